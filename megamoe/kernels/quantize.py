"""Tokens to the wire: BF16 to E4M3 with one UE8M0 scale per 32, each token to all rows that it fills, read once."""

# T tokens   H hidden   R rows   G = H / 32 blocks of a row

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.formats import BLOCK, MXFP8, quantize_mxfp8
from megamoe.kernels.rounding import round_to_mxfp8
from megamoe.kernels.targets import OPTIONS, Build, Target


@dataclass(frozen=True, slots=True)
class Filling:
    """Which token each row holds, told both ways.

    index    [R] int64, the token of a row, -1 for a row of padding, which holds zeros
    starts   [T + 2] int64; token t fills starts[t]:starts[t + 1] of `rows`, padding starts[T]:starts[T + 1]
    rows     [R] int64, rows by token, those of padding last
        index [2, 0, -1, 2], T 3  ->  starts [0, 1, 1, 3, 4], rows [1, 0, 3, 2]
    """

    index: Tensor
    starts: Tensor
    rows: Tensor

    @classmethod
    def of(cls, index: Tensor, num_tokens: int) -> Filling:
        """The filling by index [R] int64 on its device, without waiting for it."""
        tokens, rows = torch.where(index < 0, num_tokens, index).sort(stable=True)
        bounds = torch.arange(num_tokens + 2, device=index.device)
        return cls(index, torch.searchsorted(tokens, bounds), rows)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program rounds: blocks of one token."""

    blocks: int
    num_warps: int


# few tokens are cut small, so that every multiprocessor has a piece
FEW, MANY = Tile(8, 1), Tile(64, 4)
_FEW_TOKENS = 64
_SCALE_OF_ZEROS = 105  # 2^-22, the contract's least


@triton.jit
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

    tokens [T, H] bfloat16, values [R, H] and scales [R, G] uint8, rows of each a stride apart
        starts [0, 1, 1, 3, 4], rows [1, 0, 3, 2], T 3: program 2 reads token 2 and writes rows 0 and 3;
        program 0 writes row 1, and row 2 with zeros and scale byte 105, which is 2^-22, the contract's least
    """
    token = tl.program_id(0)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
    has_block, has_column = blocks * 32 < hidden, columns < hidden
    first, last = tl.load(starts + token), tl.load(starts + token + 1)
    if first < last:
        piece = tl.load(tokens + token.to(tl.int64) * token_stride + columns, mask=has_column, other=0.0)
        codes, exponents = round_to_mxfp8(piece.to(tl.float32))
        for place in range(first, last):
            row = tl.load(rows + place)
            tl.store(values + row * value_stride + columns, codes, mask=has_column)
            tl.store(scales + row * scale_stride + blocks, exponents, mask=has_block)
    for place in range(tl.load(starts + num_tokens) + token, tl.load(starts + num_tokens + 1), num_tokens):
        row = tl.load(rows + place)
        tl.store(values + row * value_stride + columns, tl.zeros((BLOCKS, 32), tl.uint8), mask=has_column)
        tl.store(scales + row * scale_stride + blocks, tl.full((BLOCKS,), 105, tl.uint8), mask=has_block)


def quantize(tokens: Tensor, filling: Filling, out: MXFP8) -> None:
    """Rounds tokens [T, H] bfloat16 and puts each into the rows of out, [R, H], that it fills; H a multiple of 32.

    out's tensors may be columns of one wider buffer. A row of padding becomes what a token of zeros would.
    ValueError where H is no multiple of 32, or out has other rows than the filling.
    """
    num_tokens, hidden = tokens.shape
    _check(hidden, filling, out)
    if not num_tokens:
        out.values.zero_()
        out.scales.fill_(_SCALE_OF_ZEROS)
        return
    tile = FEW if num_tokens < _FEW_TOKENS else MANY
    values = out.values.view(torch.uint8)
    _quantize_kernel[(num_tokens, triton.cdiv(hidden // BLOCK, tile.blocks))](
        tokens,
        filling.starts,
        filling.rows,
        values,
        out.scales,
        num_tokens,
        hidden,
        tokens.stride(0),
        values.stride(0),
        out.scales.stride(0),
        BLOCKS=tile.blocks,
        num_warps=tile.num_warps,
        **OPTIONS,
    )


def quantize_torch(tokens: Tensor, filling: Filling, out: MXFP8) -> None:
    """What quantize() means: rounds tokens and a row of zeros, then takes a row for each place."""
    _check(tokens.shape[1], filling, out)
    zeros = tokens.new_zeros(1, tokens.shape[1])
    rounded = quantize_mxfp8(torch.cat((tokens, zeros)))  # index -1 is the row of zeros
    out.values.view(torch.uint8).copy_(rounded.values.view(torch.uint8)[filling.index])
    out.scales.copy_(rounded.scales[filling.index])


def _check(hidden: int, filling: Filling, out: MXFP8) -> None:
    wanted = (len(filling.index), hidden)
    if tuple(out.values.shape) != wanted:
        raise ValueError(f"quantize: out must have {list(wanted)} values, got {list(out.values.shape)}")
    strides = (out.values.stride(1), out.scales.stride(1))
    assert strides == (1, 1), f"columns of out must lie side by side, strides are {strides}"


def builds(_: Target) -> list[Build]:
    """Both tiles."""
    pointers = {"tokens": "*bf16", "starts": "*i64", "rows": "*i64", "values": "*u8", "scales": "*u8"}
    strides = ("token_stride", "value_stride", "scale_stride")
    sizes = dict.fromkeys(("num_tokens", "hidden", *strides), "i32")
    return [
        Build(
            label=f"{tile.blocks} blocks",
            kernel=_quantize_kernel,
            signature={**pointers, **sizes, "BLOCKS": "constexpr"},
            constants={"BLOCKS": tile.blocks},
            aligned=frozenset({*pointers, "hidden", *strides} - {"scales"}),
            num_warps=tile.num_warps,
        )
        for tile in (FEW, MANY)
    ]
