"""Waves: which experts travel and compute together. Pure functions of integers.

The plan cuts every rank's experts into waves; sender and receiver must agree on it, so it follows from what all ranks
know. In which order a rank then computes is its own affair: see schedule/schedule.py.

The rule for waves="auto" before anything is known of link and compute (afterwards see schedule/cost_model.py): as many
waves as keep an average dispatch message at 256 KiB, between 1 and 8, at least one expert a wave, one where a rank is
alone. Smaller messages do not win back what a wave costs; above 8 waves, head and tail are under an eighth of the
transfer already, and rank-local rows fill them.
"""

# P ranks   W waves   e experts of one rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from megamoe.parallel.placement import Placement
from megamoe.schedule.cost_model import MAX_AUTO_WAVES

Waves = int | str | Sequence[int]

AUTO_MESSAGE_BYTES = 256 * 1024
MAX_WAVES = 10_000  # messages of a wave are told apart by its number, for which there is so much room


def check_waves(waves: Waves) -> int | str | tuple[int, ...]:
    """waves as a positive integer, "auto", or the relative sizes of uneven waves. ValueError for anything else."""
    if isinstance(waves, str) and waves == "auto":
        return "auto"
    number = len(waves) if isinstance(waves, Sequence) and not isinstance(waves, str) else waves
    if isinstance(number, int) and number > MAX_WAVES:
        raise ValueError(f"waves are at most {MAX_WAVES}, got {number}")
    if isinstance(waves, int) and not isinstance(waves, bool) and waves > 0:
        return waves
    if isinstance(waves, Sequence) and not isinstance(waves, str) and waves:
        sizes = tuple(waves)
        if all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            return sizes
    raise ValueError(f'waves must be "auto", a positive integer or positive relative sizes, got {waves!r}')


def auto_waves(placement: Placement, rows_per_rank: float, row_bytes: float) -> int:
    """Number of waves by the rule above.

    rows_per_rank: token-expert pairs that a rank has on average, row_bytes: bytes sent for each
        16 experts on 2 ranks, 8192 rows of 1060 bytes: 4.3 MB to each peer, 16 messages -> 8
        the same with 4 rows: one message -> 1
    """
    if placement.ep_size == 1:
        return 1
    to_one_peer = rows_per_rank * row_bytes / placement.ep_size
    return max(1, min(MAX_AUTO_WAVES, placement.most, int(to_one_peer / AUTO_MESSAGE_BYTES)))


@dataclass(frozen=True, slots=True)
class WavePlan:
    """placement, and for every rank the W + 1 global expert ids at which its waves begin and end."""

    placement: Placement
    bounds: tuple[tuple[int, ...], ...]

    @property
    def num_waves(self) -> int:
        return len(self.bounds[0]) - 1

    def experts(self, ep_rank: int, wave: int) -> range:
        """Global ids of the experts of one rank's wave; may be empty."""
        return range(self.bounds[ep_rank][wave], self.bounds[ep_rank][wave + 1])

    def waves(self, ep_rank: int) -> list[range]:
        """experts() of all waves of one rank."""
        return [self.experts(ep_rank, wave) for wave in range(self.num_waves)]

    def order(self) -> list[int]:
        """All experts as their rows travel: by wave, then rank, then id.

        4 experts, 2 ranks, 2 waves  ->  [0, 2, 1, 3]
        """
        ranks = range(self.placement.ep_size)
        return [e for wave in range(self.num_waves) for rank in ranks for e in self.experts(rank, wave)]


@lru_cache(maxsize=64)
def plan_waves(placement: Placement, waves: int | tuple[int, ...]) -> WavePlan:
    """Cuts each rank's experts into waves of equal size, or of the given relative sizes, rounded.

    5 experts of a rank in 2 waves -> 3 + 2       in (1, 3) -> 1 + 4       in 7 waves -> some are empty
    """
    sizes = [1] * waves if isinstance(waves, int) else list(waves)
    shares = [0, *accumulate(sizes)]
    bounds = []
    for rank in range(placement.ep_size):
        ids = placement.experts(rank)
        bounds.append(tuple(ids.start + _rounded(len(ids) * share, shares[-1]) for share in shares))
    return WavePlan(placement, tuple(bounds))


def _rounded(numerator: int, denominator: int) -> int:
    """Nearest integer of a fraction, half up.    5, 2 -> 3    5, 4 -> 1"""
    return (2 * numerator + denominator) // (2 * denominator)
