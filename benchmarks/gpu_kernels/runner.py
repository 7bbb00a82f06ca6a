"""Runs stages one after the other within a budget. Whatever becomes of one, the others' results are kept."""

from __future__ import annotations

import datetime
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from types import FrameType

from benchmarks.gpu_kernels.guard import Guard
from benchmarks.gpu_kernels.plan import Stage, Task
from benchmarks.gpu_kernels.process import StageProcess
from benchmarks.gpu_kernels.store import CANNOT, PASSED, RUNNING, Record, Store

_TICK_S = 1.0  # at least so often the log is written
_LOOK_S = 30.0
_RESERVE_S = 1.0  # of the budget, to end the last stage and write what it found


class InterruptedRun(BaseException):
    """A signal asked the runner to end."""


def say(line: str) -> None:
    """To the terminal, if anybody still reads it: a run does not end with its reader."""
    with suppress(OSError):
        print(line, flush=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which SIGTERM, SIGINT and SIGHUP raise InterruptedRun, once."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def interrupt(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise InterruptedRun(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class Runner:
    """What all stages share.

    until      in time.monotonic(), when everything has ended
    scratch    a folder that is removed afterwards
    guard      cleans up where this process is killed
    preloaded  modules that are imported here once a first stage has passed, for the others' processes to have them
    """

    store: Store
    device: str
    rehearsal: bool
    command: str
    until: float
    scratch: Path
    guard: Guard
    preloaded: Sequence[str]
    _fork_tried: bool = False
    _fresh: bool = False  # stages in new interpreters
    _left_out: list[str] = field(default_factory=list)

    def run(self, stages: Sequence[Stage]) -> bool:
        """Whether all of them ran now, and passed or had nothing to run on."""
        left = list(stages)
        try:
            with interruptible():
                while left:
                    self._run(left[0], tuple(each.name for each in stages))
                    left.pop(0)
        except InterruptedRun as signalled:
            for stage in left:
                self._not_run(stage, "interrupted", str(signalled))
        self.store.write()
        return not self._left_out and all(self.store.records[stage.name].passed for stage in stages)

    def _run(self, stage: Stage, selected: tuple[str, ...]) -> None:
        left = self.until - time.monotonic() - _RESERVE_S
        if (reason := self._reason_to_skip(stage)) or left <= 0:
            self._not_run(stage, "skipped" if reason else "no time", reason or "the budget was over")
            return
        record = self.store.records[stage.name] = self._new_record()
        self.store.write()
        say(f"{stage.name}: {stage.purpose}")
        begun = time.monotonic()
        until = begun + min(stage.limit_s, left)
        earlier = {name: asdict(each) for name, each in self.store.records.items()}
        task = Task(self.device, self.rehearsal, until, selected, earlier, stage.arguments)
        log = self.scratch / f"{stage.name}.txt"
        process = StageProcess(stage, task, log, (self.guard.pipe,), fresh=self._fresh)
        try:
            self.guard.watch(process.group)
            late = self._follow(stage, process, until)
        finally:
            process.kill()
            for finding in process.close():
                self.store.put(stage, finding)
            self.guard.watch(0)
            record.seconds = round(time.monotonic() - begun, 1)
            self.store.write_log(stage, process.log)
        limit = f"did not end within {until - begun:.0f} s"
        record.state, record.said = ("timed out", limit) if late else outcome(process, record)
        self._tell(stage, record)
        if record.passed and self.preloaded and not self._fork_tried:
            self._fork_tried = True
            for name in self.preloaded:
                import_module(name)
            self._fresh = not self._fork_works()

    def _fork_works(self) -> bool:
        """Whether a fork of this process, which has imported torch by now, has the device: looked at, not believed."""
        look = Stage("fork", "", "benchmarks.gpu_kernels.stages.task:touch", _LOOK_S)
        until = min(self.until, time.monotonic() + _LOOK_S)
        task = Task(self.device, self.rehearsal, until)
        process = StageProcess(look, task, self.scratch / "fork.txt", (self.guard.pipe,))
        try:
            self.guard.watch(process.group)
            while process.running and time.monotonic() < until:
                list(process.read(_TICK_S))
        finally:
            process.kill()
            list(process.close())
            self.guard.watch(0)
        if process.end != {}:
            say("a fork has no device: each stage imports everything anew")
        return process.end == {}

    def _follow(self, stage: Stage, process: StageProcess, until: float) -> bool:
        """Keeps what comes until the process ends -> whether it did not in time."""
        while process.running:
            if time.monotonic() >= until:
                return True
            for finding in process.read(min(_TICK_S, max(0.0, until - time.monotonic()))):
                self.store.put(stage, finding)
                self.store.write()
                say(f"  {finding.line()}")
                self.store.write_log(stage, process.log)
            self.store.write_log(stage, process.log)
        return False

    def _reason_to_skip(self, stage: Stage) -> str:
        known = self.store.records
        lacking = [f"{name} {known[name].state}" for name in stage.needs if name in known and not known[name].passed]
        return f"needs what did not pass: {', '.join(lacking)}" if lacking else ""

    def _not_run(self, stage: Stage, state: str, said: str) -> None:
        """Says so in its record, but for one of an earlier command, which stays."""
        self._left_out.append(stage.name)
        record = self.store.records.setdefault(stage.name, self._new_record())
        if record.state == RUNNING:
            record.state, record.said = state, said
        self._tell(stage, record)

    def _new_record(self) -> Record:
        return Record(command=self.command, date=datetime.datetime.now().isoformat(timespec="seconds"))

    def _tell(self, stage: Stage, record: Record) -> None:
        self.store.write()
        said = f", {record.said}" if record.said else ""
        say(f"{stage.name}: {record.state}{said} ({record.seconds:g} s)")


def outcome(process: StageProcess, record: Record) -> tuple[str, str]:
    """State of a stage that ended by itself, and why."""
    failed = [check.name for check in record.checks if not check.passed]
    problems = [f"{row.shape} {row.rows_per_expert} {row.part} {row.what}" for row in record.rows if row.problem]
    if process.code is None:
        return "crashed", "could not be ended: it waits for the driver"
    if process.code < 0:
        return "crashed", f"ended by {signal.Signals(-process.code).name}"
    if process.code or process.end is None:
        return "crashed", f"exit code {process.code}, before its end"
    if "error" in process.end:
        return "failed", process.end["error"]
    if process.broken:
        return "failed", f"{process.broken} lines of its results could not be read"
    if failed or problems:
        return "failed", "; ".join([*failed, *problems])
    return (CANNOT, process.end["cannot"]) if "cannot" in process.end else (PASSED, "")
