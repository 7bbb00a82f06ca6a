"""Number formats against plain Python arithmetic: every byte, every scale, every midpoint."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megamoe.formats import (
    MXFP4,
    MXFP4_MAX_SCALE,
    MXFP8,
    chunks,
    dequantize_e4m3_blocks,
    dequantize_mxfp4,
    dequantize_mxfp8,
    e8m0_to_float,
    mxfp4_to_e4m3,
    pack_e2m1,
    quantize_e4m3_blocks,
    quantize_mxfp4,
    quantize_mxfp8,
    unpack_e2m1,
)

INF, NAN = math.inf, math.nan
DTYPES = [torch.bfloat16, torch.float32, torch.float64]
LARGEST_MXFP4 = 1.5 * 2.0**127
examples = settings(max_examples=200, deadline=None, derandomize=True)


# ---- the formats, spelt out once more ----


def scale_of(byte: int) -> float:
    return NAN if byte == 255 else math.ldexp(1.0, byte - 127)


def e2m1(code: int) -> float:
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def scale_exponent(amax: float, largest: int) -> int:
    """The smallest k with largest * 2^k >= amax, in exact fractions."""
    ratio = Fraction(amax) / largest
    k = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    while Fraction(2) ** k < ratio:
        k += 1
    while Fraction(2) ** (k - 1) >= ratio:
        k -= 1
    return k


def nearest_e2m1(value: float, scale: float) -> float:
    """Nearest E2M1 magnitude of value / scale, the smaller one of two that are as near, times scale, with sign."""
    magnitude = min((abs(abs(value) / scale - e2m1(code)), e2m1(code)) for code in range(8))[1]
    return math.copysign(magnitude, value) * scale if magnitude else 0.0


def nearest_e4m3(value: float, scale: float) -> float:
    """Nearest E4M3 value of value / scale, the even code of two that are as near, times scale."""
    code = min(range(127), key=lambda code: (abs(abs(value) / scale - e4m3(code)), code & 1))
    return math.copysign(e4m3(code), value) * scale


def float32s(values: list[float]) -> Tensor:
    """values as float32, which must hold them exactly"""
    exact = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(exact.float().double(), exact)
    return exact.float()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values; a NaN equals a NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0, INF, -INF), b.nan_to_num(0, INF, -INF))


def every_e2m1(scales: range) -> MXFP4:
    """All 256 packed bytes under each of the scale bytes, [scales, 512 values]"""
    packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    return MXFP4(packed, torch.tensor(scales, dtype=torch.uint8).unsqueeze(1).repeat(1, 16))


finite_bf16 = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # from 0 up


# ---- dequantising ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale_byte_is_its_power_of_two(dtype: torch.dtype) -> None:
    got = e8m0_to_float(torch.arange(256, dtype=torch.uint8), dtype)
    assert got.dtype == dtype
    assert same(got.double(), torch.tensor([scale_of(byte) for byte in range(256)], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e4m3_code_under_every_scale_is_exact_where_the_dtype_holds_it(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)
    scales = torch.arange(256, dtype=torch.uint8).unsqueeze(1).repeat(1, 8)
    expected = torch.tensor(
        [[e4m3(code) * scale_of(byte) for code in range(256)] for byte in range(256)], dtype=torch.float64
    )
    got = dequantize_mxfp8(MXFP8(values, scales), dtype)
    assert got.dtype == dtype
    assert same(got, expected.to(dtype))
    smallest, largest = {torch.bfloat16: (3, 246), torch.float32: (0, 246), torch.float64: (0, 254)}[dtype]
    exact = slice(smallest, largest + 1)
    assert same(got[exact].double(), expected[exact])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_packed_e2m1_byte_under_every_scale_is_exact(dtype: torch.dtype) -> None:
    scales = range(MXFP4_MAX_SCALE + 1)
    expected = torch.tensor(
        [
            [e2m1(code) * scale_of(scale) for byte in range(256) for code in (byte & 15, byte >> 4)]  # low nibble first
            for scale in scales
        ],
        dtype=torch.float64,
    )
    got = dequantize_mxfp4(every_e2m1(scales), dtype)
    assert got.dtype == dtype
    assert torch.equal(got.double(), expected)
    assert torch.equal(got.signbit(), expected.signbit())


def test_the_first_scale_above_the_largest_leaves_bf16_and_255_is_nan() -> None:
    beyond = dequantize_mxfp4(every_e2m1(range(MXFP4_MAX_SCALE + 1, 256)))
    assert beyond[0].abs().max() == INF
    assert beyond[2].isnan().all()


def test_dequantising_reads_views_that_start_at_an_odd_byte_or_skip() -> None:
    values = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    mxfp4, mxfp8 = quantize_mxfp4(values), quantize_mxfp8(values)
    for rows in (slice(0, 0), slice(1, 2), slice(1, 5)):
        packed = torch.zeros(6, 17, dtype=torch.uint8)
        packed[:, 1:] = mxfp4.packed
        assert torch.equal(dequantize_mxfp4(MXFP4(packed[rows, 1:], mxfp4.scales[rows])), dequantize_mxfp4(mxfp4)[rows])
        codes = torch.zeros(6, 33, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes[:, 1:] = mxfp8.values
        assert torch.equal(dequantize_mxfp8(MXFP8(codes[rows, 1:], mxfp8.scales[rows])), dequantize_mxfp8(mxfp8)[rows])


# ---- packing ----


def test_low_nibble_is_the_even_k() -> None:
    codes = torch.tensor([0x1, 0x2, 0xF, 0x0], dtype=torch.uint8)
    assert pack_e2m1(codes).tolist() == [0x21, 0x0F]
    assert unpack_e2m1(torch.tensor([0x21, 0x0F], dtype=torch.uint8)).tolist() == codes.tolist()


def test_packing_and_unpacking_are_inverse_for_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(4, 2, 32)
    assert torch.equal(pack_e2m1(unpack_e2m1(every)), every)
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack_e2m1(pack_e2m1(pairs)), pairs)


def test_packing_refuses_an_odd_number_of_codes() -> None:
    with pytest.raises(ValueError, match="even last dimension, got 3"):
        pack_e2m1(torch.zeros(3, dtype=torch.uint8))


# ---- the scale rule ----


def test_mxfp4_scale_follows_the_rule_for_every_finite_bf16_amax() -> None:
    amax = finite_bf16[finite_bf16.double() <= LARGEST_MXFP4]
    assert len(amax) == len(finite_bf16) - 63
    x = torch.zeros(len(amax), 32)
    x[torch.arange(len(amax)), torch.arange(len(amax)) % 32] = amax.float()
    x[1::2] *= -1
    expected = [127] + [max(2, 127 + scale_exponent(value, 6)) for value in amax[1:].tolist()]
    assert quantize_mxfp4(x).scales.flatten().tolist() == expected
    assert quantize_mxfp4(x.to(torch.bfloat16)).scales.flatten().tolist() == expected


def test_mxfp8_scale_follows_the_rule_for_every_finite_bf16_amax() -> None:
    x = torch.zeros(len(finite_bf16), 32)
    x[torch.arange(len(x)), torch.arange(len(x)) % 32] = finite_bf16.float()
    x[1::2] *= -1
    expected = [127 + scale_exponent(max(value, 1e-4), 448) for value in finite_bf16.tolist()]
    assert quantize_mxfp8(x).scales.flatten().tolist() == expected
    assert quantize_mxfp8(x.to(torch.bfloat16)).scales.flatten().tolist() == expected


@pytest.mark.parametrize(("name", "largest", "first"), [("mxfp4", 6, -120), ("mxfp8", 448, -21)])
def test_scale_doubles_one_float32_ulp_above_the_largest_code(name: str, largest: int, first: int) -> None:
    exponents = range(first, 119)
    at = float32s([largest * 2.0**k for k in exponents])
    for amax, more in (
        (at, 0),
        (torch.nextafter(at, torch.tensor(INF)), 1),
        (torch.nextafter(at, torch.tensor(0.0)), 0),
    ):
        x = amax.unsqueeze(1).repeat(1, 32)
        q = quantize_mxfp4(x) if name == "mxfp4" else quantize_mxfp8(x)
        scales = q.scales.flatten().tolist()
        assert scales == [127 + k + more for k in exponents]
        assert scales == [127 + scale_exponent(value, largest) for value in amax.tolist()]


# ---- rounding ----


def test_mxfp4_rounds_every_midpoint_down_and_its_neighbours_to_the_nearest_code() -> None:
    for byte in range(2, MXFP4_MAX_SCALE + 1):
        scale = scale_of(byte)
        midpoints = float32s([(e2m1(code) + e2m1(code + 1)) / 2 * scale for code in range(7)])
        around = (midpoints, *(torch.nextafter(midpoints, torch.tensor(to)) for to in (0.0, INF)))
        magnitudes = torch.cat(around)
        x = torch.cat((float32s([6 * scale]).repeat(2, 1), torch.stack((magnitudes, -magnitudes))), 1)
        x = torch.nn.functional.pad(x, (0, 32 - x.shape[1]))
        q = quantize_mxfp4(x)
        assert q.scales.flatten().tolist() == [byte, byte]
        assert dequantize_mxfp4(q, torch.float64).flatten().tolist() == [
            nearest_e2m1(value, scale) for value in x.flatten().tolist()
        ]
        assert dequantize_mxfp4(q, torch.float64)[0, 1:8].tolist() == [e2m1(code) * scale for code in range(7)]


def test_mxfp8_rounds_every_midpoint_to_even_and_its_neighbours_to_the_nearest_code() -> None:
    for byte in (105, 106, 120, 127, 128, 200, 245, 246):
        scale = scale_of(byte)
        midpoints = float32s([(e4m3(code) + e4m3(code + 1)) / 2 * scale for code in range(126)])
        around = (midpoints, *(torch.nextafter(midpoints, torch.tensor(to)) for to in (0.0, INF)))
        x = torch.cat((*around, *(-values for values in around)))
        x = torch.nn.functional.pad(x, (0, -len(x) % 31)).view(-1, 31)
        x = torch.cat((torch.full((len(x), 1), 448 * scale), x), 1)
        q = quantize_mxfp8(x)
        assert set(q.scales.flatten().tolist()) == {byte}
        assert dequantize_mxfp8(q, torch.float64).flatten().tolist() == [
            nearest_e4m3(value, scale) for value in x.flatten().tolist()
        ]


@st.composite
def blocks(draw: st.DrawFn, first: int = -100, last: int = 100) -> Tensor:
    """[n, 32] float32: integers, small ones for ties and 12-bit ones, times a power of two of each block"""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        limit = draw(st.sampled_from((24, 4095)))
        exponent = draw(st.integers(first, last))
        integers = draw(st.lists(st.integers(-limit, limit), min_size=32, max_size=32))
        rows.append(float32s([math.ldexp(value, exponent) for value in integers]))
    return torch.stack(rows)


@given(blocks())
@examples
def test_mxfp4_is_the_nearest_code_and_within_half_a_step(x: Tensor) -> None:
    for row, q in zip(x, map(quantize_mxfp4, x), strict=True):
        amax = float(row.abs().max())
        scale = 2.0 ** scale_exponent(amax, 6) if amax else 1.0
        got = dequantize_mxfp4(q, torch.float64).tolist()
        assert got == [nearest_e2m1(value, scale) for value in row.tolist()]
        for value, rounded in zip(row.tolist(), got, strict=True):
            step = 2.0 ** (max(0, math.frexp(abs(value) / scale)[1] - 1) - 1)  # 0.5 below 2, 1 below 4, 2 up to 6
            assert abs(value - rounded) <= step * scale / 2


@given(blocks())
@examples
def test_mxfp8_is_the_nearest_code_and_within_half_a_step(x: Tensor) -> None:
    for row, q in zip(x, map(quantize_mxfp8, x), strict=True):
        scale = 2.0 ** scale_exponent(max(float(row.abs().max()), 1e-4), 448)
        for value, rounded in zip(row.tolist(), dequantize_mxfp8(q, torch.float64).tolist(), strict=True):
            assert rounded == nearest_e4m3(value, scale)
            step = 2.0 ** (max(-6, math.frexp(abs(value) / scale)[1] - 1) - 3)
            assert abs(value - rounded) <= step * scale / 2


@given(blocks())
@examples
def test_a_quantised_tensor_is_a_fixed_point(x: Tensor) -> None:
    for dtype in DTYPES:
        once4, once8 = dequantize_mxfp4(quantize_mxfp4(x), dtype), dequantize_mxfp8(quantize_mxfp8(x), dtype)
        assert torch.equal(dequantize_mxfp4(quantize_mxfp4(once4), dtype), once4)
        assert torch.equal(dequantize_mxfp8(quantize_mxfp8(once8), dtype), once8)


@given(blocks(0, 40), st.integers(-10, 60))
@examples
def test_a_power_of_two_moves_the_scales_and_nothing_else(x: Tensor, shift: int) -> None:
    x = x[x.abs().amax(1) > 0]  # a block of zeros keeps its scale
    q4, moved4 = quantize_mxfp4(x), quantize_mxfp4(x * 2.0**shift)
    assert torch.equal(q4.packed, moved4.packed)
    assert torch.equal(q4.scales.int() + shift, moved4.scales.int())
    q8, moved8 = quantize_mxfp8(x), quantize_mxfp8(x * 2.0**shift)
    assert torch.equal(q8.values.view(torch.uint8), moved8.values.view(torch.uint8))
    assert torch.equal(q8.scales.int() + shift, moved8.scales.int())


@given(blocks(), st.sampled_from((0.0, 1e30, NAN, INF)))
@examples
def test_a_block_does_not_depend_on_the_blocks_beside_it(x: Tensor, odd: float) -> None:
    neighbour = torch.full((1, 32), odd)
    beside = torch.cat((neighbour, x, neighbour)).flatten()
    apart = [quantize_mxfp8(row) for row in x]
    q8 = quantize_mxfp8(beside)
    assert torch.equal(q8.scales[1:-1], torch.cat([q.scales for q in apart]))
    assert torch.equal(q8.values.view(torch.uint8)[32:-32], torch.cat([q.values for q in apart]).view(torch.uint8))
    if math.isfinite(odd):
        q4, apart4 = quantize_mxfp4(beside), [quantize_mxfp4(row) for row in x]
        assert torch.equal(q4.scales[1:-1], torch.cat([q.scales for q in apart4]))
        assert torch.equal(q4.packed[16:-16], torch.cat([q.packed for q in apart4]))


def test_every_e2m1_weight_comes_back_from_quantising_as_it_was() -> None:
    weight = dequantize_mxfp4(every_e2m1(range(2, MXFP4_MAX_SCALE + 1)))
    assert torch.equal(dequantize_mxfp4(quantize_mxfp4(weight)), weight)


# ---- what is not an ordinary number ----


def one_in_a_block(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, 64]: a block with `value` at 7 and ones, and a block of ones"""
    x = torch.ones(1, 64, dtype=dtype)
    x[0, 7] = value
    return x


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_mxfp8_makes_a_block_with_nan_or_infinity_nan_as_a_whole(value: float) -> None:
    q = quantize_mxfp8(one_in_a_block(value))
    assert q.scales.tolist() == [[255, 119]]
    got = dequantize_mxfp8(q)
    assert got[:, :32].isnan().all()
    assert got[:, 32:].eq(1).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_mxfp8_takes_huge_values_and_gives_infinity_from_1_94_times_2_to_127_up(sign: int) -> None:
    edge = 1.9375 * 2.0**127
    below = float(torch.nextafter(torch.tensor(edge), torch.tensor(0.0)))
    for value, expected in ((1.5 * 2.0**127, 1.5 * 2.0**127), (below, 1.875 * 2.0**127), (edge, INF), (3.4e38, INF)):
        got = dequantize_mxfp8(quantize_mxfp8(one_in_a_block(sign * value)))
        assert float(got[0, 7]) == sign * expected
        assert got[:, 32:].eq(1).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, -(2.0**-127), 2.0**-133])
def test_mxfp8_makes_zeros_and_subnormals_zero_under_the_floor_scale(value: float) -> None:
    q = quantize_mxfp8(torch.full((2, 32), value))
    assert q.scales.tolist() == [[127 - 22], [127 - 22]]
    assert dequantize_mxfp8(q, torch.float64).eq(0).all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_mxfp4_refuses_nan_and_infinity_with_their_number(value: float) -> None:
    x = one_in_a_block(value)
    x[0, 40] = value
    with pytest.raises(ValueError, match="2 of 64 weights are NaN or infinite"):
        quantize_mxfp4(x)


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_mxfp4_refuses_what_bf16_could_not_give_back_and_takes_the_largest(value: float) -> None:
    with pytest.raises(ValueError, match=re.escape("3e+38 is above 1.5 * 2^127 = 2.552e+38")):
        quantize_mxfp4(one_in_a_block(value))
    with pytest.raises(ValueError, match=re.escape("1e+300 is above 1.5 * 2^127")):
        quantize_mxfp4(one_in_a_block(1e300, torch.float64))
    largest = math.copysign(LARGEST_MXFP4, value)
    assert float(dequantize_mxfp4(quantize_mxfp4(one_in_a_block(largest)))[0, 7]) == largest
    above = torch.nextafter(torch.tensor(largest), torch.tensor(math.copysign(INF, value)))
    with pytest.raises(ValueError, match=re.escape("is above 1.5 * 2^127")):
        quantize_mxfp4(one_in_a_block(float(above)))


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_mxfp4_stores_zeros_of_either_sign_as_zero_with_scale_one(zero: float) -> None:
    q = quantize_mxfp4(torch.full((1, 32), zero))
    assert q.scales.tolist() == [[127]]
    assert q.packed.eq(0).all()


def test_mxfp4_stores_what_rounds_to_zero_without_a_sign() -> None:
    x = torch.full((1, 32), -0.25)  # the midpoint of 0 and 0.5
    x[0, 0], x[0, 1] = 6.0, -0.0
    assert unpack_e2m1(quantize_mxfp4(x).packed).tolist() == [[7] + [0] * 31]


def test_mxfp4_rounds_subnormals_under_its_smallest_scale() -> None:
    values = [2.0**-126, -(2.0**-126), 1.5 * 2.0**-127, 2.0**-127, -(2.0**-127), 2.0**-149, 0.0] + [0.0] * 25
    q = quantize_mxfp4(float32s(values))
    assert q.scales.tolist() == [2]
    assert dequantize_mxfp4(q, torch.float64).tolist() == [nearest_e2m1(value, 2.0**-125) for value in values]
    assert dequantize_mxfp4(q)[:3].tolist() == [2.0**-126, -(2.0**-126), 2.0**-126]


# ---- MXFP4 as E4M3 with one scale per 128 x 128 ----


def random_mxfp4(rows: int, groups: int, base: int, span: int, seed: int) -> MXFP4:
    """Random codes; scale bytes from base to base + span, both of which stand in every 128 x 128 block."""
    rng = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, groups * 16), generator=rng).to(torch.uint8)
    scales = torch.randint(base, base + span + 1, (rows, groups), generator=rng).to(torch.uint8)
    for row in range(0, rows, 128):
        scales[row, ::4], scales[min(row + 127, rows - 1), ::4] = base, base + span
        packed[row], packed[min(row + 127, rows - 1)] = 0x19, 0x7F  # smallest and largest codes
    return MXFP4(packed, scales)


def from_blocks(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """E4M3 values [N, K] times the scale of their block, one by one, in float64"""
    decoded = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)[values.view(torch.uint8).long()]
    factors = torch.tensor([scale_of(byte) for byte in range(256)], dtype=torch.float64)[scales.long()]
    rows, columns = (torch.arange(size) // block for size in values.shape)
    return decoded * factors[rows][:, columns]


@pytest.mark.parametrize("span", [0, 1, 7, 13, 14])
@pytest.mark.parametrize("base", [0, 1, 5, 6, 120, MXFP4_MAX_SCALE - 14])
def test_mxfp4_as_e4m3_loses_nothing_while_scales_span_at_most_2_to_14(base: int, span: int) -> None:
    for rows, groups, block in ((128, 4, 128), (2, 1, 128), (130, 5, 128), (300, 9, 128), (70, 3, 32), (65, 5, 64)):
        q = random_mxfp4(rows, groups, base, span, seed=rows + span)
        values, scales = mxfp4_to_e4m3(q, block)
        assert values.shape == (rows, groups * 32)
        assert values.dtype == torch.float8_e4m3fn
        assert scales.shape == (-(-rows // block), -(-groups * 32 // block))
        exact = dequantize_mxfp4(q, torch.float64)
        assert torch.equal(from_blocks(values, scales, block), exact)
        assert torch.equal(values.float().signbit(), exact.signbit())


def test_mxfp4_as_e4m3_ignores_the_scales_of_blocks_of_zeros() -> None:
    q = random_mxfp4(200, 8, 100, 14, seed=3)
    codes = unpack_e2m1(q.packed).view(200, 8, 32)
    empty = torch.rand(200, 8, generator=torch.Generator().manual_seed(4)) < 0.3
    empty[:128, 4:] = True  # one block of 128 x 128 holds nothing at all
    codes[empty] &= 8  # zeros of both signs
    scales = torch.where(empty, torch.arange(200).unsqueeze(1) * 255 // 199, q.scales).to(torch.uint8)
    values, e4m3_scales = mxfp4_to_e4m3(MXFP4(pack_e2m1(codes.flatten(-2)), scales))
    expected = dequantize_mxfp4(MXFP4(pack_e2m1(codes.flatten(-2)), q.scales), torch.float64)
    assert torch.equal(from_blocks(values, e4m3_scales, 128), expected)
    assert int(e4m3_scales[0, 1]) == 127


@pytest.mark.parametrize("base", [0, 100, MXFP4_MAX_SCALE - 15])
def test_mxfp4_as_e4m3_refuses_a_span_of_2_to_15_and_names_the_block(base: int) -> None:
    q = random_mxfp4(200, 10, base, 14, seed=5)
    q.scales[199, 9] = base + 15
    q.packed[199, 9 * 16 + 3] = 0x10
    q.scales[198, 8], q.packed[198, 8 * 16] = base, 0x90
    with pytest.raises(ValueError, match=re.escape("block [1, 2] span 2^15, at most 2^14")):
        mxfp4_to_e4m3(q)


def test_mxfp4_as_e4m3_refuses_what_is_not_a_matrix_and_blocks_that_cut_a_scale() -> None:
    stack = MXFP4(torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=re.escape("got shape [2, 3, 32]")):
        mxfp4_to_e4m3(stack)
    with pytest.raises(ValueError, match="block 48 is not a multiple of 32"):
        mxfp4_to_e4m3(random_mxfp4(2, 1, 100, 0, seed=0), 48)


# ---- E4M3 with one scale per 128 x 128 ----


@pytest.mark.parametrize(("rows", "columns", "block"), [(128, 128, 128), (130, 200, 128), (1, 6, 128), (70, 40, 32)])
def test_e4m3_blocks_are_the_nearest_codes_under_the_scale_of_their_block(rows: int, columns: int, block: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=rng) * torch.randint(-9, 9, (rows, columns), generator=rng).exp2()
    values, scales = quantize_e4m3_blocks(weight, block)
    assert scales.shape == (-(-rows // block), -(-columns // block))
    got = dequantize_e4m3_blocks(values, scales, block)
    assert torch.equal(got.double(), from_blocks(values, scales, block))
    for tall in range(scales.shape[0]):
        for wide in range(scales.shape[1]):
            part = slice(tall * block, (tall + 1) * block), slice(wide * block, (wide + 1) * block)
            exponent = scale_exponent(float(weight[part].abs().max()), 448)
            assert int(scales[tall, wide]) == 127 + exponent
            for value, rounded in list(zip(weight[part].flatten(), got[part].flatten(), strict=True))[:500]:
                assert float(rounded) == nearest_e4m3(float(value), 2.0**exponent)


def test_e4m3_blocks_dequantise_exactly_for_every_code_and_scale_that_bf16_holds() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    codes = every[every & 127 != 127].view(torch.float8_e4m3fn).repeat(128 * 32, 1)  # without NaN
    for first in (3, 119):
        scales = torch.arange(first, first + 128, dtype=torch.uint8).view(-1, 1)
        got = dequantize_e4m3_blocks(codes, scales.repeat(1, 8), 32)
        assert torch.equal(got.double(), from_blocks(codes, scales.repeat(1, 8), 32))


@pytest.mark.parametrize("value", [NAN, INF])
def test_e4m3_blocks_refuse_nan_and_infinity(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        quantize_e4m3_blocks(torch.full((2, 2), value))


# ---- refusals ----


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(shape, dtype=dtype)


E4M3, I8 = torch.float8_e4m3fn, torch.int8


@pytest.mark.parametrize(
    ("values", "scales", "message"),
    [
        (zeros(2, 64), zeros(2, 2), "MXFP8 values must be torch.float8_e4m3fn, got torch.uint8"),
        (zeros(2, 64, dtype=E4M3), zeros(2, 2, dtype=I8), "MXFP8 scales must be torch.uint8, got torch.int8"),
        (zeros(2, 64, dtype=E4M3), zeros(2, 1), "MXFP8 scales must be [2, 2] for values [2, 64], got [2, 1]"),
        (zeros(2, 64, dtype=E4M3), zeros(4), "MXFP8 scales must be [2, 2] for values [2, 64], got [4]"),
        (zeros(2, 48, dtype=E4M3), zeros(2, 1), "last dimension that is a multiple of 32, got 48"),
    ],
)
def test_mxfp8_refuses_wrong_dtypes_and_shapes(values: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MXFP8(values, scales)


@pytest.mark.parametrize(
    ("packed", "scales", "message"),
    [
        (zeros(2, 32, dtype=I8), zeros(2, 2), "MXFP4 packed must be torch.uint8, got torch.int8"),
        (zeros(2, 32), zeros(2, 2, dtype=torch.float32), "MXFP4 scales must be torch.uint8, got torch.float32"),
        (zeros(2, 32), zeros(2, 1), "MXFP4 scales must be [2, 2] for values [2, 64], got [2, 1]"),
        (zeros(2, 24), zeros(2, 1), "last dimension that is a multiple of 32, got 48"),
    ],
)
def test_mxfp4_refuses_wrong_dtypes_and_shapes(packed: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MXFP4(packed, scales)


def test_mxfp4_knows_the_shape_of_its_values() -> None:
    assert MXFP4(zeros(3, 5, 32), zeros(3, 5, 2)).shape == (3, 5, 64)


@pytest.mark.parametrize("spelling", [torch.uint8, torch.int8, torch.float4_e2m1fn_x2], ids=str)
@pytest.mark.parametrize("scale_spelling", [torch.uint8, torch.int8, torch.float8_e8m0fnu], ids=str)
def test_from_bytes_takes_any_one_byte_spelling(spelling: torch.dtype, scale_spelling: torch.dtype) -> None:
    q = random_mxfp4(4, 2, 120, 14, seed=6)
    got = MXFP4.from_bytes(q.packed.view(spelling), q.scales.view(scale_spelling))
    assert torch.equal(got.packed, q.packed)
    assert torch.equal(got.scales, q.scales)


@pytest.mark.parametrize(
    "dtype",
    [torch.int32, torch.float32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz],
    ids=str,
)
def test_from_bytes_refuses_dtypes_that_are_other_numbers_whatever_their_width(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"MXFP4 packed must be of dtype uint8, int8, float4_e2m1fn_x2, got {dtype}"):
        MXFP4.from_bytes(torch.zeros(2, 32, dtype=dtype), zeros(2, 2))
    with pytest.raises(ValueError, match=rf"MXFP4 scales must be of dtype uint8, int8, float8_e8m0fnu, got {dtype}"):
        MXFP4.from_bytes(zeros(2, 32), torch.zeros(2, 2, dtype=dtype))


def test_from_bytes_refuses_scales_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=re.escape("MXFP4 scales must be [2, 2] for values [2, 64], got [2, 4]")):
        MXFP4.from_bytes(zeros(2, 32, dtype=I8), zeros(2, 4, dtype=I8))


def test_quantising_refuses_widths_that_are_not_multiples_of_32() -> None:
    with pytest.raises(ValueError, match=r"quantize_mxfp8 needs .* multiple of 32, got 40"):
        quantize_mxfp8(torch.zeros(2, 40))
    with pytest.raises(ValueError, match=r"quantize_mxfp4 needs .* multiple of 32, got 31"):
        quantize_mxfp4(torch.zeros(2, 31))


def test_scale_bytes_must_be_bytes() -> None:
    with pytest.raises(ValueError, match=r"E8M0 scales must be torch.uint8, got torch.int64"):
        e8m0_to_float(torch.tensor([127]))


@pytest.mark.parametrize("shape", [(0, 32), (3, 0, 64), (0, 0, 32)], ids=str)
def test_no_rows_are_quantised_to_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert dequantize_mxfp8(quantize_mxfp8(x)).shape == shape
    assert dequantize_mxfp4(quantize_mxfp4(x)).shape == shape


@pytest.mark.parametrize(
    ("rows", "width", "starts"),
    [(5, 200_000, [0, 2, 4]), (3, 1_000_000, [0, 1, 2]), (4096, 128, [0]), (4097, 128, [0, 4096]), (0, 8, [])],
)
def test_chunks_have_half_a_million_values_or_one_row(rows: int, width: int, starts: list[int]) -> None:
    found = list(chunks(rows, width))
    assert [each.start for each in found] == starts
    assert [each for part in found for each in range(rows)[part]] == list(range(rows))
