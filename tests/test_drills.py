"""One drill of each kind in the lab: who is named, how soon, what is left; benchmarks/drills.py runs more of them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import psutil
import pytest

from benchmarks.drills import FAULTS, Drill, Ending, Plan, drill, judge
from tests.test_lab import needs_lab


@needs_lab
@pytest.mark.parametrize("fault", FAULTS)
def test_every_survivor_names_the_rank_that_was_struck_within_the_deadline_and_two_seconds(fault: str) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    plan = replace(Plan.draw(fault, random.Random(fault), deadline_s=1.5), ranks=3, victim=1)
    found = drill(plan)
    assert found.held, json.dumps(asdict(found), indent=1)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


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
    ],
    ids=["a wrong name", "too late", "one hangs", "something is left", "its own error is not told", "a kill too late"],
)
def test_a_drill_that_does_not_hold_is_found_out(found: Drill) -> None:
    assert not found.held


def test_drills_that_hold() -> None:
    assert judged(PLAN, NAMED, NAMED, NAMED).held
    assert judged(replace(PLAN, fault="stop"), NAMED, None, NAMED).held
    assert judged(replace(PLAN, fault="raise"), NAMED, replace(NAMED, named=None), NAMED).held
    assert judged(replace(PLAN, ranks=2), NAMED, replace(NAMED, named=0)).held
