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
from torch.nn.functional import embedding, grouped_mm, linear, silu

from benchmarks.peers.peer import HERE, INSTALL_TORCHTITAN, ExpertWeights, Layer, Peer
from megamoe.launch.bench.bench import make_workload
from megamoe.launch.bench.training import make_gradient
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE

PRECISE, FP8_TOKENS, FP4_LAYER = 0.02, 0.05, 0.1  # bounds on the relative error of gradients against FP32


class TrainingLayer(Protocol):
    """A peer's layer on one rank, with gradients. Called by all ranks together."""

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As peer.Layer, in autograd's graph."""
        ...

    def masters(self) -> Sequence[nn.Parameter]:
        """This rank's experts: gate_up [e, 2I, H] and down [e, H, I], or gate [e, I, H], up and down."""
        ...


TRAINING_PEERS = (
    Peer("torch by hand", f"{HERE}.training:PlainTorch", bound=PRECISE),
    Peer("transformers eager", f"{HERE}.training:transformers_eager", "transformers", bound=PRECISE),
    Peer("transformers grouped_mm", f"{HERE}.training:transformers_grouped_mm", "transformers", bound=PRECISE),
    Peer("torchtitan", f"{HERE}.training:torchtitan", "torchtitan", INSTALL_TORCHTITAN, bound=PRECISE),
    Peer("deepspeed AutoEP", f"{HERE}.training:deepspeed_autoep", "deepspeed", bound=PRECISE),
    Peer("megamoe bf16, bf16 wire", f"{HERE}.training:bf16_rows", bound=PRECISE, ours=True),
    Peer("megamoe bf16, mxfp8 wire", f"{HERE}.training:bf16", bound=FP8_TOKENS, ours=True),
    Peer("megamoe mxfp4", f"{HERE}.training:mxfp4", bound=FP4_LAYER, ours=True),
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


class PlainTorch:
    """What a careful user writes with torch alone, and trains: BF16 parameters, autograd through both exchanges."""

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        self.num_ranks, self.num_experts = group.size, shape.num_experts
        own = weights.part(Placement(shape.num_experts, group.size).experts(group.rank))
        self.gate_up, self.down = nn.Parameter(own.gate_up), nn.Parameter(own.down)

    def masters(self) -> Sequence[nn.Parameter]:
        return self.gate_up, self.down

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        topk = ids.shape[1]
        order = ids.flatten().argsort(stable=True)  # [N] slots in order of expert, so of rank too
        sent = torch.bincount(ids.flatten(), minlength=self.num_experts).view(self.num_ranks, -1)  # [P, e]
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent)
        to, fro = sent.sum(1).tolist(), arriving.sum(1).tolist()
        received = _exchange(hidden.index_select(0, order // topk), to, fro)  # [R, H] by rank, then expert
        returned = _exchange(self._experts(received, arriving), fro, to)
        slots = embedding(order.argsort().view(ids.shape), returned)  # [T, K, H]
        return (slots * weights.to(slots.dtype).unsqueeze(-1)).sum(1)

    def _experts(self, received: Tensor, counts: Tensor) -> Tensor:
        experts = torch.arange(counts.shape[1]).repeat(self.num_ranks).repeat_interleave(counts.flatten())  # [R]
        order = experts.argsort(stable=True)
        ends = counts.sum(0).cumsum(0).to(torch.int32)
        x = received.index_select(0, order)
        gate, up = grouped_mm(x, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm(silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return out.index_select(0, order.argsort())


def _exchange(rows: Tensor, to: list[int], fro: list[int]) -> Tensor:
    found: Tensor = _Exchange.apply(rows, to, fro)  # type: ignore[no-untyped-call]
    return found


class _Transformers:
    """transformers' experts under their expert-parallel plan, which autograd goes through."""

    def __init__(self, kind: str, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        self._peer = getattr(import_module(f"{HERE}.transformers_ep"), kind)(group, shape, weights)
        for each in self.masters():
            each.requires_grad_()

    def masters(self) -> Sequence[nn.Parameter]:
        return self._peer.experts.gate_up_proj, self._peer.experts.down_proj

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = self._peer(hidden, ids, weights)
        return found


def transformers_eager(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """The eager implementation: a loop over the experts that have rows."""
    return _Transformers("Eager", group, shape, weights)


def transformers_grouped_mm(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """Its experts as two grouped products."""
    return _Transformers("GroupedMM", group, shape, weights)


class _OfModule:
    """Another peer of the inference table, whose experts hold gate, up and down as parameters of their own."""

    def __init__(self, peer: Layer, masters: Sequence[nn.Parameter]) -> None:
        self._peer, self._masters = peer, masters

    def masters(self) -> Sequence[nn.Parameter]:
        return self._masters

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._peer(hidden, ids, weights)


def torchtitan(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """Its routed experts, which its trainer runs under autograd as they are."""
    peer = import_module(f"{HERE}.torchtitan_ep").TorchTitan(group, shape, weights)
    experts = peer.routed.inner_experts
    return _OfModule(peer, (experts.w1_EFD, experts.w3_EFD, experts.w2_EDF))


def deepspeed_autoep(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """AutoEP's layer; DeepSpeed's engine would reduce the gradients of what is replicated, and here nothing is."""
    peer = import_module(f"{HERE}.deepspeed_ep").DeepSpeedAutoEP(group, shape, weights)
    experts = peer.layer.experts
    return _OfModule(peer, (experts.w1, experts.w3, experts.w2))


class _Ours:
    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights, formats: tuple[str, str]) -> None:
        self._layer = TrainableMoE(
            shape,
            group,
            weight_format=formats[0],
            dispatch_format=formats[1],
            master_dtype=torch.bfloat16,
            saved="activations",  # as autograd keeps them for the peers
            name=" ".join(formats),
        )
        self._layer.load_experts(weights.gate_up, weights.down)

    def masters(self) -> Sequence[nn.Parameter]:
        return self._layer.experts.masters

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = self._layer(hidden, ids, weights)
        return found


def bf16_rows(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """BF16 weights, rows, masters and gradients: the same bytes and the same arithmetic as the peers."""
    return _Ours(group, shape, weights, ("bf16", "bf16"))


def bf16(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """BF16 weights, rows sent as MXFP8, gradients as BF16."""
    return _Ours(group, shape, weights, ("bf16", "mxfp8"))


def mxfp4(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> TrainingLayer:
    """MXFP4 weights made from BF16 masters, rows sent as MXFP8, gradients as BF16."""
    return _Ours(group, shape, weights, ("mxfp4", "mxfp8"))


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
