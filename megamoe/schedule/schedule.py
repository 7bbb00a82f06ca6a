"""The order in which a rank computes, and a schedule played: one queue of compute, one link that carries both ways.

Rows whose expert is on their own rank need no link, so some of them are computed before the first wave has arrived
(head) and some while the last wave's results travel (tail). The layer runs these steps; the planner plays them.
"""

# W waves   e experts of one rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOOKAHEAD = 2  # waves whose rows may be on their way beyond the one that computes


@dataclass(frozen=True, slots=True)
class Step:
    """One interval of a rank's compute: the rank-local rows of some experts of a wave, and the wave's arrived rows.

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
    step_cost        time that one interval of work more takes beside its rows, as rows
    """

    local: Sequence[int]
    arriving: Sequence[int]
    dispatch_cost: float
    combine_cost: float
    decode_cost: float
    step_cost: float = 0.0


def schedule(waves: Sequence[range], load: Load) -> list[Step]:
    """A rank's order of work: head, then every wave, then tail. waves: the rank's experts, consecutive ids, by wave.

    The head takes rank-local rows from the first wave on until they cover the arrival of the first wave; the tail
    takes them from the last wave back until they cover the last wave's way home. Both are measured at the balance
    point, the only place where it matters: with a faster link there is less to cover, with a slower one compute is
    not the limit. An expert that is split is made ready twice, which is only worth it while more than that is left
    to cover; and where both are covered sooner than another interval of work is begun, there is no head and no tail.
    """
    busy = [rows for rows in load.arriving if rows]
    if not busy:
        return [Step(wave, experts, True) for wave, experts in enumerate(waves)]
    to_cover = [rows * cost for rows, cost in ((busy[0], load.dispatch_cost), (busy[-1], load.combine_cost))]
    first, last = (each if each > load.step_cost else 0.0 for each in to_cover)
    head_end = _cover(load.local, load.decode_cost, first)
    tail_size = _cover(load.local[head_end:][::-1], load.decode_cost, last)
    start, stop = waves[0].start, waves[-1].stop
    head = range(start, start + head_end)
    tail = range(stop - tail_size, stop)
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


@dataclass(frozen=True, slots=True)
class Work:
    """A step as it is played: how long it computes, in any unit of time, and whether it needs its wave to be there."""

    wave: int
    time: float
    arrived: bool = True


@dataclass(frozen=True, slots=True)
class Span:
    """One interval of one lane (dispatch, compute or combine), from start to end."""

    lane: str
    wave: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Played:
    """A schedule that was played, in its own unit of time.

    total   from the first dispatch to the last result    stalls   compute that waited for rows, head included
    head    until the first step computed                 tail     from the last step's end to the last result
    """

    total: float
    head: float
    tail: float
    stalls: float
    spans: tuple[Span, ...]


class Link:
    """A link that carries one thing after the other.

    burst: a shaped link is a bucket of tokens: what it did not carry while it rested, up to so much time, passes at
    once. least: what a message takes even then.
    """

    def __init__(self, burst: float = 0.0, least: float = 0.0) -> None:
        self._burst, self._least = burst, least
        self._used = -burst  # the time up to which the bucket's tokens are spent
        self._end = 0.0

    def carry(self, clock: float, time: float) -> tuple[float, float]:
        """What takes so much time and is sent now -> when it begins to travel, and when it has arrived.

        burst 3, rested: 2 at 0 -> 0, 0    2 at 0 -> 0, 1    2 at 10 -> 10, 10
        """
        begin = max(self._end, clock)
        self._used = max(self._used, clock - self._burst) + time
        self._end = max(self._used, begin + min(self._least, time))
        return begin, self._end


def play(
    works: Sequence[Work],
    dispatch: Sequence[float],
    combine: Sequence[float],
    lookahead: int = LOOKAHEAD,
    link: Link | None = None,
) -> Played:
    """Plays steps. dispatch[w] and combine[w]: the time that a wave's rows, and its results, keep the link busy.

    The link carries one thing after the other in the order in which they are sent: `lookahead` waves at once at the
    start, another wave when one begins to compute, and a wave's results when it has been computed. link: None for one
    without a burst.

    one wave: dispatch 100, compute 300, combine 200 -> 600; of two halves each: arrive at 50 and 100, computed at 200
    and 350, home at 300 and 450 -> 450
    """
    clock = stalls = home = 0.0
    link = link or Link()
    arrivals: list[float] = []
    spans: list[Span] = []

    def send(wave: int) -> None:
        if wave < len(dispatch):
            start, end = link.carry(clock, dispatch[wave])
            arrivals.append(end)
            spans.append(Span("dispatch", wave, start, end))

    for wave in range(lookahead):
        send(wave)
    for work in works:
        if work.arrived:
            send(work.wave + lookahead)
            stalls += max(0.0, arrivals[work.wave] - clock)
            clock = max(clock, arrivals[work.wave])
        spans.append(Span("compute", work.wave, clock, clock + work.time))
        clock += work.time
        if work.arrived:
            start, home = link.carry(clock, combine[work.wave])
            spans.append(Span("combine", work.wave, start, home))
    total = max(clock, home, *arrivals)
    head = next((span.start for span in spans if span.lane == "compute"), 0.0)
    return Played(total, head, total - clock, stalls, tuple(spans))
