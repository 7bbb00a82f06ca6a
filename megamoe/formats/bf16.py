"""BF16 weights: as they are, rounded once where they come in more bits, MXFP4 without loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megamoe.formats.mxfp4 import MXFP4, dequantize_mxfp4
from megamoe.formats.weight import VALUES, Parts, Weight, WeightFormat


class BF16Weights(WeightFormat):
    """BF16 rows by BF16 weights, summed in FP32, and a BF16 intermediate."""

    name: ClassVar[str] = "bf16"
    block: ClassVar[int] = 1
    activations: ClassVar[str | None] = None
    decodes: ClassVar[bool] = False
    kernels: ClassVar[bool] = True

    def parts(self, outputs: int, inputs: int) -> Parts:
        return {VALUES: ((outputs, inputs), torch.bfloat16)}

    def take(self, weight: Weight) -> Weight:
        return (dequantize_mxfp4(weight) if isinstance(weight, MXFP4) else weight).to(torch.bfloat16)

    def refuse(self, weight: Weight) -> None:
        """BF16 has a code for every value."""

    def split(self, weight: Weight) -> dict[str, Tensor]:
        assert isinstance(weight, Tensor)
        return {VALUES: weight}

    def join(self, parts: Mapping[str, Tensor]) -> Weight:
        return parts[VALUES]

    def dense(self, weight: Weight, out: Tensor | None = None) -> Tensor:
        assert isinstance(weight, Tensor)
        return weight if out is None else out.copy_(weight)
