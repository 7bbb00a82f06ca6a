"""What is there: versions, the device, its clocks, a kernel of grouped_mm or none, how fast a spin's clock settles."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise

import torch

from benchmarks.gpu_kernels.findings import Check, Fact, Finding
from benchmarks.gpu_kernels.measure.operands import grouped_mm_note
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import first_line
from benchmarks.gpu_kernels.stages.task import device_of
from megamoe.kernels.chips import tuned
from megamoe.kernels.chips.targets import chip_of

_MODULES = (
    "numpy",
    "triton",
    "megamoe.layer",
    "megamoe.kernels.grouped_linear1",
    "megamoe.execution.backends.triton_backend",
)
_PROGRAMS = ("nvidia-smi", "ncu", "nsys", "gcc", "cc", "clang", "ptxas")
_PROPERTIES = (
    *("multi_processor_count", "total_memory", "L2_cache_size", "shared_memory_per_block_optin"),
    *("shared_memory_per_multiprocessor", "regs_per_multiprocessor"),
)
_ASKED = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu,utilization.gpu"
_SMI_S = 15.0
_SPINS, _SPIN_CYCLES = 40, 10_000_000  # some 5 ms each at 2 GHz


def probe(task: Task) -> Iterator[Finding]:
    yield Fact("host", {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()})
    yield Fact("torch", torch.__version__)
    for name in _MODULES:
        yield _imports(name)
    yield Fact("triton", importlib.import_module("triton").__version__)
    yield Fact("programs", {name: shutil.which(name) for name in _PROGRAMS})
    device = device_of(task)
    name = tuned.device_name(device)
    yield Fact("device", name)
    yield Fact("chip", chip_of(device))
    found = (tuned.FOLDER / tuned.file_name(name)).is_file()
    tuned.table_of(device)
    yield Fact("table", "found on this device" if found else "of its chip")
    if device.type == "cuda":
        yield from _of_a_gpu(device)


def _imports(name: str) -> Check:
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001
        return Check(f"{name} imports", False, first_line(error))
    return Check(f"{name} imports", True)


def _of_a_gpu(device: torch.device) -> Iterator[Finding]:
    properties = torch.cuda.get_device_properties(device)
    yield Fact("properties", {name: getattr(properties, name, None) for name in _PROPERTIES})
    yield Fact("free bytes", torch.cuda.mem_get_info(device)[0])
    yield Fact("nvidia-smi, idle", smi())
    yield Fact("spin, MHz", spin_rates(device))
    yield Fact("nvidia-smi, after the spin", smi())
    try:
        yield Fact("grouped_mm", grouped_mm_note(device) or "queued: waits for nothing")
    except RuntimeError as error:
        yield Fact("grouped_mm", f"does not run: {first_line(error)}")


def smi() -> str:
    """The driver's clocks and power, or why there are none."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {_SMI_S:g} s"
    return (done.stdout or done.stderr).strip()


def spin_rates(device: torch.device) -> list[int]:
    """MHz of the clock that `_sleep` counts in, spin after spin from an idle chip: what a clock would be set by."""
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_SPINS + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        torch.cuda._sleep(_SPIN_CYCLES)  # type: ignore[no-untyped-call]
        event.record()
    events[-1].synchronize()
    return [round(_SPIN_CYCLES / 1e3 / max(before.elapsed_time(after), 1e-3)) for before, after in pairwise(events)]
