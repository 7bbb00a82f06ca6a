"""megamoe doctor: what this machine has for ranks, what it lacks, and what to type about it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from megamoe.launch.terminal import Format, exit_codes, progress, stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megamoe.launch.doctor.check import Check, Link

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_MOST_COLUMNS = 6  # of the matrix, in a terminal of 80
_SLOWEST = 8


def doctor(
    ranks: Annotated[int, typer.Option(help="Ranks that are to run on this machine.")] = 2,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda (ROCm too) or npu; an accelerator where there is one without.")
    ] = None,
    interface: Annotated[
        str | None, typer.Option(help="Network interface for ranks to use, such as eth0; the obvious one without.")
    ] = None,
    deadline_s: Annotated[float, typer.Option(help="Bound on what ranks try by one backend, in seconds.")] = 20.0,
    run: Annotated[
        str | None, typer.Option(help="Look at a run that goes on instead: where each of its ranks is.")
    ] = None,
    exchange: Annotated[bool, typer.Option(help="Start ranks, to try backends and measure every link.")] = True,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Check this machine for running ranks: software, devices, limits, network, and every link between ranks."""
    with exit_codes():
        if run is not None:
            _print_run(run, output)
            return
        with progress() as bar:
            task = bar.add_task("looking", total=None)
            try:
                from megamoe.launch.doctor.doctor import examination, examine  # brings torch
            except (ImportError, OSError) as broken:  # a shared library that does not load is an OSError
                raise RuntimeError(
                    f"megamoe cannot be imported: {broken}; pip install --force-reinstall megamoe"
                ) from broken

            asked = examination(
                ranks=ranks, device=device, interface=interface, deadline_s=deadline_s, exchange=exchange
            )
            found = examine(asked, lambda name: bar.update(task, description=name))
        if output is Format.json:
            sys.stdout.write(json.dumps(found.as_dict(), indent=2) + "\n")
        else:
            _print_checks(found.checks)
            _print_links(found.links, asked.ranks)
        if not found.ok:
            raise typer.Exit(1)


def _print_run(run: str, output: Format) -> None:
    from megamoe.launch.doctor.run import condition, look

    picture = look(run)
    if output is Format.json:
        sys.stdout.write(json.dumps(picture.as_dict(), indent=2) + "\n")
        return
    stdout.print(f"run {picture.run}, as rank {picture.asked} sees it", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("rank", "host", "", "heard", "where"):
        table.add_column(heading, no_wrap=heading != "where", overflow="fold")
    for status in picture.statuses:
        where = "nothing heard yet" if status.position is None else str(status.position)
        table.add_row(str(status.rank), status.host, condition(status), f"{status.heard_s:.1f} s ago", where)
    stdout.print(table)


def _print_checks(checks: Sequence[Check]) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\nfix: {check.fix}", style="bold")
        table.add_row(check.name, Text(check.state, style=STYLES[check.state]), found)
    stdout.print(table)
    counts = {state: sum(check.state == state for check in checks) for state in STYLES}
    stdout.print(", ".join(f"{number} {state}" for state, number in counts.items()), highlight=False)


def _print_links(links: Sequence[Link], size: int) -> None:
    """GB/s and microseconds from the row's rank to the column's, or the slowest links where that is too wide."""
    if not links:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    if size > _MOST_COLUMNS:
        for heading in ("slowest links", "GB/s", "us"):
            table.add_column(heading, justify="left" if heading == "slowest links" else "right", no_wrap=True)
        for link in sorted(links, key=lambda link: link.gb_s)[:_SLOWEST]:
            table.add_row(f"{link.source} to {link.target}", f"{link.gb_s:.2f}", f"{link.latency_us:.0f}")
        stdout.print(table)
        return
    table.add_column("GB/s, us", no_wrap=True)
    for target in range(size):
        table.add_column(f"to {target}", justify="right", no_wrap=True)
    cells = {(link.source, link.target): f"{link.gb_s:.2f} {link.latency_us:.0f}" for link in links}
    for source in range(size):
        table.add_row(f"from {source}", *(cells.get((source, target), "-") for target in range(size)))
    stdout.print(table)
