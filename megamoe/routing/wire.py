"""Tokens, pair records and results on the wire, and how each is written and read.

A row of the wire is one token in the dispatch format, filled up to a multiple of 16 bytes, which a GPU reads at once:
    mxfp8   H bytes E4M3, H/32 bytes UE8M0
    bf16    2H bytes BF16
A result is a row of H values in the combine format: mxfp8 as above, bf16 as it is. Results of a rank's own rows, which
go nowhere, are held in the same format, so that no bit depends on where an expert is.
The record of a (token, slot) pair is the row of the receiver's inbox that holds the token, and the pair's top-k weight:
INT32 and FP32. It names no expert: pairs are ordered by expert, and all ranks know the counts.
"""

# T tokens of this rank   H hidden   R rows   B bytes of a row   n pairs   C columns of a row of results

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP8, chunks, dequantize_mxfp8, quantize_mxfp8
from megamoe.kernels.cpu.library import chosen

DISPATCH_FORMATS = ("mxfp8", "bf16", "auto")  # auto picks one of the others
COMBINE_FORMATS = ("bf16", "mxfp8")


def pair_records(token_rows: Tensor, weights: Tensor) -> Tensor:
    """token_rows [n] int32, weights [n] float32 -> records [n, 2] int32"""
    return torch.stack((token_rows, weights.view(torch.int32)), 1)


def read_records(records: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of pair_records(); token_rows has a stride of 2."""
    return records[:, 0], records[:, 1].contiguous().view(torch.float32)


@dataclass(frozen=True, slots=True)
class Wire:
    """Encodes tokens for the journey and decodes rows after it; says how results lie that come home.

    round_on_arrival: a bf16 wire to experts whose arithmetic takes MXFP8; they round after the journey, and the
    bits are those of an mxfp8 wire.
    """

    dispatch_format: str
    hidden: int
    round_on_arrival: bool
    combine_format: str = "bf16"

    PAIR_BYTES: ClassVar[int] = 8

    @property
    def token_bytes(self) -> int:
        """Bytes of a token, without what a row is filled up with."""
        return _mxfp8_bytes(self.hidden) if self.dispatch_format == "mxfp8" else 2 * self.hidden

    @property
    def row_bytes(self) -> int:
        """B"""
        return _filled_up(self.token_bytes)

    @property
    def result_bytes(self) -> int:
        """Bytes of a result on its way home."""
        return 2 * self.hidden if self.combine_format == "bf16" else _filled_up(_mxfp8_bytes(self.hidden))

    @property
    def in_place(self) -> bool:
        """Whether rows are the tokens as the experts take them."""
        return self.dispatch_format == "bf16" and not self.round_on_arrival

    def encode(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens [T, H] bfloat16 into rows [T, B] uint8, which are returned."""
        library = chosen() if tokens.device.type == "cpu" and self.dispatch_format == "mxfp8" else None
        if library is not None:
            library.quantize(tokens, self.mxfp8(rows))
            return rows
        for part in chunks(len(tokens), self.hidden):
            self._encode(tokens[part], rows[part])
        return rows

    def tokens(self, rows: Tensor) -> Tensor:
        """rows [R, B] uint8 of a bf16 wire, seen as [R, H] bfloat16"""
        return rows.view(torch.bfloat16)[:, : self.hidden]

    def mxfp8(self, rows: Tensor) -> MXFP8:
        """rows [R, B] uint8 of an mxfp8 wire, seen as MXFP8 [R, H]"""
        return _as_mxfp8(rows, self.hidden)

    def result_rows(self, num_rows: int) -> tuple[tuple[int, int], torch.dtype]:
        """Shape [R, C] and dtype of a buffer of results."""
        if self.combine_format == "bf16":
            return (num_rows, self.hidden), torch.bfloat16
        return (num_rows, self.result_bytes), torch.uint8

    def results(self, rows: Tensor) -> Tensor | MXFP8:
        """Rows of such a buffer, seen as results [R, H]. Bytes that are all 0 are zeros, all 255 NaN."""
        return rows if self.combine_format == "bf16" else _as_mxfp8(rows, self.hidden)

    def decode(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """rows [R, B] uint8 into tokens [R, H] bfloat16 as the experts take them, which is returned."""
        library = chosen() if rows.device.type == "cpu" else None
        if library is not None and self.dispatch_format == "mxfp8":
            library.dequantize(self.mxfp8(rows), tokens)
            return tokens
        if library is not None and self.round_on_arrival:
            library.round(self.tokens(rows), tokens)
            return tokens
        for part in chunks(len(rows), self.hidden):
            self._decode(rows[part], tokens[part])
        return tokens

    def _encode(self, tokens: Tensor, rows: Tensor) -> None:
        if self.dispatch_format == "bf16":
            rows[:, : self.token_bytes] = tokens.view(torch.uint8)
            return
        quantized = quantize_mxfp8(tokens)
        rows[:, : self.hidden] = quantized.values.view(torch.uint8)
        rows[:, self.hidden : self.token_bytes] = quantized.scales

    def _decode(self, rows: Tensor, out: Tensor) -> None:
        if self.dispatch_format == "mxfp8":
            dequantize_mxfp8(self.mxfp8(rows), out=out)
            return
        tokens = self.tokens(rows)
        if self.round_on_arrival:
            dequantize_mxfp8(quantize_mxfp8(tokens), out=out)
        else:
            out.copy_(tokens)


def _mxfp8_bytes(hidden: int) -> int:
    return hidden + hidden // BLOCK


def _filled_up(num_bytes: int) -> int:
    """To a multiple of 16, which a GPU reads at once."""
    return -(-num_bytes // 16) * 16


def _as_mxfp8(rows: Tensor, hidden: int) -> MXFP8:
    """rows [R, B] uint8 -> MXFP8 [R, H]"""
    return MXFP8(rows[:, :hidden].view(torch.float8_e4m3fn), rows[:, hidden : _mxfp8_bytes(hidden)])
