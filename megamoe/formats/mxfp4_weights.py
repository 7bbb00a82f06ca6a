"""MXFP4 weights: the contract's arithmetic, with rows rounded to MXFP8 before each product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megamoe.formats.blocks import BLOCK
from megamoe.formats.mxfp4 import MXFP4, dequantize_mxfp4, quantize_mxfp4
from megamoe.formats.weight import SCALES, VALUES, Parts, Weight, WeightFormat

_LARGEST = 2.0**127  # magnitudes below it have a code


class MXFP4Weights(WeightFormat):
    """MXFP8 rows by MXFP4 weights, summed in FP32, and an MXFP8 intermediate."""

    name: ClassVar[str] = "mxfp4"
    block: ClassVar[int] = BLOCK
    activations: ClassVar[str | None] = "mxfp8"
    kernels: ClassVar[bool] = True

    def parts(self, outputs: int, inputs: int) -> Parts:
        return {
            VALUES: ((outputs, inputs // 2), torch.uint8),
            SCALES: ((outputs, inputs // BLOCK), torch.uint8),
        }

    def take(self, weight: Weight) -> Weight:
        return weight if isinstance(weight, MXFP4) else quantize_mxfp4(weight)

    def refuse(self, weight: Weight) -> None:
        if isinstance(weight, MXFP4):
            return
        largest = float(weight.detach().to(torch.float32).abs().amax()) if weight.numel() else 0.0
        if not largest < _LARGEST:  # NaN neither
            quantize_mxfp4(weight)

    def split(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, MXFP4)
        return {VALUES: weight.packed, SCALES: weight.scales}

    def join(self, parts: Mapping[str, Tensor]) -> Weight:
        return MXFP4(parts[VALUES], parts[SCALES])

    def dense(self, weight: Weight, out: Tensor | None = None) -> Tensor:
        assert isinstance(weight, MXFP4)
        return dequantize_mxfp4(weight, out=out)
