"""Fault drills in the lab: a rank killed, stopped, cut off, slowed, raising, or absent; who is named, and how soon.

    sudo .venv/bin/python benchmarks/drills.py --times 20        # needs root and iproute2; about ten seconds a drill

Ranks call a layer again and again on links of their own; at a random moment of a random wave one of them is struck.
Every survivor has to end in an error that names it within the deadline and two seconds more (three seconds where it
was killed), and nothing may be left behind. Exit code 1 where one drill does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.worker import Rendezvous
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.launch.lab import faults
from megamoe.launch.lab.namespaces import Host, lab, processes, runs
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape

SHAPE = MoEShape(hidden=512, intermediate=64, num_experts=8, topk=4)
LINK, SLOW_LINK = "1gbit", "10mbit"
LANES = ("linear1", "activation", "linear2")
FAULTS = ("kill", "stop", "cut", "slow", "raise", "absent")
CALLS = 2  # whole calls before a rank may be struck
AFTER_S, AFTER_KILL_S = 2.0, 3.0


class DrillError(Exception):
    """What a rank raises in the drill of that name."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens to whom and when: struck at the step-th product of its experts, or delay_s after all ranks call.

    What is done to a link is done to all ranks_per_host ranks of a host.
    """

    fault: str
    ranks: int
    victim: int
    step: int
    lane: str
    delay_s: float
    deadline_s: float
    ranks_per_host: int = 1

    @classmethod
    def draw(cls, fault: str, rng: random.Random, deadline_s: float) -> Plan:
        ranks = rng.randint(2, 4)
        victim, step = rng.randrange(ranks), rng.randrange(40)
        return cls(fault, ranks, victim, step, rng.choice(LANES), rng.uniform(0.0, 0.6), deadline_s)


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
                if mine and plan.fault == "raise":
                    _raise_at(layer, plan, folder)
            if mine and plan.fault == "absent" and calls == CALLS + plan.step // 10:
                _struck(folder)
                _idle(group, 4 * plan.deadline_s)
                return None
    except PeerError as error:
        return Ending(time.time(), type(error).__name__, error.rank, error.condition, str(error))
    except DrillError as error:
        return Ending(time.time(), type(error).__name__, None, "", str(error))


def _raise_at(layer: MegaMoE, plan: Plan, folder: Path) -> None:
    """Has the layer's experts raise at the step of the plan."""
    experts, lane, steps = layer.experts, plan.lane, iter(range(plan.step + 1))
    works: Callable[..., Any] = getattr(experts, lane)

    def work(*args: Any) -> Any:
        if next(steps) == plan.step:
            _struck(folder)
            raise DrillError("as planned")
        return works(*args)

    setattr(experts, lane, work)


def _struck(folder: Path) -> None:
    """Leaves word of the moment; all processes are of one machine and have one clock."""
    draft = folder / "struck.draft"
    draft.write_text(repr(time.time()))
    draft.rename(folder / "struck")


def _idle(group: EPGroup, seconds: float) -> None:
    """Stays in the group and calls nothing, until the others have given up."""
    _until(lambda: group.monitors[0].lost() is not None, seconds)


def _until(holds: Callable[[], object], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        _pause(0.002)
    return True


def _pause(seconds: float) -> None:
    """Lets others run between two looks."""
    wait([Future[None]()], timeout=seconds)


def strike(plan: Plan, hosts: Sequence[Host], pid: int, folder: Path) -> None:
    """Does to the victim what the plan says, from outside, if it is to be done from outside."""
    name = str(hosts[0].lab)
    blows: dict[str, Callable[[], object]] = {
        "kill": lambda: os.kill(pid, signal.SIGKILL),
        "stop": lambda: os.kill(pid, signal.SIGSTOP),
        "cut": lambda: faults.cut(name, plan.victim),
        "slow": lambda: faults.slow(name, plan.victim, SLOW_LINK),
    }
    if plan.fault in blows:
        _pause(plan.delay_s)
        blows[plan.fault]()
        _struck(folder)


def drill(plan: Plan) -> Drill:
    """Runs one, and takes everything down."""
    with lab(plan.ranks, LINK, ranks_per_host=plan.ranks_per_host) as hosts:
        handles = SpawnPool(plan.ranks, deadline_s=60.0, threads=1, hosts=hosts)
        try:
            with ThreadPoolExecutor(plan.ranks) as openers:
                opened = list(openers.map(lambda number: handles.open(number, 60.0), range(plan.ranks)))
            struck, endings = play(plan, hosts, opened)
        finally:
            handles.close()
        left = left_running(hosts)
    return judge(plan, struck, endings, left or _left(hosts))


def play(plan: Plan, hosts: Sequence[Host], opened: Sequence[SpawnHandle]) -> tuple[float, list[Ending | None]]:
    """Has the ranks meet and call, and strikes one: when that was, and how each ended. What was struck stays so."""
    with tempfile.TemporaryDirectory(prefix="megamoe-drill-") as place:
        folder = Path(place)
        address, port = opened[0].call("open_store").result(60.0)
        rendezvous_points = [Rendezvous(address, port, 1, rank, plan.ranks) for rank in range(plan.ranks)]
        for joined in [
            handle.call("join", rendezvous) for handle, rendezvous in zip(opened, rendezvous_points, strict=True)
        ]:
            joined.result(60.0)
        asked = [handle.call("run", call_until_it_ends, plan, folder) for handle in opened]
        if not _until(lambda: len(list(folder.glob("rank-*"))) == plan.ranks or any(f.done() for f in asked), 60):
            raise RuntimeError("the ranks did not come to their calls")
        strike(plan, hosts, opened[plan.victim].pid, folder)
        survivors = [f for rank, f in enumerate(asked) if not (rank == plan.victim and plan.fault in ("kill", "stop"))]
        wait(survivors, timeout=plan.deadline_s + 20.0)
        return float((folder / "struck").read_text()), [_ending(future) for future in asked]


def left_running(hosts: Sequence[Host]) -> str:
    """Processes that the hosts hold still; "" where there are none."""
    left = [pid for host in hosts for pid in processes(host.namespace or "")]
    return f"processes {left}" if left else ""


def _left(hosts: Sequence[Host]) -> str:
    return "the lab" if hosts[0].lab in runs() else ""


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
    """What came of a drill: struck is when the blow fell, endings are by rank, left is what was left behind."""
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
    return Drill(plan, max(took), named, max(took) <= bound, left, endings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="drills of each kind")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which kinds")
    parser.add_argument("--deadline-s", type=float, default=1.5, help="deadline of the ranks' waits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranks-per-host", type=int, default=1, help="ranks that share a host, of 4; links are then left as they are"
    )
    parser.add_argument("--json", type=Path, help="where every drill is written, in full")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    done: list[Drill] = []
    print(f"{'fault':8} {'drills':>6} {'in time':>7} {'named':>6} {'clean':>6} {'median s':>9} {'worst s':>8}")
    shared = options.ranks_per_host > 1
    for fault in options.faults.split(","):
        if shared and fault in ("cut", "slow"):
            continue
        these = []
        for number in range(options.times):
            plan = Plan.draw(fault, rng, options.deadline_s)
            if shared:
                plan = replace(plan, ranks=4, ranks_per_host=options.ranks_per_host)
            these.append(drill(plan))
            if not these[-1].held:
                print(f"{fault} {number}: {json.dumps(asdict(these[-1]), indent=1)}", file=sys.stderr, flush=True)
        done += these
        in_time, named, clean = (sum(map(test, these)) for test in (_in_time, _named, _clean))
        took = [each.took_s for each in these]
        print(
            f"{fault:8} {len(these):6} {in_time:7} {named:6} {clean:6} {median(took):9.2f} {max(took):8.2f}", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in done], indent=1))
    held = sum(each.held for each in done)
    print(f"{held} of {len(done)} drills held; deadline {options.deadline_s:g} s")
    return 0 if held == len(done) else 1


def _in_time(drill: Drill) -> bool:
    return drill.in_time


def _named(drill: Drill) -> bool:
    return drill.named


def _clean(drill: Drill) -> bool:
    return not drill.left


if __name__ == "__main__":
    sys.exit(main())
