"""Python's fork server with torch imported: a rank that it forks is there in milliseconds and shares torch's memory.

It begins with the first process that may be forked, ends with this one, and starts no threads. What it has inherited
is remembered; a process that would inherit anything else is spawned, and so is the first where the server is not
ready within a minute, and every one where it cannot begin: its socket's path must not exceed 107 bytes, which that of a
folder for temporary files may.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from megamoe.launch.forking.surroundings import surroundings, unsearched_folder

if sys.platform == "win32":  # which has no such server: no rank is started there
    from multiprocessing.context import SpawnContext as ForkServerContext

    FORK_SERVER = mp.get_context("spawn")
else:
    from multiprocessing.context import ForkServerContext

    FORK_SERVER = mp.get_context("forkserver")

MODELS = "megamoe.launch.generation.preloaded"
_preloaded = ["megamoe.launch.preloaded"]
SPAWN = mp.get_context("spawn")
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # read when a process imports torch: no warnings of addresses without names
_READY_S = 60.0
_IMPORTED_IN = os.getpid()  # which a fork does not change
_STARTING = threading.Lock()


@dataclass(slots=True)
class _Server:
    """What it has inherited, None before it begins; whether it has answered, and whether it ended before that."""

    inherited: dict[str, Any] | None = None
    ready: threading.Event = field(default_factory=threading.Event)
    failed: bool = False


_server = _Server()


def preload(module: str) -> None:
    """Has the server import a module too, which may start no threads. Without effect once it has begun."""
    if module not in _preloaded:
        _preloaded.append(module)


def context(forked: bool) -> SpawnContext | ForkServerContext:
    """How the next process is to be started. forked says that it may be; waits until the server, if new, is ready."""
    if not forked or sys.platform != "linux":
        return SPAWN
    now = surroundings()
    with starting():
        if _server.inherited is None:
            _begin()
            _server.inherited = now
    same = now == _server.inherited and _server.ready.wait(_READY_S)
    return FORK_SERVER if same and not _server.failed else SPAWN


def _begin() -> None:
    FORK_SERVER.set_forkserver_preload(list(_preloaded))
    try:
        forkserver.ensure_running()
    except OSError:
        _server.failed = True
        _server.ready.set()
    else:
        threading.Thread(target=_answer, name="megamoe waits for its fork server", daemon=True).start()


def _answer() -> None:
    """The server has answered once a process of its own has come and gone: it forks none before its imports."""
    first = FORK_SERVER.Process(target=_nothing, name="megamoe's first fork", daemon=True)
    try:
        first.start()
        first.join()
    except (OSError, EOFError):
        _server.failed = True
    finally:
        _server.ready.set()


def _nothing() -> None:
    pass


def forked_by() -> int | None:
    """The process id of the server that this process is a fork of, None where it is not."""
    return _IMPORTED_IN if os.getpid() != _IMPORTED_IN else None


def own_streams() -> list[Connection]:
    """Where this process prints now, stdout and stderr: the server has what was open when it began."""
    streams: list[Connection] = []
    with suppress(OSError):  # closed
        for number in (1, 2):
            streams.append(Connection(os.dup(number), readable=False))
    return streams


@contextmanager
def starting() -> Iterator[None]:
    """A block that starts a process: one at a time, deaf to Ctrl-C from its first moment, torch is quiet in it, and it
    looks for Python's own modules where this process does, not among the user's in the working directory.
    """
    first = QUIET if unsearched_folder() is None else {**QUIET, "PYTHONSAFEPATH": "1"}
    with _STARTING, _added(first):
        if sys.platform == "win32":
            raise AssertionError("check_system() comes first")
        resource_tracker.ensure_running()  # where it is started, it unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _added(settings: Mapping[str, str]) -> Iterator[None]:
    """A block in which these variables are set that are not set already."""
    added = settings.keys() - os.environ.keys()
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def reap(process: BaseProcess, timeout_s: float | None = None) -> None:
    """process.join(). A start looks for processes that have ended as well, and only one of the two can learn how."""
    if wait([process.sentinel], timeout_s):
        with _STARTING:
            process.join(timeout_s)  # the sentinel of a spawned process is ready a moment before its end
