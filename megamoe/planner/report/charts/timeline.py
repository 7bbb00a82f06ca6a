"""The wave timeline: what each lane does, microsecond by microsecond, and where compute waits."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.planner.report.charts.labels import Box, text_box
from megamoe.planner.report.charts.scales import Scale
from megamoe.planner.report.charts.svg import FONT, SMALL, Drawing
from megamoe.planner.report.data import Span, Timeline
from megamoe.planner.report.words import amount, number, shorten, width

ORDER = ("fixed", "dispatch", "linear", "linear-1", "linear-2", "combine", "tail")
HUES = {"dispatch": 2, "linear": 1, "linear-1": 1, "linear-2": 5, "combine": 3, "tail": 4}
SPARE = 6  # the hue of lanes that are not in HUES
NAMES = {"tail": "slot sum"}
NARROW = 600  # below it a lane's name stands above its bars
BAR, GAP, LANE_TEXT = 26.0, 10.0, 15.0


@dataclass(frozen=True, slots=True)
class Lane:
    """rows: spans that overlap lie in different rows."""

    name: str
    rows: tuple[tuple[Span, ...], ...]

    @property
    def hue(self) -> int:
        return HUES.get(self.name, SPARE)

    @property
    def title(self) -> str:
        return NAMES.get(self.name, self.name)

    @property
    def busy_us(self) -> float:
        return sum(span.end_us - span.start_us for row in self.rows for span in row if span.kind != "stall")


def lanes(timeline: Timeline) -> list[Lane]:
    """Known lanes in the order of the flow, then the others as they come."""
    names = list(dict.fromkeys(span.lane for span in timeline.spans))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return [Lane(name, _rows([span for span in timeline.spans if span.lane == name])) for name in names]


def _rows(spans: list[Span]) -> tuple[tuple[Span, ...], ...]:
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start_us, span.end_us)):
        free = next((row for row in rows if row[-1].end_us <= span.start_us + 1e-6), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return tuple(map(tuple, rows))


def end_us(timeline: Timeline) -> float:
    """Where the axis ends."""
    ends = [timeline.layer_us, *(span.end_us for span in timeline.spans)]
    return max(*ends, 1e-9)


def stall_us(timeline: Timeline) -> float:
    return sum(span.end_us - span.start_us for span in timeline.spans if span.kind == "stall")


def what(span: Span) -> str:
    return span.label if span.kind == "busy" else f"{span.label} ({span.kind})"


def times(span: Span) -> tuple[float, float, float]:
    """Start, end and length in microseconds."""
    return span.start_us, span.end_us, span.end_us - span.start_us


def span_title(span: Span) -> str:
    took = amount(span.end_us - span.start_us, "us")
    return f"{what(span)}: {number(span.start_us)} to {amount(span.end_us, 'us')}, {took}"


def caption(timeline: Timeline) -> str:
    """The drawing in one sentence."""
    busy = ", ".join(f"{lane.title} {amount(lane.busy_us, 'us')}" for lane in lanes(timeline))
    ends = f"{_end(timeline, 'Head', 0.0, timeline.head_us)}, "
    ends += _end(timeline, "tail", timeline.layer_us - timeline.tail_us, timeline.layer_us)
    stalls = f", stalls {amount(stall_us(timeline), 'us')}"
    return f"The layer takes {amount(timeline.layer_us, 'us')}. Busy: {busy}. {ends}{stalls}."


def _end(timeline: Timeline, name: str, start: float, end: float) -> str:
    """An end of the layer, and what of it no schedule could shorten: fixed costs and the sum of the slots."""
    near = (end - start) * 1e-6
    within = [span for span in timeline.spans if start - near <= span.start_us and span.end_us <= end + near]
    fixed = sum(span.end_us - span.start_us for span in within if span.kind == "fixed")
    summed = sum(span.end_us - span.start_us for span in within if span.lane == "tail" and span.kind == "busy")
    parts = [f"{amount(us, 'us')} of it {what}" for us, what in ((fixed, "fixed"), (summed, "the slot sum")) if us > 0]
    return f"{name} {amount(end - start, 'us')}" + (f" ({', '.join(parts)})" if parts else "")


def draw(timeline: Timeline, wide: float, key: str) -> str:
    return _Sheet(timeline, wide, key).draw()


class _Sheet:
    """One drawing of a timeline at one width."""

    def __init__(self, timeline: Timeline, wide: float, key: str) -> None:
        self.timeline, self.lanes = timeline, lanes(timeline)
        self.narrow = wide < NARROW
        names = [width(lane.title, FONT) for lane in self.lanes]
        self.left = 1.0 if self.narrow else min(max(names, default=0.0) + 14, 150.0)
        self.end = end_us(timeline)
        self.x = Scale(0.0, self.end, self.left, wide - 2)
        self.out = Drawing(wide, 0.0, "Timeline of one layer", caption(timeline), key, titles=wide > NARROW)

    def draw(self) -> str:
        top = self._bands_height()
        bottom = top + sum(self._height(lane) for lane in self.lanes)
        self._bands(top, bottom)
        self._grid(top, bottom)
        y = top
        for lane in self.lanes:
            self._lane(lane, y)
            y += self._height(lane)
        self.out.height = bottom + 22
        return self.out.render()

    def _bar(self, lane: Lane) -> float:
        return BAR if len(lane.rows) <= 1 else max(14.0, BAR / len(lane.rows) + 4)

    def _height(self, lane: Lane) -> float:
        bars = len(lane.rows) * (self._bar(lane) + 1) - 1
        return bars + GAP + (LANE_TEXT if self.narrow else 0)

    # ---- head and tail ----

    def _band_labels(self) -> list[tuple[float, float, str]]:
        """Start and end of each band in microseconds, and its label."""
        line = self.timeline
        bands = [(0.0, line.head_us, "head"), (line.layer_us - line.tail_us, line.layer_us, "tail")]
        return [(max(a, 0.0), b, f"{name} {amount(b - a, 'us')}") for a, b, name in bands if b - a > 0]

    def _label_spots(self) -> list[tuple[float, int, str]]:
        """Left end, row and text of the bands' labels; rows count from the bottom."""
        spots: list[tuple[float, int, str]] = []
        boxes: list[Box] = []
        for start, end, text in self._band_labels():
            wide = width(text, SMALL)
            left = (self.x(start) + self.x(end) - wide) / 2
            left = max(self.left, min(left, self.out.width - 2 - wide))
            box = text_box(left - 4, 0, text + "  ", SMALL)
            row = 1 if any(map(box.meets, boxes)) else 0
            boxes.append(box)
            spots.append((left, row, text))
        return spots

    def _bands_height(self) -> float:
        rows = [row for _, row, _ in self._label_spots()]
        return 10 + 15.0 * (max(rows) + 1) if rows else 8

    def _bands(self, top: float, bottom: float) -> None:
        for (start, end, text), (left, row, _) in zip(self._band_labels(), self._label_spots(), strict=True):
            x0, x1 = self.x(start), self.x(end)
            self.out.rect(x0, top - 6, max(x1 - x0, 1.5), bottom - top + 6, "band", text)
            base = top - 11 - 15.0 * row
            if row:
                self.out.line((x0 + x1) / 2, base + 4, (x0 + x1) / 2, top - 6, "lead")
            self.out.text(left, base, text, "ink", size=SMALL)

    # ---- axis ----

    def _grid(self, top: float, bottom: float) -> None:
        out, last = self.out, self.timeline.layer_us
        text = amount(last, "us")
        taken = [self._tick(last, text, bottom, "strong")]
        ticks = self.x.ticks(max(2, int((out.width - self.left) / 90)))
        out.path("".join(f"M{self.x(t):.1f} {top - 6:.1f}V{bottom:.1f}" for t in ticks), "grid")
        out.line(self.left, bottom, out.width - 2, bottom, "axis")
        out.line(self.x(last), top - 6, self.x(last), bottom + 4, "edge")
        for tick in ticks:
            if not any(map(self._tick_box(tick, number(tick)).meets, taken)):
                taken.append(self._tick(tick, number(tick), bottom, "soft"))
        if not self.narrow:
            label = Box(self.left - 12 - width("time, us", SMALL), 0, self.left - 12, 1)
            if label.left >= 0 and not any(map(label.meets, taken)):
                out.text(self.left - 12, bottom + 16, "time, us", "soft", anchor="end", size=SMALL)

    def _tick_left(self, at: float, text: str) -> float:
        wide = width(text, SMALL)
        return max(0.0, min(self.x(at) - wide / 2, self.out.width - wide))

    def _tick_box(self, at: float, text: str) -> Box:
        left = self._tick_left(at, text)
        return Box(left - 5, 0, left + width(text, SMALL) + 5, 1)

    def _tick(self, at: float, text: str, bottom: float, style: str) -> Box:
        x, room = self.x(at), width(text, SMALL)
        if x + room / 2 > self.out.width:
            self.out.text(self.out.width - 1, bottom + 16, text, style, anchor="end", size=SMALL)
        elif x - room / 2 < 0:
            self.out.text(x, bottom + 16, text, style, size=SMALL)
        else:
            self.out.text(x, bottom + 16, text, style, anchor="middle", size=SMALL)
        return self._tick_box(at, text)

    # ---- lanes ----

    def _lane(self, lane: Lane, y: float) -> None:
        if self.narrow:
            self.out.text(0, y + 10, shorten(lane.title, self.out.width, FONT), "ink", title=lane.title)
            y += LANE_TEXT
        else:
            name = shorten(lane.title, self.left - 12, FONT)
            middle = y + (self._height(lane) - GAP) / 2 + 4
            self.out.text(self.left - 12, middle, name, "ink", anchor="end", title=lane.title)
        high = self._bar(lane)
        for row in lane.rows:
            self._row(lane, row, y, high)
            y += high + 1

    def _row(self, lane: Lane, row: tuple[Span, ...], y: float, high: float) -> None:
        self.out.open(f"f{lane.hue}")
        for span in row:
            x0, x1 = self.x(span.start_us), self.x(span.end_us)
            inset = 0.7 if x1 - x0 > 4 else 0.0
            style = "" if span.kind == "busy" else span.kind
            self.out.rect(x0, y, max(x1 - x0 - inset, 0.6), high, style, span_title(span))
        self.out.close()
        self.out.open(f"o{lane.hue}")
        self._span_labels(row, y + high / 2 + 4)
        self.out.close()

    def _span_labels(self, row: tuple[Span, ...], y: float) -> None:
        """Waves by name or by number, whichever fits most of them, else not; pointing at a bar names it always."""
        waves = [span for span in row if span.kind == "busy" and _digits(span.label)]
        named = [sum(self._fits(span, text(span.label)) for span in waves) for text in (str, _digits)]
        whole, brief = (4 * count >= 3 * len(waves) for count in named)
        whole = whole and named[0] == named[1]
        for span in row:
            text = span.label if whole or span not in waves else _digits(span.label) * brief
            if self._fits(span, text):
                middle = (self.x(span.start_us) + self.x(span.end_us)) / 2
                style = {"busy": "", "stall": "ink", "fixed": "o7"}[span.kind]
                self.out.text(middle, y, text, style, anchor="middle", size=SMALL, title=span_title(span))

    def _fits(self, span: Span, text: str) -> bool:
        return bool(text) and width(text, SMALL) + 5 <= self.x(span.end_us) - self.x(span.start_us)


def _digits(label: str) -> str:
    """The number that a label ends in: "wave 12" -> "12"."""
    last = label.split()[-1:] or [""]
    return last[0] if last[0].isdigit() else ""
