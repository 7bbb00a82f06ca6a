"""The grouped products, interpreted, against their torch twins and FP64: any spread of rows, every code, every way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.activations import SWIGLU
from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp4, dequantize_mxfp8, pack_e2m1, quantize_mxfp4, quantize_mxfp8
from megamoe.reference import relative_error
from tests.interpreter import interpreted

pytest.importorskip("triton")

from megamoe.kernels.chips.tiles import Tile
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear2 import grouped_linear2
from megamoe.kernels.layout import LARGEST_SMALL_SCALE, Prepacked, interleave_gate_up, separate_gate_up
from tests.cases import ACTIVATIONS
from tests.kernel_cases import (
    LIMIT,
    UNTOUCHED,
    WAYS,
    as_bytes,
    as_fp64,
    both_mx,
    drawn,
    empty_hidden,
    every_way,
    grouped,
    linear1,
    linear1_fp64,
    linear2,
    normal,
    products_fp64,
    rows_for,
    weights_for,
    weights_of,
    whole,
)

BOUND = 5e-3  # relative error against FP64
# rows of each expert, K and N (half of it is I in Linear-1): no size a multiple of the tile, unless it says so
SPREADS = {
    "empty_experts": ([5, 0, 17, 1, 0], 96, 192),
    "one_row": ([0, 0, 1], 160, 64),
    "all_on_one_expert": ([0, 37, 0, 0], 96, 320),
    "one_expert": ([3], 32, 64),
    "no_rows": ([0, 0], 64, 64),
    "whole_tiles": ([16, 32], 128, 128),
    "gpt_oss_depth": ([2, 1], 2880, 64),
}
WIDE = pytest.param([2, 1], 64, 2880, id="gpt_oss_width", marks=pytest.mark.soak)  # 22 tiles and a half: 320 are 2.5
every_spread = pytest.mark.parametrize(
    ("counts", "depth", "columns"), [*(pytest.param(*each, id=name) for name, each in SPREADS.items()), WIDE]
)


def counted(*counts: int) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32)


# ---- Linear-2 ----


@every_spread
@every_way
@interpreted
def test_linear2_is_near_fp64_and_its_twin_for_any_spread(
    counts: list[int], depth: int, columns: int, way: str
) -> None:
    product = drawn(counts, depth, columns, way)
    out = linear2(product, tile=WAYS[way])
    if sum(counts):
        assert relative_error(out, products_fp64(product)) < BOUND
        assert relative_error(out, linear2(product, twin=True)) < BOUND


@every_spread
@every_way
@interpreted
def test_linear2_is_its_twin_where_sums_are_exact(counts: list[int], depth: int, columns: int, way: str) -> None:
    x, weight = whole(sum(counts), depth, seed=2), whole(len(counts), columns, depth, seed=3)
    product = grouped(x, weight, counts, way)
    assert torch.equal(as_bytes(linear2(product, tile=WAYS[way])), as_bytes(linear2(product, twin=True)))


@interpreted
def test_rows_go_where_the_index_says_and_no_other_place_is_written() -> None:
    product = grouped(whole(6, 32, seed=4), whole(3, 64, 32, seed=5), [2, 0, 3], "wide")  # the sixth row is nobody's
    index = torch.tensor([4, -1, 0, 2, 1, 3])
    straight, out = linear2(product), linear2(product, index)
    assert torch.equal(out[[4, 0, 2, 1]], straight[[0, 2, 3, 4]])
    assert bool((out[[3, 5]] == UNTOUCHED).all())
    assert torch.equal(out, linear2(product, index, twin=True))


@pytest.mark.parametrize(
    ("way", "first", "last"), [("scaled", 2, 252), ("wide", 2, 252), ("wide", 2, LARGEST_SMALL_SCALE)]
)
@interpreted
def test_every_e2m1_code_in_every_place_with_every_scale_is_decoded_exactly(way: str, first: int, last: int) -> None:
    num_scales = last + 1 - first
    scales = torch.arange(first, last + 1, dtype=torch.uint8).repeat(16)  # one a row of 32 values
    codes = (torch.arange(len(scales)).unsqueeze(1) // num_scales + torch.arange(32)) % 16
    weight = MXFP4(pack_e2m1(codes.to(torch.uint8)).unsqueeze(0), scales.view(1, -1, 1))
    ones = MXFP8(torch.eye(32).to(torch.float8_e4m3fn), torch.full((32, 1), 127, dtype=torch.uint8))
    held = weights_for(way, weight)
    assert not isinstance(held, Prepacked) or held.small_scales == (last <= LARGEST_SMALL_SCALE)
    out = linear2(Grouped(rows_for(way, ones), held, counted(32)), tile=Tile(32, 256, 128))
    assert torch.equal(out, dequantize_mxfp4(weight)[0].T)


@both_mx
@interpreted
def test_every_e4m3_code_with_every_scale_of_the_contract_is_decoded_exactly(way: str) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scales = torch.arange(105, 247, dtype=torch.uint8)  # from the contract's floor up to what BF16 holds with any code
    values = torch.zeros(len(scales), len(codes), 32, dtype=torch.uint8)
    values[:, :, 7] = codes
    x = MXFP8(values.flatten(0, 1).view(torch.float8_e4m3fn), scales.repeat_interleave(len(codes)).unsqueeze(1))
    weight = MXFP4(torch.full((1, 64, 16), 0x22, dtype=torch.uint8), torch.full((1, 64, 1), 127, dtype=torch.uint8))
    product = Grouped(rows_for(way, x), weights_for(way, weight), counted(len(x.values)))
    out = linear2(product, tile=Tile(1024, 64, 128))
    assert torch.equal(out, dequantize_mxfp8(x)[:, 7:8].expand(-1, 64))


# ---- Linear-1 ----


@every_spread
@every_way
@interpreted
def test_linear1_is_near_fp64_and_its_twin_for_any_spread(
    counts: list[int], depth: int, columns: int, way: str
) -> None:
    product = drawn(counts, depth, columns, way)
    out = as_fp64(linear1(product, tile=WAYS[way]))
    if sum(counts):
        assert relative_error(out, linear1_fp64(product)) < BOUND
        assert relative_error(out, as_fp64(linear1(product, twin=True))) < BOUND


@pytest.mark.parametrize("limit", [None, 0.5, LIMIT])
@every_way
@interpreted
def test_gate_and_up_are_clamped_to_the_limit(way: str, limit: float | None) -> None:
    product = grouped(whole(9, 64, seed=7), whole(2, 128, 64, seed=8), [5, 4], way)  # sums up to some 30
    assert float(products_fp64(product).abs().max()) > 2 * LIMIT
    activation = SWIGLU.with_limit(limit)
    got = as_fp64(linear1(product, activation, tile=WAYS[way]))
    assert relative_error(got, linear1_fp64(product, activation)) < 1e-3


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@interpreted
def test_every_activation_is_near_fp64_and_its_twin(name: str, bias: bool) -> None:
    activation = ACTIVATIONS[name]
    for way, tile in WAYS.items():
        bias_of = whole(3, 192, seed=9) if bias else None  # sums are exact in any order
        product = grouped(whole(6, 64, seed=7), whole(3, 192, 64, seed=8), [4, 0, 2], way, bias_of)
        out, twin = (as_fp64(linear1(product, activation, **each)) for each in ({"tile": tile}, {"twin": True}))
        assert relative_error(out, linear1_fp64(product, activation)) < BOUND, way
        # FP32's exponential differs in its last bits from FP64's, which crosses few of a format's steps
        assert float((out == twin).double().mean()) > 0.99, way


@every_way
@interpreted
def test_a_bias_is_added_to_the_sum_times_the_rows_weight(way: str) -> None:
    product = drawn([5, 0, 17, 1], 96, 192, way, bias=True)
    expected = products_fp64(product, weights_of(product))
    assert relative_error(linear2(product, tile=WAYS[way]), expected) < BOUND
    exact = grouped(whole(9, 64, seed=7), whole(2, 192, 64, seed=8), [5, 4], way, whole(2, 192, seed=9))
    assert torch.equal(linear2(exact, tile=WAYS[way]), linear2(exact, twin=True))
    with pytest.raises(ValueError, match=r"with a bias needs weights \[9\], got None"):
        grouped_linear2(exact, torch.arange(9), torch.empty(9, 192, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bias must be float32 \[2, 192\], got torch.float32 \[2, 191\]"):
        grouped(whole(9, 64, seed=7), whole(2, 192, 64, seed=8), [5, 4], way, torch.zeros(2, 191))


@both_mx
@interpreted
def test_the_intermediate_is_rounded_like_the_contract_rounds_it(way: str) -> None:
    product = grouped(whole(7, 96, seed=9), whole(3, 192, 96, seed=10), [2, 1, 4], way)
    out, twin = as_bytes(linear1(product, tile=WAYS[way])), as_bytes(linear1(product, twin=True))
    # FP32's exponential differs in its last bits from FP64's, which crosses few of E4M3's steps
    same = out == twin
    assert float(same.double().mean()) > 0.999


@interpreted
def test_the_worked_examples_of_the_kernels_come_out() -> None:
    w = torch.ones(1, 64, 32)
    w[0, 0::2] = 0.5
    product = grouped(torch.ones(1, 32), w, [1], "wide")
    assert bool((as_fp64(linear1(product, weights=torch.tensor([0.25]))) == 24).all())
    w = torch.stack((torch.ones(64, 32), torch.full((64, 32), 0.5)))
    product = grouped(torch.ones(3, 32), w, [1, 2], "wide")
    assert bool((linear2(product, torch.tensor([2, 0, 1]))[0] == 16).all())


@interpreted
def test_rows_beyond_the_counts_stay_as_they_are() -> None:
    product = grouped(normal(6, 32, seed=15), normal(2, 64, 32, seed=16), [2, 1], "wide")
    assert torch.equal(as_bytes(linear1(product))[3:], as_bytes(empty_hidden(product))[3:])


@interpreted
def test_rows_are_read_where_they_lie_on_the_wire() -> None:
    x = quantize_mxfp8(normal(6, 96, seed=13))
    wire = torch.cat((x.values.view(torch.uint8), x.scales, torch.full((6, 5), 0xA5, dtype=torch.uint8)), 1)
    on_wire = MXFP8(wire[:, :96].view(torch.float8_e4m3fn), wire[:, 96:99])
    weight = quantize_mxfp4(normal(2, 64, 96, seed=14))
    for operation in (linear1, linear2):
        there, here = (operation(Grouped(each, weight, counted(2, 4)), tile=WAYS["scaled"]) for each in (on_wire, x))
        assert torch.equal(as_bytes(there), as_bytes(here))


def test_gate_and_up_rows_alternate_and_come_apart_again() -> None:
    rows = torch.arange(6).view(6, 1)  # g0 g1 g2 u0 u1 u2
    assert interleave_gate_up(rows).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    weight = quantize_mxfp4(normal(3, 64, 96, seed=17))
    for part in (weight.packed, weight.scales):
        assert torch.equal(separate_gate_up(interleave_gate_up(part)), part)
