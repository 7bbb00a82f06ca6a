"""The command line. JSON alone goes to stdout, progress and notes to stderr; exit codes are 0 done, 1 failed, 2 wrong.

A check that does not hold is a failure; a request that cannot be met as it stands is wrong. A command's module is
imported when the command is chosen, so that a plan waits for nothing else.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

import megamoe
from megamoe.launch.terminal import stdout, with_homes

# command -> module of this folder and what there: a function, or the app of a group
COMMANDS = {
    "demo": "demo:demo",
    "launch": "launch:launch",
    "doctor": "doctor:doctor",
    "plan": "planner.plan:plan",
    "explain": "planner.plan:explain",
    "require": "planner.sweep:require",
    "sweep": "planner.sweep:sweep",
    "compare": "planner.compare:compare",
    "recommend": "planner.recommend:recommend",
    "catalog": "planner.catalog:app",
    "validate": "planner.validate:validate",
    "bench": "bench:app",
    "lab": "lab:app",
    "calibrate": "planner.calibrate:calibrate",
    "timeline": "timeline:timeline",
    "generate": "models.generate:generate",
    "tiny": "models.tiny:tiny",
    "upcycle": "models.upcycle:upcycle",
    "convert": "convert:convert",
}


class _Commands(Mapping[str, Any]):
    """The commands by name, each made when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = COMMANDS[name].partition(":")
        found = getattr(import_module(f"megamoe.launch.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            command: Any = typer.main.get_group(found)
        else:
            alone = typer.Typer(add_completion=False)
            alone.command(name)(with_homes(found))
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
    pretty_exceptions_show_locals=False,
)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        stdout.print(megamoe.__version__, highlight=False)
        raise typer.Exit


def main() -> None:
    """Entry point of the megamoe command. A stdout that is closed is nobody's; one that is full ends it with code 1.

    What stdout's encoding lacks is written as on stderr, \\xf6 for ö.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as failure:
        if failure.errno not in _UNWRITABLE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left is flushed when the process ends
        if failure.errno != errno.EPIPE:
            what = failure.filename or "the output"
            sys.stderr.write(f"{what} cannot be written: {failure.strerror}\n")
        raise SystemExit(1) from None
