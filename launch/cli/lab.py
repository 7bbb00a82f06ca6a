"""megamoe lab: labs that outlive the command, for ranks that you start yourself, and faults while something runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.lab import faults
from megamoe.launch.lab.namespaces import (
    PREFIX,
    Host,
    Owner,
    check_lab,
    hosts_of,
    keep,
    owner,
    parse_rate,
    processes,
    remove,
    runs,
)
from megamoe.launch.output import Output, emit, note, say, show
from megamoe.launch.terminal import Format, exit_codes

app = typer.Typer(no_args_is_help=True, help="Labs with shaped links for ranks of your own, and faults in any lab.")
_PORT = 29500  # torchrun's; a lab's ranks have a network of their own, so every lab can use the same


@app.command()
def up(
    ranks: Annotated[
        int, typer.Option(help="Ranks, each in a network namespace of its own unless --ranks-per-host says otherwise.")
    ] = 2,
    ranks_per_host: Annotated[
        int, typer.Option(help="Ranks that share a namespace: one link, and memory as ranks of a machine do.")
    ] = 1,
    link: Annotated[str, typer.Option(help="Rate of every host's link, each way.")] = "1gbit",
    latency_ms: Annotated[float, typer.Option(help="Delay of every link, one way.")] = 0.0,
    name: Annotated[str | None, typer.Option(help="What to call it; lab1, lab2, ... by default.")] = None,
    output: Output = Format.table,
) -> None:
    """Build a lab that stands until it is taken down, and print how to start ranks in it."""
    with exit_codes():
        hosts = keep(ranks, link, latency_ms=latency_ms, ranks_per_host=ranks_per_host, name=name)
        short = str(hosts[0].lab).removeprefix(PREFIX)
        starts = [{**_place(rank, host), **_start(rank, hosts)} for rank, host in enumerate(hosts)]
        report = {"lab": short, "link_gb_s": parse_rate(link) / 8e9, "latency_ms": latency_ms, "ranks": starts}
        emit(output, report, lambda: _print_starts(f"lab {short}: {plural(ranks, 'rank')}, {link} links", starts))
        note(f"it stands until: megamoe lab down {short}")


@app.command()
def status(output: Output = Format.table) -> None:
    """List the labs on this machine: owners, links as the kernel has them, faults, and what runs in them."""
    with exit_codes():
        check_lab()
        reports = [report for report in map(_report, runs()) if report is not None]
        if not reports and output is Format.table:
            note("no lab stands on this machine: megamoe lab up makes one")
        emit(output, reports, lambda: _print_labs(reports))


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="Lab to take down; the only one by default.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All labs but those of living processes.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also a lab that belongs to a living process.")] = False,
    output: Output = Format.table,
) -> None:
    """Take labs down: what runs in them is ended, their namespaces are deleted."""
    with exit_codes():
        check_lab()
        reports = [_take_down(run) for run in _chosen(name, every, force)]
        emit(output, reports, lambda: _print_down(reports))


@app.command()
def fault(
    lab: Annotated[str | None, typer.Option(help="Which lab, as status lists it; the only one by default.")] = None,
    cut: Annotated[int | None, typer.Option(metavar="RANK", help="Drop all to and from a rank, in silence.")] = None,
    slow: Annotated[
        tuple[int, str] | None, typer.Option(metavar="RANK RATE", help="Slow a rank's link down, such as 1 10mbit.")
    ] = None,
    heal: Annotated[int | None, typer.Option(metavar="RANK", help="End a rank's faults.")] = None,
    output: Output = Format.table,
) -> None:
    """Do something to a rank's link while something runs, in a lab of your own or of a running bench."""
    with exit_codes():
        check_lab()
        run, link = _strike(lab, cut, slow, heal)
        report = {"lab": run.removeprefix(PREFIX), **_link(link)}
        rate = faults.format_rate(link.bits_per_s) if link.bits_per_s else "not shaped"
        line = f"lab {report['lab']}, rank {link.rank}: {rate}, {', '.join(report['faults']) or 'no fault'}"
        emit(output, report, lambda: say(line))


def _chosen(name: str | None, every: bool, force: bool) -> list[str]:
    """Which labs to take down; those of living processes only by force."""
    if every and name is not None:
        raise ValueError(f"--all takes down {name!r} too: give a name or --all")
    chosen = runs() if every else [faults.find(name)]
    used = [run for run in chosen if _alive(owner(run)) and not force]
    for run in used:
        refusal = (
            f"lab {run.removeprefix(PREFIX)} belongs to {owner(run)}, which is alive: --force takes it down anyway"
        )
        if not every:
            raise ValueError(refusal)
        note(refusal)
    return [run for run in chosen if run not in used]


def _alive(whose: Owner) -> bool:
    return whose.process is not None and not whose.gone


def _strike(
    lab: str | None, cut: int | None, slow: tuple[int, str] | None, heal: int | None
) -> tuple[str, faults.Link]:
    if sum(each is not None for each in (cut, slow, heal)) != 1:
        raise ValueError("give one of --cut RANK, --slow RANK RATE, --heal RANK")
    run = faults.find(lab)
    if slow is not None:
        return run, faults.slow(run, *slow)
    if cut is not None:
        return run, faults.cut(run, cut)
    assert heal is not None
    return run, faults.heal(run, heal)


def _report(run: str) -> dict[str, Any] | None:
    """What status says of a lab; None where it has been taken down meanwhile."""
    try:
        found = faults.links(run)
    except RuntimeError:
        if run in runs():
            raise
        return None
    whose, built = owner(run), found[0].built_bits_per_s if found else None
    ranks = [{**_link(link), "processes": _processes(link.host)} for link in found]
    return {
        "lab": run.removeprefix(PREFIX),
        "owner": "kept" if whose.process is None else "process",
        "process": whose.process,
        "alive": None if whose.process is None else _alive(whose),
        "whole": built is not None,
        "link_gb_s": built and built / 8e9,
        "ranks": ranks,
    }


def _link(link: faults.Link) -> dict[str, Any]:
    found = [name for name, there in (("cut", link.cut), ("slow", link.slow)) if there]
    rate = link.bits_per_s
    return {**_place(link.rank, link.host), "link_gb_s": rate and rate / 8e9, "faults": found}


def _place(rank: int, host: Host) -> dict[str, Any]:
    return {"rank": rank, "namespace": host.namespace, "address": host.address, "interface": host.interface}


def _start(rank: int, hosts: list[Host]) -> dict[str, Any]:
    """What starts a program on a rank, for torch's env:// rendezvous."""
    environment = {
        "GLOO_SOCKET_IFNAME": hosts[rank].interface,
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(_PORT),
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts)),
    }
    settings = " ".join(f"{key}={setting}" for key, setting in environment.items())
    command = f"ip netns exec {hosts[rank].namespace} env {settings} python your_program.py"
    return {"environment": environment, "command": command}


def _processes(host: Host) -> list[dict[str, Any]]:
    found = []
    for process in processes(host.namespace or ""):
        try:
            line = Path(f"/proc/{process}/cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        found.append({"process": process, "command": line.replace(b"\0", b" ").decode(errors="replace").strip()})
    return found


def _take_down(run: str) -> dict[str, Any]:
    ranks = len(hosts_of(run))
    return {"lab": run.removeprefix(PREFIX), "ranks": ranks, "processes_ended": remove(run)}


def _print_starts(lab: str, starts: list[dict[str, Any]]) -> None:
    say(f"{lab}; start your program on each rank:")
    for start in starts:
        say(f"\n# rank {start['rank']}, {start['address']} on {start['interface']}\n{start['command']}")


def _print_labs(reports: list[dict[str, Any]]) -> None:
    columns = {"rank": "", "namespace": "", "address": "", "link": "", "faults": "", "processes": ""}
    for report in reports:
        alive = {None: "kept", True: f"of process {report['process']}", False: f"of process {report['process']}, gone"}
        built = faults.format_rate(report["link_gb_s"] * 8e9) + " links" if report["whole"] else "not whole"
        say(f"lab {report['lab']}: {alive[report['alive']]}, {plural(len(report['ranks']), 'rank')}, {built}")
        show(columns, map(_row, report["ranks"]), folds=True)


def _row(rank: dict[str, Any]) -> tuple[Any, ...]:
    rate = faults.format_rate(rank["link_gb_s"] * 8e9) if rank["link_gb_s"] else None
    running = [f"{each['process']} {Path(each['command'].split(' ')[0]).name}" for each in rank["processes"]]
    place = (rank["rank"], rank["namespace"], rank["address"])
    return (*place, rate, ", ".join(rank["faults"]) or None, ", ".join(running) or None)


def _print_down(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        ended = plural(len(report["processes_ended"]), "process", "processes")
        say(f"lab {report['lab']} is down: {plural(report['ranks'], 'rank')}, {ended} ended")
