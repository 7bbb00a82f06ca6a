"""megamoe timeline: draws a trace that `megamoe bench --trace` or `megamoe.record` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megamoe.launch.cli.timeline_view import draw_figure, drawn, percent
from megamoe.launch.output import Output, check_folder, emit, show, write
from megamoe.launch.terminal import Format, exit_codes, stdout
from megamoe.trace.timeline import Timeline


def timeline(
    trace: Annotated[Path, typer.Argument(help="Trace file, as `megamoe bench --trace` writes it.")],
    svg: Annotated[Path | None, typer.Option(help="Also write a figure here; .png and .pdf work too.")] = None,
    title: Annotated[str | None, typer.Option(help="What to write above the figure.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns; those of the terminal by default.", min=40)] = None,
    output: Output = Format.table,
) -> None:
    """Draw who did what when, on one time axis, and how much of the communication hid under compute."""
    with exit_codes():
        if svg is not None:
            check_folder(svg)
        found = Timeline.load(trace)
        if svg is not None:  # before anything is printed: whoever reads that may close the pipe
            write(svg, draw_figure(found, svg.suffix, title=title))
        emit(output, summary(found), lambda: _print(found, width or stdout.width))


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


def _print(timeline: Timeline, width: int) -> None:
    """The lanes of every run, then what hid in each, the runs apart."""
    for line in drawn(timeline, width):
        stdout.print(line, soft_wrap=True)
    rows: list[tuple[object, ...]] = []
    for row in summary(timeline):
        if row["rank"] == 0 and rows:
            rows.append(())
        times = [row[f"{name}_ms"] for name in ("total", "compute", "communication", "hidden")]
        share = row["hidden_percent"]
        assert share is None or isinstance(share, float)
        rank = "all" if row["rank"] is None else row["rank"]
        rows.append((f"{row['layer']} {row['call']}", rank, *times, percent(share)))
    times_ms = ("total ms", "compute ms", "communication ms", "hidden ms")
    show({"run": "", "rank": ">", **dict.fromkeys(times_ms, ".1f"), "hidden": ">"}, rows)
