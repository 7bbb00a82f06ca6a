"""What moves the result: every input 25 % lower and 25 % higher, alone.

The result is the layer's time, or with a workload the tokens per second of a device. What was picked stays picked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megamoe.catalog import figures
from megamoe.planner.answer import Answer, answer
from megamoe.planner.question import Question, Subject
from megamoe.planner.search.sweep import vary

CHANGE = 0.25
_ORDINARY = ("hidden", "intermediate", "topk", "num_experts")  # of the model
_HARDWARE = ("memory_tb_s", "scaleup_gb_s", "nic_gb_s")
_COUNTS = ("tokens_per_rank", "batch", "context")


@dataclass(frozen=True, slots=True)
class Moved:
    """The result with one input lower and higher, where it can be (an efficiency stops at 1, experts at top-k)."""

    key: str
    low: float
    base: float
    high: float

    @property
    def span(self) -> float:
        return max(self.low, self.base, self.high) - min(self.low, self.base, self.high)


def result_of(found: Answer) -> tuple[str, float, str]:
    """Name, value and unit of what is looked at."""
    if found.training is not None:
        return "step time", found.training.step_us, "us"
    if found.serving is None:
        return "layer time", found.plan.layer.layer_us, "us"
    return "rate of a device", found.serving.tokens_per_s_per_device, "tokens/s"


def sensitivity(found: Answer) -> list[Moved]:
    """Inputs by how far they move the result, those that move nothing left out."""
    base = result_of(found)[1]
    moved = []
    for key, value in inputs(found):
        low, high = (_result(found, key, value, 1 + sign * CHANGE, base) for sign in (-1, 1))
        moved.append(Moved(key, low, base, high))
    return sorted((each for each in moved if each.span > 1e-9 * base), key=lambda each: -each.span)


def inputs(found: Answer) -> Iterator[tuple[str, float]]:
    """Every number that the result may depend on, by its key."""
    question, subject = found.question, found.subject
    for key in _COUNTS:
        given = getattr(question, key)
        if given is None and key == "tokens_per_rank" and found.serving is None:
            given = found.plan.request.tokens_per_rank
        if given is not None:
            yield key, given
    hardware = figures(subject.hardware)
    for key in (*_HARDWARE, *(f"{fmt}_tflops" for fmt in subject.hardware.formats)):
        if key in hardware:
            yield f"hardware.{key}", hardware[key].value
    for key in _ORDINARY:
        yield f"model.{key}", getattr(subject.model, key)
    for key, figure in figures(subject.profile).items():
        yield f"profile.{key}", figure.value


def _result(found: Answer, key: str, value: float, factor: float, base: float) -> float:
    """The result with one input changed; base where the changed one makes no sense, such as EP64 of 48 experts."""
    changed = value * factor
    if key.endswith("_efficiency"):
        changed = min(1.0, changed)
    if key == "profile.overlap":
        changed = max(1.0, changed)
    try:
        return result_of(answer(*_varied(found.question, found.subject, key, changed)))[1]
    except ValueError:
        return base


def _varied(question: Question, subject: Subject, key: str, value: float) -> tuple[Question, Subject]:
    whole = "." not in key or key.startswith("model.")
    if key.startswith("hardware.") and key.endswith("_gb_s") and _both_ways(subject, key):
        value /= 2  # an override is one way
    return vary(question, subject, key, max(1, round(value)) if whole else value)


def _both_ways(subject: Subject, key: str) -> bool:
    return figures(subject.hardware)[key.partition(".")[2]].way == "both"
