"""One stage in a process of its own, forked: its findings come through a pipe, and it ends when it is told to.

A fork of a process that has imported torch, and has not touched the device, begins at once and has a device to itself.
The process leads a group, which is killed as one. It also ends, with what it started, when the runner is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu_kernels.findings import Finding, as_line, from_line
from benchmarks.gpu_kernels.plan import CannotRunError, Stage, Task

_PR_SET_PDEATHSIG = 1  # Linux: prctl(2)
_LARGEST_LINE = 1 << 20  # bytes; a finding has a few hundred
_AFTER_KILL_S = 3.0  # a process that waits for a driver may not end at all


def end_with(parent: int) -> None:
    """Has this process be killed when the one that started it ends. Other systems than Linux have no such thing."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def first_line(error: BaseException) -> str:
    """ValueError: what it said, up to the first line's end"""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


class StageProcess:
    """A stage that runs: forked, or for `fresh` in a new interpreter.

    log       where what it prints goes
    findings  that have come and were not taken; broken counts lines that are none
    end       what it said at its end: {}, {"cannot": why} or {"error": what}; None where it has not come so far
    code      exit code, minus the signal's number where one ended it; None while it runs, or where it cannot be ended
    """

    def __init__(
        self, stage: Stage, task: Task, log: Path, not_theirs: Sequence[int] = (), *, fresh: bool = False
    ) -> None:
        """not_theirs: files of the runner that the stage may not hold open."""
        self.log, self.broken = log, 0
        self.end: dict[str, str] | None = None
        self.code: int | None = None
        self._rest = b""
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe, theirs = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            for file in (self._pipe, *not_theirs):
                os.close(file)
            _run(stage, task, theirs, log, parent, fresh=fresh)
        os.close(theirs)
        os.set_blocking(self._pipe, False)
        self._open = True

    @property
    def group(self) -> int:
        return self._pid

    def read(self, within_s: float) -> Iterator[Finding]:
        """Findings that come within so many seconds, or that are there already. Ends early where the process ended."""
        until = time.monotonic() + within_s
        while self._open:
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                break
            with suppress(BlockingIOError):
                piece = os.read(self._pipe, 1 << 16)
                if not piece:
                    self._close()
                yield from self._lines(piece)
            if time.monotonic() >= until:
                break
        self._reap()
        if self.code is None and not self._open:
            time.sleep(0.005)  # it has closed its end of the pipe and is about to end

    @property
    def running(self) -> bool:
        """Whether the stage itself does; what it started may outlive it, and holds the pipe then."""
        return self.code is None

    def kill(self) -> None:
        """Ends the whole group. The log first gets where each thread of the stage is, if it can still say so."""
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGUSR1)
                time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        until = time.monotonic() + _AFTER_KILL_S
        while self.code is None and time.monotonic() < until:
            self._reap()
            time.sleep(0.01)

    def close(self) -> Iterator[Finding]:
        """Ends what is left of the group -> findings that were on their way."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        yield from self.read(0.0)
        self._close()

    def _reap(self) -> None:
        if self.code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._pipe)

    def _lines(self, piece: bytes) -> Iterator[Finding]:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _LARGEST_LINE:
            self._rest, self.broken = b"", self.broken + 1
        for line in lines:
            try:
                text = line.decode()
                if text.startswith('{"end"'):
                    self.end = {str(key): str(value) for key, value in json.loads(text)["end"].items()}
                else:
                    yield from_line(text)
            except (ValueError, AttributeError, RecursionError):
                self.broken += 1


def _run(stage: Stage, task: Task, pipe: int, log: Path, parent: int, *, fresh: bool) -> None:
    """What the forked process does; it does not return."""
    code = 1
    try:
        os.setsid()
        end_with(parent)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _redirect(log)
        if fresh:
            given = log.with_suffix(".task")
            given.write_bytes(pickle.dumps((stage, task, pipe)))
            os.set_inheritable(pipe, True)
            os.execv(sys.executable, [sys.executable, "-m", __name__, str(given)])
        work_through(stage, task, pipe)
        code = 0
    except BaseException:  # noqa: BLE001  the log has it
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def work_through(stage: Stage, task: Task, pipe: int) -> None:
    """The whole stage, in its process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _write(pipe, json.dumps({"end": _send_all(stage, task, pipe)}))


def _send_all(stage: Stage, task: Task, pipe: int) -> dict[str, str]:
    """Sends every finding when it is there -> how the work ended."""
    try:
        module, _, name = stage.work.partition(":")
        work: Callable[[Task], Iterator[Finding]] = getattr(importlib.import_module(module), name)
        for finding in work(task):
            print(finding.line(), flush=True)
            _write(pipe, as_line(finding))
    except CannotRunError as reason:
        return {"cannot": str(reason)}
    except Exception as error:  # noqa: BLE001  of whatever kind: it is the stage's outcome
        traceback.print_exc()
        return {"error": first_line(error)}
    return {}


def _write(pipe: int, line: str) -> None:
    data = line.encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def _redirect(log: Path) -> None:
    """Sends all that is printed, by whatever library, to the log."""
    nothing, file = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(nothing, 0)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(os.dup(file), "w", buffering=1, errors="replace")


if __name__ == "__main__":
    work_through(*pickle.loads(Path(sys.argv[1]).read_bytes()))
