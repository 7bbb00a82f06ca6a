"""The page, by its template: sections in order, each left out where the data has nothing for it."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from megamoe.planner.report import sections
from megamoe.planner.report.data import ReportData
from megamoe.planner.report.words import amount, safe


def render(data: ReportData) -> str:
    """One self-contained HTML page; the same data gives the same text."""
    page = templates().get_template("page.html")
    columns = min((6, 5, 4), key=lambda columns: (-len(data.tiles) % columns, -columns))  # the fewest gaps at the end
    made = " · ".join(part for part in (data.version, data.date) if part)
    return page.render(data=data, groups=sections.groups(data), tile_columns=columns, made=made) + "\n"


@cache
def templates() -> Environment:
    """What is printed in a template is escaped, and holds no character that XML forbids, unless it is Markup."""
    made = Environment(loader=PackageLoader("megamoe.planner.report"), autoescape=True, finalize=_escaped)
    made.filters |= {"amount": amount}
    return made


def _escaped(value: object) -> object:
    return value if value is None or isinstance(value, Markup) else Markup(safe(str(value)))
