"""Weights in a dtype of torch, converted by its own cast: BF16, and what else has one tensor and no scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megamoe.formats.mxfp4 import MXFP4, dequantize_mxfp4
from megamoe.formats.weight import VALUES, Parts, Weight, WeightFormat


class CastWeights(WeightFormat):
    """One tensor of `dtype`, which has a code for every value; rows and the intermediate stay BF16."""

    dtype: ClassVar[torch.dtype]
    block: ClassVar[int] = 1
    activations: ClassVar[str | None] = None

    def parts(self, outputs: int, inputs: int) -> Parts:
        return {VALUES: ((outputs, inputs), self.dtype)}

    def take(self, weight: Weight) -> Weight:
        return (dequantize_mxfp4(weight) if isinstance(weight, MXFP4) else weight).to(self.dtype)

    def refuse(self, weight: Weight) -> None:
        """There is nothing to refuse."""

    def split(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, Tensor)
        return {VALUES: weight}

    def join(self, parts: Mapping[str, Tensor]) -> Weight:
        return parts[VALUES]

    def dense(self, weight: Weight, out: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor)
        return weight.to(torch.bfloat16) if out is None else out.copy_(weight)


class BF16Weights(CastWeights):
    """BF16 rows by BF16 weights, summed in FP32; MXFP4 is taken without loss, and nothing is left to decode."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16
    decodes: ClassVar[bool] = False
    kernels: ClassVar[bool] = True
