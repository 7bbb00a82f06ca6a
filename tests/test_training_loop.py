"""Training as programs do it: optimisers, checkpointing, accumulation, frozen parts, and ranks that are lost."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.worker import Rendezvous
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from megamoe.training.layer import living_layers
from tests.cases import make_batch, make_layer, make_weights, split
from tests.training_cases import backward, joined, make_gradient, make_trainable

SHAPE = MoEShape(hidden=64, intermediate=64, num_experts=6, topk=2, swiglu_limit=3.0)
BATCH = make_batch(SHAPE, 37)


def twenty_steps(group: EPGroup, options: dict[str, Any]) -> list[Tensor]:
    """Weights after 20 steps of AdamW on a fixed global batch."""
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch, target = BATCH.part(mine), make_gradient(BATCH)[mine]
    layer = TrainableMoE(SHAPE, group, **options)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(batch.hidden, batch.ids, batch.weights) - target).float().square().sum().backward()
        optimizer.step()
    return [each.detach().clone() for each in layer.parameters()]


TRAINED: dict[str, list[dict[str, Any]]] = {
    "mxfp4": [{"waves": 1}, {"waves": 1}, {"waves": 3}, {"waves": "auto"}],
    "bf16": [{"weight_format": "bf16", "dispatch_format": "bf16", "master_dtype": torch.bfloat16}] * 2,
}


@pytest.mark.parametrize("name", TRAINED)
def test_weights_after_20_steps_of_adamw_are_the_same_for_any_ranks_and_waves(ranks: LocalRanks, name: str) -> None:
    alone, *others = TRAINED[name]
    (expected,) = ranks.run(twenty_steps, alone, size=1)
    assert not torch.equal(expected[0], next(iter(TrainableMoE(SHAPE, **alone).parameters())))
    for ep_size, options in enumerate(others, 2):
        outputs = ranks.run(twenty_steps, options, size=ep_size)
        for which, whole in enumerate(expected):
            assert torch.equal(torch.cat([output[which] for output in outputs]), whole), options


def two_layers(group: EPGroup, wrap: str) -> dict[str, Tensor]:
    """A chain of two layers: the second's calls use the workspace between the first's forward and backward."""
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch, gradient = BATCH.part(mine), make_gradient(BATCH)[mine]
    layers = [make_trainable(SHAPE, group, name=name, waves=2) for name in ("first", "second")]
    hidden, weights = batch.hidden.clone().requires_grad_(), batch.weights.clone().requires_grad_()

    def chain(layer: TrainableMoE, x: Tensor) -> Tensor:
        found: Tensor = x + layer(x, batch.ids, weights)
        return found

    x = hidden
    for layer in layers:
        x = chain(layer, x) if wrap == "none" else checkpoint(chain, layer, x, use_reentrant=wrap == "reentrant")
    torch.autograd.backward(x, gradient)
    found = {"hidden": hidden.grad, "topk_weights": weights.grad}
    found |= {f"{layer.name} {key}": each.grad for layer in layers for key, each in layer.named_parameters()}
    return {key: each for key, each in found.items() if each is not None}


def test_checkpoints_run_the_forward_again_and_change_no_bit(ranks: LocalRanks) -> None:
    (expected,) = ranks.run(two_layers, "none", size=1)
    assert len(expected) == 6
    for wrap in ("none", "reentrant", "not reentrant"):
        found = joined(ranks.run(two_layers, wrap, size=3))
        assert found.keys() == expected.keys()
        assert all(torch.equal(each, expected[name]) for name, each in found.items()), wrap


def test_gradients_accumulate() -> None:
    layer, gradient = make_trainable(SHAPE), make_gradient(BATCH)
    once = {name: each.clone() for name, each in backward(layer, BATCH, gradient).items()}
    twice = backward(layer, BATCH, gradient)
    for name in ("gate_up", "down"):
        assert torch.equal(twice[name], once[name] + once[name])


def test_backward_twice_over_a_kept_graph_gives_the_same_bits() -> None:
    layer = make_trainable(SHAPE)
    hidden = BATCH.hidden.clone().requires_grad_()
    out = layer(hidden, BATCH.ids, BATCH.weights)
    first, second = (torch.autograd.grad(out, hidden, make_gradient(BATCH), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("depends", [False, True], ids=["sum", "square"])
def test_gradients_of_gradients_are_refused_by_name(depends: bool) -> None:
    """Also where the gradient that came in has none: the term would be a constant."""
    layer = TrainableMoE(SHAPE, name="layers.3")
    hidden = BATCH.hidden.float().requires_grad_()
    out = layer(hidden, BATCH.ids, BATCH.weights).float()
    (first,) = torch.autograd.grad((out.square() if depends else out).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"layer 'layers.3' has no gradients of gradients"):
        first.square().sum().backward()  # type: ignore[no-untyped-call]


def test_forward_mode_is_refused_by_name() -> None:
    layer = TrainableMoE(SHAPE, name="layers.3")
    hidden = BATCH.hidden.float()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"layer 'layers.3' has no forward-mode derivative"):
        layer(forward_ad.make_dual(hidden, hidden), BATCH.ids, BATCH.weights)  # type: ignore[no-untyped-call]


def test_a_layer_made_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        layer = TrainableMoE(SHAPE)
    out = layer(BATCH.hidden, BATCH.ids, BATCH.weights)
    assert torch.equal(out, TrainableMoE(SHAPE)(BATCH.hidden, BATCH.ids, BATCH.weights))
    out.sum().backward()
    assert layer.experts.down.grad is not None


def partly_frozen(group: EPGroup) -> None:
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch, gradient = BATCH.part(mine), make_gradient(BATCH)[mine]
    layer = make_trainable(SHAPE, group)
    whole = backward(layer, batch, gradient)
    layer.zero_grad()
    layer.experts.down.requires_grad = False
    layer(batch.hidden, batch.ids, batch.weights).backward(gradient)
    assert layer.experts.down.grad is None
    assert layer.experts.gate_up.grad is not None
    assert torch.equal(layer.experts.gate_up.grad, whole["gate_up"])
    layer.requires_grad_(requires_grad=False)
    hidden = batch.hidden.clone().requires_grad_()
    layer(hidden, batch.ids, batch.weights).backward(gradient)
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, whole["hidden"])


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(ranks: LocalRanks) -> None:
    ranks.run(partly_frozen, size=2)


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_without_gradients_it_is_the_layer(weight_format: str) -> None:
    layer = make_trainable(SHAPE, weight_format=weight_format)
    plain = make_layer(SHAPE, weight_format=weight_format)
    given = BATCH.hidden, BATCH.ids, BATCH.weights
    with torch.no_grad():
        assert torch.equal(layer(*given), plain(*given))
        layer.experts.gate_up.mul_(1.5)
        plain.load_experts(make_weights(SHAPE)[0] * 1.5, make_weights(SHAPE)[1])
        assert torch.equal(layer(*given), plain(*given))
        layer.experts.gate_up.data.mul_(2)
        layer.quantize()
        plain.load_experts(make_weights(SHAPE)[0] * 3, make_weights(SHAPE)[1])
        assert torch.equal(layer(*given), plain(*given))
    assert layer(*given).requires_grad


def test_a_step_between_forward_and_backward_is_refused() -> None:
    layer = make_trainable(SHAPE)
    out = layer(BATCH.hidden, BATCH.ids, BATCH.weights)
    with torch.no_grad():
        layer.experts.down.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(make_gradient(BATCH))


COPIES: dict[str, Callable[[TrainableMoE], TrainableMoE]] = {
    "itself": lambda layer: layer,
    "a_copy": copy.deepcopy,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_every_kind_of_step_is_seen(kind: str, copied: str) -> None:
    layer = COPIES[copied](make_trainable(SHAPE))
    assert layer in living_layers()  # as clip_grad_norm_() finds them
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=kind == "foreach", fused=kind == "fused")
    before = layer(BATCH.hidden, BATCH.ids, BATCH.weights)
    before.backward(make_gradient(BATCH))
    optimizer.step()
    assert not torch.equal(layer(BATCH.hidden, BATCH.ids, BATCH.weights), before)


def nan_in_a_master(group: EPGroup) -> str:
    layer = make_trainable(SHAPE, group)
    with torch.no_grad():
        layer.experts.down[0, 0, 0] = float("nan") if group.rank == 1 else 0.5
    with pytest.raises(CallRefusedError) as refused:
        layer(BATCH.hidden, BATCH.ids, BATCH.weights)
    with torch.no_grad():
        layer.experts.down[0, 0, 0] = 0.5
    layer(BATCH.hidden, BATCH.ids, BATCH.weights).sum().backward()
    return str(refused.value)


def test_master_weights_that_have_no_code_are_refused_on_all_ranks(ranks: LocalRanks) -> None:
    for said in ranks.run(nan_in_a_master, size=2):
        assert "down of expert 3" in said
        assert "NaN" in said


def first_values(group: EPGroup | None) -> list[Tensor]:
    layer = TrainableMoE(SHAPE, group, seed=3)
    return [layer.experts.gate_up.detach(), layer.experts.down.detach()]


def test_first_values_are_each_experts_own_on_any_number_of_ranks(ranks: LocalRanks) -> None:
    alone, other = first_values(None), TrainableMoE(SHAPE, seed=4).experts.gate_up
    for stack in alone:
        bound = stack.shape[2] ** -0.5
        assert 0.99 * bound < float(stack.abs().max()) <= bound
        assert len(set(map(tuple, stack.flatten(1)[:, :8].tolist()))) == SHAPE.num_experts
    assert not torch.equal(alone[0], other)
    for whole, *parts in zip(alone, *ranks.run(first_values, size=3), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_a_state_dict_has_the_master_weights_and_is_refused_by_other_ranks() -> None:
    layer, other = make_trainable(SHAPE), TrainableMoE(SHAPE, seed=3)
    saved = layer.state_dict()
    assert sorted(saved) == ["experts.down", "experts.gate_up", "experts.held"]
    given = BATCH.hidden, BATCH.ids, BATCH.weights
    assert not torch.equal(other(*given), layer(*given))
    other.load_state_dict(saved)
    assert torch.equal(other(*given), layer(*given))
    saved["experts.held"] = torch.tensor([6, 12, 12])
    with pytest.raises(RuntimeError, match="experts 6 to 11 of 12"):
        other.load_state_dict(saved)


def test_experts_that_train_stay_where_they_are() -> None:
    layer = make_trainable(SHAPE)
    given = BATCH.hidden, BATCH.ids, BATCH.weights
    before = layer(*given)
    layer.experts.regroup(range(6))
    assert torch.equal(layer(*given), before)
    with pytest.raises(ValueError, match="cannot regroup: save it, and load what was saved in the new group"):
        layer.experts.regroup(range(3))


# ---- ranks that are lost ----

FAULTS = {
    "killed": ("dead", "dispatch"),
    "raises": ("raised", "dispatch"),
    "does not call backward": ("outside", "counts"),
}


@pytest.fixture
def pair() -> Iterator[list[SpawnHandle]]:
    """Two ranks in a group whose deadline is short."""
    with SpawnPool(2, deadline_s=5.0, threads=1) as handles:
        opened = [handles.open(number, 60.0) for number in range(2)]
        address, port = opened[0].call("open_store").result(60)
        joined = [handle.call("join", Rendezvous(address, port, 1, rank, 2)) for rank, handle in enumerate(opened)]
        for each in joined:
            each.result(60)
        yield opened


def left_alone(group: EPGroup) -> tuple[PeerError, str]:
    """What a rank is told whose peer does not do its part of a backward."""
    layer = make_trainable(SHAPE, group, waves=2)
    out = layer(BATCH.hidden, BATCH.ids, BATCH.weights)
    with pytest.raises(PeerError) as lost:
        out.backward(make_gradient(BATCH))
    with pytest.raises(RuntimeError, match="cannot be used any more") as refused:
        layer(BATCH.hidden, BATCH.ids, BATCH.weights)
    return lost.value, str(refused.value)


def faulty(group: EPGroup, fault: str) -> None:
    layer = make_trainable(SHAPE, group, waves=2)
    out = layer(BATCH.hidden, BATCH.ids, BATCH.weights)

    def fail(*_: object) -> None:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MemoryError("no room for gradients")

    if fault != "does not call backward":
        layer.experts.data_gradient = fail  # type: ignore[method-assign,assignment]
        out.backward(make_gradient(BATCH))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_does_not_do_its_part_is_named_within_the_deadline(pair: list[SpawnHandle], fault: str) -> None:
    begun = time.monotonic()
    waiting, ending = pair[0].call("run", left_alone), pair[1].call("run", faulty, fault)
    lost, refused = waiting.result(30)
    ended = ending.exception(30)
    assert time.monotonic() - begun < 15
    condition, _ = FAULTS[fault]
    assert (lost.rank, lost.layer) == (1, "moe (backward)")
    assert condition in (lost.condition or "") or condition in str(lost), lost
    assert "PeerError" in refused
    assert (ended is None) == (fault == "does not call backward")


# ---- nothing is left behind ----


def many_steps(group: EPGroup, num_steps: int) -> tuple[int, int, int]:
    """Resident bytes after a tenth of the steps and after all of them, and how often the weights were quantised."""
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch, target = BATCH.part(mine), make_gradient(BATCH)[mine]
    layer = make_trainable(SHAPE, group, waves=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    process, early = psutil.Process(), 0
    for step in range(num_steps):
        optimizer.zero_grad()
        (layer(batch.hidden, batch.ids, batch.weights) - target).float().square().sum().backward()
        optimizer.step()
        if step == num_steps // 10:
            early = process.memory_info().rss
    return early, process.memory_info().rss, layer.experts.rounding_step


@pytest.mark.parametrize("num_steps", [30, pytest.param(500, marks=pytest.mark.soak)])
def test_steps_leave_nothing_behind(ranks: LocalRanks, num_steps: int) -> None:
    for early, late, quantized in ranks.run(many_steps, num_steps, size=2):
        assert quantized == num_steps
        assert late - early < 4e6
