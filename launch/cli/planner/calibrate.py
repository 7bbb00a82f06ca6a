"""megamoe calibrate: a machine's profile from its own benchmark runs, and how wrong it is about runs it did not see."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from megamoe.launch.terminal import Format, exit_codes, stderr, stdout

if TYPE_CHECKING:
    from megamoe.catalog import Machine
    from megamoe.planner.validation.calibrate import Check


def calibrate(
    runs: Annotated[list[Path], typer.Argument(help="Files of megamoe bench --format json, one report or a list.")],
    check: Annotated[
        list[Path] | None, typer.Option("--check", help="Runs to hold the profile against that it is not fitted to.")
    ] = None,
    start: Annotated[str, typer.Option(help="Profile that has what the runs do not tell.")] = "cpu",
    cores: Annotated[int | None, typer.Option(help="Cores that all ranks shared; this machine's without.")] = None,
    name: Annotated[str, typer.Option(help="What to call the machine.")] = "this-machine",
    write: Annotated[Path | None, typer.Option(help="Where to write the profile, YAML.")] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print the result.")] = Format.table,
) -> None:
    """Fit the planner to this machine, so that it predicts the layer here."""
    with exit_codes():
        from megamoe.catalog import load_machine
        from megamoe.planner.validation import calibrate as planner
        from megamoe.schedule.machine import read_runs

        if write is not None and not write.resolve().parent.is_dir():
            raise ValueError(f"there is no folder {write.resolve().parent} to write the profile in")
        if cores is not None and cores < 1:
            raise ValueError(f"cores must be at least 1, got {cores}")
        reports = [report for path in runs for report in read_runs(path)]
        unseen = [report for path in check or [] for report in read_runs(path)]
        source = f"{len(reports)} runs of megamoe bench: {', '.join(path.name for path in runs)}"
        machine = planner.calibrate(
            reports, load_machine(start), name=name, cores=cores or os.cpu_count() or 1, source=source
        )
        fitted, held = planner.check(reports, machine), planner.check(unseen, machine)
        if write is not None:
            write.write_text(planner.as_yaml(machine))
            stderr.print(f"wrote {write}: megamoe bench --machine {write}", highlight=False, soft_wrap=True)
        if output is Format.json:
            sys.stdout.write(json.dumps(_as_dict(machine, fitted, held), indent=2) + "\n")
            return
        _print(machine, fitted, held)


def _as_dict(machine: Machine, fitted: list[Check], held: list[Check]) -> dict[str, object]:
    from megamoe.catalog import figures
    from megamoe.planner.validation.calibrate import median_error

    return {
        "machine": {key: figure.value for key, figure in figures(machine).items()},
        "rows": len(fitted),
        "median_abs_pct_error": median_error(fitted),
        "unseen_rows": len(held),
        "unseen_median_abs_pct_error": median_error(held) if held else None,
        "unseen_errors_pct": [round(each.error_pct, 2) for each in held],
    }


def _print(machine: Machine, fitted: list[Check], held: list[Check]) -> None:
    from megamoe.catalog import figures
    from megamoe.planner.validation.calibrate import median_error

    unseen = f"; of {len(held)} that it did not see {median_error(held):.1f} %" if held else ""
    stdout.print(
        f"{machine.name}: median error of the overlapped layer {median_error(fitted):.1f} % over the {len(fitted)} "
        f"runs that it was fitted to{unseen}",
        highlight=False,
        soft_wrap=True,
    )
    constants = Table(box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in ("constant", "value", "from"):
        constants.add_column(heading, justify="right" if heading == "value" else "left", no_wrap=heading != "from")
    for key, figure in figures(machine).items():
        constants.add_row(key, f"{figure.value:g}", figure.source)
    stdout.print(constants)
    _print_checks("fitted to", fitted)
    if held:
        _print_checks("not seen", held)


def _print_checks(title: str, checks: list[Check]) -> None:
    table = Table(title=f"{title}, overlapped milliseconds", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0))
    for heading in ("tokens", "experts", "weights", "GB/s", "waves", "run", "planned", "error %"):
        table.add_column(heading, justify="left" if heading in ("experts", "weights") else "right", no_wrap=True)
    for each in checks:
        run = each.run
        table.add_row(
            f"{run.ranks} x {run.tokens_per_rank}",
            f"{run.num_experts} x {run.hidden} x {run.intermediate}, top-{run.topk}",
            run.weight_format,
            f"{run.link_gb_s:.4g}" if run.link_gb_s else "loopback",
            str(run.waves),
            f"{each.overlapped_ms:.1f}",
            f"{each.predicted.overlapped_ms:.1f}",
            f"{each.error_pct:+.1f}",
        )
    stdout.print(table)
