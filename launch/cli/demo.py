"""megamoe demo: real text through FP4 experts, on several ranks and on one."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.output import Output, emit, note, say, show
from megamoe.launch.terminal import Bar, Format, compile_kernels, exit_codes, parse_waves

if TYPE_CHECKING:
    from megamoe.launch.demo import DemoReport, RankReport
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
    ] = "Explain in one sentence what a computer is.",
    deadline_s: Annotated[float, typer.Option(help="Seconds that a run, and any wait in it, may take.")] = 120.0,
    output: Output = Format.table,
) -> None:
    """Run real text through FP4 experts on several ranks, then on one, and compare every bit."""
    with exit_codes():
        with Bar() as bar:
            from megamoe.launch.demo import Request, run_demo  # brings torch, which --help does not need

            compile_kernels()
            request = Request(ranks, text, parse_waves(waves), checkpoint, deadline_s, _chosen(launcher), question)
            report = run_demo(request, bar.follow)
        emit(output, report, lambda: _print_demo(report))
        if not (report.identical and (report.answer is None or report.answer.identical)):
            raise typer.Exit(1)


def _chosen(launcher: Launcher | None) -> str:
    if launcher is not None:
        return launcher.value
    if find_spec("ray") is not None:
        return "ray"
    note("Ray is not installed (pip install 'megamoe[ray]'), so ranks are started with spawn")
    return "spawn"


_COLUMNS = {"rank": ">", "tokens": ">", "experts": ">", "read MB": ".1f", "rows in": ">", "local": ">"}
_COLUMNS |= {"sent MB": ".2f", "waves": ">", "compute ms": ".1f", "wait ms": ".1f"}


def _print_demo(report: DemoReport) -> None:
    say(
        f"{report.text}: {plural(report.tokens, 'token')} through {report.layers} layers of "
        f"{report.num_experts} MXFP4 experts, top-{report.topk}, {report.hidden} x {report.intermediate}"
    )
    rows = [_row(str(rank.rank), rank) for rank in report.ranks]
    show(_COLUMNS, [*rows, (), _row("alone", report.one_rank)], "one forward")
    verdict = "identical" if report.identical else "different"
    say(f"{plural(len(report.ranks), 'rank')} ({report.launcher}) against one, every bit of the output: {verdict}")
    if report.answer is not None:
        _print_answer(report.answer, len(report.ranks), report.launcher)


def _row(name: str, rank: RankReport) -> tuple[object, ...]:
    sent_mb, received = rank.bytes_sent / 1e6, rank.rows_received
    row = (name, rank.tokens, rank.experts, rank.read_mb, received, rank.rows_local, sent_mb, rank.waves)
    return (*row, rank.compute_ms, rank.waiting_ms)


def _print_answer(answer: AnswerReport, ranks: int, launcher: str) -> None:
    verdict = "identical" if answer.identical else "different"
    kept = f" (kept in {answer.path})" if answer.path else ""
    for line in ("", f"{answer.model}{kept}", f"> {answer.question}", answer.text, ""):
        say(line)
    say(
        f"{plural(answer.new_tokens, 'token')}: {answer.tokens_per_s:.1f} a second on {plural(ranks, 'rank')} "
        f"({launcher}), {answer.one_rank_tokens_per_s:.1f} on one, every token: {verdict}"
    )
