"""MXFP4: E2M1 with one UE8M0 scale per 32 values.

It has no code for NaN or infinity: such weights are refused; so are magnitudes above 1.5 * 2^127, which BF16 could not
give back. A block of zeros has scale 1; negative zero is stored as zero. Source: OCP Microscaling Formats v1.0 (E2M1).
"""

# K the blocked dimension, always the last

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megamoe.formats.blocks import (
    BLOCK,
    ceil_log2_ratio,
    check_blocks,
    check_dtype,
    check_scales,
    chunks,
    decoding_table,
    e8m0_to_float,
    in_blocks,
    in_words,
)
from megamoe.formats.weight import SCALES, VALUES, Parts, Weight, WeightFormat

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_MAX_SCALE = 252  # 2^125: six times the next one leaves the range of BF16
_PACKED = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
_E8M0 = (torch.uint8, torch.int8, torch.float8_e8m0fnu)
_LARGEST = 2.0**127  # magnitudes below it have a code
_MXFP4_MIN_SCALE = 2  # 2^-125: half of it is the smallest normal BF16


@dataclass(frozen=True, slots=True)
class MXFP4:
    """packed [..., K/2] uint8, low nibble the even K; scales [..., K/32] uint8 (exponent + 127)."""

    packed: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_dtype(self.packed, torch.uint8, "MXFP4 packed")
        check_scales((*self.packed.shape[:-1], self.packed.shape[-1] * 2), self.scales, "MXFP4")

    @classmethod
    def from_bytes(cls, packed: Tensor, scales: Tensor) -> MXFP4:
        """Takes packed bytes as uint8, int8 or float4_e2m1fn_x2, and scale bytes as uint8, int8 or float8_e8m0fnu.

        ValueError for other dtypes, though they may be of one byte: they are other numbers.
        """
        for name, tensor, known in (("packed", packed, _PACKED), ("scales", scales, _E8M0)):
            if tensor.dtype not in known:
                spelled = ", ".join(str(dtype).removeprefix("torch.") for dtype in known)
                raise ValueError(f"MXFP4 {name} must be of dtype {spelled}, got {tensor.dtype}")
        return cls(packed.view(torch.uint8), scales.view(torch.uint8))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values, [..., K]."""
        return (*self.packed.shape[:-1], self.packed.shape[-1] * 2)


def quantize_mxfp4(weight: Tensor) -> MXFP4:
    """Rounds weight [..., K] (float32 first) to E2M1 with scale 2^ceil(log2(amax / 6)) per 32, ties to the smaller.

    Scales stay at 2^-125 or above, so that half of one is a normal BF16.

    ValueError for NaN, infinities, magnitudes above 1.5 * 2^127, and K not a multiple of 32.
        block amax 6.0 -> scale 1.0;    2.5 -> 2.0    -2.5 -> -2.0    0.25 -> 0.0    5.1 -> 6.0
    """
    check_blocks(weight.shape[-1], "quantize_mxfp4")
    blocks = in_blocks(weight.to(torch.float32))
    amax = blocks.abs().amax(-1, keepdim=True)
    bad = 0 if bool(amax.isfinite().all()) else int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(
            f"quantize_mxfp4: {bad} of {weight.numel()} weights are NaN or infinite; MXFP4 has no code for them"
        )
    exponents = ceil_log2_ratio(amax, 0x400000, 2)
    if amax.numel() and int(exponents.max()) > MXFP4_MAX_SCALE:
        largest = float(weight.double().abs().max())
        raise ValueError(f"quantize_mxfp4: the largest weight {largest:.4g} is above 1.5 * 2^127 = 2.552e+38")
    exponents = exponents.clamp_min(_MXFP4_MIN_SCALE)
    exponents = torch.where(amax == 0, 127, exponents)
    scaled = blocks / e8m0_to_float(exponents.to(torch.uint8))
    # a magnitude goes to the next code only when above the midpoint: ties to the smaller
    midpoints = torch.tensor((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), dtype=torch.float32, device=weight.device)
    codes = torch.bucketize(scaled.abs(), midpoints, out_int32=True).to(torch.uint8)
    codes = torch.where((scaled < 0) & (codes > 0), codes + 8, codes)
    return MXFP4(pack_e2m1(codes.flatten(-2)), exponents.squeeze(-1).to(torch.uint8))


def pack_e2m1(codes: Tensor) -> Tensor:
    """Two E2M1 codes a byte, low nibble the even K.    [..., K] uint8 in 0..15 -> [..., K/2] uint8

    [0x1, 0x2, 0xF, 0x0] -> [0x21, 0x0F]
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_e2m1 needs an even last dimension, got {codes.shape[-1]}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of pack_e2m1.    [..., K/2] uint8 -> [..., K] uint8    [0x21, 0x0F] -> [0x1, 0x2, 0xF, 0x0]"""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def dequantize_mxfp4(q: MXFP4, dtype: torch.dtype = torch.bfloat16, *, out: Tensor | None = None) -> Tensor:
    """q as bfloat16, float32 or float64 [..., K], exact for scale bytes up to MXFP4_MAX_SCALE.

    out, contiguous bfloat16 [N, K] for a matrix q, takes the values in place of a new tensor.
    """
    if out is not None:
        for part in chunks(*q.packed.shape):
            rows = MXFP4(q.packed[part], q.scales[part])
            e2m1_to_bf16(rows.packed, out[part])
            in_blocks(out[part]).mul_(e8m0_to_float(rows.scales, torch.bfloat16).unsqueeze(-1))
        return out
    values = in_blocks(e2m1_to_bf16(q.packed))
    # in place where the decoded values are already of the dtype
    return values.to(dtype).mul_(e8m0_to_float(q.scales, dtype).unsqueeze(-1)).flatten(-2)


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


def _e2m1_table() -> Tensor:
    """[65536] int64: the four BF16 values of two packed bytes, in the order of memory."""
    words = torch.arange(65536, device="cpu")
    codes = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], -1)
    values = torch.tensor(E2M1_MAGNITUDES + tuple(-m for m in E2M1_MAGNITUDES), dtype=torch.bfloat16, device="cpu")
    return values[codes].view(torch.int64).flatten()


def e2m1_to_bf16(packed: Tensor, out: Tensor | None = None) -> Tensor:
    """packed [..., K/2] uint8, K a multiple of 4 -> BF16 [..., K].    [0x21, 0x00] -> [0.5, 1.0, 0.0, 0.0]"""
    table = decoding_table(_e2m1_table, packed.device)
    if out is not None:
        torch.index_select(table, 0, in_words(packed), out=out.view(torch.int64).flatten())
        return out
    decoded = table.index_select(0, in_words(packed))
    return decoded.view(torch.bfloat16).view(*packed.shape[:-1], packed.shape[-1] * 2)
