"""Orders of rows: the order in which a rank sends them, and the order in which experts compute them.

A row is one (token, slot) pair with an expert. Everything here is index arithmetic; the data moves once per order.
"""

# T tokens   K experts per token   N rows of this rank   P ranks   S sources   e experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megamoe.kernels.cpu.library import chosen as chosen_library
from megamoe.parallel.workspace import Workspace
from megamoe.routing.messages import Array, Messages
from megamoe.routing.segments import begins, chosen, spread, to_device
from megamoe.routing.waves import WavePlan


@dataclass(frozen=True, slots=True)
class Route:
    """This rank's rows, a row being a (token, slot) pair, in the order in which they travel: by wave, peer and expert;
    then its own, by expert.

    tokens [N] int64 and weights [N] float32 say where each row is from; positions [T, K] int64 where the row of a
    slot is, N for a masked slot. sent[w][r]: rows of wave w to rank r, none to this rank. fresh: tokens in the order in
    which they are sent, each once to a rank; places: in which row of its receiver's inbox the token of each row that
    leaves is, int32.
    """

    tokens: Tensor
    weights: Tensor
    positions: Tensor
    sent: list[list[int]]
    wave_starts: list[int]
    local_starts: list[int]
    unique: Tensor
    places: Tensor

    @property
    def num_rows(self) -> int:
        """N"""
        return len(self.tokens)

    def remote(self, wave: int) -> slice:
        """Rows of a wave that leave this rank."""
        return slice(self.wave_starts[wave], self.wave_starts[wave + 1])

    def local(self, experts: range, first: int) -> slice:
        """Rows of this rank for its own experts; `first` is its first expert's id."""
        return slice(self.local_starts[experts.start - first], self.local_starts[experts.stop - first])


def route_rows(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: WavePlan,
    ep_rank: int,
    counts: Sequence[int],
    messages: Messages,
    workspace: Workspace,
) -> Route:
    """Sorts the slots of topk_ids [T, K] int64 and topk_weights [T, K] float32; counts[E] are the rows of each expert.

    What counts say goes to the ids' device in one copy, and the host waits for nothing there.

    2 ranks, 4 experts, 1 wave, on rank 0:  ids [[2, 0], [3, 2], [1, -1]]  ->  rows of experts 2, 2, 3 | 0, 1
    tokens [0, 1, 1, 0, 2]    positions [[0, 3], [2, 1], [4, 5]]
    fresh [0, 1]    places [s, s + 1, s + 1], s being the row of rank 1's inbox where rank 0's tokens begin
    """
    others = [rank for rank in range(plan.placement.ep_size) if rank != ep_rank]
    travelling = [(wave, rank) for wave in range(plan.num_waves) for rank in others]
    own = plan.placement.experts(ep_rank)
    order = [e for wave, rank in travelling for e in plan.experts(rank, wave)] + list(own)
    places = np.empty(len(order) + 1, np.int64)
    places[order] = np.arange(len(order))
    places[-1] = len(order)  # masked slots, id -1, come last
    sending = _Sending.of(travelling, ep_rank, messages)
    told = to_device([places, *sending.arrays], topk_ids.device, workspace, "route")
    place = told[0]

    tokens, weights, positions = _sort_slots(topk_ids, topk_weights, place, sum(counts))
    sent: list[list[int]] = messages.pairs[ep_rank].tolist()
    wave_starts = [0, *accumulate(sum(rows) for rows in sent)]
    unique, lie = sending.once(tokens[: wave_starts[-1]], len(topk_ids), told[1:])
    return Route(
        tokens=tokens,
        weights=weights,
        positions=positions,
        sent=sent,
        wave_starts=wave_starts,
        local_starts=list(accumulate((counts[e] for e in own), initial=wave_starts[-1])),
        unique=unique,
        places=lie,
    )


def _sort_slots(topk_ids: Tensor, topk_weights: Tensor, places: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by the places [E + 1] of their experts -> tokens [N], weights [N], positions [T, K] as in Route."""
    library = chosen_library() if topk_ids.device.type == "cpu" else None
    if library is not None:
        return library.sort_slots(topk_ids, topk_weights, places, num_rows)
    slots = places[topk_ids.flatten()].argsort(stable=True)
    positions = torch.empty_like(slots)
    positions[slots] = torch.arange(len(slots), device=slots.device)
    slots = slots[:num_rows]
    tokens, weights = slots // topk_ids.shape[1], topk_weights.flatten()[slots]
    return tokens, weights, positions.clamp_(max=num_rows).view(topk_ids.shape)


@dataclass(frozen=True, slots=True)
class _Sending:
    """What counts say of the rows that leave, a segment for each (wave, receiver) that gets any.

    ranks, pairs [J]   receiver and rows of each segment
    bases [J]          row of the receiver's inbox before its tokens, less the tokens that go along before them
    size, num_unique    P, and tokens that go along in all
    """

    ranks: Array
    pairs: Array
    bases: Array
    size: int
    num_unique: int

    @property
    def arrays(self) -> list[Array]:
        """What the device must know."""
        return [self.pairs, np.stack((self.ranks, self.bases))]

    @classmethod
    def of(cls, travelling: Sequence[tuple[int, int]], ep_rank: int, messages: Messages) -> _Sending:
        waves, ranks = np.asarray(travelling, np.int64).reshape(-1, 2).T
        unique = messages.unique[ep_rank, waves, ranks]
        # the n-th unique token of all is some row behind the start of its message's tokens, and where that is is known
        bases = messages.starts[ranks, waves, ep_rank] + messages.heads[ep_rank, waves, ranks] - begins(unique) - 1
        return cls(ranks, messages.pairs[ep_rank, waves, ranks], bases, messages.pairs.shape[0], int(unique.sum()))

    def once(self, tokens: Tensor, num_tokens: int, told: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Of the rows that leave, tokens [n] as they travel: which tokens go along, where each row's token lies then.

        A token goes along with the first of its rows for a rank, and the others point there. told: arrays, there.
        """
        if not len(tokens):
            return tokens, tokens.to(torch.int32)
        pairs, of_segments = told
        library = chosen_library() if tokens.device.type == "cpu" else None
        if library is not None:
            return library.send_once(tokens, (pairs, of_segments), num_tokens, self.size, self.num_unique)
        peers, bases = spread(of_segments, pairs, len(tokens))
        index, key = torch.arange(len(tokens), device=tokens.device), tokens * self.size + peers
        first = torch.full((num_tokens * self.size,), len(tokens), device=tokens.device)
        first.scatter_reduce_(0, key, index, "amin")
        first = first[key]  # [n] the row that brings each row's token
        brings = first == index
        number = brings.cumsum(0)
        unique = chosen(tokens, brings, number, self.num_unique)
        return unique, (bases + number)[first].to(torch.int32)


def by_expert(counts: Array) -> Array:
    """Which row of the sources comes n-th when rows are ordered by expert, and by source within one.

    counts [S, e]: rows of each source, sorted by expert, for each expert.
    [[1, 2], [2, 0]]: rows 0 | 1 1 | 0 0 of two sources -> [0, 3, 4, 1, 2]
    """
    num_sources, num_experts = counts.shape
    experts = np.repeat(np.tile(np.arange(num_experts, dtype=np.uint16), num_sources), counts.ravel())
    order: Array = experts.argsort(kind="stable")
    return order
