"""The page: sections in order, each left out where the data has nothing for it."""

from __future__ import annotations

from pathlib import Path

from megamoe.planner.report import figures
from megamoe.planner.report.data import ReportData, Tile
from megamoe.planner.report.style import css
from megamoe.planner.report.tables import Column, bullets, section, table
from megamoe.planner.report.words import amount, breakable, safe

SIGNS = {
    # compute above, communication below: within it, or sticking out
    "HIDDEN": '<path class="sign" d="M0 1h38v8h-38z"/><path class="sign faint" d="M0 11h29v8h-29z"/>',
    "EXPOSED": '<path class="sign faint" d="M0 1h25v8h-25z"/><path class="sign" d="M0 11h38v8h-38z"/>',
}


def write_report(data: ReportData, path: Path) -> None:
    """Writes the page. OSError where the path cannot be written."""
    path.write_text(render(data), encoding="utf-8")


def render(data: ReportData) -> str:
    """One self-contained HTML page; the same data gives the same text."""
    parts = [
        figures.timeline_section(data),
        _pair(figures.roofline_section(data), figures.pareto_section(data)),
        _pair(figures.memory_section(data), figures.sensitivity_section(data)),
        _terms(data),
        _sources(data),
        _assumptions(data),
    ]
    main = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{data.verdict}: {safe(data.title)}</title>"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{css()}</style></head>\n'
        f'<body><div class="page">{_header(data)}\n<main>{_verdict(data)}\n{main}</main>\n{_footer(data)}</div>'
        "</body></html>\n"
    )


def _pair(*parts: str) -> str:
    """Sections side by side where there is room; nothing when there are none."""
    seen = [part for part in parts if part]
    return f'<div class="pair">{"".join(seen)}</div>' if seen else ""


# ---- the top ----


def _header(data: ReportData) -> str:
    title = " ".join(f"<span>{safe(word)}</span>" for word in data.title.split())  # names do not break at hyphens
    return f'<header><p class="kicker">megamoe plan</p><h1>{title}</h1></header>'


def _verdict(data: ReportData) -> str:
    sign = f'<svg viewBox="0 0 38 20" aria-hidden="true" focusable="false">{SIGNS[data.verdict]}</svg>'
    warnings = bullets(data.warnings, "warnings") if data.warnings else ""
    tiles = f'<dl class="tiles in{_columns(len(data.tiles))}">{"".join(map(_tile, data.tiles))}</dl>'
    return (
        f'<div class="verdict {data.verdict.lower()}"><p class="word">{sign}<strong>{data.verdict}</strong></p>'
        f'<p class="sentence">{safe(data.sentence)}</p>{warnings}</div>{tiles if data.tiles else ""}'
    )


def _columns(tiles: int) -> int:
    """As many as leave the fewest gaps in the last line."""
    return min((6, 5, 4), key=lambda columns: (-tiles % columns, -columns))


def _tile(tile: Tile) -> str:
    unit = f' <span class="unit">{safe(tile.unit)}</span>' if tile.unit else ""
    note = f'<dd class="note">{safe(tile.note)}</dd>' if tile.note else ""
    value = f'<dd class="value">{safe(amount(tile.value))}{unit}</dd>'
    return f'<div class="tile"><dt>{safe(tile.label)}</dt>{value}{note}</div>'


# ---- the words below the figures ----


def _terms(data: ReportData) -> str:
    columns = [Column("Term", 8), Column("Formula", 13), Column("In numbers", 12), Column("Value", 8, True)]
    rows = [
        [
            safe(term.name),
            f"<code>{breakable(term.formula)}</code>",
            f"<code>{breakable(term.numbers)}</code>",
            safe(amount(term.value, term.unit)),
        ]
        for term in data.terms
    ]
    body = table(columns, rows, "Each step of the calculation", stack=True)
    return section("h-terms", "The plan, term by term", body, "long") if rows else ""


def _sources(data: ReportData) -> str:
    columns = [Column("Input", 10), Column("Value", 7, True), Column("Kind", 6), Column("Source", 14)]
    rows = [
        [
            breakable(source.name),
            safe(amount(source.value, source.unit)),
            f'<span class="tag {safe(source.tag)}">{safe(source.tag)}</span>',
            breakable(source.source),
        ]
        for source in data.sources
    ]
    body = table(columns, rows, "What the plan was told, and by whom", stack=True)
    return section("h-inputs", "Inputs", body, "long") if rows else ""


def _assumptions(data: ReportData) -> str:
    return section("h-assumptions", "Assumptions", bullets(data.assumptions, "list")) if data.assumptions else ""


def _footer(data: ReportData) -> str:
    made = " · ".join(part for part in (data.version, data.date) if part)
    # words stay whole: a line that ends between the dashes of a flag cannot be read
    words = " ".join(f"<span>{safe(word)}</span>" for word in data.command.split())
    command = f"<p>Made by <code>{words}</code></p>" if words else ""
    about = f"<p>{safe(made)}</p>" if made else ""
    return f"<footer>{command}{about}</footer>" if command or about else ""
