"""What runs in Ray's processes: the actor that holds a worker, and a task that ends one from beside it.

It imports nothing at first that a process of Ray's has not imported already: Ray has it look for modules in the
driver's folder before anywhere else, where a user's statistics.py or torch.py may lie.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
from ray import cloudpickle

if TYPE_CHECKING:
    from megamoe.launch.cluster.worker import Worker, WorkerInfo

GRACE_S = 1.0  # a stopped or busy process does not hear that it is to end


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """How a worker is to be set up.

    device      device type; Ray shows a process no other devices than its own, so it is the first of them
    num_workers   how many workers its node has
    threads     torch threads, None for the node's cores shared out among its workers
    unsearched  the folder in which the driver is, where the driver itself does not look for modules
    """

    device: str
    num_workers: int
    threads: int | None
    deadline_s: float
    run: str | None
    unsearched: str | None = None


@dataclass(frozen=True, slots=True)
class Occupant:
    """The process of a worker.

    worker    what the worker says of itself
    address   of its node
    node_id   Ray's name for the node
    started   when the process was created, in seconds since 1970: with its id, its name for good
    log       path on its node of the file that has what it writes
    """

    worker: WorkerInfo
    address: str
    node_id: str
    started: float
    log: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call came to: a value, or an error and its traceback as text, which errors do not carry on a journey."""

    value: Any
    error: Exception | None = None
    trace: str = ""


class WorkerActor:
    """One process, one worker. Ray has calls wait for each other, and puts the actor's repr before what it writes."""

    def __init__(self, number: int) -> None:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the driver's stdout is for results alone
        self._number = number
        self._worker: Worker | None = None

    def __repr__(self) -> str:
        return f"rank {self._number}"

    def start(self, order: WorkerOrder) -> Answer:
        """Makes the worker; the answer's value is an Occupant."""
        return _answer(partial(self._start, order))

    def ask(self, method: str, args: tuple[Any, ...]) -> Answer:
        """Worker.method(*args)"""
        return _answer(partial(getattr(self._worker, method), *args))

    def _start(self, order: WorkerOrder) -> Occupant:
        sys.path[:] = [folder for folder in sys.path if folder != order.unsearched]
        # brings torch, and all modules from where the driver has them
        from megamoe.launch.cluster.ray.worker import start

        self._worker, occupant = start(order)
        return occupant


def end_process(pid: int, started: float, deadline_s: float) -> bool:
    """Ends a process of this machine that Ray has told to end; whether it is gone. Not one that has its id since.

    A process that ends by itself is no news to Ray; of one that is killed Ray writes at length.
    """
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) >= 1.0 or _ends(process, GRACE_S):
            return True
        process.kill()
        return _ends(process, deadline_s)
    except psutil.NoSuchProcess:
        return True


def _ends(process: psutil.Process, deadline_s: float) -> bool:
    try:
        process.wait(timeout=deadline_s)
    except psutil.TimeoutExpired:
        return False
    return True


def _answer(work: Callable[[], Any]) -> Answer:
    try:
        return Answer(work())
    except Exception as error:  # noqa: BLE001  handed to the driver, which raises it
        return Answer(None, _portable(error), "".join(traceback.format_exception(error)).rstrip())


def _portable(error: Exception) -> Exception:
    """The error as it can travel; one whose class does not survive the journey goes as text."""
    error.__cause__ = error.__context__ = None
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever a class's own pickling does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
