"""Linear-1 of all experts at once, and the activation at its end: the 2I columns of gate and up never reach memory.

Gate and up rows of the weight alternate, so a tile has both of each of its columns. They are laid so once, when the
weights are loaded. Without a gate a tile's columns are those of the result.
"""

# R rows, sorted by expert   e experts of this rank   H hidden   I intermediate

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.activations import SWIGLU, Activation
from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp8, quantize_mxfp8
from megamoe.kernels.chips.targets import Build, Target
from megamoe.kernels.chips.tiles import Tile, find, lay_out
from megamoe.kernels.device.activation import constants_of
from megamoe.kernels.device.linear import linear1_tile
from megamoe.kernels.gating import gate_fp64
from megamoe.kernels.gating import up_factor as up_factor_torch
from megamoe.kernels.grouped import SIZES, SLICED, Grouped, builds_of
from megamoe.kernels.layout import Prepacked, Wide, in_sum_order


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def _linear1_kernel(
    x,
    x_scales,
    w,
    w_scales,
    bias,
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
    """Program p computes tiles p, p + num_programs, and so on, in the order of `tiles.find`: each is linear1_tile()."""
    COLUMN_TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    counts, row_ends, tile_ends = lay_out(tokens_per_expert, num_experts, COLUMN_TILES, ROWS, EXPERTS)
    num_tiles = tl.max(tile_ends, 0)
    # addresses of the scaled product are worked out for each tile: kept across tiles they cost registers (Triton 3.6)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, disable_licm=x_scales is not None):
        expert, first_row, num_rows, column_tile = find(tile, counts, row_ends, tile_ends, COLUMN_TILES, ROWS, EXPERTS)
        linear1_tile(
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
            K,
            N,
            OPERAND,
            SMALL_SCALES,
            FUNCTION,
            GATED,
            ALPHA,
            UP_SHIFT,
            LIMIT,
            UP_LIMIT,
            CLAMP,
            ROWS,
            COLUMNS,
            DEPTH,
        )


def grouped_linear1(
    grouped: Grouped,
    weights: Tensor,
    activation: Activation,
    out: MXFP8 | Wide | Tensor,
    *,
    tile: Tile | None = None,
    programs: int | None = None,
) -> None:
    """The activation of every row times its weight, in out: what Linear-2 reads.

    grouped of x [R, H] by weights [e, 2I, H] with gate and up rows in turns, or [e, I, H] without a gate; weights [R]
    float32; out [R, I], MXFP8 or the same widened for MXFP4 weights, bfloat16 for BF16 ones. The product, with the
    bias that grouped has, is rounded to BF16 before the activation.
    Rows that are nobody's stay as they are. tile and programs as the device has them in its table, if not given.
    """
    _check(grouped, weights, activation, out)
    results: dict[str, Any]
    if isinstance(out, MXFP8):
        results = {"out": out.values.view(torch.uint8), "out_scales": out.scales}
    else:
        results = {"out": _values(out), "out_scales": None}
    grouped.run(_linear1_kernel, {**results, "weights": weights, **constants_of(activation)}, tile, programs)


def grouped_linear1_torch(
    grouped: Grouped, weights: Tensor, activation: Activation, out: MXFP8 | Wide | Tensor
) -> None:
    """What grouped_linear1() means, an expert after the other."""
    _check(grouped, weights, activation, out)
    for rows, product in grouped.products_torch():
        gate, up = (product[:, 0::2], product[:, 1::2]) if activation.gated else (product, None)
        activated = gate_fp64(gate.to(torch.float64), activation).to(torch.float32)
        if up is not None:
            activated *= up_factor_torch(up, activation)
        activated *= weights[rows].unsqueeze(-1)
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


def _check(grouped: Grouped, weights: Tensor, activation: Activation, out: MXFP8 | Wide | Tensor) -> None:
    values, wanted = _values(out), (grouped.num_rows, grouped.num_columns // activation.rows_per_output)
    if isinstance(out, MXFP8 | Wide) != isinstance(grouped.weight, MXFP4 | Prepacked):
        raise ValueError("grouped_linear1 writes MXFP8 for MXFP4 weights, widened or not, and BF16 for BF16 weights")
    if len(weights) != grouped.num_rows or tuple(values.shape) != wanted:
        given = f"{list(weights.shape)} and {list(values.shape)}"
        raise ValueError(f"grouped_linear1 needs weights [{wanted[0]}] and out {list(wanted)}, got {given}")
    assert all(each.is_contiguous() for each in (values, weights)), (values.stride(), weights.stride())


def builds(target: Target) -> list[Build]:
    """All tiles, with DeepSeek-V4-Pro's sizes and activation, rows where the source says."""
    own: dict[str, str | None] = {"source": "*i32", "weights": "*fp32"}
    kinds: dict[str, dict[str, str | None]] = {
        "mxfp4": {**own, "out": "*u8", "out_scales": "*u8"},
        "wide": {**own, "out": "*bf16", "out_scales": None},
        "bf16": {**own, "out": "*bf16", "out_scales": None},
    }
    fixed = {"K": 7168, "N": 6144, **constants_of(SWIGLU.with_limit(10.0))}
    return builds_of(target, _linear1_kernel, "V4-Pro", fixed, kinds)
