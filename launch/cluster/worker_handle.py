"""A seat: a place for one worker process, on this machine or wherever Ray put it; what a cluster needs of one."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol


class SeatLostError(RuntimeError):
    """The process in a seat is gone; number says which seat."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number, self.message = number, message

    def __reduce__(self) -> tuple[type[SeatLostError], tuple[int, str]]:
        return type(self), (self.number, self.message)


class Seat(Protocol):
    """A worker process (`cluster/worker.py`) that answers calls one at a time, in the order in which they were made.

    number   of the seat: stays, while the rank of who sits in it can change
    host     name of the machine
    pid      process id there
    """

    number: int
    host: str
    pid: int

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Worker.method(*args) in the seat. The future has its result, what it raised, or SeatLostError."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the process is there, as far as is known without asking it."""
        ...

    def kill(self) -> None:
        """Ends the process, however it is doing, and returns when it is gone. What it was asked then fails."""
        ...


class Seats(Protocol):
    """Where seats come from: processes of this machine (spawn.py), or a Ray cluster (ray_cluster.py)."""

    def open(self, number: int, deadline_s: float) -> Seat:
        """Starts a process and returns when it answers. RuntimeError, with the reason, where none can be had."""
        ...

    def close(self) -> None:
        """Ends all that was started, and returns when it is gone."""
        ...
