"""Linear-1 of all experts at once, and the activation at its end: the 2I columns of gate and up never reach memory.

Gate and up rows of the weight alternate, so a tile has both of each of its columns. They are laid so once, when the
weights are loaded.
"""

# R rows, sorted by expert   e experts of this rank   H hidden   I intermediate

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp8, quantize_mxfp8
from megamoe.kernels.chips.targets import Build, Target
from megamoe.kernels.chips.tiles import Tile, find, lay_out
from megamoe.kernels.device.products import tile_product
from megamoe.kernels.device.rounding import round_to_bf16, round_to_mxfp8, widen_block
from megamoe.kernels.grouped import SIZES, SLICED, Grouped, builds_of
from megamoe.kernels.layout import Prepacked, Wide, in_sum_order


@triton.jit
def activate(gate, up, weights, LIMIT: tl.constexpr):
    """SiLU(min(gate, LIMIT)) * clamp(up, -LIMIT, LIMIT) * weight in FP32; a NaN stays one.

    gate, up [ROWS, n] float32 that BF16 holds, weights [ROWS] float32 -> [ROWS, n] float32
        gate 2, up 20, weight 0.5, LIMIT 10  ->  2 / (1 + e^-2) * 10 * 0.5 = 8.808
    """
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate / (1 + tl.exp(-gate)) * up * weights[:, None]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def _linear1_kernel(
    x,
    x_scales,
    w,
    w_scales,
    tokens_per_expert,
    source,
    weights,
    out,
    out_scales,
    num_experts,
    num_programs,
    x_stride,
    x_scale_stride,
    K: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program p computes tiles p, p + num_programs, and so on, in the order of `tiles.find`.

    N is 2I, and a tile of COLUMNS has COLUMNS / 2 of out's columns.
        K 32, a row of x all 1; of w the even rows all 0.5, the odd ones all 1; all scales 1: gates 16, ups 32;
        LIMIT 10: 10 and 10; weight 0.25  ->  10 / (1 + e^-10) * 10 * 0.25 = 24.999, between E4M3's 24 and 26: 24
    """
    COLUMN_TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    WIDTH: tl.constexpr = N // 2
    counts, row_ends, tile_ends = lay_out(tokens_per_expert, num_experts, COLUMN_TILES, ROWS, EXPERTS)
    for tile in range(tl.program_id(0), tl.max(tile_ends, 0), num_programs):
        expert, first_row, num_rows, column_tile = find(tile, counts, row_ends, tile_ends, COLUMN_TILES, ROWS, EXPERTS)
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
        gate_up = round_to_bf16(tl.trans(total)).to(tl.float32)
        gate, up = tl.split(tl.reshape(gate_up, (ROWS, COLUMNS // 2, 2)))
        rows, columns = tl.arange(0, ROWS), column_tile * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        has_row = rows < num_rows
        activated = activate(gate, up, tl.load(weights + first_row + rows, mask=has_row, other=0.0), LIMIT)
        places = (first_row + rows).to(tl.int64)[:, None]
        wanted = has_row[:, None] & (columns < WIDTH)[None, :]
        if w_scales is None:
            tl.store(out + places * WIDTH + columns[None, :], round_to_bf16(activated), mask=wanted)
        elif out_scales is None:
            codes, exponents = round_to_mxfp8(tl.reshape(activated, (ROWS * COLUMNS // 64, 32)))
            widened = tl.reshape(widen_block(codes, exponents), (ROWS, COLUMNS // 2))
            tl.store(out + places * WIDTH + columns[None, :], widened, mask=wanted)
        else:
            codes, exponents = round_to_mxfp8(tl.reshape(activated, (ROWS, COLUMNS // 64, 32)))
            tl.store(out + places * WIDTH + columns[None, :], tl.reshape(codes, (ROWS, COLUMNS // 2)), mask=wanted)
            blocks = column_tile * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)
            wanted = has_row[:, None] & (blocks < WIDTH // 32)[None, :]
            tl.store(out_scales + places * (WIDTH // 32) + blocks[None, :], exponents, mask=wanted)


def grouped_linear1(
    grouped: Grouped,
    weights: Tensor,
    limit: float | None,
    out: MXFP8 | Wide | Tensor,
    *,
    tile: Tile | None = None,
    programs: int | None = None,
) -> None:
    """SiLU(gate) * up * weight of every row, clamped to limit, in out: what Linear-2 reads.

    grouped of x [R, H] by weights [e, 2I, H] with gate and up rows in turns; weights [R] float32; out [R, I], MXFP8 or
    the same widened for MXFP4 weights, bfloat16 for BF16 ones. The product is rounded to BF16 before the activation.
    Rows that are nobody's stay as they are. tile and programs as the device has them in its table, if not given.
    """
    _check(grouped, weights, out)
    results: dict[str, Any]
    if isinstance(out, MXFP8):
        results = {"out": out.values.view(torch.uint8), "out_scales": out.scales}
    else:
        results = {"out": _values(out), "out_scales": None}
    grouped.run(_linear1_kernel, {**results, "weights": weights, "LIMIT": limit}, tile, programs)


def grouped_linear1_torch(grouped: Grouped, weights: Tensor, limit: float | None, out: MXFP8 | Wide | Tensor) -> None:
    """What grouped_linear1() means, an expert after the other."""
    _check(grouped, weights, out)
    for rows, product in grouped.products_torch():
        gate, up = product[:, 0::2].to(torch.float64), product[:, 1::2].to(torch.float32)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        activated = torch.nn.functional.silu(gate).to(torch.float32) * up * weights[rows].unsqueeze(-1)
        if isinstance(out, MXFP8):
            rounded = quantize_mxfp8(activated)
            out.values.view(torch.uint8)[rows] = rounded.values.view(torch.uint8)
            out.scales[rows] = rounded.scales
        elif isinstance(out, Wide):
            out.values[rows] = in_sum_order(dequantize_mxfp8(quantize_mxfp8(activated)))
        else:
            out[rows] = activated.to(torch.bfloat16)


def _values(out: MXFP8 | Wide | Tensor) -> Tensor:
    return out if isinstance(out, Tensor) else out.values


def _check(grouped: Grouped, weights: Tensor, out: MXFP8 | Wide | Tensor) -> None:
    values, wanted = _values(out), (grouped.num_rows, grouped.num_columns // 2)
    if isinstance(out, MXFP8 | Wide) != isinstance(grouped.weight, MXFP4 | Prepacked):
        raise ValueError("grouped_linear1 writes MXFP8 for MXFP4 weights, widened or not, and BF16 for BF16 weights")
    if len(weights) != grouped.num_rows or tuple(values.shape) != wanted:
        given = f"{list(weights.shape)} and {list(values.shape)}"
        raise ValueError(f"grouped_linear1 needs weights [{wanted[0]}] and out {list(wanted)}, got {given}")
    assert all(each.is_contiguous() for each in (values, weights)), (values.stride(), weights.stride())


def builds(target: Target) -> list[Build]:
    """All tiles, with DeepSeek-V4-Pro's sizes, rows where the source says."""
    own: dict[str, str | None] = {"source": "*i32", "weights": "*fp32"}
    kinds: dict[str, dict[str, str | None]] = {
        "mxfp4": {**own, "out": "*u8", "out_scales": "*u8"},
        "wide": {**own, "out": "*bf16", "out_scales": None},
        "bf16": {**own, "out": "*bf16", "out_scales": None},
    }
    return builds_of(target, _linear1_kernel, "V4-Pro", {"K": 7168, "N": 6144, "LIMIT": 10.0}, kinds)
