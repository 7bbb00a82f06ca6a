"""A cluster for Python users: ranks on this machine or on Ray that hold a checkpoint's experts, and come back.

with MegaMoECluster(4, launcher="ray", policy=RestartPolicy(restarts=5)) as cluster:
    cluster.load("DeepSeek-V4-Flash")
    hidden = cluster.forward(token_ids)      # [T, H] bfloat16, the same bits however many ranks there are
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import wraps
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from megamoe.catalog.wording import plural
from megamoe.execution.journeys import CallRecord
from megamoe.launch.cluster.job import share
from megamoe.launch.cluster.membership import Membership, RankHealth
from megamoe.launch.cluster.ray.pool import RayPool
from megamoe.launch.cluster.recovery import Failure, RestartPolicy, collect, judge
from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.worker import Load, LoadReport, Rendezvous
from megamoe.launch.cluster.worker_handle import WorkerHandle, WorkerPool
from megamoe.launch.lab.namespaces import Host
from megamoe.launch.requests import IMPORTABLE, check_count, check_seconds, check_tokens, check_work
from megamoe.parallel.health.runs import sweep
from megamoe.paths import AnyPath, lasting_path_of
from megamoe.routing.waves import Waves, check_waves

if TYPE_CHECKING:
    from megamoe.launch.cluster.generation import Advance, GenerationJob

P = ParamSpec("P")
T = TypeVar("T")
LAUNCHERS = ("ray", "spawn")
_ANSWER_S = 15.0  # beyond the deadline: for a rank to say what it knows, for a process to be taken down
_START_S = 120.0
_REACH_S = 3.0  # for a connection to where the others meet


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to the group. at_s: seconds since the cluster started; kind: "formed", "failed", "replaced",
    "out", "back" or "resized"."""

    at_s: float
    kind: str
    what: str


@dataclass(slots=True)
class Starting:
    """Seconds that starting took: the launcher's own part (a Ray cluster and room in it), processes, group, weights."""

    launcher_s: float = 0.0
    processes_s: float = 0.0
    group_s: float = 0.0
    load_s: float = 0.0


def _in_turn(method: Callable[Concatenate[MegaMoECluster, P], T]) -> Callable[Concatenate[MegaMoECluster, P], T]:
    """A method of a cluster that other threads' wait for: all ranks are asked the same in the same order."""

    @wraps(method)
    def inner(self: MegaMoECluster, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._turn:
            return method(self, *args, **kwargs)

    return inner


class MegaMoECluster:
    """ranks workers in one expert-parallel group; a context manager. Threads may share it: what they ask takes turns.

    launcher     "ray" or "spawn" (processes of this machine)
    address      of a running Ray cluster; None joins this machine's, or starts one
    device       "cpu", "cuda" or "npu"
    deadline_s   bound on every wait of a rank; a batch as a whole has batch_deadline_s, by default 20 times that
    threads      torch threads of a rank
    interface    network interface of spawned ranks; hosts places them in a lab instead
    run          id under which `megamoe doctor --run` finds the ranks
    log_dir      folder in which worker-N.log keeps what each worker prints; worker N begins as rank N
    policy       whether and how the group comes back when a rank is lost; by default it does not
    on_event     called with every Event
    pool           where workers come from, in place of what launcher says
    """

    def __init__(
        self,
        ranks: int,
        *,
        launcher: str = "ray",
        address: str | None = None,
        device: str = "cpu",
        deadline_s: float = 60.0,
        batch_deadline_s: float | None = None,
        threads: int | None = None,
        interface: str | None = None,
        hosts: Sequence[Host] | None = None,
        run: str | None = None,
        log_dir: AnyPath | None = None,
        policy: RestartPolicy | None = None,
        on_event: Callable[[Event], None] = lambda _: None,
        pool: WorkerPool | None = None,
    ) -> None:
        check_count("ranks", ranks)
        check_seconds("deadline_s", deadline_s)
        check_seconds("batch_deadline_s", deadline_s if batch_deadline_s is None else batch_deadline_s)
        if launcher not in LAUNCHERS:
            raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
        unused = ("address",) if launcher == "spawn" else ("interface", "hosts")
        for name in unused:
            if {"address": address, "interface": interface, "hosts": hosts}[name] is not None:
                raise ValueError(f"{name} means nothing to launcher {launcher!r}")
        if log_dir is not None:
            log_dir = lasting_path_of(log_dir, "log_dir")
        if policy is not None and not isinstance(policy, RestartPolicy):
            raise ValueError(f"policy must be a RestartPolicy, got {type(policy).__name__}")
        self.policy = policy or RestartPolicy()
        least, most = self.policy.elastic or (ranks, ranks)
        if not least <= ranks <= most:
            raise ValueError(f"ranks {ranks} is outside of elastic {least}:{most}")
        self.launcher = launcher
        self.most, self._wanted, self._deadline_s = most, ranks, deadline_s
        self._batch_deadline_s = batch_deadline_s or 20 * deadline_s
        workers: dict[str, Any] = {"device": device, "deadline_s": deadline_s, "threads": threads}
        workers |= {"run": run, "log_dir": log_dir}
        if pool is not None:
            self._source = pool
        elif launcher == "ray":
            self._source = RayPool(most, address=address, **workers)
        else:
            self._source = SpawnPool(most, interface=interface, hosts=hosts, **workers)
        self._on_event = on_event
        self._start_s = max(_START_S, deadline_s)
        self._membership = Membership(
            self._source, most, start_s=self._start_s, retry_s=self.policy.retry_s, tell=self._tell
        )
        self._rendezvous_place = ("", 0)  # address and port, of the latest generation
        self._turn = threading.RLock()  # re-entrant, for on_event
        self._stopped = False
        self._formed = False  # whether the members are a group that can be used
        self._generation = self._restarts = 0
        self._failures: list[Exception] = []  # since the last that was done
        self._load: Load | None = None
        self.loads: list[LoadReport] = []
        self.events: list[Event] = []
        self.starting = Starting()
        self.last_calls: list[CallRecord] = []
        self._begun = time.monotonic()

    # ---- life ----

    def __enter__(self) -> MegaMoECluster:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @_in_turn
    def start(self) -> None:
        """Starts the ranks and has them meet. RuntimeError, with the reason, where one cannot be had or does not."""
        self._begun = time.monotonic()
        try:
            if isinstance(self._source, RayPool):
                self._source.place()
            self.starting.launcher_s = time.monotonic() - self._begun
            opened = time.monotonic()
            for refusal in self._membership.open(range(self._wanted), self._start_s + _ANSWER_S).values():
                raise refusal
            self.starting.processes_s = time.monotonic() - opened
            met = time.monotonic()
            self._insist(lambda: None)
            self.starting.group_s = time.monotonic() - met
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends everything that was started, and what other threads are asking."""
        self._stopped = True
        self._membership.close()
        sweep()  # ranks that are ended do not take themselves off the list of runs

    @property
    def ranks(self) -> int:
        """How many there are now."""
        return len(self.members)

    @property
    def members(self) -> list[WorkerHandle]:
        """Workers in order of rank."""
        return self._membership.members

    # ---- work ----

    @_in_turn
    def load(
        self,
        checkpoint: AnyPath,
        *,
        waves: Waves = "auto",
        dispatch_format: str = "mxfp8",
        combine_format: str = "bf16",
        whole: bool = False,
    ) -> list[LoadReport]:
        """Every rank reads its own experts, and what every rank needs. ValueError for what is no such checkpoint.

        waves, dispatch_format, combine_format   of MegaMoE
        whole   False reads the expert layers alone of a checkpoint in DeepSeek-V4's format, for forward(); True a model
                with its attention, of any family that megamoe.model.load() takes, for hidden_states()

        A rank that comes back, or another number of ranks, reads only the experts that it lacks.
        """
        begun = time.monotonic()
        self._load = None
        place = lasting_path_of(checkpoint, "checkpoint")
        check_waves(waves)
        load = Load(place, waves, dispatch_format, combine_format, whole)
        reports: list[LoadReport] = self._insist(lambda: self._all("load", [(load,)] * self.ranks))
        self._load, self.loads = load, reports
        self.starting.load_s = time.monotonic() - begun
        return reports

    @_in_turn
    def forward(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """A batch, spread over the ranks: token_ids [T] -> hidden [T, H] bfloat16.

        Where a rank is lost and the policy allows it, the group comes back and the batch is run again; else PeerError
        (a rank that others lost, by name), WorkerLostError or what the rank itself raised. ValueError, and no rank is
        asked, for what are no tokens of the checkpoint.
        """
        if self._load is None:
            raise ValueError("no checkpoint is loaded: load() comes before forward()")
        if self._load.whole:
            raise ValueError("a whole model is loaded, which takes prompts: hidden_states() runs them")
        ids = check_tokens(token_ids, self.loads[0].vocab_size)
        self._take_back()

        def attempt() -> list[tuple[Tensor, CallRecord]]:
            size = self.ranks
            return self._all("forward", [(share(ids, rank, size),) for rank in range(size)])

        done = self._insist(attempt)
        self.last_calls = [record for _, record in done]
        return torch.cat([hidden for hidden, _ in done])

    @_in_turn
    def hidden_states(self, prompts: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
        """Prompts, spread over the ranks, each through the whole model alone -> hidden [T, H] of each.

        A prompt's bits depend on neither the others nor the number of ranks. Errors as forward() has them.
        """
        if self._load is None or not self._load.whole:
            raise ValueError("no whole model is loaded: load(whole=True) comes before hidden_states()")
        ids = [check_tokens(each, self.loads[0].vocab_size) for each in prompts]
        if not all(ids):
            raise ValueError(f"prompt {[bool(each) for each in ids].index(False)} has no tokens")
        self._take_back()

        def attempt() -> list[tuple[list[Tensor], CallRecord]]:
            size = self.ranks
            shares = [ids[len(ids) * rank // size : len(ids) * (rank + 1) // size] for rank in range(size)]
            rounds = max(map(len, shares))
            return self._all("hidden_states", [(each, rounds) for each in shares])

        done = self._insist(attempt)
        self.last_calls = [record for _, record in done]
        return [hidden for found, _ in done for hidden in found]

    @_in_turn
    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """work(group, *args) on every rank, results in order of rank. Runs again where the group had to come back.

        ValueError, and no rank is asked, for what cannot be called so, or cannot be sent.
        """
        check_work(work, args)
        return self._insist(lambda: self._all("run", [(work, *args)] * self.ranks))

    @_in_turn
    def advance(self, job: GenerationJob, steps: int) -> list[Advance]:
        """The next steps of a generation on every rank, in order of rank; 0 steps only load the model.

        Where the group had to come back the job begins anew there: the same tokens come again, and then the others.
        """
        return self._insist(lambda: self._all("advance", [(job, steps)] * self.ranks))

    def health(self, timeout_s: float = 2.0) -> list[RankHealth]:
        """Every rank between batches; one that does not answer in time says so."""
        return self._membership.health(timeout_s)

    @_in_turn
    def resize(self, ranks: int) -> None:
        """Goes on with another number of ranks; experts are placed anew, and only those that move are read.

        ValueError for more than the cluster was made for; RuntimeError where a process cannot be had for a rank that
        comes, and those there were stay.
        """
        check_count("ranks", ranks, 0)
        if not 1 <= ranks <= self.most:
            raise ValueError(
                f"ranks must be in [1, {self.most}], got {ranks}: give elastic=(1, more) to have more room"
            )
        self._membership.forget_out()
        self._formed = False
        self._membership.close_pool(handle.number for handle in self.members[ranks:])
        coming = self._membership.vacant[: ranks - self.ranks]
        refusals = self._membership.open(coming, self._start_s + _ANSWER_S)
        if refusals:
            self._membership.forget_out()
            self._membership.close_pool(number for number in coming if number not in self._membership.vacant)
            raise next(iter(refusals.values()))
        self._wanted = ranks
        self._tell("resized", plural(ranks, "rank"))
        self._insist(lambda: None)

    # ---- the group ----

    def _form(self) -> None:
        """Has all members meet in a new group, and load what they hold there."""
        self._check_enough()
        self._generation += 1
        members = self.members
        for rank, handle in enumerate(members):
            if isinstance(handle, SpawnHandle):
                handle.label = f"rank {rank}"
        bound_s = self._deadline_s + _ANSWER_S
        address, port = self._rendezvous_place = self._outcomes("open_store", [()], members[:1], bound_s)[0]
        unreached = self._unreached(members)
        if unreached and self.policy.elastic:
            self._membership.put_out(unreached, f"does not reach the others at {address}")
            self._form()
            return
        if unreached:
            raise _unreached_error(unreached, address)
        points = [(Rendezvous(address, port, self._generation, rank, len(members)),) for rank in range(len(members))]
        self._outcomes("join", points, members, bound_s)
        if self._load is not None:
            self.loads = self._all("load", [(self._load,)] * len(members))
        self._formed = True
        read = f", {plural(sum(load.experts_read for load in self.loads), 'expert')} read" if self._load else ""
        self._tell("formed", f"{plural(len(members), 'rank')}{read}")

    def _unreached(self, members: Sequence[WorkerHandle]) -> list[int]:
        """Workers of those that have no way to where the others meet: of rank 0, where nobody else finds it."""
        address, port = self._rendezvous_place
        within_s = min(_REACH_S, self._deadline_s)
        asked = {handle.number: handle.call("reach", address, port, within_s) for handle in members[1:]}
        wait(asked.values(), timeout=within_s + _ANSWER_S)
        # one that died or does not answer is found out by the call that follows
        cut = [number for number, each in asked.items() if each.done() and not each.exception() and not each.result()]
        return [members[0].number] if len(cut) == len(asked) > 1 else cut

    def _all(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._outcomes(method, args, self.members, self._batch_deadline_s)

    def _outcomes(
        self, method: str, args: Sequence[tuple[Any, ...]], members: Sequence[WorkerHandle], within_s: float
    ) -> list[Any]:
        """Results in order of rank, or _GroupError with what is to be done."""
        futures: list[Future[Any]] = []
        try:
            for handle, arguments in zip(members, args, strict=True):
                futures.append(handle.call(method, *arguments))
        except (PicklingError, AttributeError, TypeError) as refusal:
            raise ValueError(
                f"what {method} is given cannot be sent to a process: {refusal}. {IMPORTABLE}"
            ) from refusal
        except BaseException:  # Ctrl-C: some ranks were asked what others were not
            self._formed = False
            raise
        outcomes = collect(futures, method, within_s=within_s, patience_s=self._deadline_s + _ANSWER_S)
        failure = judge(outcomes, {rank: handle.alive for rank, handle in enumerate(members)})
        if failure is not None:
            raise _GroupError(failure, [members[rank].number for rank in failure.replace])
        return outcomes

    def _insist(self, attempt: Callable[[], T]) -> T:
        """attempt() in a group, and again after every failure from which the group comes back."""
        while True:
            try:
                self._refuse_stopped()
                if not self._formed:
                    self._form()
                result = attempt()
            except _GroupError as error:
                self._formed = False
                self._refuse_stopped(error.failure.error)
                self._tell("failed", error.failure.summary)
                failed = error
            else:
                self._failures.clear()
                return result
            self._recover(failed)

    def _refuse_stopped(self, cause: Exception | None = None) -> None:
        if self._stopped:
            raise RuntimeError("the cluster was stopped, and starts nothing any more: make another one") from cause

    def _recover(self, failed: _GroupError) -> None:
        """Replaces the workers that failed, after a while; raises what there is to raise where that is over.

        That is the first of several failures in a row: later ones can be of ranks that did not find each other again.
        """
        error = failed.failure.error
        if not failed.failure.retry:
            raise error
        self._failures.append(error)
        if self._restarts >= self.policy.restarts:
            first = self._failures[0]
            self._failures.clear()
            raise first from (error if error is not first else None)
        self._restarts += 1
        threading.Event().wait(self.policy.wait_s(len(self._failures)))
        self._refuse_stopped(error)
        # elastic, the others need not wait for one that takes long: it is taken back when it is there
        within_s = self._deadline_s if self.policy.elastic else self._start_s + _ANSWER_S
        refusals = self._membership.open(failed.numbers, within_s)
        for handle in self.members:
            if handle.number in failed.numbers:
                self._tell("replaced", f"worker {handle.number}, now process {handle.pid} on {handle.host}")
        for refusal in refusals.values():
            self._check_enough(refusal, error)

    def _check_enough(self, refusal: RuntimeError | None = None, cause: Exception | None = None) -> None:
        """RuntimeError where fewer ranks are left than the policy allows: the refusal, if there is one."""
        least = min(self._wanted, self.policy.elastic[0]) if self.policy.elastic else self._wanted
        if self.ranks < least:
            lacking = f"{self.ranks} of at least {plural(least, 'rank')} left, the others cannot be had yet"
            raise (refusal or RuntimeError(lacking)) from cause

    def _take_back(self) -> None:
        """Between batches: has workers that are out come back, if they have a process again."""
        back = self._membership.take_back()
        handles = [handle for handle in self.members if handle.number in back]
        cut = self._unreached([self.members[0], *handles]) if back and self._rendezvous_place[0] else []
        cut = [number for number in cut if number in back]
        self._membership.put_out(
            cut, f"has a process again, but does not reach the others at {self._rendezvous_place[0]}"
        )
        back = [number for number in back if number not in cut]
        if back:
            self._formed = False
            self._tell("back", f"workers {', '.join(map(str, back))}")

    def _tell(self, kind: str, what: str) -> None:
        event = Event(time.monotonic() - self._begun, kind, what)
        self.events.append(event)
        self._on_event(event)


class _GroupError(Exception):
    """Some ranks did not come to a result; numbers are their workers."""

    def __init__(self, failure: Failure, numbers: list[int]) -> None:
        super().__init__(failure.summary)
        self.failure, self.numbers = failure, numbers


def _unreached_error(numbers: list[int], address: str) -> _GroupError:
    said = f"workers {', '.join(map(str, numbers))} do not reach the others at {address}"
    return _GroupError(Failure((), RuntimeError(said), retry=True, summary=said), numbers)
