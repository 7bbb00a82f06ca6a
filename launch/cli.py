"""The command line. JSON alone goes to stdout, progress and notes to stderr; exit codes are 0 done, 1 failed, 2 wrong.

A check that does not hold is a failure; a request that cannot be met as it stands is wrong.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import megamoe

if TYPE_CHECKING:
    from megamoe.launch.bench import BenchReport
    from megamoe.launch.demo import DemoReport

app = typer.Typer(
    help="Expert parallelism whose communication hides under compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
stdout, stderr = Console(), Console(stderr=True)


class Format(str, Enum):
    """How a command prints its result."""

    table = "table"
    json = "json"


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, raised like KeyboardInterrupt so that everything is cleaned up on the way out."""


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns what went wrong into one line and an exit code; the first signal unwinds, later ones wait for the end."""

    def unwind(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, unwind)
    try:
        yield
    except ValueError as wrong:
        stderr.print(f"[bold red]wrong request:[/] {_escaped(wrong)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from wrong
    except RuntimeError as failed:
        stderr.print(f"[bold red]failed:[/] {_escaped(failed)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from failed
    except KeyboardInterrupt as stopped:
        stderr.print("interrupted; ranks stopped, files removed", highlight=False)
        raise typer.Exit(130) from stopped
    except _Terminated as stopped:
        stderr.print("terminated; ranks stopped, files removed", highlight=False)
        raise typer.Exit(143) from stopped


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        yield bar


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        stdout.print(megamoe.__version__, highlight=False)
        raise typer.Exit


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 4,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to run; a chapter of Alice by default.")] = None,
    waves: Annotated[str, typer.Option(help='A number, relative sizes such as 1,2,1, or "auto".')] = "4",
    checkpoint: Annotated[
        Path | None, typer.Option(help="DeepSeek-V4 checkpoint to run; written there and kept if the folder is new.")
    ] = None,
    deadline_s: Annotated[float, typer.Option(help="Seconds that a run, and any wait in it, may take.")] = 120.0,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Run real text through FP4 experts on several ranks, then on one, and compare every bit."""
    with _exit_codes():
        with _progress() as bar:
            task = bar.add_task("starting", total=None)
            from megamoe.launch.demo import Request, run_demo  # brings torch, which --help does not need

            request = Request(ranks, text, parse_waves(waves), checkpoint, deadline_s)

            def show(what: str, done: int, of: int) -> None:
                bar.update(task, description=what, completed=done, total=of)

            report = run_demo(request, show)
        if output is Format.json:
            sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
        else:
            _print_demo(report)
        if not report.identical:
            raise typer.Exit(1)


@app.command()
def bench(
    ranks: Annotated[int, typer.Option(help="Processes, each a rank.")] = 2,
    link: Annotated[str | None, typer.Option(help="Rate of every rank's link, such as 1gbit; needs root.")] = None,
    latency_ms: Annotated[float, typer.Option(help="Delay of every link, one way.")] = 0.0,
    preset: Annotated[
        str | None, typer.Option(help="A model's sizes, such as deepseek-v4-flash/16; sizes that are given too win.")
    ] = None,
    tokens_per_rank: Annotated[int, typer.Option(help="Tokens that each rank brings.")] = 1024,
    hidden: Annotated[int | None, typer.Option(help="Width of a token; 1024 without a preset.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Width inside an expert; 512 without a preset.")] = None,
    num_experts: Annotated[int | None, typer.Option(help="Experts over all ranks; 16 without a preset.")] = None,
    topk: Annotated[int | None, typer.Option(help="Experts per token; 4 without a preset.")] = None,
    weight_format: Annotated[str, typer.Option(help="mxfp4 or bf16.")] = "mxfp4",
    dispatch_format: Annotated[str, typer.Option(help="mxfp8 or bf16.")] = "mxfp8",
    waves: Annotated[
        str, typer.Option(help='"auto", a number, relative sizes such as 1,2,1, or "sweep" for a row of each.')
    ] = "auto",
    threads_per_rank: Annotated[int, typer.Option(help="torch threads of a rank.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds that are measured, after one that is not.")] = 9,
    check: Annotated[bool, typer.Option(help="Compare every bit with the oracle.")] = True,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Time one layer serial, overlapped, computing alone and communicating alone, interleaved in one run."""
    with _exit_codes():
        with _progress() as bar:
            task = bar.add_task("starting", total=None)
            from megamoe.launch.bench import BenchRequest, run_bench, sweep_waves  # brings torch
            from megamoe.launch.presets import preset as shape_of

            base = shape_of(preset) if preset else None
            given = {"hidden": hidden, "intermediate": intermediate, "num_experts": num_experts, "topk": topk}
            sizes = {name: getattr(base, name) for name in given if base is not None}
            sizes |= {name: size for name, size in given.items() if size is not None}
            request = BenchRequest(
                ranks=ranks,
                link=link,
                latency_ms=latency_ms,
                tokens_per_rank=tokens_per_rank,
                weight_format=weight_format,
                dispatch_format=dispatch_format,
                waves="auto" if waves == "sweep" else parse_waves(waves),
                threads_per_rank=threads_per_rank,
                repeats=repeats,
                check=check,
                **sizes,
            )
            requests = sweep_waves(request) if waves == "sweep" else [request]
            reports = []
            for number, each in enumerate(requests):
                bar.update(task, description=f"{each.waves} waves", completed=number, total=len(requests))
                reports.append(run_bench(each))
        if link is None:
            stderr.print("links are not shaped: ranks talk over loopback; --link 1gbit gives each a link of its own")
        if output is Format.json:
            found = [report.as_dict() for report in reports]
            sys.stdout.write(json.dumps(found if waves == "sweep" else found[0], indent=2) + "\n")
        elif waves == "sweep":
            _print_sweep(reports)
        else:
            _print_bench(reports[0])
        if any(report.identical is False for report in reports):
            raise typer.Exit(1)


def _print_sweep(reports: list[BenchReport]) -> None:
    stdout.print(f"{_workload(reports[0])}; milliseconds", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    headings = ("waves", "overlapped", "min", "max", "serial", "compute", "communic.", "speedup", "effic.")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        overlapped = [report.overlapped_ms, report.overlapped_ms_min, report.overlapped_ms_max]
        times = [*overlapped, report.serial_ms, report.compute_ms, report.communication_ms]
        ratios = (f"{report.speedup:.2f}", f"{report.efficiency:.2f}")
        table.add_row(str(report.waves), *(f"{time:.1f}" for time in times), *ratios)
    stdout.print(table)


def _workload(report: BenchReport) -> str:
    link = f"{report.link_gb_s * 8:g} Gbit/s links" if report.link_gb_s else "loopback"
    experts = f"{report.num_experts} experts {report.hidden} x {report.intermediate} {report.weight_format}"
    tokens = f"{report.ranks} ranks, {link}, {report.tokens_per_rank} tokens a rank"
    return f"{tokens}, {experts}, top-{report.topk}, {report.dispatch_format} wire"


def _print_bench(report: BenchReport) -> None:
    stdout.print(f"{_workload(report)}, {report.waves} waves", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in ("", "median ms", "min", "max"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    values = report.as_dict()
    for name in ("serial", "overlapped", "compute", "communication"):
        table.add_row(name, *(f"{values[f'{name}_ms{suffix}']:.1f}" for suffix in ("", "_min", "_max")))
    stdout.print(table)
    verdict = {True: "identical to the oracle", False: "DIFFERENT from the oracle", None: "not checked"}[
        report.identical
    ]
    stdout.print(
        f"speedup over serial {report.speedup:.2f}, efficiency {report.efficiency:.2f}, exposed "
        f"{report.exposed_ms:.1f} ms, {report.bytes_sent_per_rank / 1e6:.2f} MB sent a rank; {verdict}",
        highlight=False,
        soft_wrap=True,
    )


def parse_waves(text: str) -> int | str | tuple[int, ...]:
    """'auto' -> 'auto'    '4' -> 4    '1,2,1' -> (1, 2, 1)    ValueError for anything else"""
    from megamoe.waves import check_waves

    if text == "auto":
        return "auto"
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        return check_waves(text)
    return check_waves(sizes[0] if len(sizes) == 1 else sizes)


def _print_demo(report: DemoReport) -> None:
    stdout.print(
        f"{report.text}: {report.tokens} tokens through {report.layers} layers of {report.num_experts} MXFP4 experts, "
        f"top-{report.topk}, {report.hidden} x {report.intermediate}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="one forward", title_justify="left", padding=(0, 0), box=box.SIMPLE_HEAD)
    headings = ("rank", "tokens", "experts", "read MB", "rows in", "local", "sent MB", "waves", "compute ms", "wait ms")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for rank in (*report.ranks, report.one_rank):
        alone = rank is report.one_rank
        if alone:
            table.add_section()
        table.add_row(
            "alone" if alone else str(rank.rank),
            str(rank.tokens),
            f"{rank.experts}",
            f"{rank.read_mb:.1f}",
            str(rank.rows_received),
            str(rank.rows_local),
            f"{rank.bytes_sent / 1e6:.2f}",
            str(rank.waves),
            f"{rank.compute_ms:.1f}",
            f"{rank.waiting_ms:.1f}",
        )
    stdout.print(table)
    verdict = "[bold green]identical[/]" if report.identical else "[bold red]different[/]"
    stdout.print(f"{len(report.ranks)} ranks against one, every bit of the output: {verdict}", highlight=False)


def main() -> None:
    """Entry point of the megamoe command."""
    app()
