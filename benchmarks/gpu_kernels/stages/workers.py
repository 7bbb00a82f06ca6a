"""Jobs side by side in processes: one that crashes or hangs loses its job, and another process takes the next one."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from benchmarks.gpu_kernels.process import end_with, first_line

J = TypeVar("J")


@dataclass(frozen=True, slots=True)
class Done(Generic[J]):
    """A job, the seconds that it took, and what went wrong, if anything."""

    job: J
    seconds: float
    problem: str | None


class _Worker(Generic[J]):
    """A process that does one job after the other. Forked: what this process has imported, it has."""

    def __init__(self, work: Callable[[J], object]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(work, theirs, self.pipe, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        self.job: J | None = None
        self.begun = 0.0

    def begin(self, job: J) -> None:
        self.job, self.begun = job, time.monotonic()
        self.pipe.send(job)

    def take(self) -> str | None:
        """What went wrong with the job, which has ended."""
        try:
            problem: str | None = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(1.0)
            problem = f"the process ended with {self._process.exitcode}"
        return problem

    def end(self) -> None:
        self._process.kill()
        self._process.join(5.0)
        self.pipe.close()


def run_side_by_side(
    work: Callable[[J], object], jobs: Sequence[J], count: int, limit_s: float, until: float
) -> Iterator[Done[J]]:
    """work(job) of each in `count` processes, as each ends. limit_s for a job; until, in time.monotonic(), for all."""
    waiting, workers = deque(jobs), [_Worker(work) for _ in range(min(count, len(jobs)))]
    try:
        for worker in workers:
            worker.begin(waiting.popleft())
        while workers:
            now = time.monotonic()
            ends = min(until, *(worker.begun + limit_s for worker in workers))
            ready = wait([worker.pipe for worker in workers], max(0.0, ends - now))
            now = time.monotonic()
            for worker in list(workers):
                late = now >= min(until, worker.begun + limit_s)
                if worker.pipe not in ready and not late:
                    continue
                problem = worker.take() if worker.pipe in ready else f"did not end within {now - worker.begun:.0f} s"
                assert worker.job is not None
                yield Done(worker.job, round(now - worker.begun, 1), problem)
                place = workers.index(worker)
                if problem:  # a device's error stays with its process
                    worker.end()
                    worker = workers[place] = _Worker(work) if waiting else worker
                if waiting and now < until:
                    worker.begin(waiting.popleft())
                else:
                    workers.pop(place).end()
        for job in waiting:
            yield Done(job, 0.0, "no time")
    finally:
        for worker in workers:
            worker.end()


def _serve(work: Callable[[J], object], pipe: Connection[Any, Any], other: Connection[Any, Any], parent: int) -> None:
    other.close()
    end_with(parent)
    while True:
        job = pipe.recv()
        try:
            work(job)
        except Exception as error:  # noqa: BLE001
            pipe.send(first_line(error))
        else:
            pipe.send(None)
