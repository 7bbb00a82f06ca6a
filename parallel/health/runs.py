"""Runs of this machine that can be looked at while they go on: a file for every rank that says where its heartbeat is.

The folder is the user's own and so are the files, since a heartbeat's token is in them. A rank removes its file when it
leaves; what killed ranks left is removed by whoever lists a rank or asks next.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ListedRank:
    """A rank's heartbeat: process id and start time, address, port, and the token that it answers to."""

    rank: int
    pid: int
    started: float
    address: str
    port: int
    token: str

    @property
    def gone(self) -> bool:
        """Whether its process has ended."""
        import psutil  # here, as in list_rank(): layers without a run run where it is not installed

        try:
            return bool(psutil.Process(self.pid).create_time() != self.started)
        except psutil.NoSuchProcess:
            return True


def folder() -> Path:
    """Where this user's runs are listed."""
    if sys.platform == "win32":  # where temporary files are a user's own
        return Path(tempfile.gettempdir()) / "megamoe-runs"
    return Path(tempfile.gettempdir()) / f"megamoe-runs-{os.getuid()}"


@contextmanager
def list_rank(run: str, rank: int, address: str, port: int, token: str) -> Iterator[None]:
    """Lists this process as a rank of a run for the block. ValueError for a name that makes no file name."""
    import psutil

    check_name(run)
    sweep()
    started = psutil.Process().create_time()
    file = folder() / run / f"rank-{rank}.json"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder().chmod(0o700)
    draft = file.with_suffix(f".{os.getpid()}")
    own = ListedRank(rank, os.getpid(), started, address, port, token)
    draft.write_text(json.dumps(asdict(own)), encoding="utf-8")
    draft.replace(file)
    process = os.getpid()
    try:
        yield
    finally:
        if process == os.getpid():  # not one that was forked in the block and leaves it as well
            _remove(file)


def check_name(run: str) -> str:
    """The name of a run: letters, digits, dots, hyphens and underscores, 64 at most. ValueError for any other."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run):
        raise ValueError(f"run {run!r} is not of letters, digits, dots, hyphens and underscores, 64 at most")
    return run


def listed() -> dict[str, list[ListedRank]]:
    """Runs that have ranks on this machine, each with those that are alive, by rank."""
    sweep()
    runs: dict[str, list[ListedRank]] = {}
    for file in sorted(folder().glob("*/rank-*.json")):
        rank = _read(file)
        if rank is not None:
            runs.setdefault(file.parent.name, []).append(rank)
    return {run: sorted(ranks, key=lambda rank: rank.rank) for run, ranks in runs.items()}


def sweep() -> None:
    """Removes files of processes that are gone, and what is left of files that were cut short."""
    for file in folder().glob("*/rank-*.json"):
        rank = _read(file)
        if rank is None or rank.gone:
            _remove(file)


def _read(file: Path) -> ListedRank | None:
    """None for a file that has left meanwhile, or that does not say all that it should."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return ListedRank(**{each.name: said[each.name] for each in fields(ListedRank)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _remove(file: Path) -> None:
    """The file, and its folders if they are empty then."""
    file.unlink(missing_ok=True)
    for each in (file.parent, folder()):
        with suppress(OSError):
            each.rmdir()
