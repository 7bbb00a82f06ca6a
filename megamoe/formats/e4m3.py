"""E4M3 with one power of two per 128 x 128 values, as DeepSeek-V4's dense weights are stored, and MXFP4 as such."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.formats.blocks import (
    BLOCK,
    MXFP8_MIN_AMAX,
    ceil_log2_ratio,
    check_dtype,
    e8m0_to_float,
    in_blocks,
    spread_blocks,
)
from megamoe.formats.mxfp4 import MXFP4, e2m1_to_bf16, unpack_e2m1
from megamoe.formats.mxfp8 import e4m3_to_bf16


def mxfp4_to_e4m3(q: MXFP4, block: int = 128) -> tuple[Tensor, Tensor]:
    """q [N, K] as E4M3 with one power of two per block x block, without loss.

    Returns values [N, K] float8_e4m3fn and scales [ceil(N/block), ceil(K/block)] uint8. Inside a block the
    scales of the 32-blocks that hold a non-zero code may span at most 2^14: 6 * 2^6 = 384 <= 448 and
    0.5 * 2^-8 = 2^-9 is E4M3's smallest (DeepSeek-V4 report, section 5.2.1). ValueError names the first block
    that spans more.
    """
    if len(q.shape) != 2:
        raise ValueError(f"mxfp4_to_e4m3 takes a matrix, got shape {list(q.shape)}")
    if block % BLOCK:
        raise ValueError(f"mxfp4_to_e4m3: block {block} is not a multiple of {BLOCK}")
    num_rows, num_groups = q.scales.shape
    tall, wide = -(-num_rows // block), -(-num_groups * BLOCK // block)
    used = in_blocks((unpack_e2m1(q.packed) & 7) > 0).any(-1)
    exponents = q.scales.to(torch.int32)
    high = _block_max(torch.where(used, exponents, -1), tall, wide, block)
    low = -_block_max(torch.where(used, -exponents, -256), tall, wide, block)
    span = torch.where(high >= 0, high - low, 0)
    if bool((span > 14).any()):
        row, column = (int(i) for i in (span > 14).nonzero()[0])
        raise ValueError(
            f"mxfp4_to_e4m3: scales of block [{row}, {column}] span 2^{int(span[row, column])}, at most 2^14 is exact"
        )
    scales = torch.where(high >= 0, (high - 6).clamp_min(0), 127)
    spread = spread_blocks(scales, (block, block // BLOCK), num_rows, num_groups)
    shift = torch.where(used, exponents - spread, 0).to(torch.float32)
    values = in_blocks(e2m1_to_bf16(q.packed).to(torch.float32)) * shift.exp2().unsqueeze(-1)
    return values.flatten(-2).to(torch.float8_e4m3fn), scales.to(torch.uint8)


def quantize_e4m3_blocks(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Rounds weight [N, K] to E4M3 with one power of two per block x block, as DeepSeek-V4's dense weights are stored.

    -> values [N, K] float8_e4m3fn, scales [ceil(N/block), ceil(K/block)] uint8. ValueError for NaN and infinities.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("quantize_e4m3_blocks: weights must be finite")
    rows, columns = weight.shape
    tall, wide = -(-rows // block), -(-columns // block)
    padded = torch.zeros(tall * block, wide * block, dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    amax = padded.view(tall, block, wide, block).abs().amax((1, 3)).clamp_min(MXFP8_MIN_AMAX)
    scales = ceil_log2_ratio(amax, 0x600000, 8).to(torch.uint8)
    spread = spread_blocks(e8m0_to_float(scales), (block, block), rows, columns)
    return (weight.to(torch.float32) / spread).to(torch.float8_e4m3fn), scales


def dequantize_e4m3_blocks(values: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """values [N, K] float8_e4m3fn, K even, scales [ceil(N/block), ceil(K/block)] uint8 -> [N, K] bfloat16, exact"""
    check_dtype(values, torch.float8_e4m3fn, "E4M3 values")
    spread = spread_blocks(e8m0_to_float(scales, torch.bfloat16), (block, block), *values.shape)
    return e4m3_to_bf16(values).mul_(spread)


def _block_max(groups: Tensor, tall: int, wide: int, block: int) -> Tensor:
    """Largest of groups [N, G] int32 in every tile of block x block/32 -> [tall, wide]; what is cut off is least."""
    padded = groups.new_full((tall * block, wide * block // BLOCK), -256)
    padded[: groups.shape[0], : groups.shape[1]] = groups
    return padded.view(tall, block, wide, block // BLOCK).amax((1, 3))
