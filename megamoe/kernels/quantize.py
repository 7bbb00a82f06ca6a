"""Rows to the wire: BF16 to E4M3 with one UE8M0 scale per 32, each token to all rows that it fills, read once.

Results of experts go home by it likewise, each to its one row. Or to what the experts read, where nothing travels and
the chip multiplies BF16: rounded alike, and widened (`layout`).
"""

# T tokens   H hidden   R rows   n rows that are filled   G = H / 32 blocks of a row

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.formats import BLOCK, MXFP8, dequantize_mxfp8, quantize_mxfp8
from megamoe.kernels.chips.targets import OPTIONS, Build, Target
from megamoe.kernels.device.rounding import round_to_mxfp8, widen_block
from megamoe.kernels.layout import Wide, in_sum_order


@dataclass(frozen=True, slots=True)
class Filling:
    """Which rows each token fills.

    num_rows   R, rows that there are, filled or not
    starts     [T + 2] int64; token t fills starts[t]:starts[t + 1] of `rows`, padding starts[T]:starts[T + 1]; None
               where each token fills one row, rows[t]
    rows       [n] int64, rows by token, those of padding last; rows that are not listed stay as they are
    tokens     [n] int64, the token of each of `rows`, T for padding, which is zeros
        of index [2, 0, -1, 2], T 3  ->  R 4, starts [0, 1, 1, 3, 4], rows [1, 0, 3, 2], tokens [0, 2, 2, 3]
    """

    num_rows: int
    starts: Tensor | None
    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, index: Tensor, num_tokens: int) -> Filling:
        """Every row is filled: by token index[r], or padding where that is -1. index [R] int64; waits for no device."""
        rows = torch.arange(len(index), device=index.device)
        return cls.at(torch.where(index < 0, num_tokens, index), rows, num_tokens, len(index))

    @classmethod
    def at(cls, tokens: Tensor, rows: Tensor, num_tokens: int, num_rows: int) -> Filling:
        """Row rows[i] of num_rows holds token tokens[i], padding where that is num_tokens; both [n] int64."""
        tokens, order = tokens.sort(stable=True)
        bounds = torch.arange(num_tokens + 2, device=tokens.device)
        return cls(num_rows, torch.searchsorted(tokens, bounds), rows[order], tokens)

    @classmethod
    def scattered(cls, rows: Tensor, num_rows: int) -> Filling:
        """Row rows[t] of num_rows holds token t; rows [T] int64, each another."""
        return cls(num_rows, None, rows, torch.arange(len(rows), device=rows.device))


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program rounds: blocks of one token."""

    blocks: int
    num_warps: int


# few tokens are cut small, so that every multiprocessor has a piece
FEW, MANY = Tile(8, 1), Tile(64, 4)
_FEW_TOKENS = 64


# parts of buffers begin anywhere: a kernel that was compiled for one place runs at all of them
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["starts", "rows", "scales"])
def _quantize_kernel(
    tokens,
    starts,
    rows,
    values,
    scales,
    num_tokens,
    hidden,
    token_stride,
    value_stride,
    scale_stride,
    BLOCKS: tl.constexpr,
):
    """One program: BLOCKS blocks of one token, to every row that it fills, then of its share of the padding.

    tokens [T, H] bfloat16, values [R, H] and scales [R, G] uint8, or values bfloat16 and no scales; rows of each a
    stride apart
        starts [0, 1, 1, 3, 4], rows [1, 0, 3, 2], T 3: program 2 reads token 2 and writes rows 0 and 3;
        program 0 writes row 1, and row 2 with zeros and scale byte 105, which is 2^-22, the contract's least
        no starts, rows [1, 0, 3]: program 2 reads token 2 and writes row 3, and with no rows either row 2
    """
    token = tl.program_id(0)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
    has_block, has_column = blocks * 32 < hidden, columns < hidden
    first, last = token, token + 1
    if starts is not None:
        first, last = tl.load(starts + token), tl.load(starts + token + 1)
    if first < last:
        piece = tl.load(tokens + token.to(tl.int64) * token_stride + columns, mask=has_column, other=0.0)
        codes, exponents = round_to_mxfp8(piece.to(tl.float32))
        for place in range(first, last):
            row = token.to(tl.int64)
            if rows is not None:
                row = tl.load(rows + place)
            if scales is None:
                tl.store(values + row * value_stride + columns, widen_block(codes, exponents), mask=has_column)
            else:
                tl.store(values + row * value_stride + columns, codes, mask=has_column)
                tl.store(scales + row * scale_stride + blocks, exponents, mask=has_block)
    if starts is not None:
        for place in range(tl.load(starts + num_tokens) + token, tl.load(starts + num_tokens + 1), num_tokens):
            row = tl.load(rows + place)
            zeros = tl.zeros((BLOCKS, 32), values.dtype.element_ty)
            tl.store(values + row * value_stride + columns, zeros, mask=has_column)
            if scales is not None:
                tl.store(scales + row * scale_stride + blocks, tl.full((BLOCKS,), 105, tl.uint8), mask=has_block)


def quantize(tokens: Tensor, filling: Filling | None, out: MXFP8 | Wide) -> None:
    """Rounds tokens [T, H] bfloat16 and puts each into the rows of out, [R, H], that it fills; H a multiple of 32.

    Without a filling row t holds token t.

    tokens and out's tensors may be columns of wider buffers. A row of padding becomes what a token of zeros would.
    ValueError where H is no multiple of 32, or out has other rows than the filling.
    """
    num_tokens, hidden = tokens.shape
    _check(tokens, filling, out)
    if not num_tokens:
        quantize_torch(tokens, filling, out)
        return
    tile = FEW if num_tokens < _FEW_TOKENS else MANY
    values, scales = (out.values.view(torch.uint8), out.scales) if isinstance(out, MXFP8) else (out.values, None)
    _quantize_kernel[(num_tokens, triton.cdiv(hidden // BLOCK, tile.blocks))](
        tokens,
        filling.starts if filling else None,
        filling.rows if filling else None,
        values,
        scales,
        num_tokens,
        hidden,
        tokens.stride(0),
        values.stride(0),
        0 if scales is None else scales.stride(0),
        BLOCKS=tile.blocks,
        num_warps=tile.num_warps,
        **OPTIONS,
    )


def quantize_torch(tokens: Tensor, filling: Filling | None, out: MXFP8 | Wide) -> None:
    """What quantize() means: rounds tokens and a row of zeros, then puts one in each place."""
    _check(tokens, filling, out)
    zeros = tokens.new_zeros(1, tokens.shape[1])
    rounded = quantize_mxfp8(torch.cat((tokens, zeros)))  # token T is the row of zeros
    every = torch.arange(len(tokens), device=tokens.device)
    rows, held = (filling.rows, filling.tokens) if filling else (every, every)
    if isinstance(out, MXFP8):
        out.values.view(torch.uint8)[rows] = rounded.values.view(torch.uint8)[held]
        out.scales[rows] = rounded.scales[held]
    else:
        out.values[rows] = in_sum_order(dequantize_mxfp8(rounded))[held]


def _check(tokens: Tensor, filling: Filling | None, out: MXFP8 | Wide) -> None:
    wanted = (filling.num_rows if filling else len(tokens), tokens.shape[1])
    if tuple(out.values.shape) != wanted:
        raise ValueError(f"quantize: out must have {list(wanted)} values, got {list(out.values.shape)}")
    strides = [each.stride(1) for each in ((out.values, out.scales) if isinstance(out, MXFP8) else (out.values,))]
    assert set(strides) == {1}, f"columns of out must lie side by side, strides are {strides}"


def builds(_: Target) -> list[Build]:
    """Both tiles: tokens with their rows, or one each, to MXFP8, tokens as they are to MXFP8 and widened."""
    strides = ("token_stride", "value_stride", "scale_stride")
    sizes = dict.fromkeys(("num_tokens", "hidden", *strides), "i32")
    kinds: dict[str, dict[str, str | None]] = {
        "": {"starts": "*i64", "rows": "*i64", "values": "*u8", "scales": "*u8"},
        ", a row each": {"starts": None, "rows": "*i64", "values": "*u8", "scales": "*u8"},
        ", straight": {"starts": None, "rows": None, "values": "*u8", "scales": "*u8"},
        ", straight, widened": {"starts": None, "rows": None, "values": "*bf16", "scales": None},
    }
    return [
        _build(tile, f"{tile.blocks} blocks{label}", {"tokens": "*bf16", **types, **sizes})
        for tile in (FEW, MANY)
        for label, types in kinds.items()
    ]


def _build(tile: Tile, label: str, types: Mapping[str, str | None]) -> Build:
    absent = {name: None for name, kind in types.items() if kind is None}
    return Build(
        label=label,
        kernel=_quantize_kernel,
        signature={**{name: kind or "constexpr" for name, kind in types.items()}, "BLOCKS": "constexpr"},
        constants={"BLOCKS": tile.blocks, **absent},
        aligned=frozenset(types) - frozenset(absent) - {"starts", "rows", "scales", "num_tokens"},
        num_warps=tile.num_warps,
    )
