"""megamoe bench rule: how much communication stays exposed on links of different rates, as a table and a figure."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.cli.flags import flag, takes
from megamoe.launch.output import Output, check_folder, emit, say, show, write
from megamoe.launch.terminal import Bar, Format, exit_codes, parse_waves

if TYPE_CHECKING:
    from megamoe.launch.bench.rule import Curve, RuleReport

COLUMNS = {"link Mbit/s": ".1f", "C/B": ".0f", "x": ".2f"}
COLUMNS |= dict.fromkeys(("compute", "communic.", "overlapped"), ".1f")
COLUMNS |= dict.fromkeys(("exposed", "min", "max", "theory"), ".2f")


FLAGS = {  # by the names of RuleRequest
    "ranks": flag(int, "Processes, each a rank.", 2),
    "tokens_per_rank": flag(int, "Tokens that each rank brings.", 1024),
    "hidden": flag(int, "Width of a token.", 1024),
    "num_experts": flag(int, "Experts over all ranks.", 16),
    "topk": flag(int, "Experts per token.", 4),
    "weight_format": flag(str, "mxfp4 or bf16.", "bf16"),
    "dispatch_format": flag(str, "mxfp8 or bf16.", "mxfp8"),
    "combine_format": flag(str, "bf16 or mxfp8: how results travel home.", "bf16"),
    "threads_per_rank": flag(int, "torch threads of a rank.", 1),
    "repeats": flag(int, "Rounds that are measured on each link, after one that is not.", 7),
    "check": flag(bool, "Compare every bit with the oracle.", True),
}


@takes(FLAGS)
def rule(
    given: dict[str, Any],
    intermediate: Annotated[
        list[int] | None, typer.Option(help="Width inside an expert, once for every curve; 512 and 1024 by default.")
    ] = None,
    waves: Annotated[str, typer.Option(help='"auto", a number, or relative sizes such as 1,2,1.')] = "auto",
    points: Annotated[
        str | None, typer.Option(help="The x to measure at, such as 0.5,1,2; nine from 0.25 to 4 by default.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the curves into this .svg or .png; needs megamoe's extra figures.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Sweep the link across the rule's balance point C/B = 2d and find where communication stops hiding; needs root."""
    with exit_codes():
        drawing = _drawing(figure) if figure else None
        with Bar() as bar:
            from megamoe.launch.bench.rule import RuleRequest, run_rule  # brings torch
            from megamoe.launch.lab.namespaces import check_lab

            if intermediate:
                given["intermediate"] = tuple(intermediate)
            if points is not None:
                given["points"] = _parse_points(points)
            parsed: Any = parse_waves(waves)
            request = RuleRequest(**given, waves=parsed)
            check_lab()

            report = run_rule(request, bar.follow)
        if figure and drawing:  # before anything is printed: whoever reads that may close the pipe
            write(figure, drawing.draw(report, figure.suffix[1:]))
        emit(output, report.as_dict(), lambda: _print_rule(report))
        if report.identical is False:
            raise typer.Exit(1)


def _drawing(figure: Path) -> ModuleType:
    """The module that draws. ValueError before anything is measured where the figure could not be written after."""
    if figure.suffix not in (".svg", ".png"):
        raise ValueError(f"figure {figure} must end in .svg or .png")
    check_folder(figure)
    try:
        from megamoe.launch.cli import figures  # matplotlib is an extra, and takes a second to import
    except ModuleNotFoundError as missing:
        raise ValueError("--figure needs matplotlib: pip install 'megamoe[figures]'") from missing
    return figures


def _parse_points(text: str) -> tuple[float, ...]:
    """'0.5,1,2' -> (0.5, 1.0, 2.0)    ValueError for anything else"""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as wrong:
        raise ValueError(f"points {text!r} are not numbers such as 0.5,1,2") from wrong


def _print_rule(report: RuleReport) -> None:
    request = report.request
    say(
        f"{plural(request.ranks, 'rank')}, {plural(request.tokens_per_rank, 'token')} a rank, "
        f"{request.num_experts} experts {request.weight_format}, top-{request.topk}, "
        f"{request.dispatch_format} there, {request.combine_format} back, "
        f"{report.bytes_per_row:.0f} bytes a row both ways, {report.f_remote:.0%} of rows remote; "
        "C in FLOP/s, B in bytes/s one way; milliseconds"
    )
    for curve in report.curves:
        _print_curve(curve, request.hidden)
    if report.identical is not None:
        same = "identical to the oracle" if report.identical else "DIFFERENT from the oracle"
        say(f"every bit of every output: {same}")


def _print_curve(curve: Curve, hidden: int) -> None:
    title = f"\n{hidden} x {curve.intermediate}: balance at C/B = {curve.threshold_flops_per_byte:.0f} FLOPs/byte"
    rows = []
    for point in curve.points:
        bench = point.bench
        times = (bench.compute_ms, bench.communication_ms, bench.overlapped_ms)
        shares = (point.exposed_share, point.exposed_share_min, point.exposed_share_max, point.theory_share)
        rows.append(((bench.link_gb_s or 0) * 8e3, point.hardware_flops_per_byte, point.x, *times, *shares))
    show(COLUMNS, rows, title)
    say(_verdict(curve))


def _verdict(curve: Curve) -> str:
    deviation = (
        f"exposed share at most {curve.largest_deviation:+.2f} from theory, at x = {curve.largest_deviation_x:.2f}"
    )
    if curve.turn is None:
        return f"no turn within these points; {deviation}"
    turn = curve.turn
    return (
        f"turns at x = {turn.x:.2f} (rule: 1), slope {turn.slope:.2f} (rule: 1) above a floor of {turn.floor:+.0%} of "
        f"compute; {deviation}"
    )
