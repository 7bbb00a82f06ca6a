"""megamoe timeline: draws a trace that `megamoe bench --trace` or `megamoe.record` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from megamoe.launch.cli.timeline_view import draw_figure, drawn, percent
from megamoe.launch.terminal import Format, exit_codes, stderr, stdout
from megamoe.trace.timeline import Timeline


def timeline(
    trace: Annotated[Path, typer.Argument(help="Trace file, as `megamoe bench --trace` writes it.")],
    svg: Annotated[Path | None, typer.Option(help="Also write a figure here; .png and .pdf work too.")] = None,
    title: Annotated[str | None, typer.Option(help="What to write above the figure.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns; those of the terminal by default.", min=40)] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Draw who did what when, on one time axis, and how much of the communication hid under compute."""
    with exit_codes():
        found = Timeline.load(trace)
        if output is Format.json:
            sys.stdout.write(json.dumps(summary(found), indent=2) + "\n")
        else:
            for line in drawn(found, width or stdout.width):
                stdout.print(line, highlight=False, soft_wrap=True)
            _print_shares(found)
        if svg:
            draw_figure(found, svg, title=title)
            stderr.print(f"wrote {svg}", highlight=False, soft_wrap=True)


def summary(timeline: Timeline) -> list[dict[str, object]]:
    """For every run and rank, and for all ranks of a run (rank None): milliseconds and the share that hid."""
    rows: list[dict[str, object]] = []
    for run in timeline.runs():
        for rank in (*run.ranks, None):
            share = run.share(rank)
            times = {
                f"{n}_ms": getattr(share, f"{n}_us") / 1e3 for n in ("total", "compute", "communication", "hidden")
            }
            rows.append({"layer": run.layer, "call": run.call, "rank": rank, **times})
            rows[-1]["hidden_percent"] = share.hidden_percent
    return rows


def _print_shares(timeline: Timeline) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    headings = ("run", "rank", "total ms", "compute ms", "communication ms", "hidden ms", "hidden")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for row in summary(timeline):
        if row["rank"] == 0:
            table.add_section()
        times = (f"{row[f'{name}_ms']:.1f}" for name in ("total", "compute", "communication", "hidden"))
        share = row["hidden_percent"]
        assert share is None or isinstance(share, float)
        rank = "all" if row["rank"] is None else str(row["rank"])
        table.add_row(f"{row['layer']} {row['call']}", rank, *times, percent(share))
    stdout.print(table)
