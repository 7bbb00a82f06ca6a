"""A thread that waits in place of another, which may leave it alone with that when a peer is gone.

gloo tells those that wait for a message of a connection which has ended, but not those that wait for one to leave: they
wait until the deadline, whoever closed the connection.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable

_SLICE_S = 0.01


class BrokenOffError(RuntimeError):
    """A wait was left, since what it waits for will not come."""

    def __init__(self) -> None:
        super().__init__("the wait was broken off")


class Wait:
    """A call on a waiter's thread, and what became of it.

    error   what it raised, once it has ended
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.error: BaseException | None = None
        self._pending = threading.Lock()  # a bare lock: the thread holds Python's own for as short as can be
        self._pending.acquire()

    def run(self) -> None:
        """Makes the call, in the waiter's thread."""
        try:
            self._call()
        except BaseException as error:  # noqa: BLE001  raised by result(), in the thread that asks
            self.error = error
        self._pending.release()

    def within(self, seconds: float | None = None) -> bool:
        """Whether the call ends in time; None waits until it has."""
        ended = self._pending.acquire(timeout=-1 if seconds is None else max(0.0, seconds))
        if ended:
            self._pending.release()
        return ended

    def result(self) -> None:
        """Returns when the call has ended, or raises what it raised."""
        self.within()
        if self.error is not None:
            raise self.error


class Waiter:
    """A thread that makes calls one after the other. It begins with the first, and ends with its owner."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waits: queue.SimpleQueue[Wait | None] | None = None

    def begin(self, call: Callable[[], object]) -> Wait:
        """Has the thread make a call, after those that it was given before."""
        if self._waits is None:
            self._waits = queue.SimpleQueue()
            # a daemon: an interrupted program need not wait for what does not come
            threading.Thread(target=_run, args=(self._waits,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._waits.put, None)
        asked = Wait(call)
        self._waits.put(asked)
        return asked

    def wait(self, wait: Callable[[], object], is_over: Callable[[], bool]) -> None:
        """Returns when the wait does, and raises what it raises; BrokenOffError soon after is_over() holds."""
        asked = self.begin(wait)
        while not asked.within(_SLICE_S):
            if is_over():
                raise BrokenOffError
        asked.result()


def _run(waits: queue.SimpleQueue[Wait | None]) -> None:
    while (asked := waits.get()) is not None:
        asked.run()
        del asked  # and with it what it waited for, its owner among that
