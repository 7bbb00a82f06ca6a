"""One drill of each kind in the lab: who is named, how soon, what is left; benchmarks/drills.py runs more of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from benchmarks.drills.drill import FAULTS, Drill, Ending, Plan, drill, judge, left_of, play
from benchmarks.drills.places import LINK, LabPlace
from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.lab import faults
from megamoe.launch.lab.namespaces import Host, lab, runs
from tests.processes import started
from tests.test_lab import needs_lab


def plan_of(fault: str) -> Plan:
    return replace(Plan.draw(fault, random.Random(fault), deadline_s=1.5), ranks=3, victim=1)


@needs_lab
def test_every_survivor_names_the_rank_that_was_killed_and_nothing_is_left() -> None:
    before = started()
    found = drill(plan_of("kill"))
    assert found.held, json.dumps(asdict(found), indent=1)
    assert started() <= before


@needs_lab
def test_a_rank_that_is_killed_is_named_on_its_host_and_on_the_other() -> None:
    before = started()
    found = drill(replace(plan_of("kill"), ranks=4, place="hosts"))
    assert found.held, json.dumps(asdict(found), indent=1)
    assert started() <= before


@pytest.fixture(scope="module")
def field() -> Iterator[tuple[list[Host], list[SpawnHandle]]]:
    """Three ranks in a lab, for one drill after another; nothing of them is left."""
    before = started()
    with lab(3, LINK) as hosts:
        with SpawnPool(3, deadline_s=60.0, threads=1, hosts=hosts) as handles, ThreadPoolExecutor(3) as openers:
            yield hosts, list(openers.map(lambda number: handles.open(number, 60.0), range(3)))
        assert not LabPlace(hosts).left()
    assert hosts[0].lab not in runs()
    assert started() <= before


@needs_lab
# the one that is stopped does not come back
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - {"kill"}, key=lambda fault: (fault == "stop", fault)))
def test_every_survivor_names_the_rank_that_was_struck_within_the_deadline_and_two_seconds(
    field: tuple[list[Host], list[SpawnHandle]], fault: str
) -> None:
    hosts, handles = field
    plan = plan_of(fault)
    found = judge(plan, *play(plan, LabPlace(hosts), handles), left="")
    faults.heal(str(hosts[0].lab), plan.victim)
    assert found.held, json.dumps(asdict(found), indent=1)


class Slow(LabPlace):
    """Has something left for the first looks."""

    def __init__(self, looks: int) -> None:
        super().__init__([])
        self.looks = looks

    def left(self) -> str:
        self.looks -= 1
        return "sockets ['7']" if self.looks >= 0 else ""


def test_what_the_kernel_closes_a_moment_later_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not left_of(Slow(0))
    assert not left_of(Slow(3))
    monkeypatch.setattr("benchmarks.drills.drill._GONE_S", 0.0)
    assert left_of(Slow(3)) == "sockets ['7']"


PLAN = Plan("cut", 3, 1, 0, "linear1", 0.0, 1.5)
NAMED = Ending(101.0, "PeerError", 1, "unreachable", "")


def judged(plan: Plan, *endings: Ending | None, left: str = "") -> Drill:
    return judge(plan, 100.0, list(endings), left)


@pytest.mark.parametrize(
    "found",
    [
        judged(PLAN, NAMED, NAMED, replace(NAMED, named=0)),
        judged(PLAN, NAMED, NAMED, replace(NAMED, at=103.6)),
        judged(PLAN, NAMED, NAMED, None),
        judged(PLAN, NAMED, NAMED, NAMED, left="processes [7]"),
        judged(replace(PLAN, fault="raise"), NAMED, NAMED, NAMED),
        judged(replace(PLAN, fault="kill", deadline_s=9.0), replace(NAMED, at=103.1), None, NAMED),
        judge(PLAN, float("inf"), [NAMED, NAMED, NAMED], ""),
    ],
    ids=[
        *("a wrong name", "too late", "one hangs", "something is left", "its own error is not told", "a kill too late"),
        "the calls ended before the blow",
    ],
)
def test_a_drill_that_does_not_hold_is_found_out(found: Drill) -> None:
    assert not found.held


def test_drills_that_hold() -> None:
    assert judged(PLAN, NAMED, NAMED, NAMED).held
    assert judged(replace(PLAN, fault="stop"), NAMED, None, NAMED).held
    assert judged(replace(PLAN, fault="raise"), NAMED, replace(NAMED, named=None), NAMED).held
    assert judged(replace(PLAN, ranks=2), NAMED, replace(NAMED, named=0)).held
