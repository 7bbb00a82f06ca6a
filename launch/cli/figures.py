"""Figures, drawn with matplotlib, which is an extra: only a command that was asked for a figure imports this."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megamoe.catalog.wording import plural

if TYPE_CHECKING:
    from megamoe.launch.bench.rule import Curve, RulePoint, RuleReport  # brings torch

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by colour-blind readers too
MARKERS = ("o", "s", "^", "D")
GREY = "#5c5c5c"
X_TICKS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 100)
TIME_TICKS = (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, 6, 8, 16, 32, 64, 100)
# text stays text in an SVG, and the same report gives the same file
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "megamoe", "font.size": 10.5, "axes.axisbelow": True}


def draw(report: RuleReport, form: str) -> bytes:
    """The curves as a file of a form that matplotlib knows, "svg" or "png".

    Left: the exposed share of communication against x. Right: the times behind it, with the fitted turns.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(
            figsize=(10.5, 5.2), dpi=160
        )  # a figure of its own, not pyplot's: Agg draws it, with no display
        shares, times = figure.subplots(1, 2)
        _draw_shares(shares, report)
        _draw_times(times, report)
        figure.suptitle("The link swept across the balance point of compute and communication", y=0.97, fontsize=12.5)
        figure.text(0.5, 0.02, _caption(report), ha="center", va="bottom", fontsize=7.5, color=GREY, linespacing=1.5)
        figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.235, wspace=0.17)
        return as_file(figure, form)


def as_file(figure: Figure, form: str) -> bytes:
    """A figure as a file's bytes, the same for the same figure. ValueError for a form that matplotlib does not know."""
    drawn = BytesIO()
    figure.savefig(drawn, format=form, metadata={"Date": None} if form == "svg" else None)
    return drawn.getvalue()


def _draw_shares(axes: Axes, report: RuleReport) -> None:
    xs = _draw_axis(axes, report)
    axes.plot(xs, np.maximum(0, 1 - 1 / xs), "--", color=GREY, label="theory: max(0, 1 - 1/x)")
    for number, curve in enumerate(report.curves):
        shares = [(p.exposed_share_min, p.exposed_share, p.exposed_share_max) for p in curve.points]
        label = f"d = {curve.intermediate}: balance at {curve.threshold_flops_per_byte:.0f} FLOPs/byte"
        _draw_points(axes, number, curve, shares, label=label, linestyle="-")
    axes.set_ylabel("exposed share of communication")
    points = [point for curve in report.curves for point in curve.points]
    highest = max(max(point.exposed_share, min(point.exposed_share_max, 1.0)) for point in points)
    axes.set_ylim(-0.03, 1.3 * max(highest, 0.5))  # the legend stands above; only a bar beyond 1 may leave the frame
    _draw_legend(axes)


def _draw_times(axes: Axes, report: RuleReport) -> None:
    xs = _draw_axis(axes, report)
    axes.plot(xs, np.maximum(1, xs), "--", color=GREY, label="theory: max(1, x)")
    for number, curve in enumerate(report.curves):
        turn = curve.turn
        label = f"d = {curve.intermediate}: {f'turns at x = {turn.x:.2f}' if turn else 'no turn'}"
        _draw_points(axes, number, curve, [_times(point) for point in curve.points], label=label, linestyle="none")
        if turn:
            fit = 1 + turn.floor + turn.slope * np.maximum(0, xs - turn.x)
            axes.plot(xs, fit, color=COLORS[number % len(COLORS)], lw=1.2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in TIME_TICKS if low <= tick <= high])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("overlapped time / compute time")
    _draw_legend(axes)


def _draw_axis(axes: Axes, report: RuleReport) -> NDArray[np.float64]:
    """A logarithmic axis over all points with the balance point marked; returns the x to draw lines at."""
    found = [point.x for curve in report.curves for point in curve.points]
    left, right = min([*found, 0.8]) / 1.15, max([*found, 1.25]) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks([tick for tick in X_TICKS if left <= tick <= right])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("x = (C/B) / balance point")
    axes.axvline(1, color=GREY, lw=0.8)
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return np.geomspace(left, right, 400)


def _draw_points(
    axes: Axes, number: int, curve: Curve, values: Sequence[tuple[float, float, float]], *, label: str, linestyle: str
) -> None:
    """Markers with bars; values: minimum, median and maximum of each of the curve's points."""
    low, middle, high = np.array(values).T
    axes.errorbar(
        [point.x for point in curve.points],
        middle,
        yerr=[middle - low, high - middle],
        marker=MARKERS[number % len(MARKERS)],
        color=COLORS[number % len(COLORS)],
        markersize=5,
        linewidth=1.2,
        elinewidth=0.9,
        capsize=2.5,
        linestyle=linestyle,
        label=label,
    )


def _draw_legend(axes: Axes) -> None:
    axes.legend(loc="upper left", fontsize=9, framealpha=0.9, edgecolor="none", borderpad=0.2)


def _times(point: RulePoint) -> tuple[float, float, float]:
    bench = point.bench
    least, middle, most = bench.overlapped_ms_min, bench.overlapped_ms, bench.overlapped_ms_max
    return least / bench.compute_ms, middle / bench.compute_ms, most / bench.compute_ms


def _caption(report: RuleReport) -> str:
    request = report.request
    threads = f"{request.threads_per_rank} thread{'' if request.threads_per_rank == 1 else 's'}"
    return (
        f"C: FLOP/s of a rank computing alone. B: bytes/s of its link, one way. Balance point: 6·h·d / "
        f"{report.bytes_per_row:.0f} bytes a row / {report.f_remote:.2g} of rows remote.\n"
        f"Points: medians of {request.repeats}; bars: least and most overlapped time. "
        f"Left of 1 remains what overlap costs on any link, as a share of ever less communication.\n"
        f"{plural(request.ranks, 'rank')}, {threads} each, {plural(request.tokens_per_rank, 'token')} a rank, "
        f"h = {request.hidden}, {request.num_experts} experts, top-{request.topk}, {request.weight_format} weights, "
        f"{request.dispatch_format} there, {request.combine_format} back. {report.machine}. {report.date}"
    )
