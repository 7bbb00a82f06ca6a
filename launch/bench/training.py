"""Forward and backward as one measure: a layer that trains, what a step of it gives, and what the oracle gives."""

# T tokens of a rank   H hidden   E experts   K experts per token

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.reference import moe
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from megamoe.training.reference import Problem, moe_backward

Batch = tuple[Tensor, Tensor, Tensor]
MakeBatch = Callable[[int], Batch]


def make_gradient(rank: int, shape: MoEShape, num_tokens: int) -> Tensor:
    """Of a rank's output, [T, H] bfloat16"""
    rng = torch.Generator().manual_seed(2000 + rank)
    return torch.randn(num_tokens, shape.hidden, generator=rng).to(torch.bfloat16)


def step(layer: MegaMoE, batch: Batch, gradient: Tensor) -> list[Tensor]:
    """One forward and backward -> the output, and the gradients of tokens, top-k weights and masters."""
    assert isinstance(layer, TrainableMoE)
    hidden, ids, weights = batch[0].detach().requires_grad_(), batch[1], batch[2].detach().requires_grad_()
    with torch.enable_grad():
        out: Tensor = layer(hidden, ids, weights)
        found = torch.autograd.grad(out, (hidden, weights, *layer.experts.masters), gradient)
    return [out.detach(), *found]


def expected(
    group: EPGroup, shape: MoEShape, weights: tuple[Tensor, Tensor], make: MakeBatch, formats: dict[str, Any]
) -> list[Tensor]:
    """step()'s results for this rank by the oracle, which computes the batches of all ranks; those of all experts."""
    batches = [make(rank) for rank in range(group.size)]
    gradients = [make_gradient(rank, shape, len(batch[0])) for rank, batch in enumerate(batches)]
    hidden, ids, topk_weights = (torch.cat(parts) for parts in zip(*batches, strict=True))
    given: dict[str, Any] = {name: formats[name] for name in ("weight_format", "dispatch_format")}
    problem = Problem(shape, hidden, ids, topk_weights, *weights, **given)
    found = moe_backward(problem, torch.cat(gradients))
    begin = sum(len(batch[0]) for batch in batches[: group.rank])
    mine = slice(begin, begin + len(batches[group.rank][0]))
    out = moe(shape, *batches[group.rank], *weights, **formats)
    return [out, found.hidden[mine], found.topk_weights[mine], found.gate_up, found.down]


def identical(found: list[Tensor], wanted: list[Tensor], experts: range) -> bool:
    """Whether a step gave the oracle's bits; of the experts' gradients this rank has its own."""
    own = slice(experts.start, experts.stop)
    cut = [*wanted[:3], *(each[own] for each in wanted[3:])]
    return all(torch.equal(*pair) for pair in zip(found, cut, strict=True))
