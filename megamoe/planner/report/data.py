"""What a report holds: plain numbers and words, with the units in the names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamoe.planner.serving.flops import Term

Verdict = Literal["HIDDEN", "EXPOSED"]
SpanKind = Literal["busy", "stall", "fixed"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number under the verdict. A value that is a string is printed as it is."""

    label: str
    value: float | str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one lane, in microseconds from the start of the layer.

    lane: dispatch, linear, combine and tail have their own colours, other lanes are drawn below them.
    kind: busy; stall, where the lane waits; fixed, a cost that does not depend on the work.
    """

    lane: str
    label: str
    start_us: float
    end_us: float
    kind: SpanKind = "busy"


@dataclass(frozen=True, slots=True)
class Timeline:
    """One layer as its schedule was played. head_us and tail_us are counted from the two ends of layer_us."""

    spans: tuple[Span, ...]
    layer_us: float
    head_us: float = 0.0
    tail_us: float = 0.0


@dataclass(frozen=True, slots=True)
class RooflineTier:
    """A link whose bandwidth bounds compute: GB/s one way per device."""

    name: str
    gb_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """FLOPs per byte of link traffic against TFLOP/s of one device.

    threshold_flops_per_byte: what the rule allows (2d in the simplest case); plan_*: where this plan stands. Where
    nothing travels both are infinite, and neither is drawn.
    """

    tiers: tuple[RooflineTier, ...]
    peak_tflops: float
    achieved_tflops: float
    threshold_flops_per_byte: float
    plan_flops_per_byte: float
    plan_tflops: float
    threshold_name: str = "2d"
    plan_name: str = "this plan"


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A configuration that was tried: x tokens/s per user, y tokens/s per device."""

    x: float
    y: float
    label: str
    on_front: bool = False
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class MemoryPart:
    name: str
    gb: float


@dataclass(frozen=True, slots=True)
class MemoryBar:
    """What lies in one device's memory. GB are 1e9 bytes."""

    device: str
    capacity_gb: float
    parts: tuple[MemoryPart, ...]

    @property
    def total_gb(self) -> float:
        return sum(part.gb for part in self.parts)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The result with one input 25 % lower (low) and 25 % higher (high); base is the result of the plan itself."""

    name: str
    low: float
    high: float
    base: float
    unit: str


@dataclass(frozen=True, slots=True)
class Source:
    """An input and where it comes from. tag: measured, vendor, derived, assumed."""

    name: str
    value: float | str
    unit: str
    tag: str
    source: str


@dataclass(frozen=True, slots=True)
class ReportData:
    """One page. A section whose data is None or empty is left out."""

    title: str
    verdict: Verdict
    sentence: str
    tiles: tuple[Tile, ...] = ()
    warnings: tuple[str, ...] = ()
    timeline: Timeline | None = None
    roofline: Roofline | None = None
    pareto: tuple[ParetoPoint, ...] | None = None
    memory: tuple[MemoryBar, ...] | None = None
    sensitivities: tuple[Sensitivity, ...] | None = None
    sensitivity_of: str = "layer time"
    terms: tuple[Term, ...] = ()
    sources: tuple[Source, ...] = ()
    assumptions: tuple[str, ...] = ()
    version: str = ""
    command: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        assert self.verdict in ("HIDDEN", "EXPOSED"), self.verdict
