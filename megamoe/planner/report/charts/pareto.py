"""The Pareto front: tokens/s of a device against tokens/s of a user, over all configurations that were tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from megamoe.catalog.wording import plural
from megamoe.planner.report.charts.axes import draw_axes
from megamoe.planner.report.charts.labels import ABOVE, LEADING, ROUND, Box, Labels, around
from megamoe.planner.report.charts.scales import Scale, round_up
from megamoe.planner.report.charts.svg import FONT, SMALL, Drawing
from megamoe.planner.report.data import ParetoPoint
from megamoe.planner.report.words import amount, shorten, wrap

LOG_RATIO = 40  # an axis is logarithmic where the front spans more than this
DOTS = 1200  # other configurations that are drawn, about: beyond that, close ones are drawn once
TITLED = 80  # with more points on the front than this, the table alone names them
X_NAME, Y_NAME = "tokens/s per user", "tokens/s per device"


def shown(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    return [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]


def front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    return sorted((point for point in shown(points) if point.on_front), key=lambda point: (point.x, -point.y))


def point_title(point: ParetoPoint) -> str:
    return f"{point.label}: {amount(point.y, Y_NAME)}, {amount(point.x, X_NAME)}"


def caption(points: Sequence[ParetoPoint]) -> str:
    """The drawing in sentences."""
    chosen = " ".join(f"Chosen: {point_title(point)}." for point in points if point.chosen)
    return f"{plural(len(points), 'configuration')}, {len(front(points))} on the front. {chosen}".strip()


def draw(points: Sequence[ParetoPoint], wide: float, key: str) -> str:
    return _Sheet(shown(points), wide, key).draw()


class _Sheet:
    """One drawing of a front at one width."""

    def __init__(self, points: list[ParetoPoint], wide: float, key: str) -> None:
        self.points, self.front = points, front(points)
        high = round(min(max(wide * 0.68, 290), 400))
        self.left, self.right, self.top, self.bottom = 46.0, wide - 10, 22.0, high - 36.0
        matter = [point for point in points if point.on_front or point.chosen] or points
        self.x = _scale([p.x for p in matter], [p.x for p in points], self.left, self.right)
        self.y = _scale([p.y for p in matter], [p.y for p in points], self.bottom, self.top)
        self.labels = Labels(Box(self.left + 2, self.top, self.right, self.bottom - 2))
        titles = wide > 400 and len(self.front) <= TITLED
        self.out = Drawing(wide, high, "Pareto front", caption(points), key, titles)

    def at(self, point: ParetoPoint) -> tuple[float, float]:
        """Where a point lies; what an axis leaves out stands on its edge."""
        x = min(max(self.x(point.x), self.left), self.right)
        return x, min(max(self.y(point.y), self.top), self.bottom)

    def draw(self) -> str:
        self._axes()
        self._others()
        self._line()
        for point in self.points:
            if point.chosen:
                self.out.circle(*self.at(point), 6.5, "mark", point_title(point))
                self.labels.block(around(*self.at(point), 8))
        self._all_labels()
        return self.out.render()

    def _axes(self) -> None:
        ticks = (int((self.right - self.left) / 70), 5)
        draw_axes(self.out, self.x, self.y, (X_NAME, Y_NAME), ticks)

    def _others(self) -> None:
        """All in one path; of those that lie close together one: thousands of them must not make the page heavy."""
        places = [self.at(point) for point in self.points if not point.on_front and not point.chosen]
        for grid in (1, 2, 3, 4, 6):
            cells = {(round(x / grid), round(y / grid)): (round(x), round(y)) for x, y in places}
            if len(cells) <= DOTS:
                break
        path, before = [], (0, 0)
        for x, y in sorted(cells.values()):
            path.append(f"m{x - before[0]} {y - before[1]}h0".replace(" -", "-"))
            before = x, y
            self.labels.block(around(x, y, 2), faint=True)
        if path:
            self.out.path("".join(path), "dots")

    def _line(self) -> None:
        places = [self.at(point) for point in self.front]
        if len(places) > 1:
            self.out.polyline(places, "slope s1 open")
        for (x0, y0), (x1, y1) in pairwise(places):
            self.labels.block_line(x0, y0, x1, y1)
        for point, place in zip(self.front, places, strict=True):
            self.out.circle(*place, 3.5, "f1", point_title(point))
            self.labels.block(around(*place, 4))

    def _all_labels(self) -> None:
        """The chosen one always; then the ends of the front and what lies between, where there is room close by."""
        for point in self.points:
            if point.chosen:
                self._chosen_label(point)
        between = self.front[1:-1]
        step = max(1, math.ceil(len(between) / 4))
        for point in [*self.front[-1:], *self.front[:1], *between[::step]]:
            if not point.chosen:
                text = shorten(point.label, (self.right - self.left) * 0.6, SMALL)
                self._label(point, [text], "ink halo", SMALL, 24, ABOVE)

    def _chosen_label(self, point: ParetoPoint) -> None:
        """In one line or two close by, else on the dots around the point."""
        room = (self.right - self.left) * 0.7
        one, two = wrap(point.label, room, FONT, 1), wrap(point.label, room * 0.85, FONT, 2)
        for lines, reach, directions, over in (
            *((one, 24, ABOVE, False), (two, 24, ABOVE, False), (one, 24, ROUND, True)),
            *((two, 24, ROUND, True), (two, 600, ROUND, True)),
        ):
            fits = lines is two or lines == [point.label]
            if fits and self._label(point, lines, "strong halo", FONT, reach, directions, over):
                return

    def _label(
        self,
        point: ParetoPoint,
        lines: list[str],
        style: str,
        size: float,
        reach: float,
        directions: Sequence[float],
        over: bool = False,
    ) -> bool:
        place = self.at(point)
        gap = 14 if point.chosen else 8
        spot = self.labels.place(*place, lines, size, gap=gap, reach=reach, directions=directions, over=over)
        if spot is None:
            return False
        if spot.far:
            self.out.line(*spot.lead_from(*place), *place, "lead")
        for index, line in enumerate(lines):
            y = spot.y + index * LEADING * size
            self.out.text(spot.x, y, line, style, size=size, title=point_title(point))
        return True


def _scale(matter: list[float], everything: list[float], start: float, end: float) -> Scale:
    """From zero, or logarithmic where the values that matter span too much for it."""
    low, high = min(matter), max(*everything, 0.0)
    if low > 0 and max(matter) > LOG_RATIO * low:
        positive = [value for value in everything if value > 0]
        return Scale(max(min(positive) * 0.8, low / 1000), round_up(high * 1.1), start, end, log=True)
    return Scale(min(low, 0.0), round_up(high * 1.04) if high > 0 else 1.0, start, end)
