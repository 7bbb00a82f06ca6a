"""Weights rounded on the way to their place, and how far that moved them."""

# N outputs   K inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4, dequantize_mxfp4, quantize_mxfp4

SCALES = ("contract", "best")


def check_scales(scales: str) -> None:
    if scales not in SCALES:
        raise ValueError(f"scales must be one of {', '.join(SCALES)}, got {scales!r}")


@dataclass(slots=True)
class RoundingError:
    """||rounded - weight|| / ||weight|| over everything that was added."""

    difference: float = 0.0
    norm: float = 0.0

    def add(self, weight: Tensor, rounded: Tensor) -> None:
        wide = weight.to(torch.float32)
        self.difference += float((rounded.to(torch.float32) - wide).square_().sum(dtype=torch.float64))
        self.norm += float(wide.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float:
        return (self.difference / self.norm) ** 0.5 if self.norm else 0.0


def quantize(weight: Tensor, scales: str, error: RoundingError) -> MXFP4:
    """weight [N, K] rounded to MXFP4, which error is told of. ValueError as quantize_mxfp4() raises it.

    scales   "contract": 2^ceil(log2(amax / 6)) per 32, so that nothing is clipped. "best": of that and its half the one
             that leaves the smaller sum of squared differences in the block
    """
    wide = weight.to(torch.float32)
    found = quantize_mxfp4(wide)
    if scales == "best":
        found = _better(wide, found)
    error.add(wide, dequantize_mxfp4(found, torch.float32))
    return found


def _better(weight: Tensor, first: MXFP4) -> MXFP4:
    """Block by block the better of first and what half its scale gives.

    Values clipped at 6 * half the scale have a block maximum of exactly that, for which the rule finds that scale.
    """
    blocks = torch.unflatten(weight, -1, (-1, BLOCK))
    largest = 3.0 * first.scales.view(torch.float8_e8m0fnu).to(torch.float32).unsqueeze(-1)
    second = quantize_mxfp4(torch.minimum(torch.maximum(blocks, -largest), largest).flatten(-2))
    errors = [
        (torch.unflatten(dequantize_mxfp4(each, torch.float32), -1, (-1, BLOCK)) - blocks).square_().sum(-1)
        for each in (first, second)
    ]
    better = errors[1] < errors[0]
    packed = torch.where(
        better.unsqueeze(-1),
        torch.unflatten(second.packed, -1, (-1, BLOCK // 2)),
        torch.unflatten(first.packed, -1, (-1, BLOCK // 2)),
    )
    return MXFP4(packed.flatten(-2), torch.where(better, second.scales, first.scales))
