"""A drawing: SVG elements in order, named and described for those who do not see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megamoe.planner.report.words import safe

FONT = 12.0
SMALL = 11.0


def num(value: float) -> str:
    """A coordinate to a tenth: 12.04 -> 12, 0.25 -> .2."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


@dataclass(slots=True)
class Drawing:
    """key makes its ids unique in the page; titles says whether shapes explain themselves when pointed at."""

    width: float
    height: float
    name: str
    description: str
    key: str
    titles: bool = True
    parts: list[str] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def open(self, style: str) -> None:
        self.add(f'<g class="{style}">')

    def close(self) -> None:
        self.add("</g>")

    def _put(self, tag: str, attributes: str, style: str, title: str) -> None:
        named = f' class="{style}"' if style else ""
        body = f"><title>{safe(title)}</title></{tag}>" if title and self.titles else "/>"
        self.add(f"<{tag} {attributes}{named}{body}")

    def rect(self, x: float, y: float, wide: float, high: float, style: str = "", title: str = "") -> None:
        self.path(f"M{num(x)} {num(y)}h{num(wide)}v{num(high)}h{num(-wide)}z", style, title)

    def line(self, x0: float, y0: float, x1: float, y1: float, style: str, title: str = "") -> None:
        self.path(f"M{num(x0)} {num(y0)}L{num(x1)} {num(y1)}", style, title)

    def polyline(self, points: list[tuple[float, float]], style: str) -> None:
        self.path("M" + "L".join(f"{num(x)} {num(y)}" for x, y in points), style)

    def path(self, d: str, style: str = "", title: str = "") -> None:
        self._put("path", f'd="{d}"', style, title)

    def circle(self, x: float, y: float, radius: float, style: str = "", title: str = "") -> None:
        self._put("circle", f'cx="{num(x)}" cy="{num(y)}" r="{num(radius)}"', style, title)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        style: str = "",
        *,
        anchor: str = "start",
        size: float = FONT,
        title: str = "",
        rotate: float = 0.0,
    ) -> None:
        """One line of text; title holds it in full where it is abbreviated. rotate: degrees about (x, y)."""
        if not text:
            return
        attributes = [f'x="{num(x)}" y="{num(y)}"']
        attributes += [f'text-anchor="{anchor}"'] * (anchor != "start")
        attributes += [f'font-size="{num(size)}"'] * (size != FONT)
        attributes += [f'transform="rotate({num(rotate)} {num(x)} {num(y)})"'] * (rotate != 0)
        attributes += [f'class="{style}"'] * bool(style)
        whole = f"<title>{safe(title)}</title>" if title and title != text else ""
        self.add(f"<text {' '.join(attributes)}>{whole}{safe(text)}</text>")

    def render(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {num(self.width)} {num(self.height)}" '
            f'font-size="{num(FONT)}" role="img" aria-label="{safe(self.name)}" aria-describedby="{self.key}-d">'
            f'<title>{safe(self.name)}</title><desc id="{self.key}-d">{safe(self.description)}</desc>'
        )
        return head + "".join(self.parts) + "</svg>"
