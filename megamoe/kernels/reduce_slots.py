"""The slot sum: each token's rows in ascending slot order, in FP32 from zero, rounded once."""

# T tokens   H hidden   K experts per token   N rows that came home

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.formats import MXFP8, take_rows
from megamoe.kernels.chips.targets import OPTIONS, Build, Target
from megamoe.kernels.device.rounding import decode_mxfp8, round_to_bf16


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program sums: columns of one token."""

    columns: int
    num_warps: int


# few tokens are cut small, so that every multiprocessor has a piece
FEW, MANY = Tile(512, 1), Tile(2048, 4)
_FEW_TOKENS = 64


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions", "scales"])
def _reduce_slots_kernel(
    rows,
    scales,
    positions,
    out,
    num_rows,
    hidden,
    row_stride,
    scale_stride,
    NUM_SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: COLUMNS columns of one token.

    rows [N + 1, H] bfloat16 and no scales, or E4M3 codes as uint8 with scales [N + 1, H/32] uint8; rows of each a
    stride apart; positions [T, NUM_SLOTS] int64; out [T, H] bfloat16
        positions of the token [2, 0], rows [a, b, c, 0], N 3  ->  0 + c + a
        positions of the token [3, 1]                          ->  0 + 0 + b, and row 3 is not read
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(NUM_SLOTS):
        row = tl.load(positions + token * NUM_SLOTS + slot)
        width = tl.where(row < num_rows, hidden, 0)  # the row of zeros is not worth reading
        piece = tl.load(rows + row * row_stride + columns, mask=columns < width, other=0)
        if scales is not None:
            exponents = tl.load(scales + row * scale_stride + columns // 32, mask=columns < width, other=127)
            total += decode_mxfp8(piece, exponents)
        else:
            total += piece.to(tl.float32)
    tl.store(out + token * hidden + columns, round_to_bf16(total), mask=columns < hidden)


def reduce_slots(rows: Tensor | MXFP8, positions: Tensor) -> Tensor:
    """Sums each token's rows in ascending slot order in FP32 from zero, rounds once to BF16.

    rows [N + 1, H] bfloat16 or MXFP8, the last one zero; positions [T, K] int64, N for a masked slot -> [T, H] bfloat16
        rows = [a, b, c, 0]   positions = [[2, 0], [3, 1]]  ->  [c + a, b]
    """
    values, scales = (rows.values.view(torch.uint8), rows.scales) if isinstance(rows, MXFP8) else (rows, None)
    (num_tokens, num_slots), hidden = positions.shape, values.shape[1]
    for each in (values, values if scales is None else scales):
        assert each.stride(1) == 1, f"columns of rows must lie side by side, their stride is {each.stride(1)}"
    assert positions.is_contiguous(), f"positions must be contiguous, strides are {positions.stride()}"
    out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=positions.device)
    tile = FEW if num_tokens < _FEW_TOKENS else MANY
    if out.numel():
        grid = (num_tokens, triton.cdiv(hidden, tile.columns))
        _reduce_slots_kernel[grid](
            values,
            scales,
            positions,
            out,
            len(values) - 1,
            hidden,
            values.stride(0),
            0 if scales is None else scales.stride(0),
            NUM_SLOTS=num_slots,
            COLUMNS=tile.columns,
            num_warps=tile.num_warps,
            **OPTIONS,
        )
    return out


def reduce_slots_torch(rows: Tensor | MXFP8, positions: Tensor) -> Tensor:
    """What reduce_slots() means, one slot after the other."""
    hidden = (rows if isinstance(rows, Tensor) else rows.values).shape[1]
    total = torch.zeros(len(positions), hidden, dtype=torch.float32, device=positions.device)
    for slot in positions.unbind(1):
        total += take_rows(rows, slot)
    return total.to(torch.bfloat16)


def builds(_: Target) -> list[Build]:
    """Both tiles, for six slots a token as DeepSeek-V4 has and for eight; rows that came home as MXFP8 for six."""
    return [
        *(_build(tile, num_slots, "*bf16", None) for tile in (FEW, MANY) for num_slots in (6, 8)),
        *(_build(tile, 6, "*u8", "*u8") for tile in (FEW, MANY)),
    ]


def _build(tile: Tile, num_slots: int, rows: str, scales: str | None) -> Build:
    constants: dict[str, int | None] = {"NUM_SLOTS": num_slots, "COLUMNS": tile.columns}
    aligned = {"rows", "out", "hidden", "row_stride"}
    if scales is None:
        constants |= {"scales": None}
    else:
        aligned |= {"scale_stride"}  # of one buffer with the rows
    return Build(
        label=f"{tile.columns} columns, {num_slots} slots" + (", mxfp8" if scales else ""),
        kernel=_reduce_slots_kernel,
        signature={
            "rows": rows,
            "scales": scales or "constexpr",
            "positions": "*i64",
            "out": "*bf16",
            **dict.fromkeys(("num_rows", "hidden", "row_stride", "scale_stride"), "i32"),
            "NUM_SLOTS": "constexpr",
            "COLUMNS": "constexpr",
        },
        constants=constants,
        aligned=frozenset(aligned),
        num_warps=tile.num_warps,
    )
