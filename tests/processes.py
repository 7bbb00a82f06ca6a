"""Processes that one has started, told apart: ranks and what else a test is about, and those of Python that stay."""

from __future__ import annotations

from contextlib import suppress

import psutil

_BESIDE = 15  # how much nicer than the tests what is built beside them is, at least
_PYTHONS_OWN = ("multiprocessing.resource_tracker import main", "multiprocessing.forkserver import main")


def started(process: psutil.Process | None = None) -> set[psutil.Process]:
    """What a process, this one by default, has started, however indirectly, but for Python's tracker and server.

    What is built beside the tests, at a niceness of its own, is left out: compilers come and go there.
    """
    process = process or psutil.Process()
    found = set()
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.nice() >= process.nice() + _BESIDE:
                continue
            own = child.ppid() == process.pid and any(each in " ".join(child.cmdline()) for each in _PYTHONS_OWN)
            found |= set() if own else {child}
    return found


def ranks_of(process: psutil.Process) -> list[psutil.Process]:
    """Ranks and workers of this machine that a process has started, spawned or forked by its server; oldest first."""
    found = []
    for child in started(process):
        with suppress(psutil.NoSuchProcess):
            line = " ".join(child.cmdline())
            found += [child] if "spawn_main" in line or "forkserver import main" in line else []
    return sorted(found, key=lambda each: (each.create_time(), each.pid))
