"""The ways in which the CPU's kernels can compute, and which of them this machine can run."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

_AVX512 = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "fma3")
_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-DMEGAMOE_AVX512")


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute.

    arithmetic   "fma": one fused multiply-add for each value of K, the same bits on all such paths
                 "bf16-dot": one BF16 dot product for each pair of K, as AVX512_BF16 rounds it
                 "bf16-tile": one BF16 product of tiles for each 32 of K, as AMX rounds it
    flags        what the compiler is given; needs: what torch.cpu.get_capabilities() must have
    tuned        what the compiler is given too where it has a feature: for speed, the bits are the same
    products     the source of its products; order: of MXFP4 weights, as pack_mxfp4() has it
    """

    name: str
    arithmetic: str
    flags: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    products: str = "products.cpp"
    order: str = "bytes"
    tuned: tuple[tuple[str, str], ...] = ()

    def tuned_for(self, features: Mapping[str, object]) -> Path:
        """The path as it is compiled on a CPU with these features."""
        return replace(self, flags=self.flags + tuple(flag for each, flag in self.tuned if features.get(each)))

    def runs_on(self, features: Mapping[str, object]) -> bool:
        return all(features.get(each) for each in self.needs) and ("amx_tile" not in self.needs or may_use_tiles())


@lru_cache(maxsize=1)
def may_use_tiles() -> bool:
    """Whether the operating system saves AMX's tiles for this process. Linux does for one that has asked; this asks."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


# best first
PATHS = (
    Path(
        "amx-bf16",
        "bf16-tile",
        (*_AVX512_FLAGS, "-mavx512vbmi", "-DMEGAMOE_AMX"),
        (*_AVX512, "avx512_vbmi", "amx_tile", "amx_bf16"),
        products="tiles.cpp",
        order="words",
        tuned=(("avx512_bf16", "-mavx512bf16"),),
    ),
    Path(
        "avx512-bf16",
        "bf16-dot",
        (*_AVX512_FLAGS, "-mavx512bf16", "-DMEGAMOE_BF16_DOT"),
        (*_AVX512, "avx512_bf16"),
        tuned=(("avx512_vp2intersect", "-DMEGAMOE_FULL_WIDTH"),),  # of CPUs with AVX512_BF16 alone, Zen 5 has it
    ),
    Path("avx512", "fma", _AVX512_FLAGS, _AVX512),
    Path("avx2", "fma", ("-mavx2", "-mfma", "-DMEGAMOE_AVX2"), ("avx2", "fma3")),
    Path("portable", "fma"),
)


def runnable() -> list[Path]:
    """The paths that this CPU can run, best first."""
    features = torch.cpu.get_capabilities()
    return [path.tuned_for(features) for path in PATHS if path.runs_on(features)]


def worthwhile() -> list[Path]:
    """Those that are faster than torch: an x86 CPU is asked to fuse in software where its flags are not given."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i686")
    return [path for path in runnable() if path.flags or not x86]
