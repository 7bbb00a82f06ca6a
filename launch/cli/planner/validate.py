"""megamoe validate: the planner held against what was measured, a table of layers or all published sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.output import Output, emit, note, say, show
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
    profile: Annotated[
        str | None, typer.Option(help="Whose constants plan rows that name no profile; the device's by default.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Hold the planner against measurements, and print its errors in percent."""
    with exit_codes():
        if file is not None:
            _table(file, rows, profile, output)
        elif profile is not None:
            raise ValueError("--profile is of a file's rows; published sets are planned by their devices' profiles")
        else:
            _published(output)


def _table(file: Path, rows: bool, profile: str | None, output: Format) -> None:
    from megamoe.planner.validation.validate import summary

    compared, assumed = _compared(file, profile)
    found = {**summary(compared), "assumed": list(assumed)}
    for each in assumed:
        note(f"assumed: {each}")
    every = {"compared": [_row(each) for each in compared]} if rows else {}
    emit(output, {**found, **every}, lambda: _print_table(file, found, every.get("compared", [])))


def _print_table(file: Path, found: dict[str, Any], compared: list[dict[str, Any]]) -> None:
    """The rows that are to be printed, then the errors of all rows and of groups of them."""
    if compared:
        columns = {"hardware": "", "model": "", "EP": ">", "tokens": "~", "routing": "", "timed": ""}
        columns |= {"measured us": ",.1f", "planned": ",.1f", "error %": "+.1f"}
        show(columns, [tuple(row.values()) for row in compared])
    groups: list[tuple[str, Any]] = [("all", found)]
    groups += [(f"EP{ep}", errors) for ep, errors in found["by_ep_size"].items()]
    groups += list(found["by_routing"].items())
    groups += list(found["by_stack"].items()) if len(found["by_stack"]) > 1 else []
    keys = ("rows", "median_abs_pct_error", "p95_abs_pct_error", "max_abs_pct_error")
    cells = [(name, *(each[key] for key in keys)) for name, each in groups]
    columns = {"rows of": "", "number": ">", **dict.fromkeys(("median", "95th", "largest"), ".1f")}
    show(columns, cells, f"\n{file}: errors in percent, whatever the sign")


def _compared(file: Path, profile: str | None = None) -> tuple[list[Compared], tuple[str, ...]]:
    """Every row with what the planner says, and what was assumed of the file. ValueError names the file and the row."""
    from megamoe.planner.validation.tables import by_profile, read
    from megamoe.planner.validation.validate import compare

    try:
        table = read(file)
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
    if profile is not None:
        try:
            table = by_profile(table, profile)
        except ValueError as wrong:
            raise ValueError(f"{file}, {wrong}") from wrong
    compared = []
    for row in table.rows:
        try:
            compared += compare([row])
        except ValueError as wrong:
            raise ValueError(f"{file}, line {row.line}: {wrong}") from wrong
    return compared, table.assumed


def _row(each: Compared) -> dict[str, Any]:
    row = each.row
    keys = ("hardware", "model", "ep_size", "tokens_per_rank", "routing", "stack", "latency_us")
    return {**{key: getattr(row, key) for key in keys}, "planned_us": each.planned_us, "error_pct": each.error_pct}


def _published(output: Format) -> None:
    found = {name: _set(name) for name in SETS}
    report = {name: {"what": SETS[name], **_errors(rows), "compared": rows} for name, rows in found.items()}
    emit(output, report, lambda: _print_published(report))


def _print_published(report: dict[str, dict[str, Any]]) -> None:
    columns = {"published": "~", "ours": "~", "unit": "", "error %": "+.1f", "": "", "what": ""}
    keys = ("published", "ours", "unit", "error_pct", "role", "what")
    for found in report.values():
        rows = [tuple(row.get(key, "") for key in keys) for row in found["compared"]]
        show(columns, rows, f"\n{found['what']}", folds=True)
        median, largest = found["median_abs_pct_error"], found["max_abs_pct_error"]
        say(f"{plural(found['rows'], 'row')}, errors whatever the sign: median {median:.1f} %, largest {largest:.1f} %")


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
                "what": f"{each.row.model}, {each.row.tokens_per_rank:g} tokens a rank",
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
