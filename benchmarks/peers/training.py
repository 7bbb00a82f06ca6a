"""Forward and backward: peers whose layers have gradients, each held against FP32 autograd before it is timed.

deepspeed.moe is not among them: its gate makes the given weights a softmax of its own, whose gradient is another one.
"""

# T tokens of this rank   H hidden   I intermediate   K experts per token   E experts in all   e experts of this rank

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.nn.functional import embedding, linear, silu

from benchmarks.peers import plain_torch
from benchmarks.peers.peer import FP8_TOKENS, HERE, INSTALL_TORCHTITAN, PRECISE, ExpertWeights, Layer, Peer, ours
from megamoe.launch.bench.bench import make_workload
from megamoe.launch.bench.training import make_gradient
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE

FP4_GRADIENTS = 0.1  # bound on their relative error against FP32


class TrainingLayer(Protocol):
    """A peer's layer on one rank, with gradients. Called by all ranks together."""

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As peer.Layer, in autograd's graph."""
        ...

    def masters(self) -> Sequence[Tensor]:
        """This rank's experts: gate_up [e, 2I, H] and down [e, H, I], or gate [e, I, H], up and down."""
        ...


TRAINING_PEERS = (
    Peer("torch by hand", f"{HERE}.training:PlainTorch"),
    Peer("transformers eager", f"{HERE}.training:transformers", "transformers", options=("Eager",)),
    Peer(
        "transformers grouped_mm",
        f"{HERE}.training:transformers",
        "transformers",
        bound=PRECISE,
        options=("GroupedMM",),
    ),
    Peer("torchtitan", f"{HERE}.training:torchtitan", "torchtitan", INSTALL_TORCHTITAN),
    Peer("deepspeed AutoEP", f"{HERE}.training:deepspeed_autoep", "deepspeed"),
    *ours(f"{HERE}.training:trained", (PRECISE, FP8_TOKENS, FP4_GRADIENTS)),
)


class _Exchange(Function):
    """all_to_all_single of rows, whose gradient is the same exchange backwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: list[int], fro: list[int]) -> Tensor:
        ctx.to, ctx.fro = to, fro
        received = rows.new_empty(sum(fro), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), fro, to)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        returned = gradient.new_empty(sum(ctx.to), gradient.shape[1])
        dist.all_to_all_single(returned, gradient.contiguous(), ctx.to, ctx.fro)
        return returned, None, None


class PlainTorch(plain_torch.PlainTorch):
    """As in the inference table, with BF16 parameters and autograd through both exchanges."""

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        super().__init__(group, shape, weights)
        self.gate_up, self.down = nn.Parameter(self.gate_up), nn.Parameter(self.down)

    def masters(self) -> Sequence[Tensor]:
        return self.gate_up, self.down

    def _exchange(self, rows: Tensor, to: list[int], fro: list[int]) -> Tensor:
        found: Tensor = _Exchange.apply(rows, to, fro)  # type: ignore[no-untyped-call]
        return found

    def _sum(self, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        slots = embedding(places, rows)  # [T, K, H]
        return (slots * weights.to(slots.dtype).unsqueeze(-1)).sum(1)


class _WithMasters:
    """A layer whose experts are parameters, whatever it calls them."""

    def __init__(self, layer: Layer, masters: Sequence[Tensor]) -> None:
        self._layer, self._masters = layer, masters
        for each in masters:
            each.requires_grad_()

    def masters(self) -> Sequence[Tensor]:
        return self._masters

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._layer(hidden, ids, weights)


def transformers(group: EPGroup, shape: MoEShape, weights: ExpertWeights, kind: str) -> TrainingLayer:
    """transformers' experts of a kind under their expert-parallel plan, which autograd goes through."""
    peer = getattr(import_module(f"{HERE}.transformers_ep"), kind)(group, shape, weights)
    return _WithMasters(peer, (peer.experts.gate_up_proj, peer.experts.down_proj))


def torchtitan(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """Its routed experts, which its trainer runs under autograd as they are."""
    peer = import_module(f"{HERE}.torchtitan_ep").TorchTitan(group, shape, weights)
    experts = peer.routed.inner_experts
    return _WithMasters(peer, (experts.w1_EFD, experts.w3_EFD, experts.w2_EDF))


def deepspeed_autoep(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """AutoEP's layer; DeepSpeed's engine would reduce the gradients of what is replicated, and here nothing is."""
    peer = import_module(f"{HERE}.deepspeed_ep").DeepSpeedAutoEP(group, shape, weights)
    experts = peer.layer.experts
    return _WithMasters(peer, (experts.w1, experts.w3, experts.w2))


def trained(group: EPGroup, shape: MoEShape, weights: ExpertWeights, weight_format: str, wire: str) -> TrainingLayer:
    """This project's layer: BF16 masters and gradients, weights and rows in these formats."""
    layer = TrainableMoE(
        shape,
        group,
        weight_format=weight_format,
        dispatch_format=wire,
        master_dtype=torch.bfloat16,
        saved="activations",  # as autograd keeps them for the peers
        name=f"{weight_format} {wire}",
    )
    layer.load_experts(weights.gate_up, weights.down)
    return _WithMasters(layer, layer.experts.masters)


class Step:
    """One forward and backward of a layer on one rank, its gradients freed afterwards."""

    def __init__(self, layer: TrainingLayer, batch: tuple[Tensor, Tensor, Tensor], gradient: Tensor) -> None:
        self._layer, self._batch, self._gradient = layer, batch, gradient

    def __call__(self) -> list[Tensor]:
        """The gradients of tokens, top-k weights and masters."""
        hidden, weights = (self._batch[index].detach().requires_grad_() for index in (0, 2))
        with torch.enable_grad():
            out = self._layer(hidden, self._batch[1], weights)
            return list(torch.autograd.grad(out, (hidden, weights, *self._layer.masters()), self._gradient))


def reference_gradients(group: EPGroup, shape: MoEShape, weights: ExpertWeights, tokens: Sequence[int]) -> list[Tensor]:
    """What Step gives on this rank, by autograd in FP32 on one device over the tokens of all ranks."""
    batches = [make_workload(shape, rank, number) for rank, number in enumerate(tokens)]
    output = torch.cat([make_gradient(rank, shape, number) for rank, number in enumerate(tokens)])
    hidden, ids, topk_weights = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.enable_grad():
        leaves = [each.to(torch.float32).requires_grad_() for each in (hidden, topk_weights)]
        leaves += [each.to(torch.float32).requires_grad_() for each in (weights.gate_up, weights.down)]
        total = torch.zeros(len(hidden), shape.hidden)
        for expert in range(shape.num_experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = linear(leaves[0][token], leaves[2][expert]).chunk(2, -1)
            out = linear(silu(gate) * up, leaves[3][expert])
            total = total.index_add(0, token, out * leaves[1][token, slot].unsqueeze(-1))
        found = torch.autograd.grad(total, leaves, output.to(torch.float32))
    begin = sum(tokens[: group.rank])
    mine, own = slice(begin, begin + tokens[group.rank]), Placement(shape.num_experts, group.size).experts(group.rank)
    experts = slice(own.start, own.stop)
    return [found[0][mine], found[1][mine], found[2][experts], found[3][experts]]


def squared_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Squares of the relative errors of all kinds of gradients, added, and how many there are.

    found as a Step returns it: where gate and up have gradients of their own they are one matrix here.
    """
    total, kinds = 0.0, 0
    if len(found) > len(expected):
        found = [*found[:2], torch.cat(tuple(found[2:4]), 1), *found[4:]]
    for given, wanted in zip(found, expected, strict=True):
        each = given.to_local() if isinstance(given, DTensor) else given
        if each.shape != wanted.shape:
            raise ValueError(f"a gradient of {list(each.shape)}, expected {list(wanted.shape)}")
        if wanted.numel():
            wide = wanted.to(torch.float64)
            total += float((each.to(torch.float64) - wide).square().sum() / wide.square().sum())
            kinds += 1
    return total, float(kinds)
