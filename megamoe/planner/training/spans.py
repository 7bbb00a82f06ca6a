"""A training step as a timeline: the forward's spans as they are, the backward's behind them."""

from __future__ import annotations

from megamoe.planner.report.data import Span, Timeline
from megamoe.planner.training.plan import TrainingPlan
from megamoe.schedule.backward import DATA, RECOMPUTE, WEIGHTS, Transfers

LANES = {RECOMPUTE: "linear-1", DATA: "data gradients", WEIGHTS: "weight gradients"}


def step_timeline(forward: Timeline, found: TrainingPlan) -> Timeline:
    """Head is the forward's, tail what is left of the backward when its last product has ended."""
    back = found.backward
    begin = forward.layer_us
    start = begin + back.fixed_us + back.latency_us
    spans = [*forward.spans, Span("fixed", "backward: launches around the waves", begin, start, "fixed")]
    clock = 0.0
    for step, begun, end in back.played.steps:
        if end <= begun:
            continue
        if begun > clock + 1e-9:
            spans.append(Span("data gradients", f"wave {step.wave + 1} waits", start + clock, start + begun, "stall"))
        spans.append(Span(LANES[step.work], f"wave {step.wave + 1}", start + begun, start + end))
        clock = end
    spans += _links(back.played.links, start)
    end = start + back.played.total
    spans.append(Span("tail", "backward: slot sum", end, end + back.sum_us))
    return Timeline(tuple(spans), end + back.sum_us, forward.head_us, back.sum_us + max(0.0, back.played.total - clock))


def _links(links: Transfers, start: float) -> list[Span]:
    return [
        Span(lane, f"gradients, wave {wave + 1}", start + begun, start + end)
        for lane, wave, begun, end in links
        if end > begun
    ]
