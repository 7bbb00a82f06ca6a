"""Experts whose weights stay FP4 as a checkpoint has them, in the place of a model's own experts while it is loaded."""

# E experts   H hidden   I intermediate

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megamoe.formats import BLOCK
from megamoe.model.structure import Structure


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint keeps an FP4 matrix [N, K]: two tensors, whose names are the matrix's and a suffix.

    blocked    values are [N, K/32, 16] and not [N, K/2]
    """

    values: str
    scales: str
    values_dtype: torch.dtype
    scales_dtype: torch.dtype
    blocked: bool


# by quant_method of a checkpoint's quantization_config, under the names that transformers gives the tensors
PACKINGS = {
    "fp8": Packing("", "_scale_inv", torch.int8, torch.float8_e8m0fnu, blocked=False),  # DeepSeek-V4
    "mxfp4": Packing("_blocks", "_scales", torch.uint8, torch.uint8, blocked=True),  # gpt-oss
}


class PackedExperts(nn.Module):
    """Parameters of the names, shapes and dtypes of a checkpoint's FP4 experts. It computes nothing: see handover.py.

    ValueError where H or I is not a multiple of 32.
    """

    def __init__(self, structure: Structure, packing: Packing, bias_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.structure, self.packing = structure, packing
        self.num_experts = structure.num_experts
        rows = structure.activation.rows_per_output * structure.intermediate
        for name, outputs, inputs in (
            (structure.first, rows, structure.hidden),
            ("down_proj", structure.hidden, structure.intermediate),
        ):
            if inputs % BLOCK:
                raise ValueError(f"{name} has {inputs} inputs, which is not a multiple of {BLOCK}, the block of MXFP4")
            blocks = (outputs, inputs // BLOCK)
            values = (*blocks, BLOCK // 2) if packing.blocked else (outputs, inputs // 2)
            self._declare(name + packing.values, values, packing.values_dtype)
            self._declare(name + packing.scales, blocks, packing.scales_dtype)
            if structure.has_bias:
                self._declare(f"{name}_bias", (outputs,), bias_dtype)

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        empty = torch.empty(self.num_experts, *shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def matrix(self, name: str, index: int) -> tuple[Tensor, Tensor]:
        """Packed bytes [N, K/2] and scale bytes [N, K/32] of the expert at an index of what is held."""
        values = self.get_parameter(name + self.packing.values)[index]
        return values.flatten(1) if self.packing.blocked else values, self.get_parameter(name + self.packing.scales)[
            index
        ]
