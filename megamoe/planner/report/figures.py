"""The sections with a figure: its caption and legend, the drawing at several widths, the numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megamoe.planner.report.charts import memory, pareto, roofline, timeline, tornado
from megamoe.planner.report.data import MemoryBar, ParetoPoint, ReportData, Sensitivity
from megamoe.planner.report.tables import Column, details, section, table
from megamoe.planner.report.words import amount, percent, plural, safe

HALF = (340, 480, 700)  # widths that a figure is drawn at; the style sheet shows the one that fits
FULL = (*HALF, 1080)
PARTS = 24  # parts of memory that are listed at once; the others are a click away
LISTED = 250  # configurations that are listed in words; all are drawn


def timeline_section(data: ReportData) -> str:
    line = data.timeline
    if line is None or not line.spans:
        return ""
    kinds = {span.kind for span in line.spans}
    items = [("band", "head and tail: nothing to hide under")] * (line.head_us > 0 or line.tail_us > 0)
    items += [("stall", "stall: the lane waits")] * ("stall" in kinds)
    items += [("fixed", "fixed cost")] * ("fixed" in kinds)
    rows = [
        [safe(f"{lane.title}, {timeline.what(span)}"), *map(amount, timeline.times(span))]
        for lane in timeline.lanes(line)
        for row in lane.rows
        for span in row
    ]
    columns = [Column("Lane and wave", 7), *(Column(name, 3, True) for name in ("from, us", "to, us", "us"))]
    figure = _figure("timeline", timeline.caption(line), items, lambda w, key: timeline.draw(line, w, key), FULL)
    listed = table(columns, rows, "Times from the start of the layer")
    listed = details(f"{plural(len(rows), 'span')} as a table", listed)
    return section("h-timeline", "One layer, wave by wave", figure + listed)


def roofline_section(data: ReportData) -> str:
    roof = data.roofline
    if roof is None or not roofline.can_draw(roof):
        return ""
    figure = _figure("roofline", roofline.caption(roof), [], lambda w, key: roofline.draw(roof, w, key))
    return section("h-roofline", "Roofline of the links", figure)


def pareto_section(data: ReportData) -> str:
    points = pareto.shown(data.pareto or ())
    if not points:
        return ""
    front, others = pareto.front(points), [point for point in points if not point.on_front]
    items = [("k1 bar", "front")] * bool(front) + [("faint dot", "other configurations")] * bool(others)
    items += [("k4 dot", "chosen")] * any(point.chosen for point in points)
    figure = _figure("pareto", pareto.caption(points), items, lambda w, key: pareto.draw(points, w, key))
    lists = _points(f"The front, {plural(len(front), 'configuration')}", front) if front else ""
    if others:
        most = f"The best {LISTED} of " if len(others) > LISTED else ""
        lists += _points(f"{most}{plural(len(others), 'other configuration')}", others)
    return section("h-pareto", "Throughput against speed", figure + lists)


def _points(summary: str, points: Sequence[ParetoPoint]) -> str:
    points = sorted(points, key=lambda point: (-point.y, -point.x, point.label))[:LISTED]
    rows = [[safe(point.label), amount(point.y), amount(point.x)] for point in points]
    columns = [Column("Configuration", 5), Column(pareto.Y_NAME, 2, True), Column(pareto.X_NAME, 2, True)]
    marked = next((index for index, point in enumerate(points) if point.chosen), None)
    return details(summary, table(columns, rows, "The most per device first", marked=marked))


def memory_section(data: ReportData) -> str:
    bars = data.memory or ()
    if not any(bar.parts for bar in bars):
        return ""
    figure = _figure("memory", "", [], lambda w, key: memory.draw(bars, w, key))
    return section("h-memory", "Memory", figure + _parts(bars))


def _parts(bars: Sequence[MemoryBar]) -> str:
    """The parts with their colours: the figure's legend and its numbers."""
    columns = [Column("Part", 5), *(Column(f"GB, {bar.device}" if len(bars) > 1 else "GB", 2, True) for bar in bars)]
    columns += [Column("of capacity", 2, True)] * (len(bars) == 1)
    rows = [_part(bars, name, hue) for name, hue in memory.hues(bars).items()]
    seen, rest = rows[:PARTS], rows[PARTS:]
    first = table(columns, seen, "Parts, the largest first. 1 GB is 1e9 bytes.")
    return first + (
        details(plural(len(rest), "smaller part"), table(columns, rest, "The smaller parts")) if rest else ""
    )


def _part(bars: Sequence[MemoryBar], name: str, hue: int) -> list[str]:
    sizes = [sum(part.gb for part in bar.parts if part.name == name) for bar in bars]
    row = [f'<span class="keyed"><span class="key k{hue}"></span><span>{safe(name)}</span></span>', *map(amount, sizes)]
    if len(bars) == 1:
        row.append(percent(sizes[0] / bars[0].capacity_gb).lstrip("+") if bars[0].capacity_gb > 0 else "")
    return row


def sensitivity_section(data: ReportData) -> str:
    rows, of = data.sensitivities or (), data.sensitivity_of
    if not rows:
        return ""
    items = [(f"k{tornado.LOWER}", "input 25\u00a0% lower"), (f"k{tornado.HIGHER}", "input 25\u00a0% higher")]
    figure = _figure("sensitivity", tornado.caption(rows, of), items, lambda w, key: tornado.draw(rows, of, w, key))
    listed = details(f"{plural(len(rows), 'input')} as a table", _moves(rows, of))
    return section("h-sensitivity", f"What moves the {of}", figure + listed)


def _moves(rows: Sequence[Sensitivity], of: str) -> str:
    names = ("25\u00a0% lower", "as planned", "25\u00a0% higher")
    columns = [Column("Input", 4), *(Column(name, 2, True) for name in names)]
    cells = [
        [safe(row.name), *(safe(amount(value, row.unit)) for value in (row.low, row.base, row.high))]
        for row in tornado.ordered(rows)
    ]
    return table(columns, cells, f"The {of} with one input changed at a time", stack=True)


def _figure(
    name: str,
    caption: str,
    legend: Sequence[tuple[str, str]],
    draw: Callable[[float, str], str],
    widths: Sequence[int] = HALF,
) -> str:
    said = f"<figcaption>{safe(caption)}</figcaption>" if caption else ""
    keys = "".join(f'<li><span class="key {style}"></span>{safe(text)}</li>' for style, text in legend)
    keys = f'<ul class="legend">{keys}</ul>' if keys else ""
    views = "".join(f'<div class="v{wide}">{draw(wide, f"{name}-{wide}")}</div>' for wide in widths)
    style = "plot wide" if widths is FULL else "plot"
    return f'<figure>{said}{keys}<div class="{style}">{views}</div></figure>'
