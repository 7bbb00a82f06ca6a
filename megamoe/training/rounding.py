"""Stochastic rounding of master weights: up or down by chance, so that many small steps are not lost, and unbiased.

Chance is a hash of seed, step and a weight's place in the layer: it does not depend on ranks, threads or devices.
"""

# N outputs   K inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import E2M1_MAGNITUDES, MXFP4, pack_e2m1, quantize_mxfp4
from megamoe.formats.blocks import e8m0_to_float, in_blocks

ROUNDINGS = ("nearest", "stochastic")
_BITS = 24  # of chance, which FP32 holds exactly


@dataclass(frozen=True, slots=True)
class Place:
    """Of a matrix: its expert's global id, and which of the expert's matrices it is; of the rounding: seed and step."""

    seed: int
    step: int
    expert: int
    matrix: int


def round_stochastically(weight: Tensor, weight_format: str, place: Place) -> MXFP4 | Tensor:
    """weight [N, K] in "mxfp4", scales as quantize_mxfp4() chooses them, or in "bf16".

    A value that the format holds stays; another becomes one of its two neighbours, the nearer the likelier:
        1.25 with scale 1 -> 1.0 or 1.5, each for half of all steps         2.25 -> 2.0, and 3.0 in a quarter
    """
    return _mxfp4(weight, place) if weight_format == "mxfp4" else _bf16(weight, place)


def _mxfp4(weight: Tensor, place: Place) -> MXFP4:
    scales = quantize_mxfp4(weight).scales
    blocks = in_blocks(weight.to(torch.float32)) / e8m0_to_float(scales).unsqueeze(-1)
    magnitudes = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float32, device=weight.device)
    size = blocks.abs()
    below = (torch.bucketize(size, magnitudes, right=True) - 1).clamp_(max=len(magnitudes) - 2)
    low, high = magnitudes[below], magnitudes[below + 1]
    up = chance(weight.shape, place, weight.device).view(size.shape) < (size - low) / (high - low)
    codes = (below + up).to(torch.uint8)
    codes = torch.where((blocks < 0) & (codes > 0), codes + 8, codes)
    return MXFP4(pack_e2m1(codes.flatten(-2)), scales)


def _bf16(weight: Tensor, place: Place) -> Tensor:
    if weight.dtype == torch.bfloat16:
        return weight
    bits = weight.to(torch.float32).contiguous().view(torch.int32)
    low = bits & 0xFFFF
    up = (chance(weight.shape, place, weight.device) * 65536).to(torch.int32) < low
    rounded = (bits & ~0xFFFF) + up.to(torch.int32) * 65536
    return torch.where(weight.isfinite(), rounded.view(torch.float32), weight.to(torch.float32)).to(torch.bfloat16)


def chance(shape: tuple[int, ...], place: Place, device: torch.device) -> Tensor:
    """Numbers in [0, 1) of 24 bits, float32 of that shape [N, K]: those of splitmix64 at a weight's place."""
    key = mixed(torch.tensor([place.seed, place.step, place.expert, place.matrix], dtype=torch.int64, device=device))
    start = torch.zeros(1, dtype=torch.int64, device=device)
    for each in key:
        start = mixed(start ^ each)
    numbers = torch.arange(shape[0] * shape[1], dtype=torch.int64, device=device)
    found = _shifted(mixed(start + numbers), 64 - _BITS)
    return (found.to(torch.float32) * 2.0**-_BITS).view(shape)


def mixed(x: Tensor) -> Tensor:
    """splitmix64 of int64, whose products wrap around (Steele, Lea and Flood, 2014)."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> by) & ((1 << (64 - by)) - 1)
