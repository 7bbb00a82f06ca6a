"""The sections of the page: a figure with its caption and legend, the numbers as tables.

A cell of a table is escaped unless it is Markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from megamoe.catalog.wording import plural
from megamoe.planner.report.charts import memory, pareto, roofline, timeline, tornado
from megamoe.planner.report.data import MemoryBar, ParetoPoint, ReportData
from megamoe.planner.report.words import amount, breakable, percent, safe

HALF = (340, 480, 700)  # widths that a figure is drawn at; the style sheet shows the one that fits
FULL = (*HALF, 1080)
PARTS = 24  # parts of memory that are listed at once; the others are a click away
LISTED = 250  # configurations that are listed in words; all are drawn


@dataclass(frozen=True, slots=True)
class Column:
    """share: of the table's width, in parts; number: aligned at the right, as is all but the first in a plain table."""

    name: str
    share: int
    number: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """The first cells head their rows.

    summary: what stands for the table until it is opened; without one it is open.
    stack: narrow screens show each row as a block, every cell with its column's name. Blocks lose a table's meaning
    to those who do not see it, so the roles are spelt out. marked: the row of the plan itself.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    caption: str
    summary: str = ""
    stack: bool = False
    marked: int | None = None

    @property
    def shares(self) -> int:
        return sum(column.share for column in self.columns)


@dataclass(frozen=True, slots=True)
class Figure:
    """legend: (class, text) of each key. views: an SVG for each width."""

    caption: str
    legend: Sequence[tuple[str, str]]
    views: Sequence[tuple[int, str]]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """name: the heading's id. long: goes over pages where it is printed."""

    name: str
    title: str
    figure: Figure | None = None
    tables: Sequence[Table] = ()
    lines: Sequence[str] = ()
    long: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    sections: Sequence[Section]
    pair: bool = False


def groups(data: ReportData) -> list[Group]:
    """All sections that have data, in order; those of a pair stand side by side where there is room."""
    found = [
        Group(_timeline(data)),
        Group([*_roofline(data), *_pareto(data)], pair=True),
        Group([*_memory(data), *_sensitivity(data)], pair=True),
        *(Group(each(data)) for each in (_terms, _sources, _assumptions)),
    ]
    return [group for group in found if group.sections]


def _timeline(data: ReportData) -> list[Section]:
    line = data.timeline
    if line is None or not line.spans:
        return []
    kinds = {span.kind for span in line.spans}
    items = [("band", "head and tail: nothing to hide under")] * (line.head_us > 0 or line.tail_us > 0)
    items += [("stall", "stall: the lane waits")] * ("stall" in kinds)
    items += [("fixed", "fixed cost")] * ("fixed" in kinds)
    rows = [
        [f"{lane.title}, {timeline.what(span)}", *map(amount, timeline.times(span))]
        for lane in timeline.lanes(line)
        for row in lane.rows
        for span in row
    ]
    columns = [Column("Lane and wave", 7), *(Column(name, 3, True) for name in ("from, us", "to, us", "us"))]
    figure = _figure("timeline", timeline.caption(line), items, lambda w, key: timeline.draw(line, w, key), FULL)
    summary = f"{plural(len(rows), 'span')} as a table"
    listed = Table(columns, rows, "Times from the start of the layer", summary)
    return [Section("h-timeline", "One layer, wave by wave", figure, [listed])]


def _roofline(data: ReportData) -> list[Section]:
    roof = data.roofline
    if roof is None or not roofline.can_draw(roof):
        return []
    figure = _figure("roofline", roofline.caption(roof), [], lambda w, key: roofline.draw(roof, w, key))
    return [Section("h-roofline", "Roofline of the links", figure)]


def _pareto(data: ReportData) -> list[Section]:
    points = pareto.shown(data.pareto or ())
    if not points:
        return []
    front, others = pareto.front(points), [point for point in points if not point.on_front]
    items = [("k1 bar", "front")] * bool(front) + [("faint dot", "other configurations")] * bool(others)
    items += [("k4 dot", "chosen")] * any(point.chosen for point in points)
    figure = _figure("pareto", pareto.caption(points), items, lambda w, key: pareto.draw(points, w, key))
    most = f"The best {LISTED} of " if len(others) > LISTED else ""
    lists = [(f"The front, {plural(len(front), 'configuration')}", front)] * bool(front)
    lists += [(f"{most}{plural(len(others), 'other configuration')}", others)] * bool(others)
    tables = [_points(summary, listed) for summary, listed in lists]
    return [Section("h-pareto", "Throughput against speed", figure, tables)]


def _points(summary: str, points: Sequence[ParetoPoint]) -> Table:
    points = sorted(points, key=lambda point: (-point.y, -point.x, point.label))[:LISTED]
    rows = [[point.label, amount(point.y), amount(point.x)] for point in points]
    columns = [Column("Configuration", 5), Column(pareto.Y_NAME, 2, True), Column(pareto.X_NAME, 2, True)]
    marked = next((index for index, point in enumerate(points) if point.chosen), None)
    return Table(columns, rows, "The most per device first", summary, marked=marked)


def _memory(data: ReportData) -> list[Section]:
    """The parts with their colours are the figure's legend and its numbers."""
    bars = data.memory or ()
    if not any(bar.parts for bar in bars):
        return []
    columns = [Column("Part", 5), *(Column(f"GB, {bar.device}" if len(bars) > 1 else "GB", 2, True) for bar in bars)]
    columns += [Column("of capacity", 2, True)] * (len(bars) == 1)
    rows = [_part(bars, name, hue) for name, hue in memory.hues(bars).items()]
    seen, rest = rows[:PARTS], rows[PARTS:]
    tables = [Table(columns, seen, "Parts, the largest first. 1 GB is 1e9 bytes.")]
    tables += [Table(columns, rest, "The smaller parts", plural(len(rest), "smaller part"))] * bool(rest)
    figure = _figure("memory", "", [], lambda w, key: memory.draw(bars, w, key))
    return [Section("h-memory", "Memory", figure, tables)]


def _part(bars: Sequence[MemoryBar], name: str, hue: int) -> list[str]:
    sizes = [sum(part.gb for part in bar.parts if part.name == name) for bar in bars]
    key = f'<span class="keyed"><span class="key k{hue}"></span><span>{safe(name)}</span></span>'
    row = [Markup(key), *map(amount, sizes)]
    if len(bars) == 1:
        row.append(percent(sizes[0] / bars[0].capacity_gb).lstrip("+") if bars[0].capacity_gb > 0 else "")
    return row


def _sensitivity(data: ReportData) -> list[Section]:
    rows, of = data.sensitivities or (), data.sensitivity_of
    if not rows:
        return []
    items = [(f"k{tornado.LOWER}", "input 25\u00a0% lower"), (f"k{tornado.HIGHER}", "input 25\u00a0% higher")]
    figure = _figure("sensitivity", tornado.caption(rows, of), items, lambda w, key: tornado.draw(rows, of, w, key))
    names = ("25\u00a0% lower", "as planned", "25\u00a0% higher")
    columns = [Column("Input", 4), *(Column(name, 2, True) for name in names)]
    cells = [
        [row.name, *(amount(value, row.unit) for value in (row.low, row.base, row.high))]
        for row in tornado.ordered(rows)
    ]
    summary = f"{plural(len(rows), 'input')} as a table"
    moves = Table(columns, cells, f"The {of} with one input changed at a time", summary, stack=True)
    return [Section("h-sensitivity", f"What moves the {of}", figure, [moves])]


def _terms(data: ReportData) -> list[Section]:
    columns = [Column("Term", 8), Column("Formula", 13), Column("In numbers", 12), Column("Value", 8, True)]
    rows = [
        [term.name, *(_code(text) for text in (term.formula, term.numbers)), amount(term.value, term.unit)]
        for term in data.terms
    ]
    steps = Table(columns, rows, "Each step of the calculation", stack=True)
    return [Section("h-terms", "The plan, term by term", tables=[steps], long=True)] if rows else []


def _code(text: str) -> Markup:
    return Markup(f"<code>{breakable(text)}</code>")


def _sources(data: ReportData) -> list[Section]:
    columns = [Column("Input", 10), Column("Value", 7, True), Column("Kind", 6), Column("Source", 14)]
    rows = [
        [
            Markup(breakable(source.name)),
            amount(source.value, source.unit),
            Markup(f'<span class="tag {safe(source.tag)}">{safe(source.tag)}</span>'),
            Markup(breakable(source.source)),
        ]
        for source in data.sources
    ]
    inputs = Table(columns, rows, "What the plan was told, and by whom", stack=True)
    return [Section("h-inputs", "Inputs", tables=[inputs], long=True)] if rows else []


def _assumptions(data: ReportData) -> list[Section]:
    return [Section("h-assumptions", "Assumptions", lines=data.assumptions)] if data.assumptions else []


def _figure(
    name: str,
    caption: str,
    legend: Sequence[tuple[str, str]],
    draw: Callable[[float, str], str],
    widths: Sequence[int] = HALF,
) -> Figure:
    views = [(wide, draw(wide, f"{name}-{wide}")) for wide in widths]
    return Figure(caption, legend, views, widths is FULL)
