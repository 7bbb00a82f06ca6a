"""What a tile of an expert's Linear-1 and Linear-2 computes, for the staged kernels and the mega-kernel alike."""

# K the summed dimension   N rows of an expert's weight   I intermediate

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.kernels.device.activation import apply_function, load_bias, up_factor
from megamoe.kernels.device.products import tile_product
from megamoe.kernels.device.rounding import round_to_bf16, round_to_mxfp8, widen_block


@triton.jit
def linear1_tile(
    x,
    x_scales,
    w,
    w_scales,
    bias,
    source,
    weights,
    out,
    out_scales,
    expert,
    first_row,
    num_rows,
    column_tile,
    x_stride,
    x_scale_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    CLAMP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Rows first_row to first_row + num_rows of the expert's products, activated and times their weights, into out.

    x and source as in tile_product(); weights [R] float32; out [R, I], rounded as the contract says. GATED, N is 2I,
    and a tile of COLUMNS has COLUMNS / 2 of out's columns. A bias is added to the FP32 sum.
        silu, K 32, a row of x all 1; of w the even rows all 0.5, the odd ones all 1; all scales 1: gates 16, ups 32;
        LIMIT 10: 10 and 10; weight 0.25  ->  10 / (1 + e^-10) * 10 * 0.25 = 24.999, between E4M3's 24 and 26: 24
    """
    WIDTH: tl.constexpr = N // 2 if GATED else N
    OUT: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    total = tile_product(
        x,
        x_scales,
        w,
        w_scales,
        source,
        x_stride,
        x_scale_stride,
        expert,
        first_row,
        num_rows,
        column_tile * COLUMNS,
        K,
        N,
        ROWS,
        COLUMNS,
        DEPTH,
        OPERAND,
        SMALL_SCALES,
    )
    if bias is not None:
        total += load_bias(bias, expert, column_tile * COLUMNS, N, COLUMNS)[:, None]
    first = round_to_bf16(tl.trans(total)).to(tl.float32)
    rows, columns = tl.arange(0, ROWS), column_tile * OUT + tl.arange(0, OUT)
    has_row = rows < num_rows
    if GATED:
        gate, up = tl.split(tl.reshape(first, (ROWS, OUT, 2)))
        activated = apply_function(gate, FUNCTION, ALPHA, LIMIT, CLAMP) * up_factor(up, UP_SHIFT, UP_LIMIT, CLAMP)
    else:
        activated = apply_function(first, FUNCTION, ALPHA, LIMIT, CLAMP)
    activated *= tl.load(weights + first_row + rows, mask=has_row, other=0.0)[:, None]
    places = (first_row + rows).to(tl.int64)[:, None]
    wanted = has_row[:, None] & (columns < WIDTH)[None, :]
    if w_scales is None:
        tl.store(out + places * WIDTH + columns[None, :], round_to_bf16(activated), mask=wanted)
    elif out_scales is None:
        codes, exponents = round_to_mxfp8(tl.reshape(activated, (ROWS * OUT // 32, 32)))
        widened = tl.reshape(widen_block(codes, exponents), (ROWS, OUT))
        tl.store(out + places * WIDTH + columns[None, :], widened, mask=wanted)
    else:
        codes, exponents = round_to_mxfp8(tl.reshape(activated, (ROWS, OUT // 32, 32)))
        tl.store(out + places * WIDTH + columns[None, :], tl.reshape(codes, (ROWS, OUT)), mask=wanted)
        blocks = column_tile * (OUT // 32) + tl.arange(0, OUT // 32)
        wanted = has_row[:, None] & (blocks < WIDTH // 32)[None, :]
        tl.store(out_scales + places * (WIDTH // 32) + blocks[None, :], exponents, mask=wanted)


@triton.jit
def linear2_tile(
    x,
    x_scales,
    w,
    w_scales,
    bias,
    source,
    weights,
    expert,
    first_row,
    num_rows,
    column_tile,
    x_stride,
    x_scale_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[COLUMNS, ROWS] float32: products of rows first_row to first_row + num_rows, to be rounded; others are nobody's.

    A bias, times the row's weight, is added to the FP32 sum; weights are read for nothing else.
        K 32, a row of x all 1 with scale 1, w all 0.5 with scale 1  ->  32 * 1 * 0.5 = 16 in all columns
    """
    total = tile_product(
        x,
        x_scales,
        w,
        w_scales,
        source,
        x_stride,
        x_scale_stride,
        expert,
        first_row,
        num_rows,
        column_tile * COLUMNS,
        K,
        N,
        ROWS,
        COLUMNS,
        DEPTH,
        OPERAND,
        SMALL_SCALES,
    )
    if bias is not None:
        rows = tl.arange(0, ROWS)
        scale = tl.load(weights + first_row + rows, mask=rows < num_rows, other=0.0)
        total += load_bias(bias, expert, column_tile * COLUMNS, N, COLUMNS)[:, None] * scale[None, :]
    return total
