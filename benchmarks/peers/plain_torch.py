"""Expert parallelism written by hand: all_to_all_single, grouped_mm, all_to_all_single, nothing at the same time."""

# T tokens of this rank   H hidden   I intermediate   K experts per token   E experts in all   e experts of this rank
# P ranks   N = T * K rows this rank sends   R rows it receives

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import embedding_bag, grouped_mm, silu

from benchmarks.peers.peer import ExpertWeights
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.shape import MoEShape


class PlainTorch:
    """What a careful user writes with torch alone. grouped_mm takes the weights transposed without a copy."""

    dtype = torch.bfloat16  # of weights and products; rows travel as BF16

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        self.num_ranks, self.num_experts = group.size, shape.num_experts
        own = weights.part(Placement(shape.num_experts, group.size).experts(group.rank))
        self.gate_up, self.down = own.gate_up.to(self.dtype), own.down.to(self.dtype)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        topk = ids.shape[1]
        order = ids.flatten().argsort(stable=True)  # [N] slots in order of expert, so of rank too
        sent = torch.bincount(ids.flatten(), minlength=self.num_experts).view(self.num_ranks, -1)  # [P, e]
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent)
        to, fro = sent.sum(1).tolist(), arriving.sum(1).tolist()

        received = self._exchange(hidden.index_select(0, order // topk), to, fro)  # [R, H] by rank, then expert
        returned = self._exchange(self._experts(received, arriving), fro, to)
        return self._sum(returned, order.argsort().view(ids.shape), weights)

    def _exchange(self, rows: Tensor, to: list[int], fro: list[int]) -> Tensor:
        """So many of the rows to each rank, and so many from each."""
        received = rows.new_empty(sum(fro), rows.shape[1])
        dist.all_to_all_single(received, rows, fro, to)
        return received

    def _sum(self, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Returns every row to its slot and sums a token's K slots with their weights, in one pass over the rows."""
        return embedding_bag(places, rows, per_sample_weights=weights.to(rows.dtype), mode="sum")

    def _experts(self, received: Tensor, counts: Tensor) -> Tensor:
        """received [R, H] in order of rank, counts [P, e] -> [R, H] in the same order"""
        experts = torch.arange(counts.shape[1]).repeat(self.num_ranks).repeat_interleave(counts.flatten())  # [R]
        order = experts.argsort(stable=True)
        ends = counts.sum(0).cumsum(0).to(torch.int32)
        x = received.index_select(0, order).to(self.dtype)
        gate, up = grouped_mm(x, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm(silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return out.to(received.dtype).index_select(0, order.argsort())


class PlainTorchFP32(PlainTorch):
    """The same with FP32 products, which CPUs without BF16 instructions are faster at."""

    dtype = torch.float32
