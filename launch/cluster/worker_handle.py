"""A handle on one worker process, on this machine or wherever Ray put it: what a cluster needs of one."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol


class WorkerLostError(RuntimeError):
    """A worker's process is gone; number says whose."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number, self.message = number, message

    def __reduce__(self) -> tuple[type[WorkerLostError], tuple[int, str]]:
        return type(self), (self.number, self.message)


class WorkerHandle(Protocol):
    """A worker process (`cluster/worker.py`) that answers calls one at a time, in the order in which they were made.

    number   of the worker: stays, while the rank of its process can change
    host     name of the machine
    pid      process id there
    """

    number: int
    host: str
    pid: int

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Worker.method(*args) in its process. The future has its result, what it raised, or WorkerLostError."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the process is there, as far as is known without asking it."""
        ...

    def kill(self) -> None:
        """Ends the process, however it is doing, and returns when it is gone. What it was asked then fails."""
        ...


class WorkerPool(Protocol):
    """Where workers come from: processes of this machine (spawn.py), or a Ray cluster (ray/pool.py)."""

    def open(self, number: int, deadline_s: float) -> WorkerHandle:
        """Starts a process and returns when it answers. RuntimeError, with the reason, where none can be had."""
        ...

    def close(self) -> None:
        """Ends all that was started, and returns when it is gone."""
        ...
