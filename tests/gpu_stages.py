"""Stages for tests of the runner: some that find something, and one for each way in which a stage can go wrong."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu_kernels.findings import Check, Fact, Finding, Row, Table
from benchmarks.gpu_kernels.plan import CannotRunError, Stage, Task
from benchmarks.gpu_kernels.run import main

NOTHING_AFTER_S = 30.0  # what hangs does so longer than any test


def row(us: float, what: str = "mxfp4") -> Row:
    return Row("linear2", "tiny", 8, what, 3, 24, us, us, us, 1000, 2000)


def sound(task: Task) -> Iterator[Finding]:
    """Knows what earlier stages found."""
    yield row(2.0)
    yield Fact("earlier", {name: record["state"] for name, record in task.earlier.items()})


def fails_a_check(_: Task) -> Iterator[Finding]:
    yield Check("a check", False, "1 value differs")
    yield Check("another", True)


def raises(_: Task) -> Iterator[Finding]:
    yield row(3.0)
    raise ValueError("first line\nsecond")


def exits(_: Task) -> Iterator[Finding]:
    yield row(3.0)
    os._exit(0)


def segfaults(_: Task) -> Iterator[Finding]:
    yield row(3.0)
    ctypes.string_at(0)


def hangs(_: Task) -> Iterator[Finding]:
    """With all signals blocked that can be, and a process of its own that would outlive it."""
    yield row(3.0)
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({NOTHING_AFTER_S})"])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(NOTHING_AFTER_S)


def writes_garbage(_: Task) -> Iterator[Finding]:
    """Into every open file but its log, then goes on as if nothing had been."""
    yield row(3.0)
    garbage = (
        b'{"row": {"us": NaN}}\n',
        b'{"row": {"part": 1}}\n',
        b"\xff\x00 no JSON\n",
        b'{"end"\n',
        b'{"end": 3}\n',
    )
    for file in map(int, os.listdir("/proc/self/fd")):
        for text in garbage if file > 2 else ():
            try:
                os.write(file, text)
            except OSError:
                continue
    yield row(4.0, "bf16")


def floods(_: Task) -> Iterator[Finding]:
    for _number in range(20_000):
        sys.stdout.write("x" * 100 + "\n")
    yield Fact("printed", 2_000_000)


def cannot(_: Task) -> Iterator[Finding]:
    yield Fact("looked", True)
    raise CannotRunError("no such thing on a CPU")


def makes_a_table(_: Task) -> Iterator[Finding]:
    yield Table("../outside.json", "first")
    yield Table("GPU.json", "second")


def goes_on(_: Task) -> Iterator[Finding]:
    """Finds something now and then until it is ended; its log says which processes it has."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({NOTHING_AFTER_S})"])
    sys.stdout.write(f"processes {os.getpid()} {child.pid}\n")
    sys.stdout.flush()
    for number in range(1000):
        yield row(float(number + 1))
        time.sleep(0.05)


def stage(name: str, work: str = "", *, limit_s: float = 10.0, needs: tuple[str, ...] = ()) -> Stage:
    """The stage of the function of that name, or of another's."""
    return Stage(name, f"{name}, for tests", f"tests.gpu_stages:{work or name}", limit_s, needs)


FAULTS = ("fails_a_check", "raises", "exits", "segfaults", "hangs", "writes_garbage", "floods", "cannot")
PLANS = {
    "faults": (
        stage("first", "sound"),
        *(stage(name, limit_s=1.0 if name == "hangs" else 10.0) for name in FAULTS),
        stage("needs-check", "sound", needs=("first", "fails_a_check")),
        stage("needs-skipped", "sound", needs=("needs-check",)),
        stage("needs-cannot", "sound", needs=("cannot",)),
        stage("makes_a_table"),
        stage("last", "sound"),
    ),
    "killed": (stage("first", "sound"), stage("goes_on", limit_s=60.0), stage("last", "sound")),
    "slow": (stage("hangs", limit_s=60.0), stage("last", "sound")),
    "again": (stage("first", "sound"), stage("second", "raises"), stage("third", "sound", needs=("second",))),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], plan=PLANS[sys.argv[1]], find_device=lambda: None, preloaded=()))
