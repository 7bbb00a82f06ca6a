"""megamoe require and sweep: what would hide a plan's communication, and what one input does to the plan."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.launch.cli.planner.compare import say_serial
from megamoe.launch.cli.planner.plan import answered
from megamoe.launch.cli.planner.plan_flags import asks, question_of
from megamoe.launch.output import Output, check_folder, emit, say, show, write
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.planner.layer.require import Requirement
    from megamoe.planner.search.sweep import Point


@asks
def require(given: dict[str, Any], output: Output = Format.table) -> None:
    """Say what would hide a plan's communication: bandwidth, EP size, tokens, formats, each changed alone."""
    with exit_codes():
        found = answered(given)
        if found.training is not None:
            raise ValueError("require is of one pass; plan --phase train says what both need, sweep what else does")
        from megamoe.planner.layer.require import require as requirements

        needs = requirements(found.plan)
        keys = ("key", "unit", "bound", "has", "paper", "counted", "achieved")
        rows = [{key: getattr(need, key) for key in keys} for need in needs]
        summary = {key: found.as_dict()[key] for key in ("verdict", "margin", "required_link_gb_s", "sentence")}
        emit(output, {**summary, "require": rows}, lambda: _print_require(found.verdict, needs))


def _print_require(verdict: str, needs: list[Requirement]) -> None:
    say(verdict)
    if not needs:
        say("nothing is sent, so there is nothing to hide")
        return
    columns = {"input": "", "unit": "", "has": ">", "hides at": "", "paper": ">", "counted": ">", "achieved": ">"}
    rows = [
        (need.key, need.unit, _value(need.has), need.bound, *map(_value, (need.paper, need.counted, need.achieved)))
        for need in needs
    ]
    show(columns, rows, "\nwhat would hide it, each input changed alone")
    say("paper: no scales, every pair leaves; counted: scales, pairs that leave; achieved: rates of the profile")
    say("tokens_per_rank, achieved: so many that links take no longer than weights and products; -: no value hides")


def _value(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2f}"


@asks
def sweep(
    given: dict[str, Any],
    over: Annotated[str, typer.Option(help="What to vary: ep, tokens_per_rank, batch, hardware.scaleup_gb_s, ...")],
    values: Annotated[str | None, typer.Option(help="Its values, such as 4,8,16.")] = None,
    start: Annotated[float | None, typer.Option("--from", help="Or the first of --steps values.")] = None,
    stop: Annotated[float | None, typer.Option("--to", help="And the last.")] = None,
    steps: Annotated[int, typer.Option(help="How many, the ends included.")] = 9,
    log: Annotated[bool, typer.Option("--log", help="By even factors, not by even steps.")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Also write all figures of every row here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw the result into this .svg.")] = None,
    output: Output = Format.table,
) -> None:
    """Vary one input of a plan, all others as they are, and print a row for each value."""
    with exit_codes():
        for path in (csv_file, figure):
            if path is not None:
                check_folder(path)
        if figure is not None and figure.suffix != ".svg":
            raise ValueError(f"figure {figure} must end in .svg")
        points = _swept(given, over, values, start, stop, steps, log)
        report = [{over: point.value, **point.answer.as_dict()} for point in points]
        if csv_file is not None:  # before anything is printed: whoever reads that may close the pipe
            write(csv_file, _as_csv(report))
        if figure is not None:
            from megamoe.planner.search.sweep_figure import draw

            write(figure, draw(over, points))
        emit(output, report, lambda: _print_sweep(over, points))


def _swept(
    given: dict[str, Any],
    over: str,
    values: str | None,
    start: float | None,
    stop: float | None,
    steps: int,
    log: bool,
) -> list[Point]:
    question = question_of(given)
    from megamoe.planner.search.sweep import check_key, parse_values, spread
    from megamoe.planner.search.sweep import sweep as points_of

    over = over.replace("-", "_")
    check_key(over)
    ends = (start, stop)
    if (values is None) == (ends == (None, None)) or (values is None and None in ends):
        raise ValueError(f"give the values of {over}: --values A,B,C, or --from A --to B")
    if values is not None:
        return points_of(question, over, parse_values(over, values))
    assert start is not None
    assert stop is not None
    return points_of(question, over, spread(over, start, stop, steps, log))


def _print_sweep(over: str, points: list[Point]) -> None:
    request = points[0].answer.plan.request
    ep = "" if over == "ep" else f", EP{request.ep}"
    say(f"{request.model.name} on {request.hardware.name}{ep}, over {over}")
    serves = points[0].answer.serving is not None
    time = "TTFT ms" if points[0].answer.question.phase == "prefill" else "TPOT ms"
    more = {"tok/s/dev": ",.0f", time: "~", "$/M tok": "~"} if serves else {"exposed us": ",.1f"}
    took = "step us" if points[0].answer.training is not None else "layer us"
    columns = {over.rpartition(".")[2]: ",g", "verdict": "", "margin": ".2f", "needs": ",.0f", took: ",.1f"}
    show({**columns, **more, "GB": ",.1f", "fits": ""}, [_row(point, serves) for point in points])
    say("needs: GB/s one way that would hide it; GB of a device's memory")
    say_serial(point.answer for point in points)


def _row(point: Point, serves: bool) -> tuple[Any, ...]:
    keys, trains = point.answer.as_dict(), point.answer.training
    if trains is not None:
        keys |= {"layer_us": trains.step_us, "exposed_us": trains.exposed_us}
    time = keys["ttft_ms"] if keys["tpot_ms"] is None else keys["tpot_ms"]
    more = (keys["tokens_per_s_per_device"], time, keys["usd_per_million_tokens"]) if serves else (keys["exposed_us"],)
    figures = (keys["margin"], keys["required_link_gb_s"], keys["layer_us"], *more, keys["memory_gb"])
    return (point.value, keys["verdict"], *figures, "yes" if keys["fits"] else "no")


def _as_csv(rows: list[dict[str, Any]]) -> str:
    """All that a cell can hold."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
