"""A sweep as one SVG: the result over what was varied; filled where communication hides, hollow where it is exposed."""

from __future__ import annotations

from collections.abc import Sequence

from megamoe.planner.answer import Answer
from megamoe.planner.report.charts.scales import Scale
from megamoe.planner.report.charts.svg import FONT, SMALL, Drawing
from megamoe.planner.report.render import templates
from megamoe.planner.report.words import number, short, width
from megamoe.planner.search.sensitivity import result_of
from megamoe.planner.search.sweep import Point

WIDE, HIGH = 760.0, 420.0
LEFT, RIGHT, TOP, BOTTOM = 70.0, 20.0, 56.0, 52.0
LOG_FROM = 8.0  # values that span more than this, none of them below 1, are drawn by factors


def draw(key: str, points: Sequence[Point]) -> str:
    """A file of its own, in light and dark, without a script."""
    of, _, unit = result_of(points[0].answer)
    results = [result_of(point.answer)[1] for point in points]
    first = points[0].answer.plan.request
    name = f"{of} of {first.model.name} on {first.hardware.name} over {key}"
    out = Drawing(WIDE, HIGH, name, _described(key, points, results, unit), "sweep")
    y = Scale(0.0, max(results) * 1.08 or 1.0, HIGH - BOTTOM, TOP)
    places, ticks = _across(points)
    for value in y.ticks(6):
        out.line(LEFT, y(value), WIDE - RIGHT, y(value), "grid")
        out.text(LEFT - 8, y(value) + 4, short(value), "soft", anchor="end", size=SMALL)
    for place, text in ticks:
        out.line(place, HIGH - BOTTOM, place, HIGH - BOTTOM + 5, "axis")
        out.text(place, HIGH - BOTTOM + 19, text, "soft", anchor="middle", size=SMALL)
    out.line(LEFT, HIGH - BOTTOM, WIDE - RIGHT, HIGH - BOTTOM, "axis")
    out.text(LEFT, 20, name, "strong")
    out.text(LEFT, 40, f"{unit}; filled: hidden, hollow: exposed, ringed: does not fit", "soft", size=SMALL)
    out.text((LEFT + WIDE - RIGHT) / 2, HIGH - 10, key, "ink", anchor="middle")
    out.polyline([(place, y(result)) for place, result in zip(places, results, strict=True)], "curve")
    for place, result, point in zip(places, results, points, strict=True):
        title = f"{key} {point.value}: {number(result)} {unit}, {_said(point.answer)}"
        out.circle(place, y(result), 4.5, _said(point.answer), title)
        if not point.answer.fits:
            out.circle(place, y(result), 9, "full", f"{title}, does not fit")
    return _alone(out.render())


def _described(key: str, points: Sequence[Point], results: Sequence[float], unit: str) -> str:
    pairs = zip(points, results, strict=True)
    return "; ".join(f"{key} {p.value}: {number(result)} {unit}, {_said(p.answer)}" for p, result in pairs)


def _across(points: Sequence[Point]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each point stands, and the ticks: by value where all are numbers, else side by side."""
    left, right = LEFT + 20, WIDE - RIGHT - 20
    try:
        values = [float(point.value) for point in points]
    except ValueError:
        values = []
    if not values or min(values) == max(values):
        step = (right - left) / max(1, len(points) - 1)
        places = [left + step * index for index in range(len(points))]
        return places, _apart([(place, str(p.value)) for place, p in zip(places, points, strict=True)])
    log = min(values) >= 1 and max(values) / min(values) > LOG_FROM
    scale = Scale(min(values), max(values), left, right, log)
    marks = values if len(values) <= 12 else scale.ticks(8)
    return [scale(value) for value in values], _apart([(scale(mark), short(mark)) for mark in sorted(set(marks))])


def _apart(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that do not touch the one before."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        half = width(text, SMALL) / 2
        if not kept or place - half > kept[-1][0] + width(kept[-1][1], SMALL) / 2 + FONT / 2:
            kept.append((place, text))
    return kept


def _alone(svg: str) -> str:
    """With its colours inside, so that it needs no page."""
    style = templates().get_template("sweep.css").render()
    head, _, rest = svg.partition(">")
    return f'{head} width="{WIDE:.0f}" height="{HIGH:.0f}"><style>{style}</style>{rest}\n'


def _said(found: Answer) -> str:
    return "hidden" if found.hidden else "exposed"
