"""How benchmarks take arguments and end: with the exit codes of the megamoe command, one line for what went wrong."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from megamoe.launch.output import check_folder
from megamoe.launch.terminal import exit_codes

INSTALL = "pip install -c constraints.txt -e '.[dev]'"


def run(main: Callable[[], int | None]) -> NoReturn:
    """Ends the process with main's exit code; with 2 after a ValueError, 130 after Ctrl-C, 1 after a RuntimeError or
    where a package is not installed.
    """
    code: int | None
    try:
        with exit_codes():
            try:
                code = main()
            except ModuleNotFoundError as missing:
                raise RuntimeError(f"{missing.name} is not installed; {INSTALL} has what benchmarks use") from missing
    except typer.Exit as ended:
        code = ended.exit_code
    sys.exit(code)


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    return _at_least(1, int(text))


def natural(text: str) -> int:
    """An argument that is an integer of at least 0."""
    return _at_least(0, int(text))


def above_zero(text: str) -> float:
    """An argument that is a finite number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return value


def new_file(text: str) -> Path:
    """An argument that is a file to write, refused before anything is measured where there is no folder for it."""
    try:
        check_folder(Path(text))
    except ValueError as refusal:
        raise argparse.ArgumentTypeError(str(refusal)) from refusal
    return Path(text)


def _at_least(least: int, value: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value
