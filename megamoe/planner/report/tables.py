"""Tables, lists and sections in HTML. Cells are HTML already; who calls escapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamoe.planner.report.words import safe


@dataclass(frozen=True, slots=True)
class Column:
    """share: of the table's width, in parts; number: aligned at the right, as is all but the first in a plain table."""

    name: str
    share: int
    number: bool = False


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    caption: str,
    *,
    stack: bool = False,
    marked: int | None = None,
) -> str:
    """A table whose first cells head their rows.

    stack: narrow screens show each row as a block, every cell with its column's name. Blocks lose a table's meaning
    to those who do not see it, so the roles are spelt out. marked: the row of the plan itself.
    """
    whole = sum(column.share for column in columns)
    widths = "".join(f'<col style="width:{100 * column.share / whole:.1f}%">' for column in columns)
    heads = "".join(
        f'<th scope="col"{_role("columnheader", stack)}{_style(column)}>{safe(column.name)}</th>' for column in columns
    )
    body = "".join(_row(columns, row, stack, index == marked) for index, row in enumerate(rows))
    group, style = _role("rowgroup", stack), ' class="stack"' if stack else ""
    return (
        f"<table{_role('table', stack)}{style}><caption>{safe(caption)}</caption><colgroup>{widths}</colgroup>"
        f"<thead{group}><tr{_role('row', stack)}>{heads}</tr></thead><tbody{group}>{body}</tbody></table>"
    )


def _row(columns: Sequence[Column], row: Sequence[str], stack: bool, chosen: bool) -> str:
    assert len(row) == len(columns), row
    cells = [f'<th scope="row"{_role("rowheader", stack)}>{row[0]}</th>']
    for column, cell in zip(columns[1:], row[1:], strict=True):
        label = f'<span class="label" aria-hidden="true">{safe(column.name)} </span>' if stack else ""
        cells.append(f"<td{_role('cell', stack)}{_style(column) if stack else ''}>{label}{cell}</td>")
    style = ' class="chosen"' if chosen else ""
    return f"<tr{_role('row', stack)}{style}>{''.join(cells)}</tr>"


def _role(name: str, stack: bool) -> str:
    return f' role="{name}"' if stack else ""


def _style(column: Column) -> str:
    return ' class="n"' if column.number else ""


def section(name: str, title: str, body: str, style: str = "") -> str:
    """A section that its heading names. name: the heading's id."""
    named = f' class="{style}"' if style else ""
    return f'<section aria-labelledby="{name}"{named}><h2 id="{name}">{safe(title)}</h2>{body}</section>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{safe(summary)}</summary>{body}</details>"


def bullets(lines: Iterable[str], style: str) -> str:
    return f'<ul class="{style}">' + "".join(f"<li>{safe(line)}</li>" for line in lines) + "</ul>"
