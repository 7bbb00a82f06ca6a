"""megamoe bench: a layer's times on this machine, over loopback or over the lab's links."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.cli import rule
from megamoe.launch.cli.flags import flag, takes
from megamoe.launch.output import Output, check_folder, emit, note, say, show, write
from megamoe.launch.terminal import Bar, Format, compile_kernels, exit_codes, parse_waves, with_homes

if TYPE_CHECKING:
    from megamoe.launch.bench.bench import BenchReport

app = typer.Typer(invoke_without_command=True)
app.command("rule")(with_homes(rule.rule))
_SIZES = ("hidden", "intermediate", "num_experts", "topk")
FLAGS = {  # by the names of BenchRequest
    "ranks": flag(int, "Processes, each a rank.", 2),
    "link": flag(str | None, "Rate of every rank's link, such as 1gbit; needs root."),
    "latency_ms": flag(float, "Delay of every link, one way.", 0.0),
    "ranks_per_host": flag(int, "Ranks that share a link, and memory.", 1),
    "node_limited": flag(bool, "Send a token once to each other host, where ranks share one.", True),
    "shared_memory": flag(bool, "Ranks of a host exchange rows through memory; without, through sockets.", True),
    "tokens_per_rank": flag(int, "Tokens that each rank brings.", 1024),
    "hidden": flag(int | None, "Width of a token; 1024 without a preset."),
    "intermediate": flag(int | None, "Width inside an expert; 512 without a preset."),
    "num_experts": flag(int | None, "Experts over all ranks; 16 without a preset."),
    "topk": flag(int | None, "Experts per token; 4 without a preset."),
    "weight_format": flag(str, "mxfp4 or bf16.", "mxfp4"),
    "dispatch_format": flag(str, "mxfp8, bf16, or auto.", "mxfp8"),
    "combine_format": flag(str, "bf16 or mxfp8: how results travel home.", "bf16"),
    "threads_per_rank": flag(int, "torch threads of a rank.", 1),
    "repeats": flag(int, "Rounds that are measured, after one that is not.", 9),
    "backward": flag(bool, "Measure forward and backward of a layer that trains.", False, "--backward"),
    "machine": flag(str | None, "Profile to predict by, such as megamoe calibrate writes; without, this machine's."),
    "predict": flag(bool, "Predict the run; a machine's constants are measured once, in seconds, and kept.", True),
    "check": flag(bool, "Compare every bit with the oracle.", True),
}


@app.callback()
@with_homes
@takes(FLAGS)
def bench(
    context: typer.Context,
    given: dict[str, Any],
    preset: Annotated[
        str | None, typer.Option(help="A model's sizes, such as deepseek-v4-flash/16; sizes that are given too win.")
    ] = None,
    waves: Annotated[
        str, typer.Option(help='"auto", a number, relative sizes such as 1,2,1, or "sweep" for a row of each.')
    ] = "auto",
    trace: Annotated[
        Path | None,
        typer.Option(help="Record a serial and an overlapped call, for Perfetto and megamoe timeline."),
    ] = None,
    output: Output = Format.table,
) -> None:
    """Time one layer serial, overlapped, computing alone and communicating alone, interleaved in one run."""
    with exit_codes():
        if context.invoked_subcommand is not None:
            _refuse_before(context)
            return
        with Bar() as bar:
            from megamoe.launch.bench.bench import BenchRequest, run_traced, sweep_waves  # brings torch
            from megamoe.launch.bench.bench import preset as shape_of

            sizes = {name: getattr(shape_of(preset), name) for name in _SIZES} if preset else {}
            sizes |= {name: value for name, value in given.items() if value is not None}
            parsed: Any = "auto" if waves == "sweep" else parse_waves(waves)
            request = BenchRequest(**sizes, waves=parsed, trace=trace is not None)
            if trace and waves == "sweep":
                raise ValueError("a trace holds one workload: give --trace or --waves sweep")
            if trace:
                check_folder(trace)
            compile_kernels()
            requests = sweep_waves(request) if waves == "sweep" else [request]
            reports = []
            for number, each in enumerate(requests):
                bar.follow(f"waves {each.waves}", number, len(requests))
                report, timeline = run_traced(each, bar.follow)
                reports.append(report)
        if trace and timeline:
            write(trace, timeline.text, ": open it in Perfetto, or with megamoe timeline")
        if request.link is None:
            note("links are not shaped: ranks talk over loopback; --link 1gbit gives each a link of its own")
        if waves == "sweep":
            emit(output, reports, lambda: _print_sweep(reports))
        else:
            emit(output, reports[0], lambda: _print_bench(reports[0]))
        if any(report.identical is False for report in reports):
            raise typer.Exit(1)


def _refuse_before(context: typer.Context) -> None:
    """ValueError for options that stand before the name of a command of this group: they are not its own."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        flags, command = ", ".join(name.replace("_", "-") for name in given), context.invoked_subcommand
        raise ValueError(f"options of bench {command} come after {command}; before it stands {flags}")


def _print_sweep(reports: list[BenchReport]) -> None:
    say(f"{_workload(reports[0])}; milliseconds")
    times = ("overlapped_ms", "overlapped_ms_min", "overlapped_ms_max", "predicted_ms", "serial_ms", "compute_ms")
    headings = ("overlapped", "min", "max", "predict.", "serial", "compute", "commun.")
    columns = {"waves": ">", **dict.fromkeys(headings, ".1f"), "speedup": ".2f", "effic.": ".2f"}
    keys = ("waves", *times, "communication_ms", "speedup", "efficiency")
    show(columns, [[getattr(report, key) for key in keys] for report in reports])


def _workload(report: BenchReport) -> str:
    link = f"{report.link_gb_s * 8:g} Gbit/s links" if report.link_gb_s else "loopback"
    link += "" if report.shared_memory else " without shared memory"
    experts = f"{report.num_experts} experts {report.hidden} x {report.intermediate} {report.weight_format}"
    both = ", forward and backward" if report.backward else ""
    formats = f"{report.dispatch_format} there, {report.combine_format} back"
    ranks = plural(report.ranks, "rank")
    if report.ranks_per_host > 1:
        ranks += f", {report.ranks_per_host} a host{'' if report.node_limited else ' and not node-limited'}"
    tokens = f"{ranks}, {link}, {plural(report.tokens_per_rank, 'token')} a rank"
    return f"{tokens}, {experts}, top-{report.topk}, {formats}{both}"


def _print_bench(report: BenchReport) -> None:
    say(f"{_workload(report)}, {'no waves' if report.small else plural(report.waves, 'wave')}")
    names = ("serial", "overlapped", "compute", "communication", *(["traced"] if report.traced_ms else []))
    rows = [(name, *(getattr(report, f"{name}_ms{suffix}") for suffix in ("", "_min", "_max"))) for name in names]
    digits = ".3f" if report.small else ".1f"
    show({"": "", **dict.fromkeys(("median ms", "min", "max"), digits)}, rows)
    verdict = {True: "identical to the oracle", False: "DIFFERENT from the oracle", None: "not checked"}[
        report.identical
    ]
    speedup = "no speedup" if report.speedup is None else f"speedup over serial {report.speedup:.2f}"
    say(
        f"{speedup}, efficiency {report.efficiency:.2f}, exposed {report.exposed_ms:{digits}} ms, "
        f"{report.bytes_sent_per_rank / 1e6:.2f} MB sent a rank; {verdict}"
    )
    if report.small:
        way = (
            "travel with the page of their call, in one exchange and no waves" if report.ranks > 1 else "need no waves"
        )
        say(
            f"so few tokens {way}; compute is such a call with all there already"
            + (", communication its two exchanges alone" if report.ranks > 1 else "")
        )
        say(f"serial: none, since {report.without_serial}")
    if report.ranks_per_host > 1:
        assert report.link_bytes_per_host is not None
        say(f"{report.link_bytes_per_host / 1e6:.2f} MB over the link of a host")
    if report.predicted_ms is not None:
        off = report.predicted_ms / report.overlapped_ms - 1
        say(f"the planner predicts {report.predicted_ms:{digits}} ms overlapped: {off:+.0%} (by {report.predicted_by})")
    elif report.unpredicted is not None:
        say(f"not predicted: {report.unpredicted}")
    if report.traced_ms is not None:
        hidden = "none" if report.hidden_percent is None else f"{report.hidden_percent:.1f} %"
        say(f"{hidden} of communication hidden; recording cost {report.trace_cost:+.1%}")
