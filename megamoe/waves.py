"""Waves: which experts travel and compute together, and in what order a rank computes. Pure functions of integers.

Two parts. The **plan** cuts every rank's experts into waves; sender and receiver must agree on it, so it follows
from what all ranks know. The **schedule** is this rank's own order of work: rows whose expert is on their own rank
need no link, so some of them are computed before the first wave has arrived (head) and some while the last wave's
results travel (tail). No other rank has to know.

The rule for waves="auto" before anything is known of link and compute (afterwards see pace.py): as many waves as keep
an average dispatch message at 256 KiB, between 1 and 8, at least one expert a wave, and one wave where a rank is alone.
Smaller messages do not win back what a wave costs; above 8 waves, head and tail are under an eighth of the transfer
already, and rank-local rows fill them.
"""

# P ranks   W waves   e experts of one rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megamoe.parallel.placement import Placement

Waves = int | str | Sequence[int]

LOOKAHEAD = 2  # waves whose rows may be on their way beyond the one that computes
MAX_AUTO_WAVES = 8
AUTO_MESSAGE_BYTES = 256 * 1024


def check_waves(waves: Waves) -> int | str | tuple[int, ...]:
    """waves as a positive integer, "auto", or the relative sizes of uneven waves. ValueError for anything else."""
    if waves == "auto":
        return "auto"
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

    def order(self) -> list[int]:
        """All experts as their rows travel: by wave, then rank, then id.

        4 experts, 2 ranks, 2 waves  ->  [0, 2, 1, 3]
        """
        ranks = range(self.placement.ep_size)
        return [e for wave in range(self.num_waves) for rank in ranks for e in self.experts(rank, wave)]


def plan_waves(placement: Placement, waves: int | Sequence[int]) -> WavePlan:
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


@dataclass(frozen=True, slots=True)
class Step:
    """One stretch of a rank's compute: the rank-local rows of some experts of a wave, and the wave's arrived rows.

    wave   which one            local   experts whose rank-local rows are computed here
    arrived   whether the rows of other ranks are computed here too
    """

    wave: int
    local: range
    arrived: bool


@dataclass(frozen=True, slots=True)
class Load:
    """What this rank computes, in rows, and what a row and a weight cost, in units of one computed row.

    local[e]         rank-local rows of each of this rank's experts
    arriving[w]      rows that come from other ranks in each wave
    dispatch_cost    time to receive a row, and
    combine_cost     time to send its result, where the link is at its balance point with compute
    decode_cost      time to make an expert's weights ready, and
    step_cost        time that one stretch of work more takes beside its rows, as rows
    """

    local: Sequence[int]
    arriving: Sequence[int]
    dispatch_cost: float
    combine_cost: float
    decode_cost: float
    step_cost: float = 0.0


def schedule(plan: WavePlan, ep_rank: int, load: Load) -> list[Step]:
    """This rank's order of work: head, then every wave, then tail.

    The head takes rank-local rows from the first wave on until they cover the arrival of the first wave; the tail
    takes them from the last wave back until they cover the last wave's way home. Both are measured at the balance
    point, the only place where it matters: with a faster link there is less to cover, with a slower one compute is
    not the limit. An expert that is split is made ready twice, which is only worth it while more than that is left
    to cover; and where both are covered sooner than another stretch of work is begun, there is no head and no tail.
    """
    ids = plan.placement.experts(ep_rank)
    waves = [plan.experts(ep_rank, wave) for wave in range(plan.num_waves)]
    busy = [rows for rows in load.arriving if rows]
    if not busy:
        return [Step(wave, waves[wave], True) for wave in range(plan.num_waves)]
    to_cover = [rows * cost for rows, cost in ((busy[0], load.dispatch_cost), (busy[-1], load.combine_cost))]
    first, last = (each if each > load.step_cost else 0.0 for each in to_cover)
    head_end = _cover(load.local, load.decode_cost, first)
    tail_size = _cover(load.local[head_end:][::-1], load.decode_cost, last)
    head = range(ids.start, ids.start + head_end)
    tail = range(ids.stop - tail_size, ids.stop)
    middle = range(head.stop, tail.start)
    steps = [Step(wave, _overlap(experts, head), False) for wave, experts in enumerate(waves)]
    steps += [Step(wave, _overlap(experts, middle), True) for wave, experts in enumerate(waves)]
    steps += [Step(wave, _overlap(experts, tail), False) for wave, experts in enumerate(waves)]
    return [step for step in steps if step.arrived or step.local]


def _cover(rows: Sequence[int], decode_cost: float, needed: float) -> int:
    """How many experts, from the first on, it takes to cover `needed`, as long as the next one gains anything.

    rows [300, 300, 300], decode_cost 50:   needed 500 -> 2   needed 40 -> 0, a weight decoded twice costs more
    """
    covered = 0.0
    for taken, count in enumerate(rows):
        if needed - covered <= decode_cost:
            return taken
        covered += count + decode_cost if count else 0.0
    return len(rows)


def _overlap(a: range, b: range) -> range:
    """range(0, 4), range(2, 9) -> range(2, 4)"""
    start = max(a.start, b.start)
    return range(start, max(min(a.stop, b.stop), start))
