"""What would hide a plan's communication: every input inverted alone, the others as they are.

Three counts beside each other, as in the plan: the paper's; with scales, and only the pairs that leave; and the second
at the compute and the bandwidth that are reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megamoe.planner.layer.plan import Plan, PlanRequest, larger_and_smaller, plan
from megamoe.planner.layer.rule import Rule
from megamoe.schedule.formats import WIRE_FORMATS, value_bytes

Value = int | float | str | None
MOST_TOKENS = 1 << 20  # a rank's tokens beyond which nothing changes any more


@dataclass(frozen=True, slots=True)
class Requirement:
    """One input: what there is, and what hides by each count (None: nothing does). bound: at least, at most, or one of.

    Formats are ordered by their bytes: "at most mxfp8" hides with mxfp8 and with anything narrower.
    """

    key: str
    unit: str
    bound: str
    has: float | str
    paper: Value
    counted: Value
    achieved: Value


def require(planned: Plan) -> list[Requirement]:
    """In the order of what is easiest to change last: links, EP, tokens, formats, width of an expert, compute."""
    if planned.binding is None:
        return []
    request = planned.request
    found = [_link(planned, number) for number in range(len(planned.rules))]
    found += [_ep(planned), _tokens(planned)]
    found += [_format(request, key) for key in ("combine_format", "dispatch_format")]
    margins = [min(rule.margin for rule in rules) for rules in _by_count(planned)]
    width = request.model.intermediate
    found.append(_scaled("model.intermediate", "", "at least", width, [math.ceil(width / each) for each in margins]))
    peak = planned.rules[0].tflops
    key = f"hardware.{request.compute_format}_tflops"
    found.append(_scaled(key, "TFLOP/s", "at most", peak, [peak * each for each in margins]))
    return found


def _by_count(planned: Plan) -> tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[Rule, ...]]:
    return planned.rules, planned.counted, planned.achieved


def _scaled(key: str, unit: str, bound: str, has: float, values: list[float]) -> Requirement:
    return Requirement(key, unit, bound, has, *values)


def _link(planned: Plan, number: int) -> Requirement:
    """Bandwidth as the hardware's figure counts it: what is reached, divided by the share that is reached."""
    tier = planned.rules[number]
    key = "hardware.scaleup_gb_s" if tier.tier == "scale-up" else "hardware.nic_gb_s"
    needed = [tier.gb_s / rules[number].margin for rules in _by_count(planned)]
    return _scaled(key, "GB/s one way", "at least", tier.gb_s, needed)


def _ep(planned: Plan) -> Requirement:
    """The largest EP size that hides, of those that share the experts evenly."""
    plans = [planned if each.ep == planned.request.ep else _known(each) for each in larger_and_smaller(planned.request)]
    largest: list[Value] = []
    for number in range(3):
        hiding = [p.request.ep for p in plans if p and all(rule.hidden for rule in _by_count(p)[number])]
        largest.append(max(hiding, default=None))
    return Requirement("ep", "", "at most", planned.request.ep, *largest)


def _known(request: PlanRequest) -> Plan | None:
    """None where nothing is known of the links between domains."""
    try:
        return plan(replace(request, routing="balanced"))
    except ValueError:
        return None


def _tokens(planned: Plan) -> Requirement:
    """Tokens of a rank up to which the links take no longer than compute and weights do, as the layer model has it.

    The rule does not know them. With few tokens a rank waits for its experts' weights, and links have that time too.
    """
    request = planned.request

    def hides(tokens: int) -> bool:
        layer = plan(replace(request, tokens_per_rank=tokens)).layer
        return layer.communication_us <= layer.alone_us

    most = _largest(hides, MOST_TOKENS)
    paper, counted = (_any(all(rule.hidden for rule in rules)) for rules in (planned.rules, planned.counted))
    achieved: Value = "any" if most == MOST_TOKENS else most
    return Requirement("tokens_per_rank", "", "at most", request.tokens_per_rank, paper, counted, achieved)


def _any(hides: bool) -> Value:
    return "any" if hides else None


def _largest(holds: Callable[[int], bool], most: int) -> int | None:
    """The largest of 1 .. most that holds, to a hundredth; where one does not, nothing beyond it does."""
    steps = [1 << power for power in range(0, most.bit_length(), 2)]
    low = next((step for step in reversed(steps) if holds(step)), None)
    if low is None or low == steps[-1]:
        return low
    high = 4 * low
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _format(request: PlanRequest, key: str) -> Requirement:
    """The widest format that hides, of those with which the products run at the same rate."""
    widest: list[Value] = [None, None, None]
    for name in sorted(set(WIRE_FORMATS), key=lambda each: (value_bytes(each), each)):
        changed: dict[str, Any] = {key: name, "routing": "balanced"}
        tried = plan(replace(request, **changed))
        if tried.request.compute_format != request.compute_format:
            continue  # it would hide for slower products, or not for faster ones
        for number, rules in enumerate(_by_count(tried)):
            if all(rule.hidden for rule in rules):
                widest[number] = name
    return Requirement(key, "", "at most", getattr(request, key), *widest)
