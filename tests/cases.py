"""Layers and batches that several tests share, made from a seed so that every rank can make them for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.activations import SWIGLU, Activation
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.pairs import Clock
from megamoe.reference import moe
from megamoe.routing.waves import Waves
from megamoe.shape import MoEShape

# of families of models, by what they show
ACTIVATIONS = {
    "swiglu": SWIGLU,
    "deepseek_v4": SWIGLU.with_limit(3.0),
    "gpt_oss": Activation(alpha=1.702, up_shift=1.0, limit=5.0),
    "step3p7": Activation(limit=3.0, clamp="after"),
    "inkling2": Activation(limit=4.0, clamp="tanh", up_limit=2.5),
    "gemma4": Activation("gelu_tanh"),
    "nemotron_h": Activation("relu2", gated=False),
    "gelu_shifted_after": Activation("gelu_tanh", up_shift=-0.3, limit=1.3, clamp="after", up_limit=0.9),
    "silu_ungated_before": Activation(gated=False, alpha=0.7, limit=2.0),
    "inkling2_ungated": Activation(gated=False, limit=0.8, clamp="tanh"),
    "inkling2_shifted": Activation(alpha=1.3, up_shift=0.5, limit=1.5, clamp="tanh"),
    "relu2_gated": Activation("relu2", limit=2.0),
}


@dataclass(frozen=True)
class Batch:
    """hidden [T, H] bfloat16, ids [T, K] int64, weights [T, K] float32"""

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def part(self, tokens: slice) -> Batch:
        return Batch(self.hidden[tokens], self.ids[tokens], self.weights[tokens])


def make_weights(shape: MoEShape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I], float32, large enough that the clamp works."""
    rng = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(shape.num_experts, shape.linear1_rows, shape.hidden, generator=rng)
    down = torch.randn(shape.num_experts, shape.hidden, shape.intermediate, generator=rng)
    return gate_up * 4 / shape.hidden**0.5, down / shape.intermediate**0.5


def make_biases(shape: MoEShape, seed: int = 2) -> dict[str, Tensor]:
    """gate_up_bias [E, 2I] and down_bias [E, H], float32, as large as the products; none where the shape has none."""
    rng = torch.Generator().manual_seed(seed)
    sizes = {"gate_up_bias": shape.linear1_rows, "down_bias": shape.hidden} if shape.bias else {}
    return {name: torch.randn(shape.num_experts, size, generator=rng) for name, size in sizes.items()}


def make_batch(shape: MoEShape, num_tokens: int, seed: int = 1, *, mask: bool = True) -> Batch:
    """Random routing with repeated ids in a row, masked slots, and the last expert always empty."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, shape.hidden, generator=rng).to(torch.bfloat16)
    ids = torch.randint(-1 if mask else 0, max(1, shape.num_experts - 1), (num_tokens, shape.topk), generator=rng)
    return Batch(hidden, ids, torch.rand(num_tokens, shape.topk, generator=rng) * 2)


def split(num_tokens: int, num_ranks: int, *, empty: int | None = None) -> list[slice]:
    """Uneven shares of the tokens, rank r's weight r + 1; the rank `empty` gets none."""
    shares = [0 if rank == empty else rank + 1 for rank in range(num_ranks)]
    if not sum(shares):
        shares = [1] * num_ranks
    ends = [num_tokens * sum(shares[: rank + 1]) // sum(shares) for rank in range(num_ranks)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def oracle(
    shape: MoEShape, batch: Batch, weight_format: str, dispatch_format: str, combine_format: str = "bf16"
) -> Tensor:
    gate_up, down = make_weights(shape)
    return moe(
        shape,
        batch.hidden,
        batch.ids,
        batch.weights,
        gate_up,
        down,
        **make_biases(shape),
        weight_format=weight_format,
        dispatch_format=dispatch_format,
        combine_format=combine_format,
    )


@contextmanager
def computing(layer: MegaMoE, instead: Callable[..., Any]) -> Iterator[None]:
    """A block in which this is called when the layer should compute, in a call of few tokens or in one by waves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer.experts, "linear1", instead)
        if layer._small is not None:
            patch.setattr(layer._small, "run_experts", instead)
        yield


def with_all_to_all(group: EPGroup) -> EPGroup:
    """The same ranks, whose transport is that of NCCL and HCCL, over gloo."""
    world = dist.group.WORLD
    assert world is not None
    assert group.clock is not None
    clock = Clock(group.deadline_s, group.hosts, group.own_status)
    return EPGroup(
        group.rank, group.size, AllToAllTransport(world, clock, torch.device("cpu")), group.deadline_s, clock
    )


def make_layer(
    shape: MoEShape,
    group: EPGroup | None = None,
    *,
    weight_format: str = "mxfp4",
    dispatch_format: str = "mxfp8",
    combine_format: str = "bf16",
    waves: Waves = "auto",
    name: str = "moe",
) -> MegaMoE:
    layer = MegaMoE(
        shape,
        group,
        weight_format=weight_format,
        dispatch_format=dispatch_format,
        combine_format=combine_format,
        waves=waves,
        name=name,
    )
    layer.load_experts(*make_weights(shape), **make_biases(shape))
    return layer
