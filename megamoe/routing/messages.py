"""What travels in a wave from one rank to another: a message of rows, in a place that both ends know beforehand.

A token goes to a rank once, in the wave of its first expert there, however many of its experts are on that rank. A
message is, in rows of the wire: the pair index, a few rows that say for each of the wave's (token, slot) pairs in which
row of the receiver the token is and how it is weighted; then the unique tokens, which that rank has not had before.

With node-limited dispatch (landing.py) a token goes to a host once. Behind the pair index a message then says of each
token that its receiver fetches from another rank of its host which rank that is and in which row of its inbox.

All ranks know all counts, so all know every message's size and where it lies in its receiver's inbox: behind the
receiver's own tokens, by wave and then by sender; behind each wave's messages, by sender, the tokens that are fetched.
"""

# P ranks   W waves   E experts in all   T tokens of a rank

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megamoe.kernels.cpu.library import chosen
from megamoe.parallel.placement import Placement
from megamoe.parallel.symmetric import MAX_WAVES
from megamoe.routing.waves import WavePlan
from megamoe.routing.wire import Wire

Array = npt.NDArray[np.int64]
# What a rank must save on average for node-limited dispatch to be worth its words and waits: a third of a millisecond
# of CPU in a call of four ranks, in which a link of 1 Gbit/s carries 40 KB.
LEAST_SAVED_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Messages:
    """Sizes of all messages [sender, wave, receiver], in rows: pairs counts (token, slot) pairs, heads the rows of the
    pair index, unique the tokens, fetched those that the receiver fetches from another rank of its host. starts and
    fetch_starts [receiver, wave, sender]: first rows in the receiver's inbox of the message, and of what is fetched.
    own [P]: pairs that stay on their rank.
    """

    pairs: Array
    heads: Array
    unique: Array
    fetched: Array
    starts: Array
    fetch_starts: Array
    own: Array

    @classmethod
    def of(
        cls,
        plan: WavePlan,
        wire: Wire,
        tokens: list[int],
        counts: Tensor,
        firsts: Tensor,
        landed: Tensor | None = None,
    ) -> Messages:
        """tokens[r]: T of each rank; counts, firsts, landed [P, E] int64: pairs of each rank for each expert, tokens
        whose first expert on its rank that is, and tokens that land there. Without landed every rank gets its own, and
        where it saves less than it costs.
        """
        if landed is None or not _is_worthwhile(plan, wire, firsts.numpy() - landed.numpy()):
            landed = firsts
        by_expert = np.array((counts.numpy(), firsts.numpy(), landed.numpy()))
        pairs, needed, unique = _by_wave_and_receiver(plan, by_expert)
        fetched = needed - unique
        heads: Array = -(-wire.PAIR_BYTES * (pairs + fetched) // wire.row_bytes)
        rows, fetches = (each.transpose(2, 1, 0) for each in (heads + unique, fetched))  # [receiver, wave, sender]
        of_wave = rows.sum(2) + fetches.sum(2)
        begin = (of_wave.cumsum(1) - of_wave + np.asarray(tokens, np.int64)[:, None])[:, :, None]
        starts = begin + rows.cumsum(2) - rows
        fetch_starts = begin + rows.sum(2)[:, :, None] + fetches.cumsum(2) - fetches
        own = counts.numpy().sum(1) - pairs.sum((1, 2))
        return cls(pairs, heads, unique, fetched, starts, fetch_starts, own)

    @property
    def node_limited(self) -> bool:
        """Whether any rank fetches anything."""
        return bool(self.fetched.any())

    def rows(self, sender: int, wave: int) -> list[int]:
        """Rows of the sender's message for each rank."""
        sizes: list[int] = (self.heads[sender, wave] + self.unique[sender, wave]).tolist()
        return sizes

    def incoming(self, receiver: int, wave: int) -> list[int]:
        """Rows of the message from each rank."""
        sizes: list[int] = (self.heads[:, wave, receiver] + self.unique[:, wave, receiver]).tolist()
        return sizes


def _is_worthwhile(plan: WavePlan, wire: Wire, saved: Array) -> bool:
    """Whether to send so many tokens less, saved [P, E]. No word tells that a wave beyond MAX_WAVES has landed."""
    return plan.num_waves <= MAX_WAVES and int(saved.sum()) * wire.row_bytes >= LEAST_SAVED_BYTES * len(saved)


def _by_wave_and_receiver(plan: WavePlan, by_expert: Array) -> Array:
    """[n, P, E] -> [n, P, W, P]: sums over the experts of each rank's wave, none for a rank's own."""
    upto = np.zeros((*by_expert.shape[:2], by_expert.shape[2] + 1), np.int64)
    by_expert.cumsum(2, out=upto[..., 1:])
    bounds, ranks = _bounds(plan)  # [receiver, W + 1]
    ends = upto[..., bounds.T]  # [n, P, W + 1, P]
    sums: Array = ends[..., 1:, :] - ends[..., :-1, :]
    sums[:, ranks, :, ranks] = 0
    return sums


@lru_cache(maxsize=64)
def _bounds(plan: WavePlan) -> tuple[Array, Array]:
    return np.asarray(plan.bounds), np.arange(plan.placement.ep_size)


def ranks_of(placement: Placement, device: torch.device) -> Tensor:
    """[E] int64: the rank of each expert."""
    return _ranks(placement, device)[1:]


@lru_cache(maxsize=64)
def _ranks(placement: Placement, device: torch.device) -> Tensor:
    """[1 + E] int64: -1 for masked slots, then the rank of each expert."""
    return torch.tensor([-1, *placement.ranks()], device=device)


def count_rows(topk_ids: Tensor, placement: Placement) -> Tensor:
    """Pairs for each expert, and tokens whose first expert on its rank that is -> [2, E] int64, where the ids are.

    topk_ids [T, K] int64, -1 masks. 4 experts on 2 ranks, ids [[1, 0], [2, 0], [3, -1]]:
    pairs [2, 1, 1, 1], firsts [2, 0, 1, 1]: token 0 has both of rank 0's experts, and goes there for the first
    Ids that there are not are counted as if there were, and are for others to refuse.
    """
    library = chosen() if topk_ids.device.type == "cpu" else None
    if library is not None:
        return library.count_rows(topk_ids, ranks_of(placement, topk_ids.device))
    ids = topk_ids.sort(1).values.clamp(-1, placement.num_experts - 1) + 1  # masked slots become 0
    ranks = _ranks(placement, ids.device)[ids]
    first = torch.ones_like(ids)
    first[:, 1:] = ranks[:, 1:] != ranks[:, :-1]
    counts = ids.new_zeros(2, placement.num_experts + 1)
    counts[0].scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())  # bincount would have the host wait
    counts[1].scatter_add_(0, ids.flatten(), first.flatten())
    return counts[:, 1:]
