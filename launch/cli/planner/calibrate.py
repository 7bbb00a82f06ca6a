"""megamoe calibrate: a machine's profile from its own benchmark runs, and how wrong it is about runs it did not see."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.output import Output, check_folder, emit, say, show
from megamoe.launch.output import write as write_file
from megamoe.launch.terminal import Format, exit_codes
from megamoe.schedule import limits

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
    output: Output = Format.table,
) -> None:
    """Fit the planner to this machine, so that it predicts the layer here."""
    with exit_codes():
        from megamoe.catalog import load_machine
        from megamoe.planner.validation import calibrate as planner
        from megamoe.schedule.machine import read_runs

        if write is not None:
            check_folder(write)
        if cores is not None and cores < 1:
            raise ValueError(f"cores must be at least 1, got {cores}")
        reports = [report for path in runs for report in read_runs(path)]
        unseen = [report for path in check or [] for report in read_runs(path)]
        source = f"{plural(len(reports), 'run')} of megamoe bench: {', '.join(path.name for path in runs)}"
        machine = planner.calibrate(
            reports, load_machine(start), name=name, cores=cores or limits.cores(), source=source
        )
        fitted, held = planner.check(reports, machine), planner.check(unseen, machine)
        if write is not None:
            write_file(write, planner.as_yaml(machine), f": megamoe bench --machine {quote(str(write))}")
        emit(output, _as_dict(machine, fitted, held), lambda: _print(machine, fitted, held))


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
    say(
        f"{machine.name}: median error of the overlapped layer {median_error(fitted):.1f} % over the {len(fitted)} "
        f"runs that it was fitted to{unseen}"
    )
    rows = [(key, figure.value, figure.source) for key, figure in figures(machine).items()]
    show({"constant": "", "value": "g", "from": ""}, rows, folds=True)
    for title, checks in (("fitted to", fitted), ("not seen", held)):
        if checks:
            _print_checks(f"\n{title}, overlapped milliseconds", checks)


def _print_checks(title: str, checks: list[Check]) -> None:
    columns = {"tokens": ">", "experts": "", "weights": "", "GB/s": ".4g", "waves": ">"}
    columns |= {"run": ".1f", "planned": ".1f", "error %": "+.1f"}
    rows = []
    for each in checks:
        run = each.run
        experts = f"{run.num_experts} x {run.hidden} x {run.intermediate}, top-{run.topk}"
        setting = (f"{run.ranks} x {run.tokens_per_rank}", experts, run.weight_format)
        times = (each.overlapped_ms, each.predicted.overlapped_ms, each.error_pct)
        rows.append((*setting, run.link_gb_s or "loopback", run.waves, *times))
    show(columns, rows, title)
