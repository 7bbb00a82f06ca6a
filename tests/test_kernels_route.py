"""The routing of a rank alone, interpreted, against its torch twin, a loop over single slots and the layer's checks."""

from __future__ import annotations

import math
from dataclasses import fields
from unittest import mock

import pytest
import torch
from torch import Tensor

from megamoe.execution.checks import any_wrong
from megamoe.shape import MoEShape
from tests.interpreter import interpreted

pytest.importorskip("triton")

from megamoe.kernels.route_slots import CHUNK, MOST_SLOTS, SlotsByExpert, route_slots, route_slots_torch

# T and K: one slot, six, one less than a program's part, a whole part, one more, more than one chunk
SIZES = [(1, 1), (1, 6), (31, 1), (4, 8), (11, 3), (257, 2)]
EXPERTS = [1, 2, 3, 33, 384]
LOWEST, HIGHEST = -(2**63), 2**63 - 1
every_size = pytest.mark.parametrize(("num_tokens", "topk"), SIZES)
every_number_of_experts = pytest.mark.parametrize("num_experts", EXPERTS)


def draw_ids(num_tokens: int, topk: int, num_experts: int, *strange: int) -> Tensor:
    """[T, K] int64, repeated where they happen to be; about half are of `strange`, if any are given"""
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    ids = torch.randint(0, num_experts, (num_tokens, topk), generator=generator)
    if not strange:
        return ids
    others = torch.tensor(strange)[torch.randint(0, len(strange), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, others)


def draw_weights(ids: Tensor) -> Tensor:
    return torch.rand(ids.shape, generator=torch.Generator().manual_seed(9))


def one_after_the_other(ids: Tensor, weights: Tensor, num_experts: int) -> SlotsByExpert:
    """The routing by a loop over single slots"""
    flat, topk = ids.flatten().tolist(), ids.shape[1]
    held = [[slot for slot, each in enumerate(flat) if each == expert] for expert in range(num_experts)]
    last = [slot for slot, each in enumerate(flat) if each not in range(num_experts)]
    order = [slot for rows in held for slot in rows] + last
    positions = [slot if each in range(num_experts) else len(flat) + (each == -1) for slot, each in enumerate(flat)]
    finite = [math.isfinite(weight) for weight in weights.flatten().tolist()]
    good = [each == -1 or (each in range(num_experts) and fine) for each, fine in zip(flat, finite, strict=True)]
    return SlotsByExpert(
        order=torch.tensor(order, dtype=torch.int64),
        tokens_per_expert=torch.tensor([len(rows) for rows in held], dtype=torch.int32),
        source=torch.tensor([slot // topk for slot in order], dtype=torch.int32),
        weights=torch.tensor([weights.flatten()[slot] for slot in order], dtype=torch.float32),
        positions=torch.tensor(positions, dtype=torch.int64).view(ids.shape),
        wrong=torch.tensor([int(not all(good))]),
    )


def assert_same(found: SlotsByExpert, expected: SlotsByExpert) -> None:
    """Bitwise, dtypes and shapes as well"""
    for field in fields(SlotsByExpert):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
        assert a.is_contiguous(), field.name
        assert torch.equal(*(each.view(torch.int32) if each.is_floating_point() else each for each in (a, b))), (
            f"{field.name}: {a.tolist()}, expected {b.tolist()}"
        )


def routed(ids: Tensor, weights: Tensor, num_experts: int) -> SlotsByExpert:
    """What the kernel makes of them; its twin and the loop must have made the same, and the checks agree."""
    found, twin = (op(ids, weights, num_experts) for op in (route_slots, route_slots_torch))
    assert_same(twin, one_after_the_other(ids, weights, num_experts))
    assert_same(found, twin)
    shape = MoEShape(hidden=32, intermediate=32, num_experts=num_experts, topk=min(ids.shape[1], num_experts))
    assert torch.equal(found.wrong.bool(), any_wrong(shape, ids, weights))
    return found


# ---- which rows ----


@every_number_of_experts
@every_size
@interpreted
def test_slots_are_sorted_whatever_the_size(num_tokens: int, topk: int, num_experts: int) -> None:
    ids = draw_ids(num_tokens, topk, num_experts)
    found = routed(ids, draw_weights(ids), num_experts)
    assert int(found.tokens_per_expert.sum()) == ids.numel()
    assert int(found.wrong) == 0


@every_number_of_experts
@every_size
@interpreted
def test_masked_slots_come_last_and_are_not_wrong(num_tokens: int, topk: int, num_experts: int) -> None:
    ids = draw_ids(num_tokens, topk, num_experts, -1)
    found = routed(ids, draw_weights(ids), num_experts)
    assert int(found.tokens_per_expert.sum()) == int((ids >= 0).sum())
    assert int(found.wrong) == 0


@every_number_of_experts
@every_size
@interpreted
def test_ids_beyond_both_ends_come_last_among_masked_ones(num_tokens: int, topk: int, num_experts: int) -> None:
    # of the last two, the lower 32 bits name expert 0
    strange = (-1, -2, num_experts, num_experts + 1, LOWEST, HIGHEST, 2**32, -(2**32))
    ids = draw_ids(num_tokens, topk, num_experts, *strange)
    routed(ids, draw_weights(ids), num_experts)


@interpreted
def test_the_example_of_the_record_holds() -> None:
    ids = torch.tensor([[1, 0], [-1, 1], [0, 9]])
    found = routed(ids, draw_weights(ids), 2)
    assert found.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert found.tokens_per_expert.tolist() == [2, 2]
    assert found.source.tolist() == [0, 2, 0, 1, 1, 2]
    assert found.positions.tolist() == [[0, 1], [7, 3], [4, 6]]
    assert found.wrong.tolist() == [1]


@pytest.mark.parametrize("expert", [0, 7, 63, -1, -2, 64])
@interpreted
def test_slots_that_all_have_one_id_keep_their_order(expert: int) -> None:
    ids = torch.full((CHUNK // 2 + 1, 2), expert)
    assert torch.equal(routed(ids, draw_weights(ids), 64).order, torch.arange(CHUNK + 2))


@interpreted
def test_ids_and_weights_need_not_be_contiguous() -> None:
    ids = draw_ids(12, 10, 5, -1)
    weights = draw_weights(ids)
    routed(ids[:, 2:8], weights[::2].repeat(2, 1)[:, :6], 5)
    routed(ids.t(), weights.t(), 5)


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("place", "weight"), [(0, math.nan), (CHUNK - 1, math.inf), (CHUNK, -math.inf), (CHUNK + 41, math.nan)]
)
@interpreted
def test_a_weight_that_is_not_finite_is_wrong_unless_its_slot_is_masked(place: int, weight: float) -> None:
    ids = draw_ids(CHUNK // 2 + 21, 2, 33)
    weights = draw_weights(ids)
    weights.view(-1)[place] = weight
    assert int(routed(ids, weights, 33).wrong) == 1
    ids.view(-1)[place] = -1
    assert int(routed(ids, weights, 33).wrong) == 0


@pytest.mark.parametrize("weight", [0.0, -0.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, 1e-45])
@interpreted
def test_any_finite_weight_is_right_and_keeps_its_bits(weight: float) -> None:
    ids = draw_ids(3, 2, 4)
    assert int(routed(ids, torch.full(ids.shape, weight), 4).wrong) == 0


@pytest.mark.parametrize(
    ("place", "strange"),
    [(0, -2), (CHUNK - 1, 33), (CHUNK, LOWEST), (CHUNK + 41, HIGHEST), (1, 2**32), (2, -(2**32) - 1)],
)
@interpreted
def test_an_id_that_there_is_not_is_wrong_wherever_it_stands(place: int, strange: int) -> None:
    ids = draw_ids(CHUNK // 2 + 21, 2, 33)
    ids.view(-1)[place] = strange
    assert int(routed(ids, draw_weights(ids), 33).wrong) == 1


# ---- none, and many ----


@every_number_of_experts
@interpreted
def test_without_a_token_all_experts_are_empty(num_experts: int) -> None:
    ids = torch.empty(0, 6, dtype=torch.int64)
    assert routed(ids, draw_weights(ids), num_experts).tokens_per_expert.tolist() == [0] * num_experts


@pytest.mark.parametrize(("num_slots", "launches"), [(0, 0), (1, 1), (MOST_SLOTS, 1), (MOST_SLOTS + 1, 0)])
@interpreted
def test_up_to_so_many_slots_take_one_launch_and_more_take_none(num_slots: int, launches: int) -> None:
    ids = draw_ids(num_slots, 1, 33, -1, -2)
    with mock.patch("megamoe.kernels.route_slots._route_slots_kernel") as kernel:
        found = route_slots(ids, draw_weights(ids), 33)
    assert kernel.__getitem__().call_count == launches
    if not launches:
        assert_same(found, one_after_the_other(ids, draw_weights(ids), 33))


def test_the_twin_reads_no_value_for_which_a_host_would_wait() -> None:
    ids = draw_ids(5, 3, 7, -1, -2).to("meta")  # such tensors have no values
    found = route_slots_torch(ids, torch.empty(5, 3, device="meta"), 7)
    assert {each.name: tuple(getattr(found, each.name).shape) for each in fields(found)} == {
        "order": (15,),
        "tokens_per_expert": (7,),
        "source": (15,),
        "weights": (15,),
        "positions": (5, 3),
        "wrong": (1,),
    }


def test_weights_whose_sum_is_no_number_are_taken_where_each_that_counts_is() -> None:
    shape = MoEShape(64, 32, 6, 2)
    ids, weights = torch.tensor([[0, 1], [5, -1]]), torch.full((2, 2), 3e38)
    assert not any_wrong(shape, ids, weights), "they overflow together"
    weights[1, 1] = torch.nan
    assert not any_wrong(shape, ids, weights), "a masked slot may have any weight"
    weights[0, 0] = torch.inf
    assert any_wrong(shape, ids, weights)
    assert not any_wrong(shape, ids[:0], weights[:0])
