"""What commands print: a result as JSON or as tables, lines beside it, notes on stderr; the same for all of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import typer
from rich.text import Text

from megamoe.launch.terminal import Format, stderr, stdout
from megamoe.paths import write_whole

Output = Annotated[Format, typer.Option("--format", help="How to print the result.")]
# words that have a colour, at the beginning or the end of a line, or alone in a cell
STYLES = {"HIDDEN": "bold green", "EXPOSED": "bold red", "DOES NOT FIT": "bold red", "MISSES": "bold red"}
STYLES |= {"ok": "green", "warn": "yellow", "fail": "bold red", "identical": "bold green", "different": "bold red"}
_ROOM = 30  # columns that words should have beside figures; with fewer they stand below them


def emit(output: Format, report: object, tables: Callable[[], None]) -> None:
    """Prints a result: as JSON, alone on stdout, dataclasses as objects; or by what prints its tables."""
    if output is Format.json:
        sys.stdout.write(json.dumps(report, indent=2, allow_nan=False, default=asdict) + "\n")
    else:
        tables()


def say(line: str) -> None:
    """A line as it is, however long; a verdict at its beginning or end in colour."""
    text = Text(line)
    for word, style in STYLES.items():
        if line.startswith(word):
            text.stylize(style, 0, len(word))
        elif line.endswith(f" {word}"):
            text.stylize(style, len(line) - len(word))
    stdout.print(text, soft_wrap=True)


def note(line: str) -> None:
    stderr.print(Text(line), soft_wrap=True)


def write(path: Path, content: str | bytes, use: str = "") -> None:
    """Writes a file and says so, and of what use it is. See write_whole()."""
    write_whole(path, content)
    note(f"wrote {path}{use}")


def check_folder(path: Path) -> None:
    """ValueError before anything is calculated where the file could not be written after."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    try:
        folder: Path | None = path.resolve().parent
    except FileNotFoundError:  # the working directory has been removed
        folder = None
    if folder is None or not folder.is_dir():
        raise ValueError(f"{path} is in no folder that exists")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{path} cannot be written by this user")


def show(columns: Mapping[str, str], rows: Iterable[Sequence[Any]], title: str = "", *, folds: bool = False) -> None:
    """A table as wide as it needs to be, closer together where the terminal is narrow.

    columns: heading -> how its values are printed: "" words, to the left; ">" to the right; "~" as short() does; else a
    format such as ",.1f", for figures. None is "-"; a text among figures stands as it is; an empty row is a rule.
    folds: the last column is words that go on in the next line where the terminal ends, or under the row where that
    leaves too little room.
    """
    body = [tuple(map(_cell, row, columns.values())) for row in rows]
    table = [tuple(columns), *filter(None, body)]
    widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
    left = [not kind for kind in columns.values()]
    gap = 2 if folds or sum(widths) + 2 * (len(widths) - 1) <= stdout.width else 1
    room = stdout.width - sum(widths[:-1]) - gap * len(widths[:-1])
    under = folds and room < min(_ROOM, widths[-1])
    if folds:
        widths[-1] = len(table[0][-1]) if under else min(widths[-1], room)
    dash = "\u2500" if stdout.encoding.startswith("utf") else "-"
    line = Text(dash * (sum(widths) + gap * (len(widths) - 1)))
    lines = [Text(title)] if title else []
    lines += [*_cells(table[0], widths, left, gap), line]
    for row in body:
        if not row:
            lines.append(line)
        elif under:
            lines += _cells((*row[:-1], ""), widths, left, gap)
            lines += [Text(f"    {each}") for each in wrap(row[-1], max(stdout.width - 4, 20), break_on_hyphens=False)]
        else:
            lines += _cells(row, widths, left, gap)
    stdout.print(Text("\n").join(lines), soft_wrap=True)


def _cell(value: Any, kind: str) -> str:
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return str(value) if kind in ("", ">") else short(value) if kind == "~" else f"{value:{kind}}"


def _cells(row: tuple[str, ...], widths: Sequence[int], left: Sequence[bool], gap: int) -> list[Text]:
    """The lines of a row: more than one where its last cell does not fit."""
    last = wrap(row[-1], widths[-1], break_on_hyphens=False) if widths[-1] else []
    first = (*row[:-1], last[0] if last else "")
    cells = [
        Text(cell.ljust(width) if words else cell.rjust(width), STYLES.get(cell, ""))
        for cell, width, words in zip(first, widths, left, strict=True)
    ]
    line = Text(" " * gap).join(cells)
    line.rstrip()
    indent = " " * (sum(widths[:-1]) + gap * len(widths[:-1]))
    return [line, *(Text(indent + each) for each in last[1:])]


def short(value: float | None) -> str:
    """About four digits: 12345.6 -> '12,346'    1.2345 -> '1.234'    0.012345 -> '0.0123'    8.0 -> '8'"""
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-3 and size:
        return f"{value:.3g}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4}f}"
