"""The chips that kernels are compiled for: how large a kernel may be there, and what multiplies matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

KIB = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A chip as Triton's compilers name it.

    backend, arch, warp_size   "cuda" 90 32, "hip" "gfx950" 64
    shared_bytes               shared memory that one block can have at most
    tensor_columns             columns of tensor memory that a multiprocessor has
    instruction                beginning of the matrix instruction's name in what the compiler emits
    scaled                     it multiplies MXFP8 by MXFP4 itself; else both are made BF16 first
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    tensor_columns: int
    instruction: str
    scaled: bool

    @property
    def name(self) -> str:
        """cuda:90"""
        return f"{self.backend}:{self.arch}"


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (227 KiB a block for 9.0
# and 10.0); AMD CDNA 4 Instruction Set Architecture (160 KiB LDS a compute unit). Tensor memory: PTX ISA, tcgen05.
TARGETS = (
    Target("cuda", 90, 32, 227 * KIB, 0, "wgmma.mma_async", scaled=False),
    Target("cuda", 100, 32, 227 * KIB, 512, "tcgen05.mma", scaled=True),
    Target("hip", "gfx950", 64, 160 * KIB, 0, "v_mfma", scaled=True),
)

# What all launches ask of the compiler. A product and a sum are rounded each for itself: whether Triton fuses them
# otherwise depends on its version.
OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": False}


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation of a kernel, as a launch would ask for it.

    label         says which of the kernel's tiles it is: "64x128x128"
    kernel        the @triton.jit function
    signature     Triton type of each parameter in their order: "*bf16", "*u8", "*fp8e4nv", "i32", "constexpr"
    constants     values of those that are "constexpr"
    aligned       names of pointers and sizes that 16 divides
    instruction   what must be among the emitted instructions, nothing for a kernel that multiplies no matrices
    options       for the chip's compiler, beside OPTIONS
    """

    label: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int = 4
    num_stages: int = 1
    instruction: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def target(name: str) -> Target:
    """The target of that name, such as cuda:90. ValueError where there is none."""
    found = {each.name: each for each in TARGETS}
    if name not in found:
        raise ValueError(f"no target is called {name!r}; there are {', '.join(found)}")
    return found[name]


def reads_wide(device: torch.device) -> bool:
    """Whether grouped products of MXFP4 weights take their rows widened there (`layout.Wide`)."""
    return chip_of(device) not in {target.name for target in TARGETS if target.scaled}


def chip_of(device: torch.device) -> str:
    """The name of a device's chip, whether there are kernels for it or not: cuda:90, hip:gfx950; "cpu", where Triton
    interprets. Chips of one generation share a name: compute capability 10.3 is cuda:100 as well.
    """
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return "hip:" + properties.gcnArchName.split(":")[0]
    return f"cuda:{properties.major * 10}"
