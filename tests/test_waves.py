"""Placement, waves and the schedule as pure functions: nothing is lost, nothing is done twice, order is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.parallel.placement import Placement
from megamoe.routing.waves import (
    AUTO_MESSAGE_BYTES,
    WavePlan,
    _rounded,
    auto_waves,
    check_waves,
    plan_waves,
)
from megamoe.schedule.cost_model import MAX_AUTO_WAVES
from megamoe.schedule.schedule import Load, Step, _cover, _overlap, schedule

examples = settings(max_examples=300, deadline=None, derandomize=True)
placements = st.builds(Placement, st.integers(1, 40), st.integers(1, 9))
wave_choices = st.one_of(st.integers(1, 12), st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple))
plans = st.builds(plan_waves, placements, wave_choices)


@st.composite
def loads(draw: st.DrawFn) -> tuple[WavePlan, int, Load]:
    """A plan, one of its ranks, and what that rank has to compute"""
    plan = draw(plans)
    rank = draw(st.integers(0, plan.placement.ep_size - 1))
    rows = st.one_of(st.just(0), st.integers(0, 400))
    num_local = len(plan.placement.experts(rank))
    load = Load(
        local=draw(st.lists(rows, min_size=num_local, max_size=num_local)),
        arriving=draw(st.lists(rows, min_size=plan.num_waves, max_size=plan.num_waves)),
        dispatch_cost=draw(st.floats(0, 3)),
        combine_cost=draw(st.floats(0, 3)),
        decode_cost=draw(st.sampled_from((0.0, 10.0, 90.0, 1e9))),
    )
    return plan, rank, load


# ---- placement ----


@given(placements)
@examples
def test_every_expert_has_one_rank_in_order_and_shares_differ_by_at_most_one(placement: Placement) -> None:
    runs = [placement.experts(rank) for rank in range(placement.ep_size)]
    assert [expert for run in runs for expert in run] == list(range(placement.num_experts))
    sizes = [len(run) for run in runs]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert placement.most == max(sizes)


def test_placement_of_its_docstring() -> None:
    assert [Placement(10, 4).experts(rank) for rank in range(4)] == [range(3), range(3, 6), range(6, 8), range(8, 10)]
    assert [list(Placement(2, 3).experts(rank)) for rank in range(3)] == [[0], [1], []]


@pytest.mark.parametrize(("num_experts", "ep_size"), [(0, 1), (4, 0), (-1, 2)])
def test_placement_refuses_sizes_that_are_not_positive(num_experts: int, ep_size: int) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"num_experts {num_experts} and ep_size {ep_size} must be positive")
    ):
        Placement(num_experts, ep_size)


# ---- the plan ----


@given(plans)
@examples
def test_every_expert_is_in_exactly_one_wave_of_its_own_rank(plan: WavePlan) -> None:
    for rank in range(plan.placement.ep_size):
        waves = [plan.experts(rank, wave) for wave in range(plan.num_waves)]
        assert [expert for wave in waves for expert in wave] == list(plan.placement.experts(rank))
        assert all(a.stop == b.start for a, b in pairwise(waves))  # contiguous, the empty ones too


@given(placements, wave_choices)
@examples
def test_all_ranks_have_as_many_waves_as_were_asked_for(placement: Placement, waves: int | tuple[int, ...]) -> None:
    plan = plan_waves(placement, waves)
    asked = waves if isinstance(waves, int) else len(waves)
    assert plan.num_waves == asked
    assert [len(bounds) for bounds in plan.bounds] == [asked + 1] * placement.ep_size


@given(plans)
@examples
def test_rows_travel_by_wave_then_rank_then_id(plan: WavePlan) -> None:
    home = {e: (w, r) for r in range(plan.placement.ep_size) for w in range(plan.num_waves) for e in plan.experts(r, w)}
    order = plan.order()
    assert sorted(order) == list(range(plan.placement.num_experts))
    assert order == sorted(order, key=lambda expert: (home[expert], expert))


@given(placements, st.integers(1, 12))
@examples
def test_equal_waves_differ_by_at_most_one_expert(placement: Placement, waves: int) -> None:
    plan = plan_waves(placement, waves)
    for rank in range(placement.ep_size):
        sizes = [len(plan.experts(rank, wave)) for wave in range(waves)]
        assert max(sizes) - min(sizes) <= 1


@given(placements, wave_choices.filter(lambda waves: not isinstance(waves, int)), st.integers(2, 7))
@examples
def test_only_the_ratio_of_uneven_waves_counts(placement: Placement, waves: tuple[int, ...], factor: int) -> None:
    assert plan_waves(placement, waves) == plan_waves(placement, tuple(size * factor for size in waves))


@pytest.mark.parametrize(("waves", "sizes"), [(2, [3, 2]), ((1, 3), [1, 4]), (1, [5]), (5, [1] * 5)], ids=str)
def test_five_experts_are_cut_as_the_docstring_says(waves: int | tuple[int, ...], sizes: list[int]) -> None:
    plan = plan_waves(Placement(5, 1), waves)
    assert [len(plan.experts(0, wave)) for wave in range(plan.num_waves)] == sizes


def test_more_waves_than_experts_leave_some_empty() -> None:
    sizes = [len(plan_waves(Placement(5, 1), 7).experts(0, wave)) for wave in range(7)]
    assert sorted(sizes) == [0, 0, 1, 1, 1, 1, 1]


def test_order_of_the_docstring() -> None:
    assert plan_waves(Placement(4, 2), 2).order() == [0, 2, 1, 3]


def test_fractions_are_rounded_half_up() -> None:
    assert _rounded(5, 2) == 3
    assert _rounded(5, 4) == 1
    assert [_rounded(n, 4) for n in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]


# ---- what a user may ask for ----


@pytest.mark.parametrize("waves", ["auto", 1, 8, [3], (1, 2), [1, 1, 5]], ids=str)
def test_check_waves_takes_auto_counts_and_relative_sizes(waves: int | str | Sequence[int]) -> None:
    checked = check_waves(waves)
    assert checked == (tuple(waves) if isinstance(waves, list) else waves)


@pytest.mark.parametrize(
    "waves", [0, -1, True, 1.0, "two", "", [], (), (1, 0), (2, -1), (1, True), (1, 2.0), None], ids=repr
)
def test_check_waves_refuses_anything_else_and_names_it(waves: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {waves!r}")):
        check_waves(waves)


# ---- waves="auto" ----


def test_auto_waves_of_its_docstring() -> None:
    assert int(8192 * 1060 / 2 / AUTO_MESSAGE_BYTES) == 16
    assert auto_waves(Placement(16, 2), 8192, 1060) == 8
    assert auto_waves(Placement(16, 2), 4, 1060) == 1


@given(placements, st.integers(0, 100_000), st.integers(36, 15_000))
@examples
def test_auto_waves_keeps_the_message_size_between_one_and_eight(
    placement: Placement, rows: int, row_bytes: int
) -> None:
    waves = auto_waves(placement, rows, row_bytes)
    assert 1 <= waves <= min(MAX_AUTO_WAVES, placement.most)
    to_one_peer = rows * row_bytes / placement.ep_size
    if waves > 1:
        assert to_one_peer / waves >= AUTO_MESSAGE_BYTES
    if waves < min(MAX_AUTO_WAVES, placement.most) and placement.ep_size > 1:
        assert to_one_peer / (waves + 1) < AUTO_MESSAGE_BYTES


def test_auto_waves_is_one_where_a_rank_is_alone() -> None:
    assert auto_waves(Placement(16, 1), 1_000_000, 1060) == 1


# ---- the schedule ----


@given(loads())
@examples
def test_every_rank_local_expert_is_computed_exactly_once(case: tuple[WavePlan, int, Load]) -> None:
    plan, rank, load = case
    steps = schedule(plan.waves(rank), load)
    assert sorted(e for step in steps for e in step.local) == list(plan.placement.experts(rank))
    for step in steps:
        experts = plan.experts(rank, step.wave)
        assert set(step.local) <= set(experts)
        # pipeline.py takes the ends of an empty range as indices
        ids = plan.placement.experts(rank)
        assert ids.start <= step.local.start <= step.local.stop <= ids.stop


@given(loads())
@examples
def test_every_wave_arrives_exactly_once_in_ascending_order(case: tuple[WavePlan, int, Load]) -> None:
    plan, rank, load = case
    assert [step.wave for step in schedule(plan.waves(rank), load) if step.arrived] == list(range(plan.num_waves))


@given(loads())
@examples
def test_head_is_before_the_first_arrival_and_tail_after_the_last(case: tuple[WavePlan, int, Load]) -> None:
    plan, rank, load = case
    steps = schedule(plan.waves(rank), load)
    arrived = [index for index, step in enumerate(steps) if step.arrived]
    assert arrived == list(range(arrived[0], arrived[-1] + 1))  # nothing comes between two waves
    head, tail = steps[: arrived[0]], steps[arrived[-1] + 1 :]
    assert all(step.local for step in (*head, *tail))
    ids = plan.placement.experts(rank)
    taken = [e for step in head for e in step.local]
    assert taken == list(range(ids.start, ids.start + len(taken)))  # from the first expert on
    left = [e for step in tail for e in step.local]
    assert left == list(range(ids.stop - len(left), ids.stop))  # up to the last


@given(loads())
@examples
def test_head_and_tail_stop_when_the_next_expert_would_gain_nothing(case: tuple[WavePlan, int, Load]) -> None:
    plan, rank, load = case
    steps = schedule(plan.waves(rank), load)
    first = next(index for index, step in enumerate(steps) if step.arrived)
    arrivals = [rows for rows in load.arriving if rows]
    ends = (
        (steps[:first], list(load.local), [rows * load.dispatch_cost for rows in arrivals[:1]]),
        (steps[first + plan.num_waves :], list(load.local)[::-1], [rows * load.combine_cost for rows in arrivals[-1:]]),
    )
    for taken, rows, needed in ends:
        count = sum(len(step.local) for step in taken)
        if not needed:
            assert count == 0
            continue
        covered = [sum(r + load.decode_cost for r in rows[:n] if r) for n in range(count + 1)]
        assert all(needed[0] - before > load.decode_cost for before in covered[:-1])


@given(loads())
@examples
def test_there_is_no_head_and_no_tail_where_nothing_arrives_from_other_ranks(case: tuple[WavePlan, int, Load]) -> None:
    plan, rank, load = case
    alone = Load(load.local, [0] * plan.num_waves, load.dispatch_cost, load.combine_cost, load.decode_cost)
    assert schedule(plan.waves(rank), alone) == [Step(w, plan.experts(rank, w), True) for w in range(plan.num_waves)]


@given(loads())
@examples
def test_there_is_no_head_and_no_tail_where_decoding_twice_costs_more(case: tuple[WavePlan, int, Load]) -> None:
    plan, rank, load = case
    costly = Load(load.local, load.arriving, load.dispatch_cost, load.combine_cost, decode_cost=1200.0)  # 400 rows x 3
    assert schedule(plan.waves(rank), costly) == [Step(w, plan.experts(rank, w), True) for w in range(plan.num_waves)]


def test_a_schedule_by_hand() -> None:
    plan = plan_waves(Placement(12, 2), 3)  # rank 1: [6, 7] [8, 9] [10, 11]
    load = Load([100] * 6, [200, 0, 100], dispatch_cost=0.75, combine_cost=1.5, decode_cost=20)
    assert schedule(plan.waves(1), load) == [
        Step(0, range(6, 8), False),  # 150 to cover: 120, then 30 are left, more than 20
        Step(0, range(8, 8), True),
        Step(1, range(8, 10), True),
        Step(2, range(10, 10), True),
        Step(2, range(10, 12), False),  # 150 to cover
    ]


def test_what_the_head_took_is_not_taken_by_the_tail() -> None:
    plan = plan_waves(Placement(4, 2), 1)
    load = Load([10, 10], [1000], dispatch_cost=1, combine_cost=1, decode_cost=0)
    assert schedule(plan.waves(0), load) == [Step(0, range(2), False), Step(0, range(2, 2), True)]


def test_a_head_over_several_waves_is_a_step_for_each() -> None:
    plan = plan_waves(Placement(4, 1), 4)
    load = Load([10, 10, 10, 10], [25, 0, 0, 0], dispatch_cost=1, combine_cost=0, decode_cost=0)
    head = [step for step in schedule(plan.waves(0), load) if not step.arrived]
    assert head == [Step(wave, range(wave, wave + 1), False) for wave in range(3)]


def test_there_is_no_head_and_no_tail_that_takes_longer_to_begin_than_to_wait() -> None:
    plan = plan_waves(Placement(4, 2), 1)
    load = Load([10, 10], [100], dispatch_cost=0.1, combine_cost=0.2, decode_cost=0, step_cost=15)
    assert schedule(plan.waves(0), load) == [Step(0, range(0), True), Step(0, range(2), False)]
    longer = Load([10, 10], [100], dispatch_cost=0.1, combine_cost=0.2, decode_cost=0, step_cost=20)
    assert schedule(plan.waves(0), longer) == [Step(0, range(2), True)]


def test_cover_of_its_docstring() -> None:
    assert _cover([300, 300, 300], 50, 500) == 2
    assert _cover([300, 300, 300], 50, 40) == 0
    assert _cover([300, 300, 300], 50, 50) == 0
    assert _cover([300, 300, 300], 50, 5000) == 3
    assert _cover([0, 0, 300], 50, 60) == 3  # an expert without rows covers nothing and costs nothing
    assert _cover([], 50, 60) == 0


@given(*[st.integers(0, 12)] * 4)
@examples
def test_overlap_holds_what_both_ranges_hold(a: int, b: int, c: int, d: int) -> None:
    one, other = range(min(a, b), max(a, b)), range(min(c, d), max(c, d))
    assert set(_overlap(one, other)) == set(one) & set(other)
    assert _overlap(range(4), range(2, 9)) == range(2, 4)
