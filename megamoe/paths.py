"""Paths as users give them, with ~ for a home folder as in a shell; and files written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

AnyPath = str | bytes | os.PathLike[str]
# what a folder that is not ours says to a new file, and a file that is mounted by itself
_PLACE_TAKEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, text in UTF-8, as put_whole() does."""
    data = content.encode() if isinstance(content, str) else content

    def write(file: Path) -> None:
        file.write_bytes(data)

    put_whole(path, write, write)


def put_whole(path: Path, make: Callable[[Path], None], fill: Callable[[Path], None]) -> None:
    """Has a file written in place of one that is there, which stays as it is until all is written.

    make   writes a file of the name that it is given, which then takes path's place, with the rights of the old one
    fill   writes into path itself: a device or a pipe, or a file that no other can take the place of, since it is
           mounted by itself, has several names or another owner, or lies in a folder that this user may not write to

    A link stays, and its target is replaced. OSError, which names path, where it cannot be written.
    """
    try:
        there = _stat(path)
        open_already = str(path).startswith(("/dev/", "/proc/"))  # /dev/stdout may be a file that the shell has opened
        kept = there is not None and (open_already or not _replaceable(there))
        if kept or not _replaced(path.resolve(), there, make):
            fill(path)
    except OSError as failure:
        failure.filename = str(path)
        raise


def _stat(path: Path) -> os.stat_result | None:
    """None where there is no such file, nor one that a link leads to. OSError for links that lead in a circle."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _replaceable(there: os.stat_result) -> bool:
    owned = not hasattr(os, "geteuid") or there.st_uid == os.geteuid()  # Windows knows no such owner
    return stat.S_ISREG(there.st_mode) and there.st_nlink == 1 and owned


def _replaced(path: Path, there: os.stat_result | None, make: Callable[[Path], None]) -> bool:
    """Puts a new file in a file's place, with its rights, and says whether it could. What ends it early leaves none."""
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        if there is not None:
            part.touch(0o600, exist_ok=False)  # what others may not read they do not read meanwhile either
        make(part)
        if there is not None:
            part.chmod(stat.S_IMODE(there.st_mode))
        part.replace(path)
    except BaseException as failure:
        with suppress(OSError):
            part.unlink()
        if there is not None and isinstance(failure, OSError) and failure.errno in _PLACE_TAKEN:
            return False
        raise
    return True
