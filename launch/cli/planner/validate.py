"""megamoe validate: the planner held against what was measured, a table of layers or all published sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.launch.cli.planner.plan import Output, print_json
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.planner.validation.validate import Compared

# set -> what it is
SETS = {
    "deepgemm-316": "DeepGEMM pull request 316: the fused kernel alone, EP8, Blackwell, uniform routing",
    "deepep-dispatch": "DeepEP V1: low-latency dispatch alone, H800, one 50 GB/s NIC a device, 128 tokens",
    "isca": "ISCA 2025, Insights into DeepSeek-V3, 2.3.2: arithmetic, not a measurement",
    "serving": "published serving results: tokens per second and device",
}


def validate(
    file: Annotated[
        Path | None, typer.Argument(help="A CSV file of measured layers; all published sets without one.")
    ] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Also print every row of the file.")] = False,
    output: Output = Format.table,
) -> None:
    """Hold the planner against measurements, and print its errors in percent."""
    with exit_codes():
        if file is None:
            _published(output)
        else:
            _table(file, rows, output)


def _table(file: Path, rows: bool, output: Format) -> None:
    from megamoe.planner.validation.validate import summary

    compared = _compared(file)
    found = summary(compared)
    if output is Format.json:
        every = {"compared": [_row(each) for each in compared]} if rows else {}
        print_json({**found, **every})
        return
    from megamoe.launch.cli.planner.plan_view import figure, show

    if rows:
        keys = ("hardware", "model", "ep_size", "tokens_per_rank", "routing")
        lines: list[tuple[str, ...]] = []
        for row in map(_row, compared):
            times = (figure(row["latency_us"]), figure(row["planned_us"]), f"{row['error_pct']:+.1f}")
            lines.append((*(str(row[key]) for key in keys), *times))
        headings = ("hardware", "model", "EP", "tokens", "routing", "measured us", "planned", "error %")
        show("", headings, lines, (0, 1, 4))
    _print_summary(file, found)


def _compared(file: Path) -> list[Compared]:
    """Every row with what the planner says. ValueError names the file and the row."""
    from megamoe.planner.validation.validate import compare, read_table

    try:
        rows = read_table(file)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
    compared = []
    for number, row in enumerate(rows, start=1):
        try:
            compared += compare([row])
        except ValueError as wrong:
            raise ValueError(f"{file}, row {number}: {wrong}") from wrong
    return compared


def _row(each: Compared) -> dict[str, Any]:
    row = each.row
    keys = ("hardware", "model", "ep_size", "tokens_per_rank", "routing", "latency_us")
    return {**{key: getattr(row, key) for key in keys}, "planned_us": each.planned_us, "error_pct": each.error_pct}


def _print_summary(file: Path, found: dict[str, Any]) -> None:
    from megamoe.launch.cli.planner.plan_view import show

    groups: list[tuple[str, Any]] = [("all", found)]
    groups += [(f"EP{ep}", errors) for ep, errors in found["by_ep_size"].items()]
    groups += list(found["by_routing"].items())
    keys = ("median_abs_pct_error", "p95_abs_pct_error", "max_abs_pct_error")
    cells = [(name, str(each["rows"]), *(f"{each[key]:.1f}" for key in keys)) for name, each in groups]
    show(f"\n{file}: errors in percent, whatever the sign", ("rows of", "number", "median", "95th", "largest"), cells)


def _published(output: Format) -> None:
    found = {name: _set(name) for name in SETS}
    if output is Format.json:
        print_json({name: {"what": SETS[name], **_errors(rows), "compared": rows} for name, rows in found.items()})
        return
    from megamoe.launch.cli.planner.plan_view import say, short, show

    for name, rows in found.items():
        lines = [
            (
                short(row["published"]),
                short(row["ours"]),
                row["unit"],
                f"{row['error_pct']:+.1f}",
                row.get("role", ""),
                row["what"],
            )
            for row in rows
        ]
        show(f"\n{SETS[name]}", ("published", "ours", "unit", "error %", "", "what"), lines, (2, 4, 5), folds=True)
        errors = _errors(rows)
        median, largest = errors["median_abs_pct_error"], errors["max_abs_pct_error"]
        say(f"{errors['rows']} rows, errors whatever the sign: median {median:.1f} %, largest {largest:.1f} %")


def _set(name: str) -> list[dict[str, Any]]:
    """what, published, ours, unit, error_pct of every row."""
    if name == "serving":
        from megamoe.planner.validation.published import published

        keys = ("published", "ours", "error_pct")
        return [
            {
                "what": each.result.what,
                **{key: getattr(each, key) for key in keys},
                "unit": "tokens/s",
                "role": each.result.role,
                "source": each.result.source,
                "assumed": each.result.assumed,
            }
            for each in published()
        ]
    from megamoe.planner.validation import published_layers as layers

    if name == "deepgemm-316":
        return [
            {
                "what": f"{each.row.model}, {each.row.tokens_per_rank} tokens a rank",
                "published": each.row.latency_us,
                "ours": each.planned_us,
                "unit": "us",
                "error_pct": each.error_pct,
            }
            for each in layers.pull_request_316()
        ]
    figures = layers.deepep_dispatch() if name == "deepep-dispatch" else layers.isca()
    columns = ("what", "published", "ours", "unit", "error_pct")
    return [{key: getattr(each, key) for key in columns} for each in figures]


def _errors(rows: list[dict[str, Any]]) -> dict[str, float]:
    from statistics import median

    from megamoe.planner.validation.validate import Errors, quantile

    found = sorted(abs(row["error_pct"]) for row in rows)
    return Errors(len(found), median(found), quantile(found, 0.95), found[-1]).as_dict()
