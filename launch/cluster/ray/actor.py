"""What runs in Ray's processes: the actor that holds a worker, and a task that ends one from beside it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import cloudpickle

from megamoe.launch.cluster.worker import Worker, WorkerInfo, WorkerOptions
from megamoe.launch.devices import device_of, device_type
from megamoe.parallel.interfaces import interface_of
from megamoe.schedule.kept import cores

GRACE_S = 1.0  # a stopped or busy process does not hear that it is to end


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """How a worker is to be set up.

    device      device type; Ray shows a process no other devices than its own, so it is the first of them
    num_workers   how many workers its node has
    threads     torch threads, None for the node's cores shared out among its workers
    """

    device: str
    num_workers: int
    threads: int | None
    deadline_s: float
    run: str | None


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
        address = str(ray.util.get_node_ip_address())
        interface = interface_of(address)
        for name in {"cpu", order.device}:  # whatever the device, what it has to say to the host goes by gloo
            os.environ.update(device_type(name).interface_setting(interface))
        self._worker = Worker(
            WorkerOptions(
                device=device_of(order.device, 0),
                address=address,
                interface=interface,
                threads=order.threads or max(1, cores() // order.num_workers),
                deadline_s=order.deadline_s,
                run=order.run,
            )
        )
        node_id = str(ray.get_runtime_context().get_node_id())
        return Occupant(self._worker.info(), address, node_id, psutil.Process().create_time(), _log())


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


def _log() -> str:
    """The file that stderr goes to; where the system does not say which, a pattern under Ray's own directory."""
    link = Path("/proc/self/fd", str(sys.stderr.fileno()))
    return str(link.readlink()) if link.exists() else f"/tmp/ray/session_latest/logs/worker-*-{os.getpid()}.err"
