"""Linear-2 of all experts at once: rows sorted by expert times their weights, to BF16, in the order of the wire."""

# R rows, sorted by expert   e experts of this rank   H hidden   I intermediate   W rows of the wire

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megamoe.kernels.chips.targets import Build, Target
from megamoe.kernels.chips.tiles import Tile, find, lay_out
from megamoe.kernels.device.linear import linear2_tile
from megamoe.kernels.device.rounding import round_to_bf16
from megamoe.kernels.grouped import SIZES, SLICED, Grouped, builds_of


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def _linear2_kernel(
    x,
    x_scales,
    w,
    w_scales,
    bias,
    tokens_per_expert,
    source,
    index,
    weights,
    out,
    num_experts,
    num_programs,
    x_stride,
    x_scale_stride,
    out_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program p computes tiles p, p + num_programs, and so on, in the order of `tiles.find`.

    tokens_per_expert [1, 2], K 32, row 1 of x all 1 with scale 1, w[1] all 0.5 with scale 1, index [2, 0, 1]
        ->  row 0 of out is 32 * 1 * 0.5 = 16 in all columns; a row with index -1 is written nowhere
    Each tile is linear2_tile().
    """
    COLUMN_TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    counts, row_ends, tile_ends = lay_out(tokens_per_expert, num_experts, COLUMN_TILES, ROWS, EXPERTS)
    num_tiles = tl.max(tile_ends, 0)
    # addresses of the scaled product are worked out for each tile: kept across tiles they cost registers (Triton 3.6)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, disable_licm=x_scales is not None):
        expert, first_row, num_rows, column_tile = find(tile, counts, row_ends, tile_ends, COLUMN_TILES, ROWS, EXPERTS)
        total = linear2_tile(
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
            K,
            N,
            OPERAND,
            SMALL_SCALES,
            ROWS,
            COLUMNS,
            DEPTH,
        )
        rows, columns = tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
        places = tl.load(index + first_row + rows, mask=rows < num_rows, other=-1)
        wanted = (places >= 0)[:, None] & (columns < N)[None, :]
        tl.store(out + places[:, None] * out_stride + columns[None, :], round_to_bf16(tl.trans(total)), mask=wanted)


def grouped_linear2(
    grouped: Grouped,
    index: Tensor,
    out: Tensor,
    weights: Tensor | None = None,
    *,
    tile: Tile | None = None,
    programs: int | None = None,
) -> None:
    """Row r of the product goes to out[index[r]], rounded to BF16; what no row goes to stays as it is.

    grouped of x [R, I] by weights [e, H, I]; index [R] int64, -1 for a row that goes nowhere; out [W, H] bfloat16;
    weights [R] float32, by which the bias is multiplied that grouped may have; x has its own in it
        index [2, 0], products [a, b]  ->  out [b, ., a]
    tile and programs as the device has them in its table, if not given.
    """
    _check(grouped, index, out, weights)
    results = {"index": index, "out": out, "out_stride": out.stride(0)}
    grouped.run(_linear2_kernel, {**results, "weights": None if grouped.bias is None else weights}, tile, programs)


def grouped_linear2_torch(grouped: Grouped, index: Tensor, out: Tensor, weights: Tensor | None = None) -> None:
    """What grouped_linear2() means, an expert after the other."""
    _check(grouped, index, out, weights)
    for rows, product in grouped.products_torch(weights):
        places = index[rows]
        out[places[places >= 0]] = product[places >= 0]


def _check(grouped: Grouped, index: Tensor, out: Tensor, weights: Tensor | None) -> None:
    if len(index) != grouped.num_rows or out.shape[1] != grouped.num_columns:
        wanted = f"index [{grouped.num_rows}] and out [W, {grouped.num_columns}]"
        raise ValueError(f"grouped_linear2 needs {wanted}, got {list(index.shape)} and {list(out.shape)}")
    if grouped.bias is not None and (weights is None or len(weights) != grouped.num_rows):
        given = None if weights is None else list(weights.shape)
        raise ValueError(f"grouped_linear2 with a bias needs weights [{grouped.num_rows}], got {given}")
    assert (out.stride(1), index.stride(0)) == (1, 1), (out.stride(), index.stride())


def builds(target: Target) -> list[Build]:
    """All tiles, with DeepSeek-V4-Pro's sizes."""
    own = {"source": None, "index": "*i64", "weights": None, "out": "*bf16", "out_stride": "i32"}
    return builds_of(
        target, _linear2_kernel, "V4-Pro", {"K": 3072, "N": 7168}, dict.fromkeys(("mxfp4", "wide", "bf16"), own)
    )
