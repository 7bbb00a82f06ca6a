"""Paths as users give them: text, bytes or os.PathLike, with `~` for a home folder as in a shell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

AnyPath = str | bytes | os.PathLike[str]


def path_of(given: Any, what: str = "path") -> Path:
    """The path that a user means by a str, bytes or os.PathLike. what: the argument's name, for the refusal.

    One that begins with ~/ or ~name/ is below that user's home folder, as in a shell; where there is no such user it
    stays as it is, and "./~/x" is in this folder. ValueError for anything else, and for an empty text.
    """
    try:
        text = os.fsdecode(given)
    except TypeError:
        raise ValueError(f"{what} must be a path, as str, bytes or os.PathLike, got {given!r}") from None
    if not text or "\0" in text:
        raise ValueError(f"{what} must be a path, got {given!r}")
    if text.startswith("~"):
        return Path(os.path.expanduser(text))
    path = Path(text)
    return path.absolute() if str(path).startswith("~") else path  # Path() takes "./" away


def lasting_path_of(given: Any, what: str = "path") -> Path:
    """As path_of(), absolute: the same place whatever folder a process changes to, or another process is in."""
    path = path_of(given, what)
    try:
        return path.absolute()
    except FileNotFoundError:
        raise ValueError(f"{what} {path} is relative to a working directory that has been removed") from None
