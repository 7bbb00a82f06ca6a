"""megamoe demo: real text through FP4 experts, on several ranks and on one."""

from __future__ import annotations

import json
import sys
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from megamoe.launch.terminal import Format, compile_kernels, exit_codes, parse_waves, progress, stderr, stdout

if TYPE_CHECKING:
    from megamoe.launch.demo import DemoReport
    from megamoe.launch.generation.answer import AnswerReport


class Launcher(str, Enum):
    """What starts ranks."""

    ray = "ray"
    spawn = "spawn"
    torchrun = "torchrun"


def demo(
    ranks: Annotated[int, typer.Option(help="Processes that share the experts.")] = 4,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to run; a chapter of Alice by default.")] = None,
    waves: Annotated[str, typer.Option(help='A number, relative sizes such as 1,2,1, or "auto".')] = "4",
    checkpoint: Annotated[
        Path | None, typer.Option(help="DeepSeek-V4 checkpoint to run; written there and kept if the folder is new.")
    ] = None,
    launcher: Annotated[
        Launcher | None, typer.Option(help="What starts the ranks; ray where it is installed, else spawn.")
    ] = None,
    question: Annotated[
        str, typer.Option(help='What a model is asked at the end; "" asks nothing.')
    ] = "Explain in one sentence why leaves are green.",
    deadline_s: Annotated[float, typer.Option(help="Seconds that a run, and any wait in it, may take.")] = 120.0,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Run real text through FP4 experts on several ranks, then on one, and compare every bit."""
    with exit_codes():
        with progress() as bar:
            task = bar.add_task("starting", total=None)
            from megamoe.launch.demo import Request, run_demo  # brings torch, which --help does not need

            compile_kernels(bar)
            request = Request(ranks, text, parse_waves(waves), checkpoint, deadline_s, _chosen(launcher), question)

            def show(what: str, done: int, of: int) -> None:
                bar.update(task, description=what, completed=done, total=of)

            report = run_demo(request, show)
        if output is Format.json:
            sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
        else:
            _print_demo(report)
        if not (report.identical and (report.answer is None or report.answer.identical)):
            raise typer.Exit(1)


def _chosen(launcher: Launcher | None) -> str:
    if launcher is not None:
        return launcher.value
    if find_spec("ray") is not None:
        return "ray"
    stderr.print("Ray is not installed (pip install 'megamoe[ray]'), so ranks are started with spawn", highlight=False)
    return "spawn"


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
    stdout.print(
        f"{len(report.ranks)} ranks ({report.launcher}) against one, every bit of the output: {verdict}",
        highlight=False,
    )
    if report.answer is not None:
        _print_answer(report.answer, len(report.ranks), report.launcher)


def _print_answer(answer: AnswerReport, ranks: int, launcher: str) -> None:
    verdict = "[bold green]identical[/]" if answer.identical else "[bold red]different[/]"
    kept = f" (kept in {answer.path})" if answer.path else ""
    lines = (
        f"\n{answer.model}{kept}",
        f"> {answer.question}",
        f"{answer.text}",
    )
    for line in lines:
        stdout.print(line, highlight=False, markup=False, soft_wrap=True)
    stdout.print(
        f"\n{answer.new_tokens} tokens: {answer.tokens_per_s:.1f} a second on {ranks} ranks ({launcher}), "
        f"{answer.one_rank_tokens_per_s:.1f} on one, every token: {verdict}",
        highlight=False,
        soft_wrap=True,
    )
