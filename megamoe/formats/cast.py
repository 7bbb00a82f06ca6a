"""Weights in a dtype of torch, converted by its own cast: BF16, and what else has one tensor and no scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from megamoe.formats.mxfp4 import MXFP4, dequantize_mxfp4
from megamoe.formats.weight import VALUES, Parts, Weight, WeightFormat


class CastWeights(WeightFormat):
    """One tensor of `dtype`; rows and the intermediate stay BF16. Weights that are not finite in it are refused."""

    dtype: ClassVar[torch.dtype]
    block: ClassVar[int] = 1
    activations: ClassVar[str | None] = None

    def parts(self, outputs: int, inputs: int) -> Parts:
        return {VALUES: ((outputs, inputs), self.dtype)}

    def take(self, weight: Weight) -> Weight:
        taken = (dequantize_mxfp4(weight) if isinstance(weight, MXFP4) else weight).to(self.dtype)
        self._refuse_not_finite(taken)
        return taken

    def refuse(self, weight: Weight) -> None:
        if isinstance(weight, Tensor):
            self._refuse_not_finite(weight.detach().to(self.dtype))

    def _refuse_not_finite(self, taken: Tensor) -> None:
        """ValueError where a value is NaN or infinite. One read, which is a fifth of what packing takes."""
        dense = self.dense(taken)
        if not dense.numel():
            return
        ends = torch.aminmax(dense if dense.is_contiguous() else dense.mT)  # a transposed view is read as it lies
        if not bool(torch.stack(ends).isfinite().all()):  # a NaN is both of the ends
            wrong = int((~dense.isfinite()).sum())
            raise ValueError(f"{wrong} of {dense.numel()} weights are NaN or infinite in {self.name.upper()}")

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
