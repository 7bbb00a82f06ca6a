"""megamoe timeline: a trace as lanes of characters, or as a figure: runs above each other, on one axis of time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from megamoe.launch.output import Output, check_folder, emit, show, write
from megamoe.launch.terminal import Format, exit_codes, stdout
from megamoe.trace.timeline import Event, Run, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Tableau's ten colours: neighbouring waves differ at a glance, on white and on black
COLOURS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2"),
    *("#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"),
)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def percent(value: float | None) -> str:
    """87.3 -> '87.3 %'    None -> 'none to hide'"""
    return "none to hide" if value is None else f"{value:.1f} %"


def drawn(timeline: Timeline, width: int) -> Iterator[Text]:
    """Lines of at most `width` columns: every run begins at the left, and a column is the same time in all of them.

    A character is the wave that has most of its column, counted on in letters after nine.
    """
    runs, margin = timeline.runs(), 11
    columns = max(20, width - margin)
    scale = max(run.end_us - run.begin_us for run in runs) / columns
    for run in runs:
        yield Text(f"{run.layer}: {(run.end_us - run.begin_us) / 1e3:.1f} ms, a column is {scale / 1e3:.2f} ms")
        for rank in run.ranks:
            yield Text(f"rank {rank} on {timeline.hosts[rank]}: {percent(run.share(rank).hidden_percent)} hidden")
            for lane in run.lanes:
                events = [event for event in run.of(rank) if event.lane == lane]
                yield Text(f"{_short(lane):>10} ").append_text(_lane(events, run.begin_us, scale, columns))
        yield Text()


def _short(lane: str) -> str:
    """'linear-2 gradient' -> "linear-2 '"    'dispatch' -> 'dispatch'"""
    return lane.replace("activation", "activ.").replace(" gradient", " '")


def _lane(events: list[Event], begin_us: float, scale: float, columns: int) -> Text:
    """One lane: in each column the event that covers most of it, nothing where none does."""
    most: list[tuple[float, int | None]] = [(0.0, None)] * columns
    for event in events:
        begin, end = (event.begin_us - begin_us) / scale, (event.end_us - begin_us) / scale
        for column in range(int(begin), min(columns, int(end) + 1)):
            covered = min(end, column + 1) - max(begin, column)
            if covered > most[column][0]:
                most[column] = (covered, event.wave)
    line = Text()
    for _, wave in most:
        if wave is None:
            line.append(" ")
        else:
            line.append(_DIGITS[wave % len(_DIGITS)], style=f"black on {COLOURS[wave % len(COLOURS)]}")
    return line


def draw_figure(timeline: Timeline, suffix: str, *, title: str | None = None) -> bytes:
    """The figure as a file whose name ends so, such as ".svg". ValueError without matplotlib, or for a suffix that it
    does not know.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        from megamoe.launch.cli.figures import as_file
    except ImportError as missing:
        raise ValueError("a figure needs matplotlib: pip install 'megamoe[figures]'") from missing
    runs = timeline.runs()
    heights = [len(run.ranks) for run in runs]
    longest = max(run.end_us - run.begin_us for run in runs) / 1e3
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megamoe", "font.size": 9}):
        figure = Figure(figsize=(10, 0.9 + 1.55 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axis, run in zip(axes, runs, strict=True):
            _draw_run(axis, run, longest)
        axes[-1].set_xlabel("milliseconds since the call began; a colour is a wave")
        if title:
            figure.suptitle(title)
        if suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
            raise ValueError(f"a figure's name ends in .svg, .png or .pdf, not in {suffix!r}")
        return as_file(figure, suffix[1:].lower())


def _draw_run(axis: Axes, run: Run, longest_ms: float) -> None:
    """One run: ranks below each other, in each the lanes from top to bottom."""
    ticks, labels = [], []
    for place, rank in enumerate(run.ranks):
        for number, lane in enumerate(run.lanes):
            top = -(place * (len(run.lanes) + 1) + number)
            events = [event for event in run.of(rank) if event.lane == lane]
            axis.broken_barh(
                [((e.begin_us - run.begin_us) / 1e3, (e.end_us - e.begin_us) / 1e3) for e in events],
                (top - 0.4, 0.8),
                facecolors=[COLOURS[e.wave % len(COLOURS)] for e in events],
                edgecolor="white",
                linewidth=0.3,
            )
            ticks.append(top)
            labels.append(f"rank {rank}  {lane}" if number == 0 else lane)
    share = run.share()
    axis.set_yticks(ticks, labels)
    axis.set_xlim(0, longest_ms * 1.01)
    axis.set_ylim(min(ticks) - 0.7, 0.7)
    axis.axvline((run.end_us - run.begin_us) / 1e3, color="black", linewidth=0.8, linestyle="--")
    hidden = percent(share.hidden_percent)
    axis.set_title(f"{run.layer}: {share.total_us / 1e3:.0f} ms, {hidden} of communication hidden", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", linewidth=0.3)


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
