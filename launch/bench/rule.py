"""The rule, tested: communication hides while C/B stays below a threshold, and here the link is swept across it.

C is the FLOPs per second of a rank computing alone, B its link's bytes per second one way. The DeepSeek-V4 report
(section 3.1) compares what a token-expert pair computes with what it moves: 6hd FLOPs (gate, up and down projection)
against 3h bytes (h out in FP8, 2h home in BF16), so that all hides while C/B <= 2d. Here every byte of the wire counts,
a token goes to a rank once, and only pairs that leave their rank move: with f the share of those, the threshold is
6hd / bytes per row / f.

    x          (C/B) / threshold, which is communication over compute: the rule says that 1 is where it turns
    exposed    max(0, overlapped - compute) / communication
    theory     max(0, 1 - 1/x), from overlapped = max(compute, communication)
"""

# h hidden   d intermediate

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch

from megamoe.catalog.wording import plural
from megamoe.launch.bench.bench import BenchReport, BenchRequest, run_bench
from megamoe.parallel.placement import Placement
from megamoe.routing.waves import Waves
from megamoe.routing.wire import Wire
from megamoe.schedule.kept import processor

POINTS = (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)
CALIBRATION_REPEATS = 3
MIN_SLOPE = 0.5  # past the turn, time should grow as communication does, by 1; half of that is no turn but noise


@dataclass(frozen=True, slots=True)
class RuleRequest:
    """One workload for several expert sizes, and the x to measure each at."""

    ranks: int = 2
    tokens_per_rank: int = 1024
    hidden: int = 1024
    intermediate: tuple[int, ...] = (512, 1024)
    num_experts: int = 16
    topk: int = 4
    weight_format: str = "bf16"
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    waves: Waves = "auto"
    threads_per_rank: int = 1
    repeats: int = 7
    points: tuple[float, ...] = POINTS
    check: bool = True

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise ValueError(f"ranks must be at least 2 for anything to be sent, got {self.ranks}")
        if self.dispatch_format == "auto":
            raise ValueError("dispatch_format auto changes the bytes of a row between links: give mxfp8 or bf16")
        if not self.intermediate or len(set(self.intermediate)) < len(self.intermediate):
            raise ValueError(f"intermediate must name one size or several different ones, got {self.intermediate}")
        if not self.points or not all(0.01 <= point <= 100 for point in self.points):
            raise ValueError(f"points must be between 0.01 and 100, got {list(self.points)}")
        for intermediate in self.intermediate:
            self.bench(intermediate)

    def bench(self, intermediate: int, link: str | None = None) -> BenchRequest:
        """The workload with experts of one size over one link. ValueError where it does not fit."""
        shared = {name: value for name, value in asdict(self).items() if name not in ("intermediate", "points")}
        return BenchRequest(**shared, intermediate=intermediate, link=link, predict=False)

    @property
    def f_remote(self) -> float:
        """Share of token-expert pairs that leave their rank under uniform routing, which the benchmark's is."""
        return 1 - 1 / self.ranks

    @property
    def tokens_per_row(self) -> float:
        """Tokens sent for a pair that leaves: one goes to a rank once, for all of its topk experts there.

        16 experts on 2 ranks, top-4: 1 - C(8, 4) / C(16, 4) of the tokens go there, for 2 pairs each -> 0.48
        """
        placement, tokens = Placement(self.num_experts, self.ranks), 0.0
        for rank in range(self.ranks):
            elsewhere = self.num_experts - len(placement.experts(rank))
            tokens += 1 - math.comb(elsewhere, self.topk) / math.comb(self.num_experts, self.topk)
        return tokens / self.topk

    @property
    def bytes_per_row(self) -> float:
        """What a pair that leaves moves through a link in either direction: its token's share out, its result home."""
        wire = Wire(self.dispatch_format, self.hidden, round_on_arrival=False, combine_format=self.combine_format)
        return wire.PAIR_BYTES + self.tokens_per_row * wire.row_bytes + wire.result_bytes

    def threshold(self, intermediate: int) -> float:
        """FLOPs per byte for experts of one size."""
        return threshold_flops_per_byte(self.hidden, intermediate, self.bytes_per_row, self.f_remote)


@dataclass(frozen=True, slots=True)
class RulePoint:
    """One link. Shares are of communication; their min and max are those of overlapped against the other medians."""

    hardware_flops_per_byte: float
    x: float
    exposed_share: float
    exposed_share_min: float
    exposed_share_max: float
    theory_share: float
    bench: BenchReport

    @classmethod
    def of(cls, bench: BenchReport, threshold: float) -> RulePoint:
        """A report of a run over a link, against a threshold in FLOPs per byte."""
        assert bench.link_gb_s is not None
        intensity = _flops_per_s(bench) / (bench.link_gb_s * 1e9)
        x = intensity / threshold
        times = (bench.overlapped_ms, bench.overlapped_ms_min, bench.overlapped_ms_max)
        middle, least, most = (exposed_share(time, bench.compute_ms, bench.communication_ms) for time in times)
        return cls(intensity, x, middle, least, most, theory_share(x), bench)


@dataclass(frozen=True, slots=True)
class Turn:
    """Where overlapped time bends, in units of compute: overlapped / compute = 1 + floor + slope * max(0, x - turn).

    floor: what overlap costs however fast the link, such as the CPU time of moving bytes; the rule says x 1, slope 1.
    """

    x: float
    floor: float
    slope: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Experts of one size over all links. turn None: the points show none; deviation: exposed share minus theory."""

    intermediate: int
    threshold_flops_per_byte: float
    points: tuple[RulePoint, ...]
    turn: Turn | None
    largest_deviation: float
    largest_deviation_x: float

    @classmethod
    def of(cls, intermediate: int, threshold: float, points: Sequence[RulePoint]) -> Curve:
        """The points in order of x, with their turn and what is farthest from theory."""
        points = sorted(points, key=lambda point: point.x)
        turn = fit_turn([(point.x, point.bench.overlapped_ms / point.bench.compute_ms) for point in points])
        farthest = max(points, key=lambda point: abs(point.exposed_share - point.theory_share))
        deviation = farthest.exposed_share - farthest.theory_share
        return cls(intermediate, threshold, tuple(points), turn, deviation, farthest.x)


@dataclass(frozen=True, slots=True)
class RuleReport:
    """What was measured, where and when."""

    request: RuleRequest
    f_remote: float
    bytes_per_row: float
    curves: tuple[Curve, ...]
    machine: str
    date: str

    @property
    def identical(self) -> bool | None:
        """Whether every run gave the oracle's bits; None where that was not checked."""
        found = [point.bench.identical for curve in self.curves for point in curve.points]
        return all(found) if self.request.check else None

    def as_dict(self) -> dict[str, Any]:
        """The request's keys beside the rest."""
        values = asdict(self)
        return {**values.pop("request"), "identical": self.identical, **values}


def threshold_flops_per_byte(hidden: int, intermediate: int, bytes_per_row: float, f_remote: float) -> float:
    """C/B up to which communication hides: DeepSeek-V4 report, section 3.1, for any wire and share of remote pairs.

    V4-Pro: 7168, 3072, 3 * 7168 bytes, 1.0 -> 6144 = 2d      with half of the pairs remote -> 12288
    """
    return 6 * hidden * intermediate / bytes_per_row / f_remote


def exposed_share(overlapped_ms: float, compute_ms: float, communication_ms: float) -> float:
    """Share of communication that compute does not hide.    120, 100, 80 -> 0.25    90, 100, 80 -> 0"""
    return max(0.0, overlapped_ms - compute_ms) / communication_ms


def theory_share(x: float) -> float:
    """Exposed share under perfect overlap, where communication takes x times as long as compute.    2 -> 0.5"""
    return max(0.0, 1 - 1 / x)


def fit_turn(points: Sequence[tuple[float, float]]) -> Turn | None:
    """The bend that fits pairs of (x, overlapped / compute) best, or None where they show none.

    Least squares of residuals relative to max(1, x), the time that perfect overlap takes, because the noise of a time
    grows with it. Floor and slope are linear; the turn is tried at 1001 places, so that one point at least lies before
    it and two behind.
    """
    if len({x for x, _ in points}) < 4:
        return None
    xs, times = np.array(sorted(points)).T
    weights = 1 / np.maximum(1, xs)
    places = np.geomspace(xs[0], xs[-2], 1001)
    best: tuple[float, Turn] | None = None
    for place in places[1:-1]:
        terms = np.stack([np.ones_like(xs), np.maximum(0, xs - place)], 1)
        floor, slope = np.linalg.lstsq(terms * weights[:, None], (times - 1) * weights, rcond=None)[0]
        error = float((((times - 1) - terms @ (floor, slope)) ** 2 * weights**2).sum())
        if slope >= MIN_SLOPE and (best is None or error < best[0]):
            best = error, Turn(float(place), float(floor), float(slope))
    return best[1] if best else None


def run_rule(
    request: RuleRequest,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    measure: Callable[[BenchRequest], BenchReport] = run_bench,
) -> RuleReport:
    """Measures every size over links at the points asked for. Errors are those of run_bench().

    A link is chosen by the median of the compute rates seen so far, the first of them over loopback; x is then that
    of the rate measured together with the rest.
    """
    curves, done, of = [], 0, len(request.intermediate) * (1 + len(request.points))
    for intermediate in request.intermediate:
        progress(f"intermediate {intermediate}: compute alone", done, of)
        threshold, reports = request.threshold(intermediate), list[BenchReport]()
        rates = [_flops_per_s(measure(_calibration(request, intermediate)))]
        for number, point in enumerate(request.points, start=1):
            link = link_for(point, median(rates), threshold)
            progress(f"intermediate {intermediate}: link {link}", done + number, of)
            reports.append(measure(request.bench(intermediate, link)))
            rates.append(_flops_per_s(reports[-1]))
        done += 1 + len(request.points)
        points = [RulePoint.of(report, threshold) for report in reports]
        curves.append(Curve.of(intermediate, threshold, points))
    today = datetime.date.today().isoformat()
    return RuleReport(request, request.f_remote, request.bytes_per_row, tuple(curves), machine(), today)


def link_for(x: float, flops_per_s: float, threshold: float) -> str:
    """The link, as tc writes it, that a compute rate meets at x.    0.5, 6.4e10, 2000 -> 512000kbit"""
    return f"{max(1, round(8 * flops_per_s / (x * threshold) / 1e3))}kbit"


def machine() -> str:
    """Cores, processor and torch, for captions."""
    return f"{plural(os.cpu_count() or 1, 'core')} of {processor()}, torch {torch.__version__}"


def _calibration(request: RuleRequest, intermediate: int) -> BenchRequest:
    return replace(request.bench(intermediate), repeats=min(CALIBRATION_REPEATS, request.repeats), check=False)


def _flops_per_s(report: BenchReport) -> float:
    return report.flops_per_rank / report.compute_ms * 1e3
