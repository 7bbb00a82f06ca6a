"""The roofline: what each link and the compute ceiling allow, the rule's threshold, and where the plan stands."""

from __future__ import annotations

import math

from megamoe.planner.report.charts.axes import draw_axes
from megamoe.planner.report.charts.labels import ASCENT, DESCENT, LEADING, Box, Labels, around, text_box
from megamoe.planner.report.charts.scales import Scale
from megamoe.planner.report.charts.svg import FONT, SMALL, Drawing
from megamoe.planner.report.data import Roofline, RooflineTier
from megamoe.planner.report.words import amount, number, shorten, width

FLOPS_PER_BYTE = "FLOPs/Byte"
HUES = (1, 2, 3, 5, 6)


def ridge(tier: RooflineTier, tflops: float) -> float:
    """FLOPs per byte at which a link of this bandwidth feeds this much compute."""
    return 1000 * tflops / tier.gb_s


def shown(roofline: Roofline) -> list[RooflineTier]:
    return [tier for tier in roofline.tiers if 0 < tier.gb_s < math.inf]


def can_draw(roofline: Roofline) -> bool:
    return bool(shown(roofline)) and 0 < roofline.peak_tflops < math.inf


def caption(roofline: Roofline) -> str:
    """The drawing in sentences."""
    peak, name = amount(roofline.peak_tflops, "TFLOP/s"), roofline.plan_name
    meets = "; ".join(
        f"{tier.name} {amount(tier.gb_s, 'GB/s')} at {amount(ridge(tier, roofline.peak_tflops), FLOPS_PER_BYTE)}"
        for tier in shown(roofline)
    )
    plan = f"{amount(roofline.plan_tflops, 'TFLOP/s')} at {amount(roofline.plan_flops_per_byte, FLOPS_PER_BYTE)}"
    threshold = amount(roofline.threshold_flops_per_byte, FLOPS_PER_BYTE)
    rule = "" if roofline.threshold_name == "threshold" else f"{roofline.threshold_name} = "
    return (
        f"Links meet the peak of {peak} here: {meets}. Reached by the profile: "
        f"{amount(roofline.achieved_tflops, 'TFLOP/s')}. Threshold {rule}{threshold}; "
        f"{name}: {plan}. A link hides when it meets the ceiling left of the threshold."
    )


def draw(roofline: Roofline, wide: float, key: str) -> str:
    return _Sheet(roofline, wide, key).draw()


class _Sheet:
    """One drawing of a roofline at one width."""

    def __init__(self, roofline: Roofline, wide: float, key: str) -> None:
        self.roofline, self.tiers = roofline, shown(roofline)
        self.ceilings = [v for v in (roofline.peak_tflops, roofline.achieved_tflops) if 0 < v < math.inf]
        high = round(min(max(wide * 0.68, 290), 400))
        self.left, self.right, self.top, self.bottom = 42.0, wide - 6, 22.0, high - 36.0
        self.x, self.y = self._scales()
        self.labels = Labels(Box(self.left + 2, self.top, self.right, self.bottom - 2))
        self.out = Drawing(wide, high, "Roofline", caption(roofline), key)

    def _scales(self) -> tuple[Scale, Scale]:
        roofline = self.roofline
        across = [ridge(tier, roofline.peak_tflops) for tier in self.tiers]
        across += [roofline.threshold_flops_per_byte, roofline.plan_flops_per_byte]
        across = [value for value in across if 0 < value < math.inf]
        low, high = min(across) / 12, max(across) * 3
        up = [*self.ceilings, roofline.plan_tflops]
        up = [value for value in up if 0 < value < math.inf]
        lowest = min(min(up) / 3, max(up) / 15)
        return Scale(low, high, self.left, self.right, log=True), Scale(
            lowest, max(up) * 2.2, self.bottom, self.top, log=True
        )

    def draw(self) -> str:
        self._axes()
        self._threshold()
        self._ceilings()
        ends = [self._slope(tier, HUES[index % len(HUES)]) for index, tier in enumerate(self.tiers)]
        self._plan_point()
        self._ceiling_labels()
        self._plan_label()
        self._threshold_label()
        for tier, (x0, y0, x1, y1), index in zip(self.tiers, ends, range(len(ends)), strict=True):
            self._slope_label(tier, x0, y0, x1, y1, HUES[index % len(HUES)])
        return self.out.render()

    # ---- axes ----

    def _axes(self) -> None:
        ticks = (int((self.right - self.left) / 58), 6)
        names = ("FLOPs per byte of link traffic", "TFLOP/s per device")
        draw_axes(self.out, self.x, self.y, names, ticks)

    # ---- lines ----

    def _slope(self, tier: RooflineTier, hue: int) -> tuple[float, float, float, float]:
        """Draws the part of a link's slope that is in sight, up to the peak."""
        first = max(self.x.low, 1000 * self.y.low / tier.gb_s)
        last = min(self.x.high, ridge(tier, max(self.ceilings)))
        ends = (
            self.x(first),
            self.y(first * tier.gb_s / 1000),
            self.x(last),
            self.y(last * tier.gb_s / 1000),
        )
        title = f"{tier.name}: {amount(tier.gb_s, 'GB/s')} one way"
        self.out.line(*ends, f"slope s{hue}", title)
        self.labels.block_line(*ends)
        top = ridge(tier, self.roofline.peak_tflops)
        if top <= self.x.high:
            meets = f"{tier.name} meets the peak at {amount(top, FLOPS_PER_BYTE)}"
            self.out.circle(self.x(top), self.y(self.roofline.peak_tflops), 3, f"f{hue}", meets)
            self.labels.block(around(self.x(top), self.y(self.roofline.peak_tflops), 4))
        return ends

    def _ceilings(self) -> None:
        fastest = max(self.tiers, key=lambda tier: tier.gb_s)
        for value, style in zip(self.ceilings, ("ceiling", "ceiling dashed"), strict=False):
            start, y = self.x(max(ridge(fastest, value), self.x.low)), self.y(value)
            self.out.line(start, y, self.right, y, style)
            self.labels.block_line(start, y, self.right, y)

    def _threshold(self) -> None:
        value = self.roofline.threshold_flops_per_byte
        if 0 < value < math.inf:
            self.out.line(self.x(value), self.top, self.x(value), self.bottom, "threshold", self._threshold_text())
            self.labels.block_line(self.x(value), self.top, self.x(value), self.bottom, faint=True)

    def _plan_point(self) -> None:
        point = self._point()
        if point:
            self.out.circle(*point, 6, "mark", self._plan_text())
            self.labels.block(around(*point, 8))

    def _point(self) -> tuple[float, float] | None:
        across, up = self.roofline.plan_flops_per_byte, self.roofline.plan_tflops
        return (self.x(across), self.y(up)) if 0 < across < math.inf and 0 < up < math.inf else None

    # ---- labels ----

    def _threshold_text(self) -> str:
        return f"{self.roofline.threshold_name} = {amount(self.roofline.threshold_flops_per_byte, FLOPS_PER_BYTE)}"

    def _plan_text(self) -> str:
        roofline = self.roofline
        where = f"{amount(roofline.plan_tflops, 'TFLOP/s')} at {amount(roofline.plan_flops_per_byte, FLOPS_PER_BYTE)}"
        return f"{roofline.plan_name}: {where}"

    def _near(self, x: float, y: float, text: str, style: str) -> None:
        """A label as near to a point as there is room, with a line to it when that is far."""
        self._place((x, y), (shorten(text, (self.right - self.left) * 0.7, SMALL),), style, SMALL, 400.0, text)

    def _place(
        self,
        point: tuple[float, float],
        lines: tuple[str, ...],
        style: str,
        size: float,
        reach: float,
        title: str,
        over: bool = False,
    ) -> bool:
        spot = self.labels.place(*point, lines, size, gap=9, reach=reach, over=over)
        if spot is None:
            return False
        if spot.far:
            self.out.line(*spot.lead_from(*point), *point, "lead")
        for index, line in enumerate(lines):
            self.out.text(spot.x, spot.y + index * LEADING * size, line, style, size=size, title=title)
        return True

    def _ceiling_labels(self) -> None:
        """On its line where a place is free, from the right end leftwards, or on the threshold; else led to."""
        for value, name in zip(self.ceilings, ("peak", "achieved"), strict=False):
            y, whole = self.y(value), f"{name} {amount(value, 'TFLOP/s')}"
            start = self.x(max(min(ridge(tier, value) for tier in self.tiers), self.x.low))
            rights = [self.right - step * (self.right - start) / 16 for step in range(16)]
            texts = (whole, f"{name} {number(value)}")
            spots = [(right, y + down, text) for text in texts for down in (-6, 14) for right in rights]
            tries = ((spot, over) for over in (False, True) for spot in spots)
            found = next((s for s, over in tries if self.labels.claim(text_box(*s, SMALL, "end"), over=over)), None)
            if found:
                self.out.text(*found, "ink halo", anchor="end", size=SMALL, title=whole)
            else:
                self._near((start + self.right) / 2, y, whole, "ink halo")

    def _plan_label(self) -> None:
        """Name and value in one line, or in two where one finds no room close by; on the threshold before far off."""
        point = self._point()
        if not point:
            return
        name, value = self.roofline.plan_name, amount(self.roofline.plan_tflops, "TFLOP/s")
        one, two = (f"{name}: {value}",), (name, value)
        for lines, reach, over in ((one, 20.0, False), (two, 20.0, False), (one, 30.0, True), (two, 400.0, True)):
            if self._place(point, lines, "strong halo", FONT, reach, self._plan_text(), over):
                return

    def _threshold_label(self) -> None:
        """Beside its line, as far down as there is room, at last without its name; else above the line's end."""
        value, whole = self.roofline.threshold_flops_per_byte, self._threshold_text()
        if not 0 < value < math.inf:
            return
        x, brief = self.x(value), amount(value, FLOPS_PER_BYTE)
        bases = [self.bottom - 8 - step for step in range(0, int(self.bottom - self.top) - 20, 8)]
        sides = ((x + 6, "start"), (x - 6, "end"))
        spots = [(at, base, text, side) for text in (whole, brief) for base in bases for at, side in sides]
        left = min(x, self.right - width(brief, SMALL))
        free = (spot for spot in spots if self.labels.claim(text_box(*spot[:3], SMALL, spot[3])))
        at, base, text, side = next(free, (left, 11, brief, "start"))
        self.out.text(at, base, text, "ink halo", anchor=side, size=SMALL, title=whole)

    def _slope_label(self, tier: RooflineTier, x0: float, y0: float, x1: float, y1: float, hue: int) -> None:
        """Along the slope, or close to it; abbreviated along it where neither has room; else anywhere, led to."""
        rate, long, middle = amount(tier.gb_s, "GB/s"), math.hypot(x1 - x0, y1 - y0), ((x0 + x1) / 2, (y0 + y1) / 2)
        slope, whole, style = (x0, y0, x1, y1), f"{tier.name} {rate}", f"t{hue} halo"
        rooms = [long * share - width(f" {rate}", SMALL) for share in (0.9, 0.7, 0.5)]
        briefs = [f"{shorten(tier.name, room, SMALL)} {rate}".strip() for room in rooms]
        if any(self._along(whole, whole, slope, style, over) for over in (False, True)):
            return
        if self._place(middle, (whole,), style, SMALL, 40.0, whole):
            return
        if any(self._along(brief, whole, slope, style, True) for brief in briefs):
            return
        cut = shorten(whole, (self.right - self.left) * 0.6, SMALL)
        if not self._place(middle, (cut,), style, SMALL, 400.0, whole, True):
            self._place(middle, (rate,), style, SMALL, 400.0, whole, True)

    def _along(self, text: str, whole: str, slope: tuple[float, float, float, float], style: str, over: bool) -> bool:
        x0, y0, x1, y1 = slope
        angle, long = math.atan2(y1 - y0, x1 - x0), math.hypot(x1 - x0, y1 - y0)
        wide, tall = width(text, SMALL), ASCENT * SMALL * 0.9
        for share in (0.5, 0.45, 0.55, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8):
            for off in (-6.0, 6.0 + tall):
                x = x0 + (x1 - x0) * share - off * math.sin(angle)
                y = y0 + (y1 - y0) * share + off * math.cos(angle)
                fits = wide / 2 <= min(share, 1 - share) * long
                if fits and self.labels.claim(*_chain(x, y, wide, angle), over=over):
                    turn = math.degrees(angle)
                    self.out.text(x, y, text, style, anchor="middle", size=SMALL, rotate=turn, title=whole)
                    return True
        return False


def _chain(x: float, y: float, wide: float, angle: float) -> list[Box]:
    """Small boxes along a line of text that is turned about its middle."""
    rise = (ASCENT - DESCENT) / 2 * SMALL
    x, y = x + rise * math.sin(angle), y - rise * math.cos(angle)
    count = max(2, math.ceil(wide / 8))
    steps = [(index / (count - 1) - 0.5) * wide for index in range(count)]
    return [around(x + step * math.cos(angle), y + step * math.sin(angle), 5) for step in steps]
