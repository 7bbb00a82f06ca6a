"""What a dispatched row looks like on the wire, and how the experts read it.

A row is the token in the dispatch format, then its top-k weight in FP32. Which expert a row is for is not in it:
rows are ordered by expert, and the counts, exchanged once per call, say the rest.
    mxfp8   H bytes E4M3, H/32 bytes UE8M0, 4 bytes weight
    bf16    2H bytes BF16, 4 bytes weight
"""

# T tokens of this rank   H hidden   R rows   B bytes of a token on the wire

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP8, dequantize_mxfp8, quantize_mxfp8, stretches

WEIGHT_BYTES = 4
DISPATCH_FORMATS = ("mxfp8", "bf16", "auto")  # auto picks one of the others


@dataclass(frozen=True, slots=True)
class Wire:
    """Encodes tokens for the journey and decodes rows after it.

    round_on_arrival: a bf16 wire to experts whose arithmetic takes MXFP8; they round after the journey, and the
    bits are those of an mxfp8 wire.
    """

    dispatch_format: str
    hidden: int
    round_on_arrival: bool

    @property
    def token_bytes(self) -> int:
        """B"""
        return self.hidden + self.hidden // BLOCK if self.dispatch_format == "mxfp8" else 2 * self.hidden

    @property
    def row_bytes(self) -> int:
        """Bytes of one dispatched row, B + 4."""
        return self.token_bytes + WEIGHT_BYTES

    def encode(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """tokens [T, H] bfloat16 into rows [T, B + 4] uint8, the weight's place still empty."""
        for part in stretches(len(tokens), self.hidden):
            self._encode(tokens[part], rows[part])
        return rows

    def address(self, rows: Tensor, weights: Tensor) -> None:
        """Writes weights [R] float32 into their place in rows [R, B + 4]."""
        rows[:, self.token_bytes :] = weights.contiguous().view(torch.uint8).view(-1, WEIGHT_BYTES)

    @property
    def in_place(self) -> bool:
        """Whether rows hold the tokens as the experts take them."""
        return self.dispatch_format == "bf16" and not self.round_on_arrival

    def tokens(self, rows: Tensor) -> Tensor:
        """Where in_place: a view of rows [R, B + 4] uint8 -> [R, H] bfloat16, of which each row stands alone."""
        return rows.view(torch.bfloat16)[:, : self.hidden]

    def weights(self, rows: Tensor) -> Tensor:
        """rows [R, B + 4] uint8 -> weights [R] float32"""
        return _copy(rows[:, self.token_bytes :]).view(torch.float32).flatten()

    def decode(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """rows [R, B + 4] uint8 into tokens [R, H] bfloat16 as the experts take them, which is returned."""
        for part in stretches(len(rows), self.hidden):
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
            values = rows[:, : self.hidden].view(torch.float8_e4m3fn)
            dequantize_mxfp8(MXFP8(values, rows[:, self.hidden : self.token_bytes]), out=out)
            return
        tokens = _copy(rows[:, : self.token_bytes]).view(torch.bfloat16)
        if self.round_on_arrival:
            dequantize_mxfp8(quantize_mxfp8(tokens), out=out)
        else:
            out.copy_(tokens)


def _copy(columns: Tensor) -> Tensor:
    """contiguous(), but of a single row too: only a copy starts where wider dtypes may be read."""
    return columns.clone(memory_format=torch.contiguous_format)
