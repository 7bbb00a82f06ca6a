"""What blocked formats share: one UE8M0 scale per 32 values, its rule, and decoding by tables.

Functions are exact where a format is: dequantising is a table look-up and a multiplication by a power of two, and
quantising rounds once. Sources: OCP Microscaling Formats v1.0 (E8M0), and the numeric contract of DeepSeek-V4's expert
layer for the scale rule, scale = 2^ceil(log2(amax / largest)).
"""

# K the blocked dimension, always the last   G K / 32 blocks

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 32
MXFP8_MIN_AMAX = 1e-4  # the contract's floor; its scale is 2^-22
_VALUES_AT_ONCE = 512 * 1024


def check_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_scales(shape: tuple[int, ...] | torch.Size, scales: Tensor, name: str) -> None:
    check_dtype(scales, torch.uint8, f"{name} scales")
    check_blocks(shape[-1], name)
    expected = (*shape[:-1], shape[-1] // BLOCK)
    if tuple(scales.shape) != tuple(expected):
        raise ValueError(f"{name} scales must be {list(expected)} for values {list(shape)}, got {list(scales.shape)}")


def check_blocks(size: int, name: str) -> None:
    if size % BLOCK:
        raise ValueError(f"{name} needs a last dimension that is a multiple of {BLOCK}, got {size}")


def in_blocks(x: Tensor) -> Tensor:
    """[..., K] -> [..., G, 32]"""
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def ceil_log2_ratio(amax: Tensor, mantissa: int, exponent: int) -> Tensor:
    """Biased exponent of 2^ceil(log2(amax / largest)), exact, from the bits of amax (float32, normal, finite).

    largest = (1 + mantissa / 2^23) * 2^exponent. The ratio of two mantissas lies in (1/2, 2), so the power of
    two is the exponents' difference, and one more where amax has the larger mantissa: adding the complement of
    `mantissa` carries into the exponent exactly then.
        largest 6 = 1.5 * 2^2:   amax 6.0 -> 127 (1.0)    amax 6.25 -> 128 (2.0)    amax 3.0 -> 126 (0.5)
    """
    carried: Tensor = ((amax.view(torch.int32) + (0x7FFFFF - mantissa)) >> 23) - exponent
    return carried


def e8m0_to_float(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale bytes [...] uint8 as powers of two, exact in float32, bfloat16 and float64.

    127 -> 1.0    130 -> 8.0    0 -> 2^-127    255 -> NaN
    """
    check_dtype(scales, torch.uint8, "E8M0 scales")
    return scales.view(torch.float8_e8m0fnu).to(torch.float32).to(dtype)


def chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Rows of the given width in chunks whose FP32 temporaries stay in a core's cache.

    5 rows of 200,000 values -> 0:2, 2:4, 4:6
    """
    step = max(1, _VALUES_AT_ONCE // width)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def spread_blocks(scales: Tensor, block: tuple[int, int], rows: int, columns: int) -> Tensor:
    """One scale per block of (rows, columns) -> one per value, [rows, columns]"""
    return scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


# ---- decoding: two bytes at a time look up a word that holds their BF16 values ----

_TABLES: dict[tuple[Callable[[], Tensor], torch.device], Tensor] = {}


def decoding_table(build: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What build() makes, [65536] words, on the device; made once."""
    key = (build, device)
    if key not in _TABLES:
        _TABLES[key] = build().to(device)
    return _TABLES[key]


def in_words(values: Tensor) -> Tensor:
    """Two one-byte values at a time as a number, [n / 2] int32. A view of two bytes cannot start at an odd one.

    Rows cut from a wider buffer are read in place where each starts at an even byte.
    """
    odd = any(offset % 2 for offset in (values.storage_offset(), *values.stride()[:-1])) or values.stride(-1) != 1
    aligned = values.clone(memory_format=torch.contiguous_format) if odd else values
    return aligned.view(torch.uint16).to(torch.int32).flatten()
