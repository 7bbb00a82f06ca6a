"""Experts whose weights stay FP4 or FP8 as a checkpoint has them, in the place of a model's own while it is loaded."""

# E experts   H hidden   I intermediate   N outputs   K inputs   b values that share a scale, along a side

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamoe.formats import BLOCK
from megamoe.formats.given import GivenWeight
from megamoe.model.loading.stored import dequantize_fp8
from megamoe.model.structure import Structure


@dataclass(frozen=True, slots=True)
class Packing:
    """How a checkpoint keeps a matrix [N, K]: two tensors, whose names are the matrix's and a suffix.

    blocked    values are [N, K/32, 16] and not [N, K/2]; of FP4
    block      b x b, of FP8, whose values are [N, K]; None for FP4, which has a scale for 32 inputs
    """

    values: str
    scales: str
    values_dtype: torch.dtype
    scales_dtype: torch.dtype
    blocked: bool = False
    block: tuple[int, int] | None = None

    @property
    def weight_format(self) -> str:
        """In which a layer holds them."""
        return "mxfp4" if self.block is None else "bf16"


_DEEPSEEK_FP4 = Packing("", "_scale_inv", torch.int8, torch.float8_e8m0fnu)  # names as transformers has them
_GPT_OSS_FP4 = Packing("_blocks", "_scales", torch.uint8, torch.uint8, blocked=True)


def packing_of(checkpoint: dict[str, Any]) -> Packing:
    """How a checkpoint with this quantization_config keeps its experts. ValueError for what is neither FP4 nor FP8."""
    method, dtype = checkpoint.get("quant_method"), checkpoint.get("expert_dtype", "fp8")
    if method == "mxfp4":
        return _GPT_OSS_FP4
    if method == "fp8" and dtype == "fp4":
        return _DEEPSEEK_FP4
    if method != "fp8" or dtype != "fp8":
        found = f"quant_method {method!r}" + (f" with expert_dtype {dtype!r}" if method == "fp8" else "")
        raise ValueError(f"experts are neither FP4 nor FP8: {found}, expected 'mxfp4' or 'fp8'")
    block = checkpoint.get("weight_block_size", (128, 128))
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise ValueError(f"FP8 experts must have a scale for each block of values, got weight_block_size {block!r}")
    return Packing("", "_scale_inv", torch.float8_e4m3fn, torch.float32, block=(block[0], block[1]))


class PackedExperts(nn.Module):
    """Parameters with the names, shapes and dtypes of a checkpoint's packed experts. See handover.py for what follows.

    ValueError where H or I is not a multiple of 32 and they are FP4, and where FP8 ones are transposed.
    """

    def __init__(self, structure: Structure, packing: Packing, bias_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.structure, self.packing = structure, packing
        self.num_experts = structure.num_experts
        rows = structure.activation.rows_per_output * structure.intermediate
        if packing.block is not None and (structure.is_transposed or structure.is_interleaved):
            raise ValueError(
                "FP8 experts whose weights are [inputs, outputs], or gates and ups in turns, are not supported"
            )
        for name, outputs, inputs in (
            (structure.first, rows, structure.hidden),
            ("down_proj", structure.hidden, structure.intermediate),
        ):
            values, scales = self._shapes(name, outputs, inputs)
            self._declare(name + packing.values, values, packing.values_dtype)
            self._declare(name + packing.scales, scales, packing.scales_dtype)
            if structure.has_bias:
                self._declare(f"{name}_bias", (outputs,), bias_dtype)

    def _shapes(self, name: str, outputs: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of an expert's values and scales."""
        if self.packing.block is not None:
            (tall, wide), parts = self.packing.block, self._parts(name)
            return (outputs, inputs), (parts * -(-outputs // parts // tall), -(-inputs // wide))
        if inputs % BLOCK:
            raise ValueError(f"{name} has {inputs} inputs, which is not a multiple of {BLOCK}, the block of MXFP4")
        blocks = (outputs, inputs // BLOCK)
        return (*blocks, BLOCK // 2) if self.packing.blocked else (outputs, inputs // 2), blocks

    def _parts(self, name: str) -> int:
        """How many matrices lie one below the other, each with scales of its own: gate and up."""
        return 1 if name == "down_proj" else self.structure.activation.rows_per_output

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        empty = torch.empty(self.num_experts, *shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def matrix(self, name: str, index: int) -> GivenWeight:
        """The expert at an index of what is held: packed bytes [N, K/2] and scale bytes [N, K/32], or BF16 of FP8."""
        values = self.get_parameter(name + self.packing.values)[index].detach()
        scales = self.get_parameter(name + self.packing.scales)[index].detach()
        if self.packing.block is None:
            return values.flatten(1) if self.packing.blocked else values, scales
        parts = self._parts(name)
        decoded = [
            dequantize_fp8(*each, self.packing.block)
            for each in zip(values.chunk(parts), scales.chunk(parts), strict=True)
        ]
        return torch.cat(decoded).to(torch.bfloat16)
