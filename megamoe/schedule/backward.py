"""The order of a backward call on one rank: what needs the link as early as it can be, what needs none in the gaps.

Of each wave there is Linear-1 to recompute, which needs what the forward kept; the data gradient, which needs the
gradients of outputs of other ranks, and whose results go home; and the weight gradient, which needs the data gradient's
intermediate results and no link. Recomputing fills the head, weight gradients fill gaps and the tail.
"""

# W waves

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megamoe.schedule.schedule import LOOKAHEAD, Link

RECOMPUTE, DATA, WEIGHTS = "recompute", "data", "weights"
Saved = Literal["tokens", "activations", "dispatch-again"]  # what a forward keeps for its backward
SAVED: tuple[Saved, ...] = ("tokens", "activations", "dispatch-again")
GRADIENT_FORMATS = ("bf16", "mxfp8")
HOME_BYTES = 16  # beside a row's gradient on its way home: that of its top-k weight
Transfers = list[tuple[str, int, float, float]]  # "dispatch" or "combine", wave, begin and end


@dataclass(frozen=True, slots=True)
class BackwardStep:
    """One interval of compute: RECOMPUTE, DATA or WEIGHTS of a wave."""

    work: str
    wave: int


@dataclass(frozen=True, slots=True)
class BackwardLoad:
    """Times [W] in one unit: of compute, recompute, data and weights; of the link, dispatch and combine."""

    recompute: Sequence[float]
    data: Sequence[float]
    weights: Sequence[float]
    dispatch: Sequence[float]
    combine: Sequence[float]


def schedule_backward(load: BackwardLoad) -> list[BackwardStep]:
    """Plays the call with one queue of compute and one link: at each moment the next wave's data gradient if its rows
    have arrived; else what is there to fill the gap, unless the gap is shorter than half of it.

    Fast link, 2 waves -> recompute 0, data 0, recompute 1, data 1, weights 0, weights 1
    dispatch [1, 9], all else 2 -> recompute 0, data 0, recompute 1, weights 0, data 1, weights 1
    """
    return [step for step, _, _ in play_backward(load).steps]


@dataclass(frozen=True, slots=True)
class PlayedBackward:
    """total: from the first dispatch to the last result and the last weight gradient; steps with begin and end.

    links: what the link carried, in order
    """

    total: float
    steps: list[tuple[BackwardStep, float, float]]
    links: Transfers = field(default_factory=list)


def play_backward(load: BackwardLoad, link: Link | None = None) -> PlayedBackward:
    """The schedule with its times. The link carries one thing after the other, as in schedule.play()."""
    num_waves, clock, home, link = len(load.data), 0.0, 0.0, link or Link()
    arrivals: list[float] = []
    steps: list[tuple[BackwardStep, float, float]] = []
    links: Transfers = []
    recomputed, pending = 0, list[int]()  # waves recomputed so far; waves whose weight gradients are to be computed

    def carry(lane: str, wave: int, time: float) -> float:
        begin, end = link.carry(clock, time)
        links.append((lane, wave, begin, end))
        return end

    def send() -> None:
        if len(arrivals) < num_waves:
            arrivals.append(carry("dispatch", len(arrivals), load.dispatch[len(arrivals)]))

    def compute(work: str, wave: int, time: float) -> None:
        nonlocal clock
        steps.append((BackwardStep(work, wave), clock, clock + time))
        clock += time

    for _ in range(LOOKAHEAD):
        send()
    for wave in range(num_waves):
        while True:
            gap = arrivals[wave] - clock
            if recomputed <= wave or (gap > 0 and recomputed < num_waves and gap >= load.recompute[recomputed] / 2):
                compute(RECOMPUTE, recomputed, load.recompute[recomputed])
                recomputed += 1
            elif gap > 0 and pending and gap >= load.weights[pending[0]] / 2:
                filler = pending.pop(0)
                compute(WEIGHTS, filler, load.weights[filler])
            else:
                break
        send()
        clock = max(clock, arrivals[wave])
        compute(DATA, wave, load.data[wave])
        home = carry("combine", wave, load.combine[wave])
        pending.append(wave)
    for wave in pending:
        compute(WEIGHTS, wave, load.weights[wave])
    return PlayedBackward(max(clock, home), steps, links)
