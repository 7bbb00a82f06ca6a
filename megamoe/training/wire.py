"""Gradients on the wire: rows of outputs' gradients on their way out, rows of tokens' gradients on their way home."""

# H hidden   n rows   R rows of a buffer   B bytes of a row

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import BLOCK
from megamoe.routing.wire import Wire
from megamoe.schedule.backward import GRADIENT_FORMATS


@dataclass(frozen=True, slots=True)
class GradientWire(Wire):
    """A token's output gradient, and before it the token itself where tokens are dispatched again.

    tokens   how the forward encoded tokens; None where they are kept
    """

    token_wire: Wire | None = None

    @property
    def row_bytes(self) -> int:
        return self.gradient_begin + -(-self.token_bytes // 16) * 16

    @property
    def gradient_begin(self) -> int:
        """Where in a row the gradient begins, in bytes."""
        return 0 if self.token_wire is None else self.token_wire.row_bytes

    def gradients(self, rows: Tensor) -> Tensor:
        """rows [R, B] uint8 -> the part that holds gradients"""
        return rows[:, self.gradient_begin :]

    def forward_tokens(self, rows: Tensor) -> Tensor:
        """rows [R, B] uint8 -> the part that holds tokens, as the forward's wire has them"""
        return rows[:, : self.gradient_begin]


@dataclass(frozen=True, slots=True)
class HomeWire:
    """A row on its way home: the gradient of a token's row, and the gradient of its top-k weight in FP32 behind it."""

    gradient_format: str
    hidden: int

    @property
    def wire(self) -> Wire:
        return Wire(self.gradient_format, self.hidden, round_on_arrival=False)

    @property
    def row_bytes(self) -> int:
        return self.wire.row_bytes + 16

    @property
    def in_place(self) -> bool:
        return self.gradient_format == "bf16"

    def rows(self, results: Tensor) -> Tensor:
        """results [R, B] uint8, in place -> [R, H] bfloat16, of a stride"""
        return self.wire.tokens(results)

    def weights(self, results: Tensor) -> Tensor:
        """results [R, B] uint8 -> [R] float32, of a stride"""
        begin = self.wire.row_bytes
        return results[:, begin : begin + 4].view(torch.float32).squeeze(1)

    def encode(self, rows: Tensor, results: Tensor, goes: Tensor) -> None:
        """rows [n, H] bfloat16 to rows goes [n] of results."""
        encoded = rows.new_empty(len(rows), self.wire.row_bytes, dtype=torch.uint8)
        results[:, : self.wire.row_bytes].index_copy_(0, goes, self.wire.encode(rows, encoded))

    def decode(self, results: Tensor) -> Tensor:
        """results [R, B] uint8 -> [R, W] bfloat16, contiguous, the first H of W columns being the rows"""
        if self.in_place:
            return results.view(torch.bfloat16)
        rows = torch.empty(len(results), self.hidden, dtype=torch.bfloat16, device=results.device)
        return self.wire.decode(results[:, : self.wire.row_bytes], rows)


def check_gradient_format(gradient_format: str, hidden: int) -> None:
    """ValueError for a format that gradients do not travel in."""
    if gradient_format not in GRADIENT_FORMATS:
        raise ValueError(f"gradient_format must be one of {', '.join(GRADIENT_FORMATS)}, got {gradient_format!r}")
    if gradient_format == "mxfp8" and hidden % BLOCK:
        raise ValueError(
            f'hidden {hidden} is not a multiple of {BLOCK}, the block of MXFP8: use gradient_format="bf16"'
        )
