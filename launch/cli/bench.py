"""megamoe bench: a layer's times on this machine, over loopback or over the lab's links."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from megamoe.launch.cli import rule
from megamoe.launch.terminal import Format, compile_kernels, exit_codes, parse_waves, progress, stderr, stdout

if TYPE_CHECKING:
    from megamoe.launch.bench.bench import BenchReport

app = typer.Typer(invoke_without_command=True)
app.command("rule")(rule.rule)


@app.callback()
def bench(
    context: typer.Context,
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
    dispatch_format: Annotated[str, typer.Option(help="mxfp8, bf16, or auto.")] = "mxfp8",
    waves: Annotated[
        str, typer.Option(help='"auto", a number, relative sizes such as 1,2,1, or "sweep" for a row of each.')
    ] = "auto",
    threads_per_rank: Annotated[int, typer.Option(help="torch threads of a rank.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds that are measured, after one that is not.")] = 9,
    trace: Annotated[
        Path | None,
        typer.Option(help="Record a serial and an overlapped call, for Perfetto and megamoe timeline."),
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="Profile to predict by, such as megamoe calibrate writes; what ships without.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare every bit with the oracle.")] = True,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Time one layer serial, overlapped, computing alone and communicating alone, interleaved in one run."""
    if context.invoked_subcommand is not None:
        return
    with exit_codes():
        with progress() as bar:
            task = bar.add_task("starting", total=None)
            from megamoe.launch.bench.bench import BenchRequest, run_traced, sweep_waves  # brings torch
            from megamoe.launch.bench.presets import preset as shape_of

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
                trace=trace is not None,
                machine=machine,
                **sizes,
            )
            if trace and waves == "sweep":
                raise ValueError("a trace holds one workload: give --trace or --waves sweep")
            if trace and not trace.resolve().parent.is_dir():
                raise ValueError(f"there is no folder {trace.resolve().parent} to write the trace in")
            compile_kernels(bar)
            requests = sweep_waves(request) if waves == "sweep" else [request]
            reports = []
            for number, each in enumerate(requests):
                bar.update(task, description=f"{each.waves} waves", completed=number, total=len(requests))
                report, timeline = run_traced(each)
                reports.append(report)
        if trace and timeline:
            timeline.save(trace)
            stderr.print(
                f"wrote {trace}: open it in Perfetto, or with megamoe timeline", highlight=False, soft_wrap=True
            )
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
    headings = ("waves", "overlapped", "min", "max", "predict.", "serial", "compute", "commun.", "speedup", "effic.")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        overlapped = [report.overlapped_ms, report.overlapped_ms_min, report.overlapped_ms_max]
        predicted = "" if report.predicted_ms is None else f"{report.predicted_ms:.1f}"
        times = [f"{time:.1f}" for time in (report.serial_ms, report.compute_ms, report.communication_ms)]
        ratios = (f"{report.speedup:.2f}", f"{report.efficiency:.2f}")
        table.add_row(str(report.waves), *(f"{time:.1f}" for time in overlapped), predicted, *times, *ratios)
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
    for name in ("serial", "overlapped", "compute", "communication", *(["traced"] if report.traced_ms else [])):
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
    if report.predicted_ms is not None:
        off = report.predicted_ms / report.overlapped_ms - 1
        stdout.print(f"the planner predicts {report.predicted_ms:.1f} ms overlapped: {off:+.0%}", highlight=False)
    if report.traced_ms is not None:
        cost = report.trace_cost
        hidden = "none" if report.hidden_percent is None else f"{report.hidden_percent:.1f} %"
        stdout.print(f"{hidden} of communication hidden; recording cost {cost:+.1%}", highlight=False)
