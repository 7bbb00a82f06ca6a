"""How fast a layer's compute and its link are on a rank, and which number of waves they make best.

The schedule is played as it will run, on a rank like all others: its compute is one queue, its link another, which
carries dispatched rows and results in the order in which they are sent. The layer asks for its waves here, with what
it measured; the planner with what a machine's profile says.
"""

# R rows a rank computes   P ranks   W waves   e experts of a rank

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megamoe.schedule.schedule import Load, Played, Work, schedule
from megamoe.schedule.schedule import play as play_works

MAX_AUTO_WAVES = 8
# Ranks are not in step, which a schedule that is played does not show, and small waves forgive that: up to this share
# of the time may be spent on more waves where communication takes as long as compute, less where it is shorter.
# Measured with `megamoe bench --waves sweep`, two ranks on two cores of a Zen 4 CPU over gloo, 2026-11-24: at the
# balance point 8 waves took 167 ms where 2 took 195, and 179 where 2 took 186.
FORGIVENESS = 0.03
_STEP_ROWS = (
    50.0  # what beginning an interval of work costs as long as nothing is measured: half a millisecond, in rows
)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds: row_s to compute a row; out_s and home_s for its two journeys over the link; wave_s for a wave itself.

    decode_rows: what making an expert's weights ready costs, in rows.
    """

    row_s: float
    out_s: float
    home_s: float
    wave_s: float
    decode_rows: float = 0.0

    @classmethod
    def balanced(cls, out_bytes: float, home_bytes: float, f_remote: float, decode_rows: float) -> CostModel:
        """Where all journeys together take as long as all compute, whatever that is: the place to be prepared for."""
        journey_s = 1.0 / f_remote if f_remote else 0.0
        out = out_bytes / (out_bytes + home_bytes)
        return cls(1.0, journey_s * out, journey_s * (1 - out), _STEP_ROWS, decode_rows)

    def load(self, local: list[int], arriving: list[int]) -> Load:
        """What the schedule needs to know, in units of one computed row."""
        out, home, step = (each / self.row_s for each in (self.out_s, self.home_s, self.wave_s))
        return Load(local, arriving, out, home, self.decode_rows, step)


@dataclass(frozen=True, slots=True)
class Spread:
    """Experts over ranks: the most that one rank holds, e, and how many ranks there are, P."""

    experts_per_rank: int
    ep_size: int

    def waves(self, number: int) -> list[range]:
        """e experts in so many waves, as even as they can be.    5 in 2 -> [0, 3) and [3, 5)"""
        bounds = [(2 * self.experts_per_rank * wave + number) // (2 * number) for wave in range(number + 1)]
        return [range(*ends) for ends in pairwise(bounds)]


def best_waves(spread: Spread, rows_per_rank: float, cost_model: CostModel) -> int:
    """Number of waves, 1 to 8 and at most one expert each: the most that take hardly longer than the best does."""
    if spread.ep_size == 1:
        return 1
    numbers = range(1, min(MAX_AUTO_WAVES, spread.experts_per_rank) + 1)
    times = {waves: play(spread, waves, rows_per_rank, cost_model).total for waves in numbers}
    journeys = (cost_model.out_s + cost_model.home_s) * (1 - 1 / spread.ep_size)
    longest = min(times.values()) * (1 + FORGIVENESS * min(1.0, journeys / cost_model.row_s))
    return max(waves for waves, time in times.items() if time <= longest)


def play(spread: Spread, waves: int, rows_per_rank: float, cost_model: CostModel) -> Played:
    """What a rank does with R rows, spread evenly over experts and sources, from first dispatch to last result.

    2 ranks with 2 experts each, 1 wave, R 400, row_s 1, out_s 0.5, home_s 1: rows arrive at 100, and until then one
    expert's rank-local rows are computed; those that came are done at 300 and home at 500, the other expert's at 400
    """
    per_source = rows_per_rank / spread.experts_per_rank / spread.ep_size
    experts = spread.waves(waves)
    local = [round(per_source)] * spread.experts_per_rank
    arriving = [per_source * (spread.ep_size - 1) * len(ids) for ids in experts]
    works = []
    for step in schedule(experts, cost_model.load(local, [round(rows) for rows in arriving])):
        rows = per_source * len(step.local) + (arriving[step.wave] if step.arrived else 0)
        works.append(Work(step.wave, rows * cost_model.row_s + cost_model.wave_s, step.arrived))
    out, home = ([rows * each for rows in arriving] for each in (cost_model.out_s, cost_model.home_s))
    return play_works(works, out, home)
