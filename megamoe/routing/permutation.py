"""The order in which a rank's rows travel, and which tokens are sent: index arithmetic on (token, slot) pairs."""

# T tokens   K experts per token   N rows of this rank   P ranks   E experts in all

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megamoe.kernels.cpu.library import chosen
from megamoe.parallel.workspace import Workspace
from megamoe.routing.landing import Landing
from megamoe.routing.messages import Array, Messages
from megamoe.routing.segments import exclusive_sum, repeat, select, to_device
from megamoe.routing.waves import WavePlan


@dataclass(frozen=True, slots=True)
class Route:
    """This rank's rows, one for each unmasked (token, slot) pair: by wave, receiver and expert, then its own by expert.

    tokens, weights   [N] int64, [N] float32: the token and the top-k weight of each row
    positions         [T, K] int64: the row of each slot, N for a masked slot
    unique            [.] int64: tokens in the order in which they are sent, each once to a rank
    token_rows        [N] int32: the row of the receiver's inbox that holds each row's token
    fetches           [., 2] int32: for each token that a receiver fetches, by wave and receiver: the rank of its host
                      on which the token lands, and the row of that rank's inbox
    """

    tokens: Tensor
    weights: Tensor
    positions: Tensor
    unique: Tensor
    token_rows: Tensor
    fetches: Tensor

    @property
    def num_rows(self) -> int:
        """N"""
        return len(self.tokens)


def route_rows(
    topk_ids: Tensor,
    topk_weights: Tensor,
    plan: WavePlan,
    ep_rank: int,
    num_rows: int,
    messages: Messages,
    workspace: Workspace,
    landing: Landing | None = None,
) -> Route:
    """Sorts the slots of topk_ids [T, K] int64 and topk_weights [T, K] float32; num_rows N of them are not masked.
    landing: where the tokens land, needed where messages are node-limited.

    What follows from counts is copied to the ids' device once, and the host waits for nothing.

    2 ranks, 4 experts, 1 wave, on rank 0:  ids [[2, 0], [3, 2], [1, -1]]  ->  rows of experts 2, 2, 3 | 0, 1
    tokens [0, 1, 1, 0, 2]    positions [[0, 3], [2, 1], [4, 5]]    unique [0, 1]
    token_rows [s, s + 1, s + 1, 0, 2], s being the row of rank 1's inbox where rank 0's tokens begin
    """
    ranking, waves, ranks = _ranking(plan, ep_rank)
    sending = _Sending.of(waves, ranks, ep_rank, messages)
    metadata = to_device([ranking, *sending.arrays], topk_ids.device, workspace, "route")

    tokens, weights, positions = _sort_slots(topk_ids, topk_weights, metadata[0], num_rows)
    leaving = tokens[: int(sending.pairs.sum())]
    fetches = torch.empty(0, 2, dtype=torch.int32)
    if messages.node_limited:
        assert landing is not None
        unique, sent_rows, fetches = sending.land(leaving, landing, metadata[1:])
    else:
        unique, sent_rows = sending.unique(leaving, len(topk_ids), metadata[1:])
    token_rows = torch.cat((sent_rows, tokens[len(leaving) :].to(torch.int32)))
    return Route(tokens, weights, positions, unique, token_rows, fetches)


@lru_cache(maxsize=64)
def _ranking(plan: WavePlan, ep_rank: int) -> tuple[Array, Array, Array]:
    """Place of each expert in the order of Route, [E + 1] with that of masked slots, id -1, at the end; and the waves
    and receivers of the messages that leave, in order.
    """
    others = [rank for rank in range(plan.placement.ep_size) if rank != ep_rank]
    remote = [(wave, rank) for wave in range(plan.num_waves) for rank in others]
    order = [e for wave, rank in remote for e in plan.experts(rank, wave)] + list(plan.placement.experts(ep_rank))
    ranking = np.empty(len(order) + 1, np.int64)
    ranking[order] = np.arange(len(order))
    ranking[-1] = len(order)
    waves, ranks = np.asarray(remote, np.int64).reshape(-1, 2).T
    return ranking, waves, ranks


def _sort_slots(
    topk_ids: Tensor, topk_weights: Tensor, ranking: Tensor, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by the ranking [E + 1] of their experts -> tokens [N], weights [N], positions [T, K] as in Route."""
    library = chosen() if topk_ids.device.type == "cpu" else None
    if library is not None:
        return library.sort_slots(topk_ids, topk_weights, ranking, num_rows)
    slots = ranking[topk_ids.flatten()].argsort(stable=True)
    positions = torch.empty_like(slots)
    positions[slots] = torch.arange(len(slots), device=slots.device)
    slots = slots[:num_rows]
    tokens, weights = slots // topk_ids.shape[1], topk_weights.flatten()[slots]
    return tokens, weights, positions.clamp_(max=num_rows).view(topk_ids.shape)


@dataclass(frozen=True, slots=True)
class _Sending:
    """The messages that leave, from counts: a segment of rows for each wave and receiver.

    ranks, pairs [J]   receiver and rows of each segment
    bases [J]          row of the receiver's inbox before its tokens, less the unique tokens that are sent before them
    fetch_bases [J]    the same of the tokens that it fetches
    size, num_unique   P, and unique tokens in all
    """

    ranks: Array
    pairs: Array
    bases: Array
    fetch_bases: Array
    size: int
    num_unique: int

    @property
    def arrays(self) -> list[Array]:
        """What unique() needs on the device."""
        return [self.pairs, np.stack((self.ranks, self.bases))]

    @classmethod
    def of(cls, waves: Array, ranks: Array, ep_rank: int, messages: Messages) -> _Sending:
        unique = messages.unique[ep_rank, waves, ranks]
        # the n-th unique token of all lies in row bases + n + 1 of its receiver's inbox
        bases = (
            messages.starts[ranks, waves, ep_rank] + messages.heads[ep_rank, waves, ranks] - exclusive_sum(unique) - 1
        )
        fetch_bases = messages.fetch_starts[ranks, waves, ep_rank] - 1
        fetch_bases -= exclusive_sum(messages.fetched[ep_rank, waves, ranks])
        pairs, size = messages.pairs[ep_rank, waves, ranks], messages.pairs.shape[0]
        return cls(ranks, pairs, bases, fetch_bases, size, int(unique.sum()))

    def unique(self, tokens: Tensor, num_tokens: int, arrays: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """tokens [n] of the rows that leave, in order -> unique tokens [num_unique], row of each row's token [n] int32.

        A token is sent with its first row for a rank; its other rows there refer to it. arrays: on the device.
        """
        if not len(tokens):
            return tokens, tokens.to(torch.int32)
        pairs, ranks_and_bases = arrays
        library = chosen() if tokens.device.type == "cpu" else None
        if library is not None:
            return library.send_once(tokens, (pairs, ranks_and_bases), num_tokens, self.size, self.num_unique)
        ranks, bases = repeat(ranks_and_bases, pairs, len(tokens))
        index, key = torch.arange(len(tokens), device=tokens.device), tokens * self.size + ranks
        first = torch.full((num_tokens * self.size,), len(tokens), device=tokens.device)
        first.scatter_reduce_(0, key, index, "amin")
        first = first[key]  # [n] the first row of each row's token for that rank
        is_first = first == index
        number = is_first.cumsum(0)
        unique = select(tokens, is_first, number, self.num_unique)
        return unique, (bases + number)[first].to(torch.int32)

    def land(self, tokens: Tensor, landing: Landing, arrays: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As unique() where tokens land on one rank of each other host -> unique, row of each row's token, fetches.

        A rank that has a token's expert and on which it does not land fetches it for the first of its rows: [., 2]
        int32, as in Route.
        """
        pairs, (ranks, bases) = arrays[0], arrays[1]
        segments = torch.stack((ranks, bases, torch.from_numpy(self.fetch_bases)))
        ranks, bases, fetch_bases = repeat(segments, pairs, len(tokens))
        index, key = torch.arange(len(tokens)), tokens * self.size + ranks
        row_of = torch.full((len(landing.ranks) * self.size,), len(tokens))
        row_of.scatter_reduce_(0, key, index, "amin")  # the first row of a token for a rank
        first = row_of[key]
        landed_on = landing.ranks[tokens, landing.columns[ranks]]
        lands, is_first = landed_on == ranks, first == index
        unique, fetched = is_first & lands, is_first & ~lands
        rows = torch.where(lands, bases + unique.cumsum(0), fetch_bases + fetched.cumsum(0))
        there = rows[row_of[tokens[fetched] * self.size + landed_on[fetched]]]
        return tokens[unique], rows[first].to(torch.int32), torch.stack((landed_on[fetched], there), 1).to(torch.int32)
