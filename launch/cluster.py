"""A cluster for Python users: ranks on this machine or on Ray that hold a checkpoint's experts, and come back.

with MegaMoECluster(4, launcher="ray", policy=Policy(restarts=5)) as cluster:
    cluster.load("DeepSeek-V4-Flash")
    hidden = cluster.forward(token_ids)      # [T, H] bfloat16, the same bits however many ranks there are
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megamoe.call import CallRecord
from megamoe.launch.job import share
from megamoe.launch.lab import Host
from megamoe.launch.ray_cluster import RaySeats
from megamoe.launch.recovery import Failure, Policy, StuckError, judge
from megamoe.launch.seats import Seat, Seats
from megamoe.launch.spawn import SpawnSeat, SpawnSeats
from megamoe.launch.worker import Load, LoadReport, Meeting
from megamoe.waves import Waves

LAUNCHERS = ("ray", "spawn")
_ANSWER_S = 15.0  # beyond the deadline: for a rank to say what it knows, for a process to be taken down
_START_S = 120.0


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to the group. at_s: seconds since the cluster started; kind: "formed", "failed", "replaced",
    "out", "back" or "resized"."""

    at_s: float
    kind: str
    what: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RankHealth:
    """One rank: where its process is, whether it is there, and where it says that it is."""

    rank: int
    seat: int
    host: str
    pid: int
    alive: bool
    position: str


@dataclass(slots=True)
class Starting:
    """Seconds that starting took: the launcher's own part (a Ray cluster and room in it), processes, group, weights."""

    launcher_s: float = 0.0
    processes_s: float = 0.0
    group_s: float = 0.0
    load_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class MegaMoECluster:
    """ranks workers in one expert-parallel group; a context manager.

    launcher     "ray" or "spawn" (processes of this machine)
    address      of a running Ray cluster; None joins this machine's, or starts one
    device       "cpu", "cuda" or "npu"
    deadline_s   bound on every wait of a rank; a batch as a whole has batch_deadline_s, by default 20 times that
    threads      torch threads of a rank
    interface    network interface of spawned ranks; hosts places them in a lab instead
    run          id under which `megamoe doctor --run` finds the ranks
    log_dir      where each rank's output is kept
    policy       whether and how the group comes back when a rank is lost; by default it does not
    on_event     called with every Event
    seats        where processes come from, in place of what launcher says
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
        log_dir: Path | None = None,
        policy: Policy | None = None,
        on_event: Callable[[Event], None] = lambda _: None,
        seats: Seats | None = None,
    ) -> None:
        if ranks < 1:
            raise ValueError(f"ranks must be positive, got {ranks}")
        if launcher not in LAUNCHERS:
            raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
        self.policy = policy or Policy()
        least, most = self.policy.elastic or (ranks, ranks)
        if not least <= ranks <= most:
            raise ValueError(f"ranks {ranks} is outside of elastic {least}:{most}")
        self.launcher = launcher
        self.most, self._wanted, self._deadline_s = most, ranks, deadline_s
        self._batch_deadline_s = batch_deadline_s or 20 * deadline_s
        if seats is not None:
            self._seats = seats
        elif launcher == "ray":
            self._seats = RaySeats(
                most, address=address, device=device, deadline_s=deadline_s, threads=threads, run=run, log_dir=log_dir
            )
        else:
            self._seats = SpawnSeats(
                most,
                device=device,
                deadline_s=deadline_s,
                threads=threads,
                interface=interface,
                hosts=hosts,
                run=run,
                log_dir=log_dir,
            )
        self._on_event = on_event
        self._members: dict[int, Seat] = {}  # by number of the seat
        self._returning: dict[int, tuple[float, Future[Seat] | None]] = {}  # seats that are out: when to try, the try
        self._opener = ThreadPoolExecutor(max_workers=1, thread_name_prefix="megamoe opener")
        self._generation = self._restarts = self._in_a_row = 0
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the ranks and has them meet. RuntimeError, with the reason, where one cannot be had or none answers."""
        self._begun = time.monotonic()
        try:
            if isinstance(self._seats, RaySeats):
                self._seats.place()
            self.starting.launcher_s = time.monotonic() - self._begun
            opened = time.monotonic()
            self._open(range(self._wanted))
            self.starting.processes_s = time.monotonic() - opened
            met = time.monotonic()
            self._insist(self._form)
            self.starting.group_s = time.monotonic() - met
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends everything that was started."""
        self._opener.shutdown(wait=False, cancel_futures=True)
        self._members = {}
        self._seats.close()

    @property
    def ranks(self) -> int:
        """How many there are now."""
        return len(self._members)

    @property
    def members(self) -> list[Seat]:
        """Seats in order of rank."""
        return [self._members[number] for number in sorted(self._members)]

    # ---- work ----

    def load(
        self, checkpoint: Path | str, *, waves: Waves = "auto", dispatch_format: str = "mxfp8"
    ) -> list[LoadReport]:
        """Every rank reads its own experts, and what every rank needs. ValueError for what is no such checkpoint."""
        begun = time.monotonic()
        self._load = None
        load = Load(Path(checkpoint), waves, dispatch_format)
        reports: list[LoadReport] = self._insist(lambda: self._all("load", [(load,)] * self.ranks))
        self._load, self.loads = load, reports
        self.starting.load_s = time.monotonic() - begun
        return reports

    def forward(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """A batch, spread over the ranks: token_ids [T] -> hidden [T, H] bfloat16.

        Where a rank is lost and the policy allows it, the group comes back and the batch is run again; else PeerError
        (a rank that others lost, by name), SeatLostError or what the rank itself raised.
        """
        if self._load is None:
            raise ValueError("no checkpoint is loaded: load() comes before forward()")
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        self._take_back()

        def attempt() -> list[tuple[Tensor, CallRecord]]:
            size = self.ranks
            done: list[tuple[Tensor, CallRecord]] = self._all(
                "forward", [(share(ids, rank, size),) for rank in range(size)]
            )
            return done

        done = self._insist(attempt)
        self.last_calls = [record for _, record in done]
        return torch.cat([hidden for hidden, _ in done])

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """work(group, *args) on every rank, results in order of rank. Runs again where the group had to come back."""
        return self._insist(lambda: self._all("run", [(work, *args)] * self.ranks))

    def health(self, timeout_s: float = 2.0) -> list[RankHealth]:
        """Every rank between batches; one that does not answer in time says so."""
        asked = [(seat, seat.call("position") if seat.alive else None) for seat in self.members]
        wait([future for _, future in asked if future], timeout=timeout_s)
        return [
            RankHealth(rank, seat.number, seat.host, seat.pid, seat.alive, _position(future))
            for rank, (seat, future) in enumerate(asked)
        ]

    def resize(self, ranks: int) -> None:
        """Goes on with another number of ranks; experts are placed anew, and only those that move are read.

        ValueError for more than the cluster was made for.
        """
        if not 1 <= ranks <= self.most:
            raise ValueError(
                f"ranks must be in [1, {self.most}], got {ranks}: give elastic=(1, more) to have more room"
            )
        for number in sorted(self._members, reverse=True)[: max(0, self.ranks - ranks)]:
            self._members.pop(number).kill()
        self._returning.clear()
        missing = [number for number in range(self.most) if number not in self._members]
        self._open(missing[: max(0, ranks - self.ranks)])
        self._wanted = ranks
        self._tell("resized", f"{ranks} ranks")
        self._insist(self._form)

    # ---- the group ----

    def _open(self, numbers: Iterable[int]) -> None:
        """Opens seats, all at once."""
        numbers = list(numbers)
        with ThreadPoolExecutor(max(1, len(numbers))) as pool:
            opened = list(pool.map(lambda number: self._seats.open(number, self._start_s), numbers))
        self._members |= dict(zip(numbers, opened, strict=True))

    @property
    def _start_s(self) -> float:
        return max(_START_S, self._deadline_s)

    def _form(self) -> None:
        """Has all members meet in a new group, and load what they hold there."""
        self._generation += 1
        members = self.members
        for rank, seat in enumerate(members):
            if isinstance(seat, SpawnSeat):
                seat.label = f"rank {rank}"
        address, port = self._outcomes("open_store", [()], members[:1])[0]
        meetings = [Meeting(address, port, self._generation, rank, len(members)) for rank in range(len(members))]
        self._all("join", [(meeting,) for meeting in meetings])
        if self._load is not None:
            self.loads = self._all("load", [(self._load,)] * len(members))
        read = f", {sum(load.experts_read for load in self.loads)} experts read" if self._load else ""
        self._tell("formed", f"{len(members)} ranks{read}")

    def _all(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._outcomes(method, args, self.members)

    def _outcomes(self, method: str, args: Sequence[tuple[Any, ...]], members: Sequence[Seat]) -> list[Any]:
        """Results in order of rank, or _GroupError with what is to be done."""
        futures = [seat.call(method, *arguments) for seat, arguments in zip(members, args, strict=True)]
        wait(futures, timeout=self._batch_deadline_s, return_when=FIRST_EXCEPTION)
        if _failed(futures):
            wait(futures, timeout=self._deadline_s + _ANSWER_S)
        outcomes = [_outcome(future, method) for future in futures]
        failure = judge(outcomes, {rank: seat.alive for rank, seat in enumerate(members)})
        if failure is not None:
            raise _GroupError(failure, [members[rank].number for rank in failure.replace])
        return outcomes

    def _insist(self, attempt: Callable[[], Any]) -> Any:
        """attempt(), and again after every failure from which the group comes back."""
        while True:
            try:
                result = attempt()
            except _GroupError as error:
                self._tell("failed", error.failure.summary)
                self._recover(error)
                continue
            self._in_a_row = 0
            return result

    def _recover(self, error: _GroupError) -> None:
        """Replaces the seats that failed and forms the group anew; raises what there is to raise where that is over."""
        while True:
            self._in_a_row += 1
            if not error.failure.retry or self._restarts >= self.policy.restarts:
                raise error.failure.error
            self._restarts += 1
            threading.Event().wait(self.policy.wait_s(self._in_a_row))
            self._replace(error)
            try:
                self._form()
            except _GroupError as again:
                self._tell("failed", again.failure.summary)
                error = again
            else:
                return

    def _replace(self, error: _GroupError) -> None:
        """Starts the seats that failed anew; where one cannot be had and the policy is elastic, goes on without it."""
        for number in error.numbers:
            self._members.pop(number, None)
        with ThreadPoolExecutor(max(1, len(error.numbers))) as pool:
            for number, found in zip(error.numbers, pool.map(self._reopened, error.numbers), strict=True):
                if not isinstance(found, RuntimeError):
                    self._members[number] = found
                    self._tell("replaced", f"seat {number}, now process {found.pid} on {found.host}")
                    continue
                least = self.policy.elastic[0] if self.policy.elastic else self._wanted
                self._tell("out", f"seat {number} cannot be had again: {found}")
                self._returning[number] = (time.monotonic() + self.policy.retry_s, None)
                if self.most - len(self._returning) < least:
                    raise found from error.failure.error

    def _reopened(self, number: int) -> Seat | RuntimeError:
        try:
            return self._seats.open(number, self._start_s)
        except RuntimeError as refusal:
            return refusal

    def _take_back(self) -> None:
        """Between batches: tries seats that are out, never waiting for one, and takes back those that answer."""
        back = {}
        for number, (due, trying) in list(self._returning.items()):
            if trying is None and time.monotonic() >= due:
                trying = self._opener.submit(self._seats.open, number, self._start_s)
                self._returning[number] = (due, trying)
            elif trying is not None and trying.done():
                if trying.exception() is None:
                    back[number] = trying.result()
                    del self._returning[number]
                else:
                    self._returning[number] = (time.monotonic() + self.policy.retry_s, None)
        if back:
            self._members |= back
            self._tell("back", f"seats {', '.join(map(str, back))}")
            self._insist(self._form)

    def _tell(self, kind: str, what: str) -> None:
        event = Event(time.monotonic() - self._begun, kind, what)
        self.events.append(event)
        self._on_event(event)


class _GroupError(Exception):
    """Some ranks did not come to a result; numbers are their seats."""

    def __init__(self, failure: Failure, numbers: list[int]) -> None:
        super().__init__(failure.summary)
        self.failure, self.numbers = failure, numbers


def _failed(futures: Sequence[Future[Any]]) -> bool:
    return any(future.done() and future.exception() is not None for future in futures)


def _outcome(future: Future[Any], method: str) -> Any:
    if not future.done():
        return StuckError(f"a rank did not come back from {method}")
    error = future.exception()
    return error if error is not None else future.result()


def _position(future: Future[Any] | None) -> str:
    if future is None:
        return "its process is gone"
    if not future.done():
        return "does not answer"
    error = future.exception()
    return str(future.result()) if error is None else str(error)
