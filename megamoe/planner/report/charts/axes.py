"""The two axes of a chart: grid, ticks that do not meet, and names."""

from __future__ import annotations

from megamoe.planner.report.charts.labels import Box, text_box
from megamoe.planner.report.charts.scales import Scale
from megamoe.planner.report.charts.svg import SMALL, Drawing, num
from megamoe.planner.report.words import short, shorten


def draw_axes(out: Drawing, x: Scale, y: Scale, names: tuple[str, str], ticks: tuple[int, int]) -> None:
    """names and about how many ticks, of x and of y; y runs from the bottom (start) to the top (end)."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    across, up = x.ticks(ticks[0]), y.ticks(ticks[1])
    out.path("".join(f"M{num(x(t))} {num(top)}V{num(bottom)}" for t in across), "grid")
    out.path("".join(f"M{num(left)} {num(y(t))}H{num(right)}" for t in up), "grid")
    out.line(left, bottom, right, bottom, "axis")
    taken: list[Box] = []
    for tick in across:
        box = text_box(x(tick), bottom + 15, short(tick), SMALL, "middle")
        if box.left >= 0 and box.right <= out.width and not any(map(box.meets, taken)):
            taken.append(box)
            out.text(x(tick), bottom + 15, short(tick), "soft", anchor="middle", size=SMALL)
    for tick in up:
        name = shorten(short(tick), left - 6, SMALL)
        out.text(left - 6, y(tick) + 4, name, "soft", anchor="end", size=SMALL, title=short(tick))
    across_name, up_name = (name + (" (log)" if axis.log else "") for name, axis in zip(names, (x, y), strict=True))
    out.text(right, bottom + 31, across_name, "soft", anchor="end", size=SMALL)
    out.text(0, 11, up_name, "soft", size=SMALL)
