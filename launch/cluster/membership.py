"""The workers of a cluster that have a process, and those that are out and are tried again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from megamoe.launch.cluster.worker_handle import WorkerHandle, WorkerPool


@dataclass(frozen=True, slots=True)
class RankHealth:
    """One rank: where its process is, whether it is there, and where it says that it is."""

    rank: int
    worker: int
    host: str
    pid: int
    alive: bool
    position: str


class Membership:
    """Opens workers, all at once, and never waits for longer than it is told to.

    source     where processes come from
    num_workers  workers there are at most
    start_s    how long a process may take to start
    retry_s    how long after a failed try a worker that is out is tried again
    tell       called with what happened to a worker: a kind and words
    """

    def __init__(
        self, source: WorkerPool, num_workers: int, *, start_s: float, retry_s: float, tell: Callable[[str, str], None]
    ) -> None:
        self._source, self._num_workers, self._start_s, self._retry_s = source, num_workers, start_s, retry_s
        self._tell = tell
        self._members: dict[int, WorkerHandle] = {}
        self._tries: dict[int, Future[WorkerHandle]] = {}
        self._due: dict[int, float] = {}  # workers that are out and not being tried: when to
        self._opener = ThreadPoolExecutor(num_workers, thread_name_prefix="megamoe opener")

    @property
    def members(self) -> list[WorkerHandle]:
        """Workers that have a process, in order of their numbers."""
        return [self._members[number] for number in sorted(self._members)]

    @property
    def vacant(self) -> list[int]:
        """Numbers of the workers that have none."""
        return [number for number in range(self._num_workers) if number not in self._members]

    def health(self, timeout_s: float) -> list[RankHealth]:
        """Every rank; one that does not answer within timeout_s says so."""
        asked = [(handle, handle.call("position") if handle.alive else None) for handle in self.members]
        wait([future for _, future in asked if future], timeout=timeout_s)
        return [
            RankHealth(rank, handle.number, handle.host, handle.pid, handle.alive, _position(future))
            for rank, (handle, future) in enumerate(asked)
        ]

    def open(self, numbers: Iterable[int], within_s: float) -> dict[int, RuntimeError]:
        """Starts processes of workers, in place of those that they have; the workers that are out now, and why.

        One that takes longer than within_s is out until it is there.
        """
        numbers = list(numbers)
        for number in numbers:
            self._members.pop(number, None)
            self._try(number)
        wait([self._tries[number] for number in numbers], timeout=within_s)
        refusals = {}
        for number in numbers:
            if not self._tries[number].done():
                refusals[number] = RuntimeError(f"worker {number} has no process after {within_s:g} s")
            elif (refusal := self._take(number)) is not None:
                refusals[number] = refusal
        for number, refusal in refusals.items():
            self._tell("out", f"worker {number} cannot be had: {refusal}")
        return refusals

    def take_back(self) -> list[int]:
        """Tries workers that are out, without waiting; those that have a process again since the last time."""
        for number, due in list(self._due.items()):
            if time.monotonic() >= due:
                self._try(number)
        return [number for number in list(self._tries) if self._tries[number].done() and self._take(number) is None]

    def put_out(self, numbers: Iterable[int], why: str) -> None:
        """Ends their processes; the workers are out, and tried again later."""
        numbers = list(numbers)
        self.close_pool(numbers)
        for number in numbers:
            self._due[number] = time.monotonic() + self._retry_s
            self._tell("out", f"worker {number} {why}")

    def close_pool(self, numbers: Iterable[int]) -> None:
        """Ends their processes, and returns when they are gone."""
        for handle in [self._members.pop(number) for number in numbers]:
            handle.kill()

    def forget_out(self) -> None:
        """No worker is out any more: none is tried again. Waits for those that are being tried, as a start takes.

        Those that have a process by then are members.
        """
        wait(list(self._tries.values()))
        for number in list(self._tries):
            self._take(number)
        self._due.clear()

    def close(self) -> None:
        """Ends everything that was started."""
        self._opener.shutdown(wait=False, cancel_futures=True)
        self._members.clear()
        self._source.close()

    def _try(self, number: int) -> None:
        self._due.pop(number, None)
        if number not in self._tries:
            self._tries[number] = self._opener.submit(self._source.open, number, self._start_s)

    def _take(self, number: int) -> RuntimeError | None:
        """What a try that has ended came to: a member, or when to try again and why it failed."""
        trying = self._tries.pop(number)
        refusal = trying.exception()
        if refusal is None:
            self._members[number] = trying.result()
            return None
        if not isinstance(refusal, RuntimeError):
            raise refusal
        self._due[number] = time.monotonic() + self._retry_s
        return refusal


def _position(future: Future[Any] | None) -> str:
    if future is None:
        return "its process is gone"
    if not future.done():
        return "does not answer"
    error = future.exception()
    return str(future.result()) if error is None else str(error)
