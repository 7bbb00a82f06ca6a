"""Which rank is busiest, and how many rows each of its experts computes.

    balanced                every expert the same, as far as whole tokens allow
    uniform                 every token chooses at random: chance alone makes some rank busiest
    zipf_S                  the n-th most wanted expert is chosen 1 / n^S as often; which rank holds it is chance
    power_law_A             experts' shares are drawn from a power law of exponent A between 1 and 0.8 times the tokens
                            (0.01 to 2 where there are fewer pairs than experts), then rounded to whole tokens
    power_law_sampled_A     shares drawn between 1 and 0.8 times the tokens, but at least 512; every token chooses by
                            them, without taking one twice
    power_law_sampled_A_M   the same with shares between 1 and M, as power_law_sampled_1.9_1024

The last are what the synthetic workloads of published mega-kernel tables are called (ai-dynamo/aiconfigurator), of
which power_law_A is one draw, the same whenever sizes are the same, and power_law_sampled_A a mean over ten.
Redundant experts: copies of the most loaded experts, and ranks filled anew so that they are as even as they can be.
"""

# T tokens of a rank   E experts   K experts per token   P token-expert pairs of all ranks   e experts of a rank

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = ("balanced", "uniform", "zipf", "power_law_sampled", "power_law")
_DRAWS = {"balanced": 1, "power_law": 1, "power_law_sampled": 10, "uniform": 8, "zipf": 8}
_SAMPLED_MAX = 512.0  # the largest share of power_law_sampled where 0.8 times the tokens are fewer
_MOST_SHARE = 1e12
_MOST_TOKENS = 4096  # tokens drawn one by one; of more, chance counts as the root of their number

Groups = tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """A kind of routing, its exponent, and the largest share of power_law_sampled where it is given, else 0."""

    kind: str
    exponent: float = 0.0
    most: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Routing:
        """ "zipf_1.1" -> zipf, 1.1    ValueError for anything that is not one of the kinds above"""
        kind = next((kind for kind in KINDS if text == kind or text.startswith(f"{kind}_")), None)
        number = text[len(kind) + 1 :] if kind else ""
        plain = kind in ("balanced", "uniform")
        number, bounded, bound = number.partition("_")
        try:
            exponent = 0.0 if plain and kind == text else float(number)
            most = float(bound) if bounded else 0.0
        except ValueError:
            kind = None
        if bounded and not (kind == "power_law_sampled" and 1 < most <= _MOST_SHARE):
            kind = None
        if kind is None or (plain and number) or not 0 <= exponent <= 10:
            raise ValueError(
                f"routing {text!r} is not known; there are balanced, uniform, zipf_S, power_law_A and "
                f"power_law_sampled_A with an exponent between 0 and 10, such as zipf_1.1, and power_law_sampled_A_M"
            )
        return cls(kind, exponent, most)


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank computes: (rows, number of experts with so many), experts without rows left out.

    experts: that the rank holds, those without rows among them
    """

    groups: Groups
    experts: int = field(default=0, compare=False)

    @property
    def rows(self) -> float:
        return sum(rows * count for rows, count in self.groups)

    @property
    def touched(self) -> int:
        """Experts whose weights are read."""
        return sum(count for _, count in self.groups)


def busiest(
    routing: str, num_experts: int, topk: int, ep: int, tokens_per_rank: float, redundant: int = 0, draws: int = 0
) -> tuple[tuple[RankLoad, ...], ...]:
    """For each draw of the routing, the ranks that may be last: the one with most rows, the one with most experts.

    redundant: copies of experts that there are beside the E; the ranks hold (E + redundant) / EP each
    draws: how many, 0 for as many as the kind of routing has
        balanced, 16 experts, top-4, 2 ranks, 10 tokens -> one draw, one rank, 8 experts of 5 rows
    """
    parsed = Routing.parse(routing)
    if parsed.kind == "balanced":
        return ((_balanced(num_experts + redundant, topk, ep, tokens_per_rank),),)
    tokens = max(1, round(tokens_per_rank * ep))
    return _drawn(parsed, num_experts, topk, ep, tokens, redundant, draws or _DRAWS[parsed.kind])


def _balanced(slots: int, topk: int, ep: int, tokens_per_rank: float) -> RankLoad:
    pairs = tokens_per_rank * ep * topk
    local = -(-slots // ep)
    touched = min(local, max(1, math.ceil(pairs / ep))) if pairs else 0
    per_expert = max(pairs / slots, min(1.0, pairs / ep)) if touched else 0.0
    return RankLoad(((per_expert, touched),) if touched else (), local)


@lru_cache(maxsize=4096)
def _drawn(
    routing: Routing, num_experts: int, topk: int, ep: int, tokens: int, redundant: int, number: int
) -> tuple[tuple[RankLoad, ...], ...]:
    draws = []
    for seed in range(number):
        counts = _counts(routing, num_experts, topk, ep, tokens, seed)
        ranks = list(_replicated(counts, ep, redundant) if redundant else _contiguous(counts, ep))
        fullest, widest = max(ranks, key=sum), max(ranks, key=lambda rank: sum(rows > 0 for rows in rank))
        draws.append(tuple(_load(rank) for rank in ([fullest] if fullest is widest else [fullest, widest])))
    return tuple(draws)


def _load(rank: list[float]) -> RankLoad:
    return RankLoad(tuple(Counter(rows for rows in rank if rows > 0).items()), len(rank))


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


def _counts(routing: Routing, num_experts: int, topk: int, ep: int, tokens: int, seed: int) -> list[float]:
    """Rows of every expert of all ranks."""
    pairs = tokens * topk
    if routing.kind == "power_law":
        bounds = (1.0, tokens * 0.8) if pairs > num_experts else (0.01, 2.0)
        return _dealt(_power_law(num_experts, routing.exponent, *bounds, seed), pairs, tokens, ep)
    most = routing.most or max(_SAMPLED_MAX, 0.8 * tokens)
    drawn, expected = _token_by_token(routing, num_experts, topk, min(tokens, _MOST_TOKENS), most, seed)
    if tokens <= _MOST_TOKENS:
        return list(drawn)
    chance = math.sqrt(tokens / _MOST_TOKENS)
    return [
        min(float(tokens), max(0.0, mean * tokens + (rows - mean * _MOST_TOKENS) * chance))
        for rows, mean in zip(drawn, expected, strict=True)
    ]


@lru_cache(maxsize=1024)
def _token_by_token(
    routing: Routing, num_experts: int, topk: int, tokens: int, most: float, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Rows of every expert when each token draws K of them by their shares, none twice; and what a token may expect.

    most: the largest share of power_law_sampled, the smallest being 1
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    if routing.kind == "power_law_sampled":
        shares = _power_law(num_experts, routing.exponent, 1.0, most, seed)
    elif routing.kind == "zipf":
        shares = rng.permutation(np.arange(1.0, num_experts + 1) ** -routing.exponent)
    else:
        shares = np.ones(num_experts)
    keys = rng.standard_exponential((tokens, num_experts), dtype=np.float32) / shares.astype(np.float32)
    chosen = np.argpartition(keys, topk - 1, axis=1)[:, :topk]  # the K that come first in a race at these rates
    return tuple(np.bincount(chosen.ravel(), minlength=num_experts).tolist()), tuple(_expected(shares, topk).tolist())


def _expected(shares: NDArray[np.float64], topk: int) -> NDArray[np.float64]:
    """How likely each expert is among the K that come first: 1 - exp(-share * t) at the time t when K are expected."""
    import numpy as np

    if topk >= len(shares):
        return np.ones_like(shares)
    low, high = 0.0, 1.0
    while (1 - np.exp(-shares * high)).sum() < topk:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-shares * middle)).sum() < topk else (low, middle)
    return 1 - np.exp(-shares * high)


def _power_law(size: int, exponent: float, low: float, high: float, seed: int) -> NDArray[np.float64]:
    """Shares of a power law by the inverse of its distribution, from the Mersenne Twister's 24-bit fractions."""
    import numpy as np  # here and below: balanced routing does not wait for it

    uniform = (np.random.RandomState(seed).randint(0, 2**32, size, dtype=np.uint32) & 0xFFFFFF) / 2.0**24
    if exponent == 1:
        return low * (high / low) ** uniform
    power = 1 - exponent
    return ((high**power - low**power) * uniform + low**power) ** (1 / power)  # type: ignore[no-any-return]


def _dealt(shares: NDArray[np.float64], pairs: int, tokens: int, ep: int) -> list[float]:
    """Shares as whole rows that sum to `pairs`, as the published workloads round them.

    Each is rounded by itself, at most to the number of tokens, since a token chooses an expert once. The rows that then
    lack or are too many go around the ranks, one each, to the expert of the rank that has least, or from the one that
    has most: where there are fewer pairs than experts nearly every share rounds to 0, and each rank has as many rows.
    """
    import numpy as np

    counts = np.minimum(np.round(shares / shares.sum() * pairs), tokens)
    ranks = list(_contiguous(counts.tolist(), ep))
    lack = round(pairs - counts.sum())
    if lack > 0:
        return _spread(ranks, lack, float(tokens))
    return [-rows for rows in _spread([[-rows for rows in rank] for rank in ranks], -lack, 0.0)]


def _spread(ranks: list[list[float]], number: int, most: float) -> list[float]:
    """`number` rows more, one for each rank in turn, for the expert that has least and fewer than `most`.

    ranks [[0, 2], [5, 5]], 3 rows, most 6 -> 1, 2, 6, 5 and then 2, 2, 6, 5
    """
    room = [sum(most - rows for rows in rank) for rank in ranks]
    given = [0.0] * len(ranks)
    while number:
        open_ranks = [at for at, left in enumerate(room) if left > 0]
        each = max(1, min(number // len(open_ranks), int(min(room[at] for at in open_ranks))))
        for at in open_ranks[:number]:
            given[at], room[at], number = given[at] + each, room[at] - each, number - each
    return [rows for rank, more in zip(ranks, given, strict=True) for rows in _raised(rank, more, most)]


def _raised(rows: list[float], number: float, most: float) -> list[float]:
    """`number` added one by one to the smallest.    [0, 2, 9], 5 -> [4, 3, 9]"""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    raised, lowest = list(rows), 0
    while number > 0:
        lowest = sum(rows[at] <= raised[order[0]] for at in order)  # how many stand at the level
        level = raised[order[0]]
        above = min(rows[order[lowest]] if lowest < len(rows) else most, most)
        steps = min(number // lowest, above - level)
        for at in order[:lowest]:
            raised[at] = level + steps
        number -= steps * lowest
        if number < lowest and steps < above - level:
            for at in order[: int(number)]:
                raised[at] += 1
            return raised
    return raised
