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
    """What a careful user writes with torch alone. Weights in the layout that grouped_mm takes without a copy."""

    dtype = torch.bfloat16  # of weights and products; rows travel as BF16

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        self.num_ranks, self.num_experts = group.size, shape.num_experts
        own = weights.part(Placement(shape.num_experts, group.size).experts(group.rank))
        # [e, H, 2I], [e, I, H]
        self.gate_up, self.down = (each.to(self.dtype).transpose(1, 2) for each in (own.gate_up, own.down))

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        topk = ids.shape[1]
        order = ids.flatten().argsort(stable=True)  # [N] slots in order of expert, so of rank too
        sent = torch.bincount(ids.flatten(), minlength=self.num_experts).view(self.num_ranks, -1)  # [P, e]
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent)
        to, fro = sent.sum(1).tolist(), arriving.sum(1).tolist()

        rows = hidden.index_select(0, order // topk)  # [N, H]
        received = rows.new_empty(sum(fro), hidden.shape[1])  # [R, H] in order of rank, then of expert
        dist.all_to_all_single(received, rows, fro, to)
        done = self._experts(received, arriving)
        returned = torch.empty_like(rows)
        dist.all_to_all_single(returned, done, to, fro)

        # returns every row to its slot and sums a token's K slots with their weights, in one pass over the rows
        places = order.argsort().view(ids.shape)
        return embedding_bag(places, returned, per_sample_weights=weights.to(hidden.dtype), mode="sum")

    def _experts(self, received: Tensor, counts: Tensor) -> Tensor:
        """received [R, H] in order of rank, counts [P, e] -> [R, H] in the same order"""
        experts = torch.arange(counts.shape[1]).repeat(self.num_ranks).repeat_interleave(counts.flatten())  # [R]
        order = experts.argsort(stable=True)
        ends = counts.sum(0).cumsum(0).to(torch.int32)
        x = received.index_select(0, order).to(self.dtype)
        gate, up = grouped_mm(x, self.gate_up, offs=ends).chunk(2, dim=-1)
        out = grouped_mm(silu(gate) * up, self.down, offs=ends)
        return out.to(received.dtype).index_select(0, order.argsort())


class PlainTorchFP32(PlainTorch):
    """The same with FP32 products, which CPUs without BF16 instructions are faster at."""

    dtype = torch.float32
