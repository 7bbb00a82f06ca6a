"""How commands speak: consoles, formats, progress and exit codes, the same for all of them.

JSON alone goes to stdout, progress and notes to stderr; exit codes are 0 done, 1 failed, 2 wrong.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from megamoe.paths import path_of

stdout, stderr = Console(), Console(stderr=True)


class Format(str, Enum):
    """How a command prints its result."""

    table = "table"
    json = "json"


# what a file's error calls for
_HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room and run it again")
_HINTS |= {errno.EFBIG: "files may not be as large here: see ulimit -f"}
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_HINTS |= dict.fromkeys(_REFUSED[:3], "give a place that this user may use")

_EXTRAS = {"transformers": "models", "ray": "ray", "matplotlib": "figures"}  # library -> what of megamoe brings it


# what ends a command from outside; Windows has no SIGHUP
_ENDS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """SIGINT. Where a KeyboardInterrupt itself has passed an exec(), Python ends by the signal whatever catches it."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP, raised like KeyboardInterrupt so that everything is cleaned up on the way out."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns what went wrong into one line and an exit code; the first signal unwinds, later ones wait for the end."""

    def unwind(number: int, _: FrameType | None) -> None:
        for each in _ENDS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted if number == signal.SIGINT else Terminated

    before = {each: signal.signal(each, unwind) for each in _ENDS}
    log = logging.getLogger("megamoe")
    log.addHandler(handler := _Lines(logging.WARNING))
    try:
        yield
    except typer.Exit:  # which is a RuntimeError, and says nothing
        raise
    except ValueError as wrong:
        stderr.print(f"[bold red]wrong request:[/] {_escaped(wrong)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from wrong
    except RuntimeError as failed:
        stderr.print(f"[bold red]failed:[/] {_escaped(failed)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from failed
    except ImportError as missing:
        library = (missing.name or "").partition(".")[0]
        if library not in _EXTRAS:
            raise
        there = f"newer than the one that is here ({missing})" if sys.modules.get(library) else "which is not installed"
        needs = f"this needs {library}, {there}: pip install --upgrade 'megamoe[{_EXTRAS[library]}]'"
        stderr.print(f"[bold red]wrong request:[/] {_escaped(needs)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from missing
    except OSError as failure:
        if failure.filename is None or failure.errno == errno.EPIPE:  # an output, which main() knows, or our mistake
            raise
        refused, hint = failure.errno in _REFUSED, _HINTS.get(failure.errno or 0)
        said = f"{failure.filename}: {failure.strerror}{f': {hint}' if hint else ''}"
        stderr.print(Text(f"{'wrong request' if refused else 'failed'}: {said}", "red"), soft_wrap=True)
        raise typer.Exit(2 if refused else 1) from failure
    except KeyboardInterrupt as stopped:
        stderr.print("interrupted; all that was started is stopped and removed", highlight=False)
        raise typer.Exit(130) from stopped
    except Terminated as stopped:
        stderr.print("terminated; all that was started is stopped and removed", highlight=False)
        raise typer.Exit(143) from stopped
    finally:
        log.removeHandler(handler)
        if signal.getsignal(signal.SIGINT) is unwind:
            for each, handled in before.items():
                signal.signal(each, handled or signal.SIG_DFL)


class _Lines(logging.Handler):
    """What the library logs, as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        stderr.print(Text(record.getMessage()), soft_wrap=True)


def _escaped(error: Exception | str) -> str:
    return str(error).replace("[", r"\[")


def with_homes(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose paths may begin with ~, which a shell expands in `--out ~/x` and not in `--out=~/x`."""

    @wraps(verb)
    def called(**given: Any) -> None:
        verb(**{name: _with_home(value) for name, value in given.items()})

    return called


def _with_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_home(each) for each in value]
    return path_of(value) if isinstance(value, Path) else value


class Bar(Progress):
    """A line on stderr that says what is being done and how far that is; where stderr is a terminal."""

    def __init__(self, what: str = "starting") -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        super().__init__(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
        self._only = self.add_task(what, total=None)

    def follow(self, what: str, done: float | None = None, of: float | None = None) -> None:
        """What is being done now, how many steps are done, of how many."""
        self.update(self._only, description=what, completed=done, total=of)


def parse_waves(text: str) -> int | str | tuple[int, ...]:
    """'auto' -> 'auto'    '4' -> 4    '1,2,1' -> (1, 2, 1)    ValueError for anything else"""
    from megamoe.routing.waves import check_waves

    if text == "auto":
        return "auto"
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        return check_waves(text)
    return check_waves(sizes[0] if len(sizes) == 1 else sizes)


def compile_kernels() -> None:
    """Compiles the CPU's kernels before ranks start, with a line that says so, where this machine has none yet."""
    from megamoe.kernels.cpu.library import prepare  # brings torch, which --help does not need

    prepare(lambda line: stderr.print(line, highlight=False, soft_wrap=True))
