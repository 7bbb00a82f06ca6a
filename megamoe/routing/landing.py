"""Node-limited dispatch: a token goes once to each other host, and the ranks of that host fetch it where it landed.

It lands on the rank that has its first expert on the host, and each other rank of the host that has one of its experts
copies it from there through the memory that they share. On the sender's own host each rank gets its own copy.

Which expert is a token's first must be known before waves are chosen. Expert i of the n on its rank ends (2i + 1)/2n of
the way through that rank's experts, halves rounded, and a wave is the same part of every rank's experts (waves.py). So
the expert with the least such part on a host is in the first wave in which any rank of that host needs the token,
whatever waves are chosen. Of several experts with the same part senders take turns in which one counts.
"""

# P ranks   E experts in all   T tokens of this rank   K experts per token

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from megamoe.parallel.placement import Placement


@dataclass(frozen=True, slots=True)
class Landing:
    """Where this rank's tokens land.

    ranks      [T, P] int64: the rank that each token is sent to for the sake of all ranks of a column, -1 for none
    columns    [P] int64: the column of each rank: that of the lowest rank of its host, or its own on the sender's host
    counts     [E] int64: tokens that land on an expert's rank because it is their first expert of that column
    """

    ranks: Tensor
    columns: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Order:
    """places [E + 1] of experts in the order in which they can be first, columns [E + 1]; experts [E], ranks [E + 1] by
    place. The last entries are those of masked slots and of no expert.
    """

    places: Tensor
    columns: Tensor
    experts: Tensor
    ranks: Tensor


def land(topk_ids: Tensor, placement: Placement, nodes: tuple[int, ...], ep_rank: int) -> Landing:
    """topk_ids [T, K] int64 on the CPU, -1 masks; nodes[r]: the lowest rank on rank r's host.

    4 experts on ranks 0 to 3, hosts {0, 1} and {2, 3}, on rank 0: ids [[0, 1], [3, 2]]
        ranks [[0, 1, -1, -1], [-1, -1, 2, -1]]: token 0 goes to both ranks of its own host, token 1 lands on rank 2
    Ids that there are not are counted as if there were, and are for others to refuse.
    """
    columns, order = _columns(nodes, ep_rank), order_of(placement, nodes, ep_rank)
    ids = topk_ids.clamp(-1, placement.num_experts - 1)  # -1 finds the last entry
    first = torch.full((len(ids), len(nodes) + 1), placement.num_experts, dtype=torch.int64)
    first.scatter_reduce_(1, order.columns[ids], order.places[ids], "amin")
    first = first[:, :-1]
    counts = torch.zeros(placement.num_experts, dtype=torch.int64)
    counts[order.experts] = first.flatten().bincount(minlength=placement.num_experts + 1)[:-1]
    return Landing(order.ranks[first], torch.tensor(columns), counts)


def _columns(nodes: tuple[int, ...], ep_rank: int) -> list[int]:
    return [rank if node == nodes[ep_rank] else node for rank, node in enumerate(nodes)]


@lru_cache(maxsize=64)
def order_of(placement: Placement, nodes: tuple[int, ...], ep_rank: int) -> Order:
    """In which order the experts can be a token's first on a host, of tokens of ep_rank."""
    size, columns = placement.ep_size, _columns(nodes, ep_rank)
    ranked = []
    for rank in range(size):
        ids = placement.experts(rank)
        ranked += [(Fraction(2 * i + 1, len(ids)), (rank + ep_rank) % size, expert) for i, expert in enumerate(ids)]
    experts = [expert for *_, expert in sorted(ranked)]
    places = torch.empty(len(experts) + 1, dtype=torch.int64)
    places[torch.tensor([*experts, -1])] = torch.arange(len(experts) + 1)
    ranks = placement.ranks()
    return Order(
        places=places,
        columns=torch.tensor([*(columns[rank] for rank in ranks), size]),
        experts=torch.tensor(experts),
        ranks=torch.tensor([*(ranks[expert] for expert in experts), -1]),
    )
