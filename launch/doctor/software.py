"""What is installed, and the devices that it drives, as the doctor sees them."""

from __future__ import annotations

import os
import platform
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import megamoe
from megamoe.catalog.wording import plural
from megamoe.execution.ops import has_kernels
from megamoe.execution.products import ROW_BLOCKS, keeps_bits, multiply_dtype
from megamoe.kernels.cpu.library import ELSEWHERE, KernelWarning, find
from megamoe.kernels.cpu.paths import may_use_tiles
from megamoe.launch.devices import DEVICE_TYPES, device_of, device_type, num_devices
from megamoe.launch.doctor.check import Check, Examination, LookAt, gib
from megamoe.schedule.kept import processor

LEAST_TORCH, LEAST_RAY = (2, 11), (2, 40)
_TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-ascend")
_INSTRUCTIONS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "avx_vnni_2": "AVX-VNNI-2"}
# what a driver leaves in the file system, whether or not torch can use it
_DRIVERS = {"NVIDIA": "/proc/driver/nvidia/version", "AMD": "/dev/kfd", "Ascend": "/dev/davinci_manager"}
_INSTALL_TORCH = "install the torch that https://pytorch.org/get-started/locally names for it"
_INSTALL_COMPILER = {
    "darwin": "xcode-select --install, or point CXX at a C++ compiler",
    "win32": "run it in WSL: wsl --install",
}.get(sys.platform, "install a C++ compiler: apt-get install g++, or point CXX at one")
_INSTALL_NPU = "pip install torch_npu (the version of your torch), and source CANN's set_env.sh"


def python(_: Examination) -> Check:
    """Versions of Python and of this package."""
    system = f"{platform.system()} {platform.machine()}"
    return Check.ok("python", f"{platform.python_version()} on {system}, megamoe {megamoe.__version__}")


def torch_version(_: Examination) -> Check:
    """torch, which has what the layer needs from 2.11 on."""
    least = ".".join(map(str, LEAST_TORCH))
    recent = parse_version(torch.__version__) >= LEAST_TORCH
    return Check.needs("torch", recent, str(torch.__version__), f"pip install 'torch>={least}'", "fail")


def triton(examination: Examination) -> Check:
    """Triton, which kernels for GPUs are written in; a CPU needs none."""
    found = _installed(*_TRITONS)
    if found is None and examination.device == "cpu":
        return Check.ok("triton", "not installed, and a CPU needs none")
    fix = "pip install triton-ascend" if examination.device == "npu" else "pip install triton"
    return Check.needs("triton", found is not None, found or "not installed", fix)


def ray(_: Examination) -> Check:
    """Ray, for ranks on several machines."""
    if sys.platform == "win32":
        return Check.ok("ray", "not used on Windows")
    found = _installed("ray")
    if found is None:
        return Check("ray", "warn", "not installed: ranks of this machine only", "pip install 'megamoe[ray]'")
    return Check.needs("ray", parse_version(found) >= LEAST_RAY, found, "pip install --upgrade 'megamoe[ray]'")


def devices(examination: Examination) -> Check:
    """Devices of the type that ranks are to use: how many, which, their memory."""
    name = examination.device
    if name == "cpu":
        counts = {other: num_devices(other) for other in DEVICE_TYPES if other != name}
        idle = [f"{number} {other}" for other, number in counts.items() if number]
        return Check.ok("devices", f"cpu, {processor()}" + (f"; not used: {', '.join(idle)}" if idle else ""))
    number, variable = num_devices(name), device_type(name).visible_devices or ""
    bound = f", {variable}={os.environ[variable]}" if variable in os.environ else ""
    if not number:
        found = f"torch sees no {name} device{bound}{_reason(name)}"
        return Check("devices", "fail", found, "use --device cpu, or see the driver's line")
    module = getattr(torch, name)
    each = [module.get_device_properties(device_of(name, index)) for index in range(number)]
    kinds = sorted({f"{one.name}, {gib(one.total_memory)}" for one in each})
    found = f"{number} {name}: {'; '.join(kinds)}{bound}"
    fix = f"use at most --ranks {number}: a rank needs a device of its own"
    return Check.needs("devices", examination.ranks <= number, f"{found}; {plural(examination.ranks, 'rank')}", fix)


def driver(_: Examination) -> Check:
    """Whether torch was built for the drivers that are here."""
    built = {"CUDA": torch.version.cuda, "ROCm (HIP)": torch.version.hip, "torch_npu": _installed("torch_npu")}
    found = [f"{name} {number}" for name, number in built.items() if number] or ["the CPU alone"]
    said = f"torch is built for {', '.join(found)}"
    here = [name for name, trace in _DRIVERS.items() if Path(trace).exists()]
    usable = {"NVIDIA": torch.version.cuda, "AMD": torch.version.hip, "Ascend": built["torch_npu"]}
    unused = [name for name in here if not usable[name]]
    if unused:
        fix = _INSTALL_NPU if unused == ["Ascend"] else _INSTALL_TORCH
        return Check("driver", "warn", f"{said}, but a driver of {' and '.join(unused)} is here", fix)
    blind = [name for name in here if not num_devices("npu" if name == "Ascend" else "cuda")]
    if blind:
        fix = f"update the driver, or {_INSTALL_TORCH}"
        return Check("driver", "warn", f"{said}, sees no device of {' and '.join(blind)}{_reason('cuda')}", fix)
    return Check.ok("driver", said if here else f"{said}; no driver of an accelerator is here")


def cpu_instructions(_: Examination) -> Check:
    """Which instructions for BF16 the CPU has. A fact, not a fault."""
    features = torch.cpu.get_capabilities()
    found = [name for feature, name in _INSTRUCTIONS.items() if features.get(feature)]
    if features.get("amx_tile") and not may_use_tiles():
        found.append("but the system does not grant AMX's tiles")
    return Check.ok("cpu instructions", ", ".join(found) or "none for BF16")


def experts(examination: Examination) -> Check:
    """What computes the experts on the devices that ranks are to use."""
    name = examination.device
    if not num_devices(name):
        return Check.ok("experts", f"there is no {name} to compute them")
    if name == "cpu":
        return _cpu_kernels()
    kernels = has_kernels(torch.device(device_of(name, 0)))
    return Check.ok("experts", f"{'Triton kernels' if kernels else 'torch'} on {name}")


def _cpu_kernels() -> Check:
    """The path of the CPU's kernels, compiled here if it was not, and why a better one is not used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelWarning)
        library, reasons = find(None)
    said = f"; not {', '.join(reasons)}" if reasons else ""
    if library is None:
        built = any(ELSEWHERE in reason for reason in reasons)
        fix = ELSEWHERE if built else _INSTALL_COMPILER
        depends = "" if _torch_keeps_bits() else "; its products depend on the batch on this machine"
        return Check("experts", "warn", f"torch on cpu, slower{depends}{said}", fix)
    return Check.ok("experts", f"kernels {library.path.name} on cpu, sums in order {library.path.arithmetic}{said}")


def _torch_keeps_bits() -> bool:
    """Whether a row of torch's products has the same bits in any place, in blocks of some size; tried on one shape."""
    cpu = torch.device("cpu")
    return any(keeps_bits(cpu, multiply_dtype(cpu), (1024, 1024), size) for size in ROW_BLOCKS)


LOOK_AT: tuple[LookAt, ...] = (python, torch_version, triton, ray, devices, driver, cpu_instructions, experts)


def parse_version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version.    "2.11.0+cpu" -> (2, 11)    "2.9.0.dev20250901" -> (2, 9)"""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _installed(*packages: str) -> str | None:
    """Version of the first of several packages that is installed."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def _reason(name: str) -> str:
    """Why CUDA or ROCm do not start, in their own words; "" where nothing was built in that could say."""
    if name != "cuda" or not (torch.version.cuda or torch.version.hip):
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as refusal:
        return f": {str(refusal).splitlines()[0]}"
    return ""
