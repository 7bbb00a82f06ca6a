"""Sensitivity: what +-25 % of each input does to the result, the largest effect on top."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megamoe.planner.report.charts.scales import Scale
from megamoe.planner.report.charts.svg import FONT, SMALL, Drawing
from megamoe.planner.report.data import Sensitivity
from megamoe.planner.report.words import ELLIPSIS, amount, percent, width, wrap

NARROW = 440  # below it an input's name stands above its bar
LOWER, HIGHER = 2, 1  # hues: the input lower, the input higher
NOTHING = 5e-4  # changes below this are no effect: they would print as 0.0 %
ROW, LINE = 24.0, 13.0


def change(row: Sensitivity, value: float) -> float:
    return (value - row.base) / abs(row.base) if row.base else 0.0


def effect(row: Sensitivity) -> float:
    moves = [abs(change(row, value)) for value in (row.low, row.high)]
    return max((move for move in moves if math.isfinite(move)), default=0.0)


def ordered(rows: Sequence[Sensitivity]) -> list[Sensitivity]:
    return sorted(rows, key=lambda row: -effect(row))


def row_title(row: Sensitivity) -> str:
    low, high = percent(change(row, row.low)), percent(change(row, row.high))
    return (
        f"{row.name}: {amount(row.low, row.unit)} ({low}) with 25\u00a0% less, "
        f"{amount(row.high, row.unit)} ({high}) with 25\u00a0% more"
    )


def caption(rows: Sequence[Sensitivity], of: str) -> str:
    """The drawing in sentences."""
    first = ordered(rows)[0]
    still = [row.name for row in rows if effect(row) < NOTHING]
    none = f" No effect: {', '.join(still)}." if still else ""
    if effect(first) < NOTHING:
        return f"No input moves the {of} from {amount(first.base, first.unit)} by itself."
    return f"Base: {of} {amount(first.base, first.unit)}. Most: {row_title(first)}.{none}"


def draw(rows: Sequence[Sensitivity], of: str, wide: float, key: str) -> str:
    return _Sheet(rows, of, wide, key).draw()


class _Sheet:
    """One drawing of the tornado at one width."""

    def __init__(self, rows: Sequence[Sensitivity], of: str, wide: float, key: str) -> None:
        self.rows, self.narrow = ordered(rows), wide < NARROW
        names = max(width(row.name, FONT) for row in rows)
        self.left = 0.0 if self.narrow else min(names + 12, wide * 0.42)
        self.x = self._scale(wide)
        self.out = Drawing(wide, 0.0, f"Sensitivity of the {of}", caption(rows, of), key)

    def _scale(self, wide: float) -> Scale:
        """The widest label of either side fits between the longest bar and the edge."""
        ends = [end for row in self.rows for end in _ends(row)]
        moves = [0.0, *(move for move, _ in ends)]
        left = max((width(text, SMALL) for move, text in ends if move < 0), default=0.0)
        right = max((width(text, SMALL) for move, text in ends if move >= 0), default=0.0)
        low, high = (min(moves), max(moves)) if ends else (-0.01, 0.01)
        return Scale(low, high, self.left + left + 7, wide - right - 7)

    def draw(self) -> str:
        y = 20.0
        base = amount(self.rows[0].base, self.rows[0].unit)
        self._base_label(f"base {base}")
        end = y + sum(map(self._height, self.rows))
        self.out.line(self.x(0), 16, self.x(0), end - 2, "edge")
        for row in self.rows:
            self._row(row, y)
            y += self._height(row)
        self.out.height = end + 2
        return self.out.render()

    def _base_label(self, text: str) -> None:
        half = width(text, SMALL) / 2
        x = max(half, min(self.x(0), self.out.width - half))
        self.out.text(x, 11, text, "soft", anchor="middle", size=SMALL)

    def _name(self, row: Sensitivity) -> list[str]:
        return wrap(row.name, self.out.width if self.narrow else self.left - 10, FONT, 3)

    def _height(self, row: Sensitivity) -> float:
        return ROW + (len(self._name(row)) - 1) * LINE + (LINE + 5 if self.narrow else 0)

    def _row(self, row: Sensitivity, y: float) -> None:
        """Draws a row below y: its name, and beside it or below it the bars."""
        lines = self._name(row)
        for index, line in enumerate(lines):
            at = y + (11 if self.narrow else 15) + LINE * index
            self.out.text(0, at, line, "ink halo", title=row.name if line.endswith(ELLIPSIS) else "")
        extra = (len(lines) - 1) * LINE
        self._bars(row, y + (LINE + extra if self.narrow else extra / 2))

    def _bars(self, row: Sensitivity, y: float) -> None:
        low, high = change(row, row.low), change(row, row.high)
        thick = 8.0 if low * high > 0 else 16.0
        self._bar(row, low, LOWER, y + 3, thick)
        self._bar(row, high, HIGHER, y + 19 - thick, thick)
        for move, text in _ends(row):
            left = move < 0
            x = self.x(move) + (-5 if left else 5)
            self.out.text(x, y + 15, text, "soft halo", anchor="end" if left else "start", size=SMALL)
        if not _ends(row):
            self._no_effect(y + 15)

    def _no_effect(self, y: float) -> None:
        left = self.x(0) + 80 > self.out.width
        self.out.text(
            self.x(0) + (-6 if left else 6), y, "no effect", "soft halo", anchor="end" if left else "start", size=SMALL
        )

    def _bar(self, row: Sensitivity, move: float, hue: int, y: float, high: float) -> None:
        if math.isfinite(move) and abs(move) >= NOTHING:
            x0, x1 = sorted((self.x(0), self.x(move)))
            self.out.rect(x0, y, max(x1 - x0, 0.8), high, f"f{hue}", row_title(row))


def _ends(row: Sensitivity) -> list[tuple[float, str]]:
    """The labels of a row and the ends they stand at; one for both where both bars point the same way."""
    moves = [change(row, value) for value in (row.low, row.high)]
    texts = [percent(move) for move in moves]
    seen = [end for end in zip(moves, texts, strict=True) if NOTHING <= abs(end[0]) < math.inf]
    if len(seen) == 2 and moves[0] * moves[1] > 0:
        return [(max(moves, key=abs), " / ".join(texts))]
    return seen
