"""megamoe doctor: what this machine has for ranks, what it lacks, and what to type about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from megamoe.launch.output import Output, emit, say, show
from megamoe.launch.terminal import Bar, Format, exit_codes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megamoe.launch.doctor.check import Check, Link
    from megamoe.launch.doctor.run import Picture

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
    output: Output = Format.table,
) -> None:
    """Check this machine for running ranks: software, devices, limits, network, and every link between ranks."""
    with exit_codes():
        if run is not None:
            from megamoe.launch.doctor.run import look

            picture = look(run)
            emit(output, picture.as_dict(), lambda: _print_run(picture))
            return
        with Bar("looking") as bar:
            try:
                from megamoe.launch.doctor.doctor import examination, examine  # brings torch
            except (ImportError, OSError) as broken:  # a shared library that does not load is an OSError
                raise RuntimeError(
                    f"megamoe cannot be imported: {broken}; pip install --force-reinstall megamoe"
                ) from broken

            asked = examination(
                ranks=ranks, device=device, interface=interface, deadline_s=deadline_s, exchange=exchange
            )
            found = examine(asked, bar.follow)
        emit(output, found.as_dict(), lambda: _print(found.checks, found.links, asked.ranks))
        if not found.ok:
            raise typer.Exit(1)


def _print_run(picture: Picture) -> None:
    from megamoe.launch.doctor.run import condition

    say(f"run {picture.run}, as rank {picture.asked} sees it")
    rows = []
    for status in picture.statuses:
        where = "nothing heard yet" if status.position is None else str(status.position)
        rows.append((status.rank, status.host, condition(status), f"{status.heard_s:.1f} s ago", where))
    show({"rank": "", "host": "", "": "", "heard": "", "where": ""}, rows, folds=True)


def _print(checks: Sequence[Check], links: Sequence[Link], ranks: int) -> None:
    """What was found, with what to do about it below it, then the links."""
    rows: list[tuple[str, ...]] = []
    for check in checks:
        rows.append((check.name, check.state, check.found))
        rows += [("", "", f"fix: {check.fix}")] * bool(check.fix)
    show({"check": "", "": "", "found": ""}, rows, folds=True)
    states = [check.state for check in checks]
    say(", ".join(f"{states.count(state)} {state}" for state in ("ok", "warn", "fail")))
    if links:
        say("")
        _print_links(links, ranks)


def _print_links(links: Sequence[Link], size: int) -> None:
    """GB/s and microseconds from the row's rank to the column's, or the slowest links where that is too wide."""
    if size > _MOST_COLUMNS:
        slowest = sorted(links, key=lambda link: link.gb_s)[:_SLOWEST]
        rows = [(f"{link.source} to {link.target}", link.gb_s, link.latency_us) for link in slowest]
        show({"slowest links": "", "GB/s": ".2f", "us": ".0f"}, rows)
    else:
        cells = {(link.source, link.target): f"{link.gb_s:.2f} {link.latency_us:.0f}" for link in links}
        columns = {"GB/s, us": "", **{f"to {target}": ">" for target in range(size)}}
        show(columns, [(f"from {s}", *(cells.get((s, t)) for t in range(size))) for s in range(size)])
