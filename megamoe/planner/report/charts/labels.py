"""Where labels may stand: boxes that are taken, and a search for one that is free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from megamoe.planner.report.words import width

ASCENT, DESCENT = 0.80, 0.24  # of a line of text, in ems above and below its baseline
LEADING = 1.17  # from baseline to baseline, in ems
LINE = 2.0  # room that a line takes to either side
ROUND = (0, 180, -90, 90, -45, -135, 45, 135, -20, -160, 20, 160, -70, -110, 70, 110)
ABOVE = (-45, -20, 0, -70, -90, -110, -135, -160)  # degrees, clockwise from the right: above and beside a point


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


def text_box(x: float, y: float, text: str, size: float, anchor: str = "start") -> Box:
    """The box of a line of text whose baseline is at y."""
    wide = width(text, size)
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return Box(left, y - ASCENT * size, left + wide, y + DESCENT * size)


def around(x: float, y: float, radius: float) -> Box:
    return Box(x - radius, y - radius, x + radius, y + radius)


@dataclass(frozen=True, slots=True)
class Spot:
    """A label's place: where its first line starts, its box, and whether it is so far off that a line should lead."""

    x: float
    y: float
    box: Box
    far: bool

    def lead_from(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box's upper or lower edge that is nearest to (x, y)."""
        return min(max(x, self.box.left), self.box.right), self.box.bottom if self.box.bottom < y else self.box.top


@dataclass(slots=True)
class Labels:
    """The labels of one chart. Every box that is put in stays free of later ones.

    faint: dots and dotted lines, which a label with a halo may cover where there is no better place.
    """

    bounds: Box
    taken: list[Box] = field(default_factory=list)
    faint: list[Box] = field(default_factory=list)

    def block(self, *boxes: Box, faint: bool = False) -> None:
        (self.faint if faint else self.taken).extend(boxes)

    def block_line(self, x0: float, y0: float, x1: float, y1: float, *, faint: bool = False) -> None:
        """A straight line, as a chain of small boxes."""
        steps = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / (2 * LINE)))
        for step in range(steps + 1):
            self.block(around(x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps, LINE), faint=faint)

    def free(self, boxes: Iterable[Box], over: bool = False) -> bool:
        taken = self.taken if over else [*self.taken, *self.faint]
        return all(box.inside(self.bounds) and not any(map(box.meets, taken)) for box in boxes)

    def claim(self, *boxes: Box, over: bool = False) -> bool:
        """Takes the boxes if all of them are free; over: what is faint does not count."""
        if not self.free(boxes, over):
            return False
        self.block(*boxes)
        return True

    def place(
        self,
        x: float,
        y: float,
        lines: Sequence[str],
        size: float,
        *,
        gap: float = 7,
        reach: float = 400,
        directions: Sequence[float] = ROUND,
        over: bool = False,
    ) -> Spot | None:
        """The free place nearest to a point, at least gap and at most reach away from it; None when there is none.

        over: what is faint does not count.
        """
        wide, high = max(width(line, size) for line in lines), (len(lines) - 1) * LEADING * size
        for distance, left, middle in _near(x, y, wide, high + size, gap, reach, directions):
            first = middle - high / 2 + (ASCENT - DESCENT) / 2 * size
            box = Box(left, first - ASCENT * size, left + wide, first + high + DESCENT * size)
            if self.claim(box, over=over):
                return Spot(left, first, box, distance > gap)
        return None


def _near(
    x: float, y: float, wide: float, high: float, gap: float, reach: float, directions: Sequence[float]
) -> Iterator[tuple[float, float, float]]:
    """Distance, left edge and vertical middle of boxes around a point, the nearest first."""
    distance = gap
    while distance <= reach:
        for degrees in directions:
            across, down = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            yield distance, x + distance * across - wide * (1 - across) / 2, y + distance * down + down * high / 2
        distance += 5
