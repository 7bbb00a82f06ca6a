"""A thread that waits in place of the call's own, for waits that nothing ends from outside.

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


class Waiter:
    """The thread begins with the first wait, and ends with its owner."""

    def __init__(self) -> None:
        self._waits: queue.SimpleQueue[_Wait | None] | None = None

    def wait(self, wait: Callable[[], object], is_over: Callable[[], bool]) -> None:
        """Returns when the wait does, and raises what it raises; BrokenOffError soon after is_over() holds."""
        if self._waits is None:
            self._waits = queue.SimpleQueue()
            # a daemon: an interrupted program need not wait for what does not leave
            threading.Thread(target=_run, args=(self._waits,), name="megamoe waiter", daemon=True).start()
            weakref.finalize(self, self._waits.put, None)
        asked = _Wait(wait)
        self._waits.put(asked)
        while not asked.ended(_SLICE_S):
            if is_over():
                raise BrokenOffError


class _Wait:
    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait
        self._error: BaseException | None = None
        self._pending = threading.Lock()
        self._pending.acquire()

    def run(self) -> None:
        try:
            self._wait()
        except BaseException as error:  # noqa: BLE001  raised by ended(), in the thread of the call
            self._error = error
        self._pending.release()

    def ended(self, within_s: float) -> bool:
        """Whether the wait ends in time; raises what it raised. Not to be called again once it has ended."""
        if not self._pending.acquire(timeout=within_s):
            return False
        if self._error is not None:
            raise self._error
        return True


def _run(waits: queue.SimpleQueue[_Wait | None]) -> None:
    while (asked := waits.get()) is not None:
        asked.run()
        del asked  # and with it what it waited for, its owner among that
