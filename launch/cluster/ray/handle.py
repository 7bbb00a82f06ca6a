"""A worker on Ray: an actor in its bundle as the driver sees it, from its start to its end."""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from megamoe.launch.cluster.ray.actor import Answer, Occupant, WorkerActor, WorkerOrder, end_process
from megamoe.launch.cluster.ray.placement import Placement
from megamoe.launch.cluster.worker_handle import WorkerLostError

KILL_S = 20.0  # how long a process may take to end; a node that has to start one to see to it needs a few seconds
_LOOK_S = 0.2
# what a process of Ray's has first of this package goes there whole: it would import a megamoe.py of the user's folder
cloudpickle.register_pickle_by_value(sys.modules[WorkerActor.__module__])


class RayHandle:
    """A worker in an actor. Where its process is on the driver's machine, its end is seen without asking Ray."""

    def __init__(self, actor: Any, number: int, occupant: Occupant) -> None:
        self.number, self.host, self.pid = number, occupant.worker.host, occupant.worker.pid
        self._actor, self._occupant = actor, occupant
        self._process = _process_here(occupant)
        self._lost: WorkerLostError | None = None
        self._gone = False
        self._asked: set[Future[Any]] = set()

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Worker.method(*args) in its process. The future has its result, what it raised, or WorkerLostError."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        reference = self._actor.ask.remote(method, args)
        reference.future().add_done_callback(partial(self._settle, future, reference))
        return future

    def _settle(self, future: Future[Any], _: Any, answered: Future[Answer]) -> None:
        """Hands on what came of a call. (The reference is held until then: without one Ray drops the result.)"""
        failure = answered.exception()
        if failure is None:
            answer = answered.result()
            if answer.error is None:
                future.set_result(answer.value)
            else:
                future.set_exception(_noted(answer, self.number))
        elif isinstance(failure, RayTaskError):  # the worker's own errors are answers
            why = str(failure.cause).partition("\n")[0]
            future.set_exception(RuntimeError(f"a call to rank {self.number} or its answer could not travel: {why}"))
        elif isinstance(failure, RayError):
            self._lose(failure)
            future.set_exception(self._lost)
        else:
            future.set_exception(failure)

    def _lose(self, failure: BaseException) -> None:
        self._gone = self._gone or isinstance(failure, ActorDiedError)
        who = f"rank {self.number} (process {self.pid} on {self.host})"
        self._lost = self._lost or WorkerLostError(self.number, f"{who} is gone: {reason(failure)}")

    @property
    def alive(self) -> bool:
        """Whether the process is there, as far as is known without asking it."""
        return self._lost is None and (self._process is None or _runs(self._process))

    def kill(self) -> None:
        """Ends the process, however it is doing, and returns when it is gone. What it was asked then fails.

        Of a node that went with all its processes Ray takes some seconds to say so. RuntimeError where the node is out
        of reach and the process may be there still.
        """
        self.abandon()
        if self._process is not None:
            self._gone = end_process(self.pid, self._occupant.started, KILL_S)
        elif not self._gone:
            self._gone = self._end_elsewhere()
        if not self._gone:
            raise RuntimeError(f"process {self.pid} on {self.host} could not be ended within {KILL_S:g} s")
        wait(list(self._asked), timeout=KILL_S)
        self._lost = self._lost or WorkerLostError(self.number, f"rank {self.number} was ended")

    def abandon(self) -> None:
        """Has Ray end the process, where it can, and does not wait for that."""
        ray.kill(self._actor, no_restart=True)

    def _end_elsewhere(self) -> bool:
        """Has a task beside the process end it: Ray calls an actor dead before its process is. Whether it is gone."""
        node_id = self._occupant.node_id
        task = ray.remote(end_process).options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        )
        try:
            return bool(ray.get(task.remote(self.pid, self._occupant.started, KILL_S / 2), timeout=KILL_S))
        except RayError:
            return not any(each["Alive"] and each["NodeID"] == node_id for each in ray.nodes())


def open_worker(number: int, placement: Placement, order: WorkerOrder, deadline_s: float) -> tuple[RayHandle, Occupant]:
    """Starts an actor in a worker's bundle. RuntimeError, with the reason, where none answers within deadline_s."""
    strategy = PlacementGroupSchedulingStrategy(placement.group, placement.bundle(number))
    options = {"scheduling_strategy": strategy, "max_restarts": 0, "max_task_retries": 0}
    actor = ray.remote(WorkerActor).options(**options, **_one_of(placement.resource)).remote(number)
    try:
        answer = _first_answer(actor.start.remote(order), placement, deadline_s)
        if answer.error is not None:
            raise _noted(answer, number)
    except BaseException as failure:
        ray.kill(actor, no_restart=True)
        if isinstance(failure, GetTimeoutError):
            why = placement.why_late(number)
            raise RuntimeError(f"rank {number} did not start within {deadline_s:g} s: {why}") from failure
        if isinstance(failure, Exception):
            raise RuntimeError(f"rank {number} did not start: {reason(failure)}") from failure
        raise
    return RayHandle(actor, number, answer.value), answer.value


def _first_answer(asked: Any, placement: Placement, deadline_s: float) -> Answer:
    """What an actor says when it has started. ray.get() would wait on for one whose bundle has been given back."""
    until = time.monotonic() + deadline_s
    while not ray.wait([asked], timeout=min(_LOOK_S, max(0.0, until - time.monotonic())))[0]:
        if placement.group is None:
            raise RuntimeError("its bundle has been given back")
        if time.monotonic() >= until:
            raise GetTimeoutError
    answer: Answer = ray.get(asked)
    return answer


def reason(failure: BaseException) -> str:
    """What Ray says of a failure without its advice, in one line.

    "The actor died ...\\n\\tpid: 7\\nThe actor is dead because its worker process has died. ... Some common causes ..."
    ->  "its worker process has died. ..."
    """
    text = " ".join(str(failure).split())
    for end in (" Some common causes include", " There are some potential root causes", " The task may or may not"):
        text = text.partition(end)[0]
    text = text.rpartition("The actor is dead because ")[2] or type(failure).__name__
    if "connection error code 2" in text:  # all that Ray sees of a signal
        return f"it was killed (SIGKILL, as for lack of memory) or crashed. Ray says: {text}"
    return text


def _noted(answer: Answer, number: int) -> Exception:
    """The error of an answer, with where it was raised in a note. (Python 3.10 has no notes.)"""
    assert answer.error is not None
    if hasattr(answer.error, "add_note"):
        answer.error.add_note(f"raised on rank {number}:\n{answer.trace}")
    return answer.error


def _one_of(resource: str) -> dict[str, Any]:
    """Options of an actor that takes one of a resource.    "NPU" -> {"num_cpus": 0, "resources": {"NPU": 1}}"""
    known = {"CPU": {"num_cpus": 1}, "GPU": {"num_cpus": 0, "num_gpus": 1}}
    return known.get(resource, {"num_cpus": 0, "resources": {resource: 1}})


def _process_here(occupant: Occupant) -> psutil.Process | None:
    """The process, where it is one of those that the driver sees: on its node, and not behind a Ray client."""
    if ray.util.client.ray.is_connected() or occupant.node_id != ray.get_runtime_context().get_node_id():
        return None
    try:
        process = psutil.Process(occupant.worker.pid)
        return process if abs(process.create_time() - occupant.started) < 1.0 else None
    except psutil.NoSuchProcess:  # the driver is in a container of its own, with other ids
        return None


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
