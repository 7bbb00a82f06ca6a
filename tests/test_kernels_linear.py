"""The grouped products, interpreted, against their torch twins, FP64 and themselves in other company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp4, dequantize_mxfp8, pack_e2m1, quantize_mxfp4, quantize_mxfp8
from megamoe.reference import relative_error
from tests.interpreter import interpreted

pytest.importorskip("triton")

from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear1 import (
    grouped_linear1,
    grouped_linear1_torch,
    interleave_gate_up,
    separate_gate_up,
)
from megamoe.kernels.grouped_linear2 import grouped_linear2, grouped_linear2_torch
from megamoe.kernels.tiles import TABLES, Tile, tile_for

FORMATS = ("mxfp4", "bf16")
LIMIT = 10.0
UNTOUCHED = 77.0  # what an output holds before
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
    "gpt_oss_width": ([2, 1], 64, 5760),
}
every_spread = pytest.mark.parametrize(("counts", "depth", "columns"), SPREADS.values(), ids=SPREADS)
both_formats = pytest.mark.parametrize("weight_format", FORMATS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int) -> Tensor:
    """-2 to 2, whole: products whose FP32 sums are the same in any order, and exact in both formats"""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def grouped(x: Tensor, weight: Tensor, counts: list[int], weight_format: str) -> Grouped:
    tokens_per_expert = torch.tensor(counts, dtype=torch.int32)
    if weight_format == "mxfp4":
        return Grouped(quantize_mxfp8(x), quantize_mxfp4(weight), tokens_per_expert)
    return Grouped(x.bfloat16(), weight.bfloat16(), tokens_per_expert)


def drawn(counts: list[int], depth: int, columns: int, weight_format: str, seed: int = 0) -> Grouped:
    x = normal(sum(counts), depth, seed=seed) * 2
    return grouped(x, normal(len(counts), columns, depth, seed=seed + 1) * 0.1, counts, weight_format)


def operands_fp64(product: Grouped) -> tuple[Tensor, Tensor]:
    if isinstance(product.x, MXFP8) and isinstance(product.weight, MXFP4):
        return dequantize_mxfp8(product.x, torch.float64), dequantize_mxfp4(product.weight, torch.float64)
    assert isinstance(product.x, Tensor)
    assert isinstance(product.weight, Tensor)
    return product.x.double(), product.weight.double()


def products_fp64(product: Grouped) -> Tensor:
    """[R, N] float64"""
    x, weight = operands_fp64(product)
    pieces = x.split(product.tokens_per_expert.tolist())
    return torch.cat([piece @ each.T for piece, each in zip(pieces, weight, strict=True)])


def as_fp64(out: MXFP8 | Tensor) -> Tensor:
    return dequantize_mxfp8(out, torch.float64) if isinstance(out, MXFP8) else out.double()


def same_bits(a: MXFP8 | Tensor, b: MXFP8 | Tensor) -> bool:
    if isinstance(a, MXFP8) and isinstance(b, MXFP8):
        return torch.equal(a.scales, b.scales) and torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# ---- Linear-2 ----


def linear2(product: Grouped, index: Tensor | None = None, *, twin: bool = False, **options: Any) -> Tensor:
    """[R, H] bfloat16, UNTOUCHED where no row went"""
    out = torch.full((product.num_rows, product.num_columns), UNTOUCHED, dtype=torch.bfloat16)
    index = torch.arange(product.num_rows) if index is None else index
    (grouped_linear2_torch if twin else grouped_linear2)(product, index, out, **options)
    return out


@every_spread
@both_formats
@interpreted
def test_linear2_is_near_fp64_for_any_spread(counts: list[int], depth: int, columns: int, weight_format: str) -> None:
    product = drawn(counts, depth, columns, weight_format)
    out = linear2(product)
    if sum(counts):
        assert relative_error(out, products_fp64(product)) < BOUND
        assert relative_error(out, linear2(product, twin=True)) < BOUND


@every_spread
@both_formats
@interpreted
def test_linear2_is_its_twin_where_sums_are_exact(
    counts: list[int], depth: int, columns: int, weight_format: str
) -> None:
    x, weight = whole(sum(counts), depth, seed=2), whole(len(counts), columns, depth, seed=3)
    product = grouped(x, weight, counts, weight_format)
    assert same_bits(linear2(product), linear2(product, twin=True))


@interpreted
def test_rows_go_where_the_index_says_and_no_other_place_is_written() -> None:
    product = grouped(whole(6, 32, seed=4), whole(3, 64, 32, seed=5), [2, 0, 3], "mxfp4")  # the sixth row is nobody's
    index = torch.tensor([4, -1, 0, 2, 1, 3])
    straight, out = linear2(product), linear2(product, index)
    assert same_bits(out[[4, 0, 2, 1]], straight[[0, 2, 3, 4]])
    assert bool((out[[3, 5]] == UNTOUCHED).all())
    assert same_bits(out, linear2(product, index, twin=True))


@interpreted
def test_every_e2m1_code_in_every_place_with_every_scale_is_decoded_exactly() -> None:
    scales = torch.arange(2, 253, dtype=torch.uint8).repeat(16)  # one a row of 32 values
    codes = (torch.arange(len(scales)).unsqueeze(1) // 251 + torch.arange(32)) % 16
    weight = MXFP4(pack_e2m1(codes.to(torch.uint8)).unsqueeze(0), scales.view(1, -1, 1))
    ones = MXFP8(torch.eye(32).to(torch.float8_e4m3fn), torch.full((32, 1), 127, dtype=torch.uint8))
    out = linear2(Grouped(ones, weight, torch.tensor([32], dtype=torch.int32)), tile=Tile(32, 256, 32))
    assert torch.equal(out, dequantize_mxfp4(weight)[0].T)


@interpreted
def test_every_e4m3_code_with_every_scale_of_the_contract_is_decoded_exactly() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scales = torch.arange(105, 247, dtype=torch.uint8).unsqueeze(
        1
    )  # from the floor up to what BF16 holds with any code
    values = torch.zeros(len(scales), len(codes), 32, dtype=torch.uint8)
    values[:, :, 7] = codes
    x = MXFP8(values.flatten(0, 1).view(torch.float8_e4m3fn), scales.repeat_interleave(len(codes), 0))
    weight = MXFP4(torch.full((1, 64, 16), 0x22, dtype=torch.uint8), torch.full((1, 64, 1), 127, dtype=torch.uint8))
    num_rows = torch.tensor([len(x.values)], dtype=torch.int32)
    out = linear2(Grouped(x, weight, num_rows), tile=Tile(1024, 64, 32))
    assert torch.equal(out, dequantize_mxfp8(x)[:, 7:8].expand(-1, 64))


# ---- Linear-1 ----


def empty_hidden(product: Grouped) -> MXFP8 | Tensor:
    """Of grouped_linear1, filled with what nobody wrote"""
    rows, columns = product.num_rows, product.num_columns // 2
    if product.weight_format == "bf16":
        return torch.full((rows, columns), UNTOUCHED, dtype=torch.bfloat16)
    values = torch.full((rows, columns), 0x55, dtype=torch.uint8)
    return MXFP8(values.view(torch.float8_e4m3fn), torch.full((rows, columns // 32), 0xA5, dtype=torch.uint8))


def linear1(
    product: Grouped, limit: float | None = LIMIT, weights: Tensor | None = None, *, twin: bool = False, **options: Any
) -> MXFP8 | Tensor:
    """[R, I]"""
    out = empty_hidden(product)
    weights = weights_of(product) if weights is None else weights
    (grouped_linear1_torch if twin else grouped_linear1)(product, weights, limit, out, **options)
    return out


def weights_of(product: Grouped) -> Tensor:
    """[R] float32, 0.25 to 1.25"""
    return torch.rand(product.num_rows, generator=torch.Generator().manual_seed(6)) + 0.25


def linear1_fp64(product: Grouped, limit: float | None) -> Tensor:
    """[R, I] float64, rounded where the contract rounds"""
    exact = products_fp64(product).bfloat16().double()
    gate, up = exact[:, 0::2], exact[:, 1::2]
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    activated = torch.nn.functional.silu(gate) * up * weights_of(product).double().unsqueeze(1)
    return as_fp64(quantize_mxfp8(activated.float()) if product.weight_format == "mxfp4" else activated.bfloat16())


@every_spread
@both_formats
@interpreted
def test_linear1_is_near_fp64_and_its_twin_for_any_spread(
    counts: list[int], depth: int, columns: int, weight_format: str
) -> None:
    product = drawn(counts, depth, columns, weight_format)
    out = as_fp64(linear1(product))
    if sum(counts):
        assert relative_error(out, linear1_fp64(product, LIMIT)) < BOUND
        assert relative_error(out, as_fp64(linear1(product, twin=True))) < BOUND


@pytest.mark.parametrize("limit", [None, 0.5, LIMIT])
@both_formats
@interpreted
def test_gate_and_up_are_clamped_to_the_limit(weight_format: str, limit: float | None) -> None:
    product = grouped(whole(9, 64, seed=7), whole(2, 128, 64, seed=8), [5, 4], weight_format)  # sums up to some 30
    assert float(products_fp64(product).abs().max()) > 2 * LIMIT
    assert relative_error(as_fp64(linear1(product, limit)), linear1_fp64(product, limit)) < 1e-3


@interpreted
def test_the_intermediate_is_rounded_like_the_contract_rounds_it() -> None:
    product = grouped(whole(7, 96, seed=9), whole(3, 192, 96, seed=10), [2, 1, 4], "mxfp4")
    out, twin = linear1(product), linear1(product, twin=True)
    assert isinstance(out, MXFP8)
    assert isinstance(twin, MXFP8)
    assert torch.equal(out.scales, twin.scales)
    # FP32's exponential differs in its last bits from FP64's, which crosses few of E4M3's steps
    same = out.values.view(torch.uint8) == twin.values.view(torch.uint8)
    assert float(same.double().mean()) > 0.999


@interpreted
def test_the_worked_examples_of_the_kernels_come_out() -> None:
    w = torch.ones(1, 64, 32)
    w[0, 0::2] = 0.5
    product = grouped(torch.ones(1, 32), w, [1], "mxfp4")
    assert bool((as_fp64(linear1(product, weights=torch.tensor([0.25]))) == 24).all())
    w = torch.stack((torch.ones(64, 32), torch.full((64, 32), 0.5)))
    product = grouped(torch.ones(3, 32), w, [1, 2], "mxfp4")
    assert bool((linear2(product, torch.tensor([2, 0, 1]))[0] == 16).all())


@both_formats
@interpreted
def test_a_row_that_is_not_a_number_stays_one_and_leaves_the_others_as_they_are(weight_format: str) -> None:
    x, weight = normal(5, 64, seed=11), normal(2, 128, 64, seed=12)
    clean = grouped(x, weight, [3, 2], weight_format)
    x[1, 40] = torch.nan
    marked = grouped(x, weight, [3, 2], weight_format)
    others = [0, 2, 3, 4]
    for before, after in ((linear1(clean), linear1(marked)), (linear2(clean), linear2(marked))):
        assert bool(as_fp64(after)[1].isnan().all())
        assert torch.equal(as_fp64(after)[others], as_fp64(before)[others])


@interpreted
def test_rows_are_read_where_they_lie_on_the_wire() -> None:
    x = quantize_mxfp8(normal(6, 96, seed=13))
    wire = torch.cat((x.values.view(torch.uint8), x.scales, torch.full((6, 5), 0xA5, dtype=torch.uint8)), 1)
    on_wire = MXFP8(wire[:, :96].view(torch.float8_e4m3fn), wire[:, 96:99])
    weight, counts = quantize_mxfp4(normal(2, 64, 96, seed=14)), torch.tensor([2, 4], dtype=torch.int32)
    assert same_bits(linear1(Grouped(on_wire, weight, counts)), linear1(Grouped(x, weight, counts)))
    assert same_bits(linear2(Grouped(on_wire, weight, counts)), linear2(Grouped(x, weight, counts)))


@interpreted
def test_rows_beyond_the_counts_stay_as_they_are() -> None:
    product = grouped(normal(6, 32, seed=15), normal(2, 64, 32, seed=16), [2, 1], "mxfp4")
    out, before = linear1(product), empty_hidden(product)
    assert isinstance(out, MXFP8)
    assert isinstance(before, MXFP8)
    assert same_bits(MXFP8(out.values[3:], out.scales[3:]), MXFP8(before.values[3:], before.scales[3:]))


def test_gate_and_up_rows_alternate_and_come_apart_again() -> None:
    rows = torch.arange(6).view(6, 1)  # g0 g1 g2 u0 u1 u2
    assert interleave_gate_up(rows).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    weight = quantize_mxfp4(normal(3, 64, 96, seed=17))
    for part in (weight.packed, weight.scales):
        assert torch.equal(separate_gate_up(interleave_gate_up(part)), part)


# ---- the same bits in any company ----


def row_bytes(product: Grouped, **options: Any) -> Tensor:
    """[R, B] uint8: what both products give each row, side by side; scales too"""
    hidden, result = (
        linear1(product, weights=torch.full((product.num_rows,), 0.75), **options),
        linear2(product, **options),
    )
    if isinstance(hidden, MXFP8):
        return torch.cat((hidden.values.view(torch.uint8), hidden.scales, result.view(torch.uint8)), 1)
    return torch.cat((hidden.view(torch.uint8), result.view(torch.uint8)), 1)


@both_formats
@interpreted
def test_a_token_alone_has_the_bits_it_has_among_257(weight_format: str) -> None:
    x, weight = normal(257, 160, seed=18), normal(3, 128, 160, seed=19)
    crowd = row_bytes(grouped(x, weight, [100, 0, 157], weight_format))
    for row in (0, 57, 99, 100, 131, 256):
        counts = [1, 0, 0] if row < 100 else [0, 0, 1]
        assert torch.equal(row_bytes(grouped(x[row : row + 1], weight, counts, weight_format))[0], crowd[row])


@both_formats
@interpreted
def test_neither_another_run_nor_another_number_of_programs_changes_a_bit(weight_format: str) -> None:
    product = drawn([7, 0, 21], 96, 320, weight_format)
    first = row_bytes(product, programs=3)
    for programs in (3, 1, 5, 64):
        assert torch.equal(row_bytes(product, programs=programs), first)


@interpreted
def test_other_rows_in_a_tile_of_the_same_depth_change_no_bit() -> None:
    product = drawn([7, 0, 21], 96, 320, "mxfp4")
    assert torch.equal(row_bytes(product, tile=Tile(64, 128, 64)), row_bytes(product, tile=Tile(16, 128, 64)))


# ---- tables, and what is refused ----


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("chip", TABLES)
def test_a_chip_sums_in_steps_of_one_depth_whatever_the_rows(chip: str, weight_format: str) -> None:
    table = TABLES[chip][weight_format]
    assert len({(tile.depth, tile.options) for _, tile in table}) == 1
    bounds = [bound for bound, _ in table]
    assert bounds[-1] is None
    assert bounds[:-1] == sorted(bound for bound in bounds if bound is not None)


def test_tiles_follow_rows_per_expert() -> None:
    rows = [tile_for("cuda:90", "mxfp4", num_rows, 8).rows for num_rows in (0, 1, 8, 128, 129, 513, 4096)]
    assert rows == [16, 16, 16, 16, 64, 128, 128]


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight, counts = torch.zeros(2, 64).bfloat16(), torch.zeros(1, 64, 64).bfloat16(), torch.ones(1).int()
    with pytest.raises(ValueError, match="MXFP8 rows by MXFP4 weights, or BF16"):
        Grouped(quantize_mxfp8(x), weight, counts)
    with pytest.raises(ValueError, match="sums over 64 of the weights and 32 of the rows"):
        Grouped(x[:, :32], weight, counts)
    with pytest.raises(ValueError, match=r"must be int32 \[1\], got torch.int64 \[1\]"):
        Grouped(x, weight, counts.long())
    with pytest.raises(ValueError, match="columns must be a power of two and a multiple of 64, got 96"):
        Tile(16, 96, 64)
    product = Grouped(x, weight, counts)
    with pytest.raises(ValueError, match=r"index \[2\] and out \[W, 64\], got \[1\] and \[2, 64\]"):
        grouped_linear2(product, torch.zeros(1).long(), x)
    with pytest.raises(ValueError, match=r"weights \[2\] and out \[2, 32\], got \[2\] and \[2, 64\]"):
        grouped_linear1(product, torch.ones(2), None, x)
