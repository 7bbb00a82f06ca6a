"""Where the products' time goes: ncu's sections where it is there and may look, else torch.profiler's kernels.

python -m benchmarks.gpu_kernels.stages.profiling cuda:0 V4-Pro 8 512      launches each product twice, for ncu
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kernels.findings import Fact, Finding
from benchmarks.gpu_kernels.measure.clock import OnceClock
from benchmarks.gpu_kernels.measure.operands import Products, Rows, Weights, kind_of
from benchmarks.gpu_kernels.measure.shapes import Shape, shape_of
from benchmarks.gpu_kernels.plan import CannotRunError, Task
from benchmarks.gpu_kernels.process import end_with
from benchmarks.gpu_kernels.stages.task import device_of, rows_for, shape_for

_SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
_NCU_SHARE = 0.6  # of the stage's time; the rest is torch.profiler's
_TEXT = 40_000  # characters of what ncu says
_LAUNCHES = 3
_KEPT = ("grid", "block", "registers per thread", "shared memory", "blocks per SM", "est. achieved occupancy %")


def profile(task: Task) -> Iterator[Finding]:
    reason = "there is none" if shutil.which("ncu") is None else ""
    if not reason and not task.rehearsal:
        text, reason = _ncu(task, time.monotonic() + _NCU_SHARE * (task.until - time.monotonic()))
        yield Fact("ncu", text[-_TEXT:])
    if not reason:
        return
    yield Fact("no ncu", reason)
    kernels = list(_profiled(task))
    if not kernels:
        raise CannotRunError(f"ncu: {reason}; torch.profiler ran, and saw no kernel of a GPU")
    yield Fact("kernels", kernels)


def _ncu(task: Task, until: float) -> tuple[str, str]:
    """What it printed, and why that is nothing to go by, if so."""
    program = [sys.executable, "-m", __name__, task.device, task.arguments["shape"], *map(str, task.arguments["rows"])]
    sections = [flag for section in _SECTIONS for flag in ("--section", section)]
    launches = str(2 * len(task.arguments["rows"]))
    kernels = ["-k", "regex:_linear[12]_kernel", "--launch-skip", "0", "-c", str(2 * int(launches))]
    command = ["ncu", "--clock-control", "none", *sections, *kernels, *program]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, until - time.monotonic()),
            check=False,
            preexec_fn=partial(end_with, os.getpid()),
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        return said.decode(errors="replace") if isinstance(said, bytes) else said, f"not within {late.timeout:.0f} s"
    refused = next((line for line in done.stdout.splitlines() if "==ERROR==" in line), "")
    return done.stdout, refused or (f"exit code {done.returncode}" if done.returncode else "")


def launches(device: torch.device, shape: Shape, rows: tuple[int, ...]) -> Iterator[tuple[int, Callable[[], None]]]:
    """Rows an expert, and what launches both products of MXFP4 weights."""
    kind = kind_of("mxfp4", device)
    weights = Weights.made(shape, kind, OnceClock(device))
    for each in rows:
        products = Products.made(Rows.made(shape, each, device), weights, shape.sizes.swiglu_limit, kind)
        products.both()
        yield each, products.both


def _profiled(task: Task) -> Iterator[dict[str, Any]]:
    """Each kernel of a few launches, with its microseconds and what the profiler says of its launch."""
    device, shape = device_of(task), shape_for(task, task.arguments["shape"])
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for rows, launch in launches(device, shape, rows_for(task)):
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(1 if task.rehearsal else _LAUNCHES):
                launch()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        for event in events:
            if event.get("cat") == "kernel":
                said = {name: event["args"][name] for name in _KEPT if name in event.get("args", {})}
                yield {"rows": rows, "name": event["name"], "us": event["dur"], **said}


def main() -> None:
    """For ncu: each product once unseen and once seen; it counts launches of both."""
    end_with(os.getppid())
    device = torch.device(sys.argv[1])
    torch.cuda.set_device(device)
    rows = tuple(map(int, sys.argv[3:]))
    for _, launch in launches(device, shape_of(sys.argv[2], rehearsal=False), rows):
        launch()
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
