"""The command line. JSON alone goes to stdout, progress and notes to stderr; exit codes are 0 done, 1 failed, 2 wrong.

A check that does not hold is a failure; a request that cannot be met as it stands is wrong. A command's module is
imported when the command is chosen, so that a plan waits for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

import megamoe
from megamoe.launch.terminal import stdout

# command -> module of this folder and what there: a function, or the app of a group
COMMANDS = {
    "demo": "demo_cli:demo",
    "launch": "launch_cli:launch",
    "doctor": "doctor_cli:doctor",
    "plan": "plan_cli:plan",
    "explain": "plan_cli:explain",
    "require": "sweep_cli:require",
    "sweep": "sweep_cli:sweep",
    "compare": "compare_cli:compare",
    "recommend": "recommend_cli:recommend",
    "catalog": "catalog_cli:app",
    "validate": "validate_cli:validate",
    "bench": "bench_cli:app",
    "lab": "lab_cli:app",
    "calibrate": "calibrate_cli:calibrate",
    "timeline": "timeline_cli:timeline",
}


class _Commands(Mapping[str, Any]):
    """The commands by name, each made when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = COMMANDS[name].partition(":")
        found = getattr(import_module(f"megamoe.launch.{module}"), attribute)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_group(found)
        else:
            alone = typer.Typer(add_completion=False)
            alone.command(name)(found)
            command = typer.main.get_command(alone)
        command.name = name
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(typer.core.TyperGroup):
    """megamoe itself."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = _Commands()


app = typer.Typer(
    cls=_Group,
    help="Expert parallelism whose communication hides under compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        stdout.print(megamoe.__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point of the megamoe command."""
    app()
