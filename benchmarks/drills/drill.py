"""One drill: ranks call a layer again and again, one of them is struck, and what the others said is judged.

At a random moment of a random wave one rank is killed, stopped, cut off, slowed, raises, or is absent. Every survivor
has to end in an error that names it within the deadline and two seconds more (three seconds where it was killed), and
nothing may be left behind. Where the ranks are, and what strikes them from outside, is a Place: see places.py.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.drills.places import PLACES, Place, lose_signals, near
from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.worker import Rendezvous
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape

SHAPE = MoEShape(hidden=512, intermediate=64, num_experts=8, topk=4)
LANES = ("linear1", "activation", "linear2")
FAULTS = ("kill", "stop", "cut", "slow", "raise", "absent")
GROUP = "group"  # all ranks are killed at once: there is nobody left to name anyone, and nothing may be left
GONE = ("kill", "stop", GROUP)  # of these a victim says nothing
CALLS = 2  # whole calls before a rank may be struck
AFTER_S, AFTER_KILL_S = 2.0, 3.0
_GONE_S = 5.0  # in which nothing may be left any more
_START_S = 180.0  # that a process may take until it answers, on a machine that is busy


class DrillError(Exception):
    """What a rank raises in the drill of that name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to whom and when: struck at the step-th product of its experts, or delay_s after all ranks call.

    place   a name in PLACES
    """

    fault: str
    ranks: int
    victim: int
    step: int
    lane: str
    delay_s: float
    deadline_s: float
    place: str = "lab"

    @classmethod
    def draw(cls, fault: str, rng: random.Random, deadline_s: float, place: str = "lab") -> Plan:
        ranks = 4 if place == "hosts" else rng.randint(2, 4)
        victim, step = rng.randrange(ranks), rng.randrange(40)
        return cls(fault, ranks, victim, step, rng.choice(LANES), rng.uniform(0.0, 0.6), deadline_s, place)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rank's calls ended: when (seconds since the epoch), in what, and whom it named."""

    at: float
    error: str
    named: int | None
    condition: str
    message: str


@dataclass(frozen=True, slots=True)
class Drill:
    """What came of one: seconds from the blow to the last survivor's error, whether the name was right everywhere."""

    plan: Plan
    took_s: float
    named: bool
    in_time: bool
    left: str
    endings: list[Ending | None]

    @property
    def hung(self) -> bool:
        """Whether a rank that should have ended never did."""
        return self.took_s == float("inf")

    @property
    def held(self) -> bool:
        return self.named and self.in_time and not self.left


def call_until_it_ends(group: EPGroup, plan: Plan, folder: Path) -> Ending | None:
    """A rank's part: calls the layer until something ends it, or once too few. None where this rank ends in peace."""
    assert group.clock is not None
    group.clock.deadline_s = plan.deadline_s  # that of meeting is longer
    torch.manual_seed(group.rank)
    tokens = 8192 // group.size
    layer = MegaMoE(SHAPE, group, weight_format="bf16", dispatch_format="bf16", waves=2)
    size, width = SHAPE.intermediate, SHAPE.hidden
    layer.load_experts(torch.randn(8, 2 * size, width) / 23, torch.randn(8, width, size) / 8)
    batch = (torch.randn(tokens, width), torch.rand(tokens, 8).topk(4).indices, torch.rand(tokens, 4))
    mine = group.rank == plan.victim
    calls = 0
    try:
        while True:
            layer(*batch)
            calls += 1
            if calls == CALLS:
                (folder / f"rank-{group.rank}").touch()
                if plan.place == "host":
                    assert near(group) == group.size - 1, "ranks of one host must share its memory here"
                if plan.place == "hosts":
                    assert layer.last_call.tokens_fetched, "a token must go to a host once here"
                if mine and plan.fault == "raise":
                    _at_step(layer, plan, folder, _raise)
                if mine and plan.fault == "cut" and plan.place != "lab":
                    _at_step(layer, plan, folder, lambda: lose_signals(group))
            if mine and plan.fault == "absent" and calls == CALLS + plan.step // 10:
                _struck(folder)
                _idle(group, 4 * plan.deadline_s)
                return None
    except PeerError as error:
        return Ending(time.time(), type(error).__name__, error.rank, error.condition, str(error))
    except DrillError as error:
        return Ending(time.time(), type(error).__name__, None, "", str(error))


def _at_step(layer: MegaMoE, plan: Plan, folder: Path, blow: Callable[[], None]) -> None:
    """Has the layer's experts strike their own rank at the step of the plan."""
    experts, lane, steps = layer.experts, plan.lane, count()
    works: Callable[..., Any] = getattr(experts, lane)

    def work(*args: Any) -> Any:
        if next(steps) == plan.step:
            _struck(folder)
            blow()
        return works(*args)

    setattr(experts, lane, work)


def _raise() -> None:
    raise DrillError("as planned")


def _struck(folder: Path) -> None:
    """Leaves word of the moment; all processes are of one machine and have one clock."""
    draft = folder / "struck.draft"
    draft.write_text(repr(time.time()))
    draft.rename(folder / "struck")


def _moment(folder: Path) -> float:
    """When the blow fell, infinity where the calls ended before it."""
    file = folder / "struck"
    return float(file.read_text()) if file.exists() else float("inf")


def _idle(group: EPGroup, seconds: float) -> None:
    """Stays in the group and calls nothing, until the others have given up."""
    _until(lambda: group.monitors[0].lost() is not None, seconds)


def _until(holds: Callable[[], object], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.002)
    return True


def open_all(pool: SpawnPool, size: int) -> list[SpawnHandle]:
    """The first workers of a pool, all at once."""
    with ThreadPoolExecutor(size) as openers:
        return list(openers.map(lambda number: pool.open(number, _START_S), range(size)))


class Field:
    """Ranks for one drill after another, each in a group of its own; what a drill did to them is made good after it."""

    def __init__(self, pool: SpawnPool, place: Place, size: int) -> None:
        self._pool, self.place, self._size = pool, place, size
        self.handles = open_all(pool, size)

    def drill(self, plan: Plan) -> Drill:
        """Of the first ranks; what is left is known only where all were killed, and once the pool is closed."""
        struck, endings = play(plan, self.place, self.handles[: plan.ranks])
        left = ""
        if plan.fault == GROUP:
            for handle in self.handles:  # those too that had no part in it: what they hold is of earlier drills
                handle.kill()  # returns when the process has been reaped
            left = left_of(self.place)
            self.handles = open_all(self._pool, self._size)
        for rank in range(plan.ranks):
            if plan.fault == "kill" and rank == plan.victim:
                self.handles[rank] = self._pool.open(rank, _START_S)
            elif plan.fault == "stop" and rank == plan.victim:
                os.kill(self.handles[rank].pid, signal.SIGCONT)
        return judge(plan, struck, endings, left)


def left_of(place: Place) -> str:
    """What is there still of processes that have been reaped: the kernel may take a moment to close what they had."""
    until = time.monotonic() + _GONE_S
    while (left := place.left()) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def on_one_field(plans: Sequence[Plan]) -> Iterator[Drill]:
    """Drills of ranks of this host, one after another on the same processes; the last one says what is left of all."""
    size = max(plan.ranks for plan in plans)
    with PLACES["host"](size) as place:
        with SpawnPool(size, deadline_s=60.0, threads=1) as pool:
            field = Field(pool, place, size)
            for plan in plans[:-1]:
                yield field.drill(plan)
            last = field.drill(plans[-1])
        yield replace(last, left=", ".join(each for each in (last.left, left_of(place)) if each))


def drill(plan: Plan) -> Drill:
    """Runs one in the place of the plan, on processes of its own, and takes everything down."""
    with PLACES[plan.place](plan.ranks) as place:
        with SpawnPool(plan.ranks, deadline_s=60.0, threads=1, hosts=place.hosts) as pool:
            struck, endings = play(plan, place, open_all(pool, plan.ranks))
        left = left_of(place)
    return judge(plan, struck, endings, left)


def play(plan: Plan, place: Place, opened: Sequence[SpawnHandle]) -> tuple[float, list[Ending | None]]:
    """Has the ranks meet and call, and strikes one: when that was, and how each ended. What was struck stays so."""
    with tempfile.TemporaryDirectory(prefix="megamoe-drill-") as temporary:
        folder = Path(temporary)
        address, port = opened[0].call("open_store").result(60.0)
        points = [Rendezvous(address, port, 1, rank, plan.ranks) for rank in range(plan.ranks)]
        for joined in [handle.call("join", point) for handle, point in zip(opened, points, strict=True)]:
            joined.result(60.0)
        asked = [handle.call("run", call_until_it_ends, plan, folder) for handle in opened]
        if not _until(lambda: len(list(folder.glob("rank-*"))) == plan.ranks or any(f.done() for f in asked), 60):
            raise RuntimeError("the ranks did not come to their calls")
        place.look([handle.pid for handle in opened])
        struck = [rank for rank in range(plan.ranks) if plan.fault == "group" or rank == plan.victim]
        others = [future for rank, future in enumerate(asked) if rank not in struck]
        until = plan.deadline_s + 20.0
        with ThreadPoolExecutor(1) as blows:
            pids = [opened[rank].pid for rank in struck]
            blow = blows.submit(_strike, plan, place, pids, folder, lambda: all(f.done() for f in others))
            wait([f for rank, f in enumerate(asked) if not (rank in struck and plan.fault in GONE)], timeout=until)
            blow.result()
        return _moment(folder), [_ending(future) for future in asked]


def _strike(plan: Plan, place: Place, pids: Sequence[int], folder: Path, over: Callable[[], bool]) -> None:
    """Does to the victim what the plan says, from outside, if it is to be done from outside."""
    blow = place.blows(plan.victim, pids).get(plan.fault)
    if blow is None:
        return
    time.sleep(plan.delay_s)
    with blow():
        _struck(folder)
        _until(over, plan.deadline_s + AFTER_S)


def _ending(future: Future[Any]) -> Ending | None:
    """None where the rank never came to an end."""
    if not future.done():
        return None
    try:
        ending: Ending | None = future.result()
    except WorkerLostError:
        return None
    return ending


def judge(plan: Plan, struck: float, endings: list[Ending | None], left: str) -> Drill:
    """What came of a drill: struck is when the blow fell, endings are by rank, left is what was left behind.

    Where the calls ended before the blow, which a deadline does that is too short for a busy machine, nothing holds.
    """
    if struck == float("inf"):
        return Drill(plan, 0.0, False, False, left, endings)
    if plan.fault == GROUP:
        return Drill(plan, 0.0, all(ending is None for ending in endings), True, left, endings)
    survivors = [rank for rank in range(plan.ranks) if rank != plan.victim or plan.fault in ("cut", "slow", "raise")]
    took = [ending.at - struck if (ending := endings[rank]) else float("inf") for rank in survivors]
    named = True
    for rank in survivors:
        ending = endings[rank]
        right: tuple[int | None, ...] = (plan.victim,)
        if rank == plan.victim and plan.fault == "raise":
            right = (None,)  # its own error
        elif rank == plan.victim and plan.ranks == 2:
            right = (0, 1)  # two ranks cannot tell which end of their link it is
        named &= ending is not None and ending.named in right
    bound = AFTER_KILL_S if plan.fault == "kill" else plan.deadline_s + AFTER_S
    if plan.fault == "slow" and plan.place == "host":  # the call that was under way may still end
        bound += plan.deadline_s
    return Drill(plan, max(took), named, max(took) <= bound, left, endings)
