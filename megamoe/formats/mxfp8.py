"""MXFP8: E4M3 with one UE8M0 scale per 32 values.

A block of 32 that holds a NaN or an infinity becomes NaN as a whole (scale byte 255); magnitudes from 1.94 * 2^127 up
round to 2^128 and dequantise to infinity; subnormals and zeros become zero, with their sign. Source: OCP Microscaling
Formats v1.0 (E4M3).
"""

# K the blocked dimension, always the last

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats.blocks import (
    MXFP8_MIN_AMAX,
    ceil_log2_ratio,
    check_blocks,
    check_dtype,
    check_scales,
    decoding_table,
    e8m0_to_float,
    in_blocks,
    in_words,
)


@dataclass(frozen=True, slots=True)
class MXFP8:
    """values [..., K] float8_e4m3fn, scales [..., K/32] uint8 (exponent + 127; 255 is NaN)."""

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_dtype(self.values, torch.float8_e4m3fn, "MXFP8 values")
        check_scales(self.values.shape, self.scales, "MXFP8")


def quantize_mxfp8(x: Tensor) -> MXFP8:
    """Rounds x [..., K] (bfloat16 or float32) to E4M3 with scale 2^ceil(log2(max(amax, 1e-4) / 448)) per 32.

    A block with a NaN or an infinity becomes NaN as a whole. ValueError where K is not a multiple of 32.
    """
    check_blocks(x.shape[-1], "quantize_mxfp8")
    blocks = in_blocks(x.to(torch.float32))
    amax = blocks.abs().amax(-1, keepdim=True)
    exponents = ceil_log2_ratio(amax.clamp_min(MXFP8_MIN_AMAX), 0x600000, 8)
    # times 2^-e, exact; a NaN or infinity in the block makes every value NaN
    inverse = ((254 - exponents) << 23).view(torch.float32)
    if amax.numel() and not math.isfinite(float(amax.max())):  # NaN and infinity both come through the maximum
        finite = amax.isfinite()
        exponents = torch.where(finite, exponents, 255)
        inverse = torch.where(finite, inverse, torch.nan)
    values = (blocks * inverse).to(torch.float8_e4m3fn).flatten(-2)
    return MXFP8(values, exponents.squeeze(-1).to(torch.uint8))


def dequantize_mxfp8(q: MXFP8, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None) -> Tensor:
    """q as bfloat16, float32 or float64 [..., K]: E4M3 has 4 significant bits and a scale is a power of two, so exact.

    In BF16 that holds for scale bytes 3 to 246; see the top of the file for what lies outside.

    out, contiguous and of that dtype, takes the values in place of a new tensor.
    """
    values, scales = in_blocks(e4m3_to_bf16(q.values)).to(dtype), e8m0_to_float(q.scales, dtype).unsqueeze(-1)
    if out is None:
        return values.mul_(scales).flatten(-2)
    torch.mul(values, scales, out=out.view(values.shape))
    return out


def take_rows(rows: Tensor | MXFP8, index: Tensor) -> Tensor:
    """Rows of bfloat16 or MXFP8 [R, K] by number, index [n] int64 -> [n, K] bfloat16"""
    if isinstance(rows, Tensor):
        return rows.index_select(0, index)
    values = rows.values.view(torch.uint8).index_select(0, index).view(torch.float8_e4m3fn)
    return dequantize_mxfp8(MXFP8(values, rows.scales.index_select(0, index)))


def _e4m3_table() -> Tensor:
    """[65536] int32: the two BF16 values of two bytes, in the order of memory."""
    words = torch.arange(65536, device="cpu")
    codes = torch.stack((words & 255, words >> 8), -1)
    values = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).to(torch.bfloat16)
    return values[codes].view(torch.int32).flatten()


def e4m3_to_bf16(values: Tensor) -> Tensor:
    """values [..., K] float8_e4m3fn, K even -> BF16 [..., K]. torch's own cast takes ten times as long on a CPU."""
    decoded = decoding_table(_e4m3_table, values.device).index_select(0, in_words(values))
    return decoded.view(torch.bfloat16).view(values.shape)
