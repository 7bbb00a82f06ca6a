"""Training problems that several tests share: what a layer is called with, and gradients gathered from ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from megamoe.training.reference import Gradients, Problem
from tests.cases import Batch, make_biases, make_weights, split


def make_trainable(shape: MoEShape, group: EPGroup | None = None, **options: Any) -> TrainableMoE:
    layer = TrainableMoE(shape, group, **options)
    layer.load_experts(*make_weights(shape), **make_biases(shape))
    return layer


def make_problem(shape: MoEShape, batch: Batch, **formats: Any) -> Problem:
    gate_up, down = make_weights(shape)
    given: dict[str, Any] = {**make_biases(shape), **formats}
    return Problem(shape, batch.hidden, batch.ids, batch.weights, gate_up, down, **given)


def make_gradient(batch: Batch, seed: int = 5) -> Tensor:
    """Of the output, [T, H] bfloat16"""
    return torch.randn(batch.hidden.shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def backward(layer: TrainableMoE, batch: Batch, gradient: Tensor) -> dict[str, Tensor]:
    """This rank's gradients, by name; experts' are those of its own."""
    hidden, weights = batch.hidden.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    layer(hidden, batch.ids, weights).backward(gradient)
    found = {"hidden": hidden.grad, "topk_weights": weights.grad}
    found |= {name: each.grad for name, each in layer.experts.named_parameters()}
    assert all(each is not None for each in found.values())
    return {name: each for name, each in found.items() if each is not None}


def backward_on_ranks(
    group: EPGroup, shape: MoEShape, batch: Batch, empty: int | None, sweep: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """backward() of this rank's share of the batch, for each of the options."""
    mine = split(len(batch.hidden), group.size, empty=empty)[group.rank]
    found = []
    for options in sweep:
        layer = make_trainable(shape, group, **options)
        found.append(backward(layer, batch.part(mine), make_gradient(batch)[mine]))
    return found


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Ranks' gradients as one rank has them: tokens and experts are both in the order of ranks."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def differences(found: dict[str, Tensor], expected: Gradients) -> list[str]:
    """Names of gradients that are not the same to the bit."""
    return [name for name, each in found.items() if not torch.equal(each, getattr(expected, name))]
