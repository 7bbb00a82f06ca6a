"""Memory of a device: its parts side by side, against what it has."""

from __future__ import annotations

from collections.abc import Sequence

from megamoe.planner.report.charts.labels import Box, text_box
from megamoe.planner.report.charts.scales import Scale
from megamoe.planner.report.charts.svg import FONT, SMALL, Drawing
from megamoe.planner.report.data import MemoryBar, MemoryPart
from megamoe.planner.report.words import amount, percent, short, shorten, width

HUES = 6  # parts that have a colour of their own: the largest; the rest share REST
REST = 7
HIGH = 34.0


def hues(bars: Sequence[MemoryBar]) -> dict[str, int]:
    """The colour of every part, largest first over all bars; a part keeps its colour from bar to bar."""
    total: dict[str, float] = {}
    for bar in bars:
        for part in bar.parts:
            total[part.name] = total.get(part.name, 0.0) + part.gb
    ordered = sorted(total, key=lambda name: -total[name])
    few = len(ordered) <= HUES + 1
    return {name: index + 1 if index < HUES or few else REST for index, name in enumerate(ordered)}


def fill(bar: MemoryBar) -> str:
    """How full a device is, in words."""
    total, capacity = amount(bar.total_gb, "GB"), amount(bar.capacity_gb, "GB")
    share = percent(bar.total_gb / bar.capacity_gb).lstrip("+") if bar.capacity_gb > 0 else "all"
    over = bar.total_gb - bar.capacity_gb
    rest = f"{amount(over, 'GB')} too much" if over > 0 else f"{amount(-over, 'GB')} free"
    return f"{total} of {capacity} ({share}), {rest}"


def caption(bars: Sequence[MemoryBar]) -> str:
    return " ".join(f"{bar.device}: {fill(bar)}." for bar in bars)


def draw(bars: Sequence[MemoryBar], wide: float, key: str) -> str:
    return _Sheet(bars, wide, key).draw()


class _Sheet:
    """One drawing of the bars at one width."""

    def __init__(self, bars: Sequence[MemoryBar], wide: float, key: str) -> None:
        self.bars, self.hues = bars, hues(bars)
        most = max(*(bar.total_gb for bar in bars), *(bar.capacity_gb for bar in bars), 1e-9)
        self.x = Scale(0.0, most, 1.0, wide - 3)
        self.out = Drawing(wide, 0.0, "Memory per device", caption(bars), key)

    def draw(self) -> str:
        y = 0.0
        for bar in self.bars:
            y = self._bar(bar, y)
        self._axis(y - 8)
        self.out.height = y + 12
        return self.out.render()

    def _bar(self, bar: MemoryBar, y: float) -> float:
        """Draws one bar below y; where the next begins."""
        for line, style in ((bar.device, "strong"), (fill(bar), "soft")):
            y += 16
            self.out.text(0, y, shorten(line, self.out.width, FONT), style, title=line)
        y += 9
        self.out.rect(self.x(0), y, self.x(bar.capacity_gb) - self.x(0), HIGH, "track")
        at, full = 0.0, self.x(bar.capacity_gb)
        for part in sorted(bar.parts, key=lambda part: (self.hues[part.name], -part.gb)):
            self._part(part, at, y, full)
            at += max(part.gb, 0.0)
        self._capacity(bar, y)
        return y + HIGH + 24

    def _part(self, part: MemoryPart, at: float, y: float, full: float) -> None:
        """full: where the device is full, a line that the label keeps to one side of."""
        x0, x1 = self.x(at), self.x(at + max(part.gb, 0.0))
        if x1 <= x0:
            return
        hue, title = self.hues[part.name], f"{part.name}: {amount(part.gb, 'GB')}"
        self.out.rect(x0, y, max(x1 - x0 - (0.8 if x1 - x0 > 3 else 0), 0.4), HIGH, f"f{hue}", title)
        if x0 < full < x1:
            x0, x1 = (x0, full) if full - x0 > x1 - full else (full, x1)
        for text in (f"{part.name} {amount(part.gb, 'GB')}", part.name, amount(part.gb, "GB")):
            if width(text, SMALL) + 8 <= x1 - x0:
                self.out.text(
                    (x0 + x1) / 2, y + HIGH / 2 + 4, text, f"o{hue}", anchor="middle", size=SMALL, title=title
                )
                return

    def _capacity(self, bar: MemoryBar, y: float) -> None:
        x = self.x(bar.capacity_gb)
        end = self.x(bar.total_gb)
        if end > x:
            over = amount(bar.total_gb - bar.capacity_gb, "GB")
            self.out.rect(x, y - 4, end - x, HIGH + 8, "over", f"{over} too much")
        self.out.line(x, y - 4, x, y + HIGH + 4, "edge", f"capacity {amount(bar.capacity_gb, 'GB')}")

    def _axis(self, y: float) -> None:
        out = self.out
        out.line(self.x.start, y - 10, self.x.end, y - 10, "axis")
        taken: list[Box] = []
        for tick in self.x.ticks(max(2, int(out.width / 90))):
            name = short(tick) if tick else "0"
            name = f"{name}\u00a0GB"
            wide = width(name, SMALL)
            left = max(0.0, min(self.x(tick) - wide / 2, out.width - wide))
            box = text_box(left, y + 5, name, SMALL)
            if not any(map(box.meets, taken)):
                taken.append(box)
                out.line(self.x(tick), y - 10, self.x(tick), y - 6, "axis")
                if left == 0:
                    out.text(0, y + 5, name, "soft", size=SMALL)
                elif left + wide >= out.width - 0.01:
                    out.text(out.width, y + 5, name, "soft", anchor="end", size=SMALL)
                else:
                    out.text(self.x(tick), y + 5, name, "soft", anchor="middle", size=SMALL)
