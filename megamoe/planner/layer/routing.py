"""Which rank is busiest, and how many rows each of its experts computes.

    balanced                every expert the same, as far as whole tokens allow
    uniform                 every token chooses at random: chance alone makes some rank busiest
    zipf_S                  the n-th most wanted expert is chosen 1 / n^S as often; which rank holds it is chance
    power_law_A             experts' shares are drawn from a power law of exponent A between 1 and 0.8 times the tokens
                            (0.01 to 2 where there are fewer pairs than experts), then rounded to whole tokens
    power_law_sampled_A     shares drawn between 1 and 1024; every token chooses by them, without taking one twice

The last two are what the synthetic workloads of published mega-kernel tables are called (ai-dynamo/aiconfigurator), of
which power_law_A is one draw, the same whenever sizes are the same, and power_law_sampled_A a mean over ten.
Redundant experts: copies of the most loaded experts, and ranks filled anew so that they are as even as they can be.
"""

# T tokens of a rank   E experts   K experts per token   P token-expert pairs of all ranks   e experts of a rank

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = ("balanced", "uniform", "zipf", "power_law_sampled", "power_law")
_DRAWS = {"balanced": 1, "power_law": 1, "power_law_sampled": 10, "uniform": 8, "zipf": 8}
_SAMPLED_MAX = 1024.0  # the largest share of power_law_sampled, the smallest being 1
_MOST_TOKENS = 4096  # tokens drawn one by one; more are these, scaled

Groups = tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """A kind of routing and its exponent."""

    kind: str
    exponent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Routing:
        """ "zipf_1.1" -> zipf, 1.1    ValueError for anything that is not one of the kinds above"""
        kind = next((kind for kind in KINDS if text == kind or text.startswith(f"{kind}_")), None)
        number = text[len(kind) + 1 :] if kind else ""
        plain = kind in ("balanced", "uniform")
        try:
            exponent = 0.0 if plain and kind == text else float(number)
        except ValueError:
            kind = None
        if kind is None or (plain and number) or not 0 <= exponent <= 10:
            raise ValueError(
                f"routing {text!r} is not known; there are balanced, uniform, zipf_S, power_law_A and "
                f"power_law_sampled_A with an exponent between 0 and 10, such as zipf_1.1"
            )
        return cls(kind, exponent)


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank computes: (rows, number of experts with so many), experts without rows left out."""

    groups: Groups

    @property
    def rows(self) -> float:
        return sum(rows * count for rows, count in self.groups)

    @property
    def touched(self) -> int:
        """Experts whose weights are read."""
        return sum(count for _, count in self.groups)


def busiest(
    routing: str, num_experts: int, topk: int, ep: int, tokens_per_rank: float, redundant: int = 0
) -> tuple[tuple[RankLoad, ...], ...]:
    """For each draw of the routing, the ranks that may be last: the one with most rows, the one with most experts.

    redundant: copies of experts that there are beside the E; the ranks hold (E + redundant) / EP each
        balanced, 16 experts, top-4, 2 ranks, 10 tokens -> one draw, one rank, 8 experts of 5 rows
    """
    parsed = Routing.parse(routing)
    if parsed.kind == "balanced":
        return ((_balanced(num_experts + redundant, topk, ep, tokens_per_rank),),)
    tokens = max(1, round(tokens_per_rank * ep))
    return _drawn(parsed, num_experts, topk, ep, tokens, redundant)


def _balanced(slots: int, topk: int, ep: int, tokens_per_rank: float) -> RankLoad:
    pairs = tokens_per_rank * ep * topk
    local = -(-slots // ep)
    touched = min(local, max(1, math.ceil(pairs / ep))) if pairs else 0
    per_expert = max(pairs / slots, min(1.0, pairs / ep)) if touched else 0.0
    return RankLoad(((per_expert, touched),) if touched else ())


@lru_cache(maxsize=4096)
def _drawn(
    routing: Routing, num_experts: int, topk: int, ep: int, tokens: int, redundant: int
) -> tuple[tuple[RankLoad, ...], ...]:
    draws = []
    for seed in range(_DRAWS[routing.kind]):
        counts = _counts(routing, num_experts, topk, tokens, seed)
        ranks = list(_replicated(counts, ep, redundant) if redundant else _contiguous(counts, ep))
        fullest, widest = max(ranks, key=sum), max(ranks, key=lambda rank: sum(rows > 0 for rows in rank))
        draws.append(tuple(_load(rank) for rank in ([fullest] if fullest is widest else [fullest, widest])))
    return tuple(draws)


def _load(rank: list[float]) -> RankLoad:
    return RankLoad(tuple(Counter(rows for rows in rank if rows > 0).items()))


def _contiguous(counts: list[float], ep: int) -> Iterator[list[float]]:
    """Runs as even as they can be, the first ones one longer."""
    share, extra = divmod(len(counts), ep)
    start = 0
    for rank in range(ep):
        stop = start + share + (rank < extra)
        yield counts[start:stop]
        start = stop


def _replicated(counts: list[float], ep: int, redundant: int) -> list[list[float]]:
    """Copies for whatever has most rows a copy, then the largest first to the emptiest rank that has room.

    [8, 1, 1, 2], 2 ranks, 2 copies: 8 three times, 2.67 each -> [2.67, 2.67, 1] and [2.67, 2, 1]
    """
    copies = [(-rows, 1, rows) for rows in counts]
    heapq.heapify(copies)
    for _ in range(redundant):
        _, number, rows = copies[0]
        heapq.heapreplace(copies, (-rows / (number + 1), number + 1, rows))
    parts = sorted((rows / number for _, number, rows in copies for _ in range(number)), reverse=True)
    room = -(-len(parts) // ep)
    ranks: list[tuple[float, int, list[float]]] = [(0.0, rank, []) for rank in range(ep)]
    full = []
    for rows in parts:
        load, rank, inside = heapq.heappop(ranks)
        inside.append(rows)
        if len(inside) < room:
            heapq.heappush(ranks, (load + rows, rank, inside))
        else:
            full.append(inside)
    return full + [inside for _, _, inside in ranks]


def _counts(routing: Routing, num_experts: int, topk: int, tokens: int, seed: int) -> list[float]:
    """Rows of every expert of all ranks."""
    pairs = tokens * topk
    if routing.kind == "power_law":
        bounds = (1.0, tokens * 0.8) if pairs > num_experts else (0.01, 2.0)
        return _rounded(_power_law(num_experts, routing.exponent, *bounds, seed), pairs, tokens)
    drawn = min(tokens, _MOST_TOKENS)
    return [rows * (tokens / drawn) for rows in _token_by_token(routing, num_experts, topk, drawn, seed)]


@lru_cache(maxsize=1024)
def _token_by_token(routing: Routing, num_experts: int, topk: int, tokens: int, seed: int) -> tuple[int, ...]:
    """Rows of every expert when each token draws K of them by their shares, none twice."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if routing.kind == "power_law_sampled":
        shares = _power_law(num_experts, routing.exponent, 1.0, _SAMPLED_MAX, seed)
    elif routing.kind == "zipf":
        shares = rng.permutation(np.arange(1.0, num_experts + 1) ** -routing.exponent)
    else:
        shares = np.ones(num_experts)
    keys = rng.standard_exponential((tokens, num_experts), dtype=np.float32) / shares.astype(np.float32)
    chosen = np.argpartition(keys, topk - 1, axis=1)[:, :topk]  # the K that come first in a race at these rates
    return tuple(np.bincount(chosen.ravel(), minlength=num_experts).tolist())


def _power_law(size: int, exponent: float, low: float, high: float, seed: int) -> NDArray[np.float64]:
    """Shares of a power law by the inverse of its distribution, from the Mersenne Twister's 24-bit fractions."""
    import numpy as np  # here and below: balanced routing does not wait for it

    uniform = (np.random.RandomState(seed).randint(0, 2**32, size, dtype=np.uint32) & 0xFFFFFF) / 2.0**24
    if exponent == 1:
        return low * (high / low) ** uniform
    power = 1 - exponent
    return ((high**power - low**power) * uniform + low**power) ** (1 / power)  # type: ignore[no-any-return]


def _rounded(shares: NDArray[np.float64], pairs: int, tokens: int) -> list[float]:
    """Shares as whole rows that sum to `pairs`, the largest remainders rounded up.

    A token chooses an expert once: no expert has more rows than there are tokens.
    """
    import numpy as np

    exact = shares / shares.sum() * pairs
    counts = np.floor(exact)
    up = np.argsort(counts - exact, kind="stable")[: int(pairs - counts.sum())]
    counts[up] += 1
    return np.minimum(counts, tokens).tolist()  # type: ignore[no-any-return]
