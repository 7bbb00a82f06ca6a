"""Gradients have the oracle's bits for any ranks, waves and savings, and are close to FP64's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.execution.journeys import CallRecord
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.reference import relative_error
from megamoe.routing.waves import Waves
from megamoe.shape import MoEShape
from megamoe.training.reference import Problem, moe_backward, moe_backward_fp64
from tests.cases import ACTIVATIONS, Batch, make_batch, split
from tests.training_cases import (
    backward,
    backward_on_ranks,
    differences,
    joined,
    make_gradient,
    make_problem,
    make_trainable,
)

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
FORMATS = [("mxfp4", "mxfp8", "bf16"), ("bf16", "bf16", "bf16"), ("mxfp4", "bf16", "mxfp8")]
WAVES: list[Waves] = [1, 3, "auto", (1, 3, 2)]
SAVED = ["tokens", "activations", "dispatch-again"]


def options(formats: tuple[str, str, str], **others: Any) -> dict[str, Any]:
    return dict(zip(("weight_format", "dispatch_format", "gradient_format"), formats, strict=True)) | others


@pytest.mark.parametrize("empty", [None, 0], ids=["all_have_tokens", "rank_0_empty"])
@pytest.mark.parametrize("ep_size", [1, 2, 3, 4], ids="ep{}".format)
def test_gradients_are_the_same_for_any_ep_size(ranks: LocalRanks, ep_size: int, empty: int | None) -> None:
    batch = make_batch(SHAPE, 61)
    sweep = [options(formats, waves=waves) for formats in FORMATS for waves in WAVES]
    sweep += [options(FORMATS[0], waves=3, saved=saved) for saved in SAVED[1:]]
    sweep += [options(FORMATS[1], overlap=False, saved=saved) for saved in SAVED]
    outputs = ranks.run(backward_on_ranks, SHAPE, batch, empty, sweep, size=ep_size)
    expected = {
        formats: moe_backward(make_problem(SHAPE, batch, **options(formats)), make_gradient(batch))
        for formats in FORMATS
    }
    for index, each in enumerate(sweep):
        formats = each["weight_format"], each["dispatch_format"], each["gradient_format"]
        assert not differences(joined([output[index] for output in outputs]), expected[formats]), each


def records_of_both(group: EPGroup, batch: Batch) -> tuple[CallRecord, CallRecord]:
    layer = make_trainable(SHAPE, group, waves=3, dispatch_format="bf16", gradient_format="bf16")
    mine = batch.part(split(len(batch.ids), group.size)[group.rank])
    backward(layer, mine, make_gradient(mine))
    return layer.last_call, layer.last_backward


def test_a_backward_counts_the_rows_and_bytes_of_its_forward_and_its_own_time(ranks: LocalRanks) -> None:
    """Gradients of outputs travel as BF16 tokens do, those of tokens home with 16 bytes more for their weight's."""
    for forward, found in ranks.run(records_of_both, make_batch(SHAPE, 300), size=3):
        for name in ("tokens", "waves", "rows_local", "rows_sent", "rows_received", "dispatch_bytes"):
            assert getattr(found, name) == getattr(forward, name) > 0, name
        assert found.combine_bytes == found.rows_received * (2 * SHAPE.hidden + 16)
        assert not found.small
        assert min(found.counts_s, found.compute_s, found.waiting_s) > 0
        assert found.counts_s + found.compute_s + found.waiting_s <= found.total_s


def routed(ids: torch.Tensor) -> Batch:
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3))
    return Batch(make_batch(SHAPE, len(ids)).hidden, ids, weights)


ROUTINGS = {
    "all_on_one_expert": torch.full((40, 4), 7),
    "all_masked": torch.full((40, 4), -1),
    "one_slot_each": torch.tensor([[-1, -1, 5, -1]]).repeat(40, 1),
    "same_expert_twice": torch.tensor([[9, 9, 0, 0]]).repeat(40, 1),
    "one_token": torch.tensor([[0, 3, 6, 9]]),
    "no_tokens": torch.zeros(0, 4, dtype=torch.int64),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_extreme_routings_match_the_oracle(ranks: LocalRanks, routing: str) -> None:
    batch = routed(ROUTINGS[routing])
    expected = moe_backward(make_problem(SHAPE, batch), make_gradient(batch))
    sweep = [{"waves": 3}, {"waves": 2, "saved": "dispatch-again"}]
    outputs = ranks.run(backward_on_ranks, SHAPE, batch, None, sweep, size=3)
    for index in range(len(sweep)):
        assert not differences(joined([output[index] for output in outputs]), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_every_activation_has_a_gradient(family: str, bias: bool) -> None:
    shape = MoEShape(64, 96, 4, 3, activation=ACTIVATIONS[family], bias=bias)
    batch = make_batch(shape, 40)
    for weights, tokens, gradients in FORMATS[:2]:
        formats = options((weights, tokens, gradients))
        problem, gradient = make_problem(shape, batch, **formats), make_gradient(batch)
        found = backward(make_trainable(shape, **formats), batch, gradient)
        assert not differences(found, moe_backward(problem, gradient))
        exact = moe_backward_fp64(problem, gradient)
        errors = {name: relative_error(each, getattr(exact, name)) for name, each in found.items()}
        assert all(error < 5e-3 for error in errors.values()), errors


@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_error_against_fp64_is_below_the_contracts_bound(formats: tuple[str, str, str]) -> None:
    shape = MoEShape(512, 256, 8, 3, 10.0)
    batch = make_batch(shape, 100)
    gradient = make_gradient(batch)
    exact = moe_backward_fp64(make_problem(shape, batch, **options(formats)), gradient)
    found = backward(make_trainable(shape, **options(formats)), batch, gradient)
    bound = 5e-3 if formats[2] == "bf16" else 5e-2
    for name, each in found.items():
        error = relative_error(each, getattr(exact, name))
        print(f"{'-'.join(formats)}, 512 x 256, {name}: relative error {error:.5f}")  # noqa: T201
        assert error < bound


def smooth(problem: Problem, leaves: dict[str, Tensor]) -> Tensor:
    """The layer's function in FP64 without a rounding, slot by slot, written apart from the oracles -> [T, H]"""
    rows = []
    for ids, weights, x in zip(problem.topk_ids, leaves["topk_weights"], leaves["hidden"], strict=True):
        row = torch.zeros_like(x)
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            if expert >= 0:
                gate, up = (leaves["gate_up"][expert] @ x).chunk(2)
                inner = gate / (1 + torch.exp(-gate)) * up
                row = row + weight * (leaves["down"][expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("formats", FORMATS[:2], ids="-".join)
def test_gradients_are_the_slopes_of_the_forward(formats: tuple[str, str, str]) -> None:
    """As gradcheck has it: difference quotients at a tiny size, with a masked slot and an expert twice in a row."""
    shape = MoEShape(32, 32, 3, 2)
    batch = Batch(make_batch(shape, 3).hidden, torch.tensor([[0, 1], [1, 1], [-1, 0]]), torch.rand(3, 2) + 0.5)
    problem, gradient = make_problem(shape, batch, **options(formats)), make_gradient(batch)
    found = backward(make_trainable(shape, **options(formats)), batch, gradient)
    leaves = {
        "hidden": problem.tokens(),
        "topk_weights": problem.topk_weights,
        "gate_up": torch.stack([problem.dense(each) for each in problem.gate_up]),
        "down": torch.stack([problem.dense(each) for each in problem.down]),
    }
    exact = {name: leaf.to(torch.float64) for name, leaf in leaves.items()}
    for name, leaf in exact.items():
        chosen = torch.randperm(leaf.numel(), generator=torch.Generator().manual_seed(2))[:200]
        slopes = torch.zeros(len(chosen), dtype=torch.float64)
        for at, index in enumerate(chosen.tolist()):
            values = []
            for step in (1e-6, -1e-6):
                moved = leaf.clone()
                moved.view(-1)[index] += step
                values.append((smooth(problem, {**exact, name: moved}) * gradient.to(torch.float64)).sum())
            slopes[at] = (values[0] - values[1]) / 2e-6
        assert slopes.any()
        error = relative_error(found[name].reshape(-1)[chosen], slopes)
        assert error < (0.05 if "mxfp8" in formats else 0.01), (name, error)
