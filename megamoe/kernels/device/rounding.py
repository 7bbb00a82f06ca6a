"""Rounding inside kernels: to BF16, and to E4M3 with one UE8M0 scale per 32, to the same bits on every chip.

A value is rounded by arithmetic that is exact everywhere, and what follows only changes its format. So the bits are
those of `megamoe.formats` whatever a chip's own cast does with ties, and in Triton's interpreter too, whose casts cut
BF16 off, lose its subnormals and lose E4M3's carries (3.9).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_bf16(x):
    """x float32 of any shape, rounded to the nearest bfloat16, ties to even.

    1 + 2^-8 lies between 1 and 1 + 2^-7: 0x3F808000 + 0x7FFF + 0 keeps 0x3F80, which is 1.0
    1 + 3 * 2^-8, the next such point:    0x3F818000 + 0x7FFF + 1 gives 0x3F82, which is 1 + 2^-6
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded)  # a NaN could round to an infinity
    return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_mxfp8(x):
    """x [..., 32] float32 -> E4M3 codes [..., 32] uint8, scales [...] uint8, as formats.quantize_mxfp8() has them.

    A block of 448 and 3.3: amax 448 has scale 2^0, byte 127. 3.3 lies in [2, 4), where E4M3 has steps of 2^-2:
    2^(1 + 20) + 3.3 in float32 has steps of 2^-2 as well and becomes 2^21 + 3.25, so 3.25, code 0x45.
    """
    magnitudes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitudes, -1)  # of bits, which are ordered as the numbers are, infinity and NaN at the end
    finite = amax < 0x7F800000
    # 2^ceil(log2(max(amax, 1e-4) / 448)): formats.blocks.ceil_log2_ratio
    exponents = ((tl.maximum(amax, 0x38D1B717) + 0x1FFFFF) >> 23) - 8
    inverse = ((254 - exponents) << 23).to(tl.float32, bitcast=True)
    scaled = magnitudes.to(tl.float32, bitcast=True) * tl.expand_dims(inverse, -1)
    binade = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)  # subnormals have 2^-6's steps
    coarse = (binade + (20 << 23)).to(tl.float32, bitcast=True)
    rounded = ((scaled + coarse) - coarse).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    signs = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    codes = tl.where(tl.expand_dims(finite, -1), rounded | signs.to(tl.uint8), 0x7F)
    return codes.to(tl.uint8), tl.where(finite, exponents, 255).to(tl.uint8)


@triton.jit
def decode_mxfp8(codes, exponents):
    """codes uint8 and the scale byte of each, of one shape -> float32, exact.

    code 0x38 (1.0), exponent 128  ->  2.0; exponent 255  ->  NaN
    """
    scales = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scales = tl.where(exponents == 255, float("nan"), scales)
    return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scales


@triton.jit
def widen_block(codes, exponents):
    """codes [n, 32] uint8, exponents [n] uint8 -> [n, 32] bfloat16, exact, in the order of the sum (`layout.Wide`).

    code 0x38 (1.0) in place 4, exponent 128  ->  2.0 in place 1; exponent 255  ->  NaN everywhere
    """
    values = decode_mxfp8(codes, exponents[:, None])
    values = tl.permute(tl.reshape(values, (codes.shape[0], 4, 2, 4)), (0, 3, 1, 2))  # word, half, register
    return round_to_bf16(tl.reshape(values, (codes.shape[0], 32)))


@triton.jit
def dequantize_block(codes, exponents):
    """widen_block() in the order of memory: code 0x38 (1.0) in place 4, exponent 128  ->  2.0 in place 4"""
    scales = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    scales = tl.where(exponents == 255, float("nan"), scales)
    return round_to_bf16(codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scales[:, None])
