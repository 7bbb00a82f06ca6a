"""How operands lie for the kernels: gate and up rows in turns, BF16 rows in the order of the sum, prepacked weights."""

# I intermediate   W width of a row   K the summed dimension   R rows   e experts   N outputs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4


def interleave_gate_up(weight: Tensor) -> Tensor:
    """Rows of [..., 2I, W], gate first, in turns. Packed values, scales and BF16 alike.

    [g0, g1, g2, u0, u1, u2]  ->  [g0, u0, g1, u1, g2, u2]
    """
    return torch.stack(weight.chunk(2, -2), -2).flatten(-3, -2)


def separate_gate_up(weight: Tensor) -> Tensor:
    """Inverse of interleave_gate_up().    [g0, u0, g1, u1, g2, u2]  ->  [g0, g1, g2, u0, u1, u2]"""
    return torch.cat((weight[..., 0::2, :], weight[..., 1::2, :]), -2)


@dataclass(frozen=True, slots=True)
class Wide:
    """Rows of MXFP8 as BF16, which holds them exactly: values [R, K] bfloat16, each 32 of K in the order of the sum.

    That order is what `fp4.decode_e2m1` gives weights: place 8q + 4h + i in memory is place 8i + 2q + h of the sum.
    """

    values: Tensor


def in_sum_order(rows: Tensor) -> Tensor:
    """rows [..., K] of any dtype, each 32 of K put into the order of the sum.

    0 1 2 ... 31  ->  0 4 8 12 16 20 24 28 | 1 5 9 ... 29 | 2 6 ... 30 | 3 7 ... 31
    """
    blocks: Tensor = rows.unflatten(-1, (-1, 4, 2, 4))  # word, half, register
    return blocks.movedim(-1, -3).flatten(-4)


def in_memory_order(rows: Tensor) -> Tensor:
    """Inverse of in_sum_order()."""
    blocks: Tensor = rows.unflatten(-1, (-1, 4, 4, 2))  # register, word, half
    return blocks.movedim(-3, -1).flatten(-4)


# ---- MXFP4 weights for chips that multiply BF16 ----

# outputs of a panel, values of K of a chunk; a piece, one of each, is contiguous
PANEL, CHUNK = 64, 128
LARGEST_SMALL_SCALE = 128  # 2^126 times a scale, which turns codes into values (`fp4`), is below 2^128
# a word has codes i and i + 4 in its halves: where the magnitude's lowest bit and the sign of i lie in 16 bits
_MAGNITUDES, _SIGNS = (6, 3, 0, 9), (15, 12, 13, 14)


@dataclass(frozen=True, slots=True)
class Prepacked:
    """MXFP4 weights [e, N, K] in contiguous pieces of 64 outputs by 128 of K, codes where `fp4` takes them.

    words          [e, N / 64, K / 128, 64, 16] int32, both quotients rounded up, zeros beyond the last output and K
    scales         [e, N / 64, K / 128, 64, 4] uint8
    outputs        N
    inputs         K
    small_scales   no scale byte is above 128: one multiplication decodes a code
    """

    words: Tensor
    scales: Tensor
    outputs: int
    inputs: int
    small_scales: bool

    @classmethod
    def of(cls, weight: MXFP4) -> Prepacked:
        """weight [e, N, K]; waits for the device, for its largest scale."""
        words, scales = prepack(weight)
        largest = int(weight.scales.max()) if weight.scales.numel() else 0
        return cls(words, scales, weight.shape[1], weight.shape[2], largest <= LARGEST_SMALL_SCALE)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.words), self.outputs, self.inputs))

    def plain(self) -> MXFP4:
        """As it came."""
        return unprepack(self.words, self.scales, self.outputs, self.inputs)

    def __getitem__(self, experts: slice) -> Prepacked:
        return Prepacked(self.words[experts], self.scales[experts], self.outputs, self.inputs, self.small_scales)


def prepacked_shapes(outputs: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one expert's words and scales."""
    pieces = (math.ceil(outputs / PANEL), math.ceil(inputs / CHUNK), PANEL)
    return (*pieces, CHUNK // 8), (*pieces, CHUNK // BLOCK)


def prepack(weight: MXFP4) -> tuple[Tensor, Tensor]:
    """weight [..., N, K] -> words and scales as in Prepacked"""
    words = weight.packed.contiguous().view(torch.int32)
    return _in_pieces(spread_codes(words), CHUNK // 8), _in_pieces(weight.scales, CHUNK // BLOCK)


def unprepack(words: Tensor, scales: Tensor, outputs: int, inputs: int) -> MXFP4:
    """Inverse of prepack()."""
    words = gather_codes(_in_rows(words, outputs, inputs // 8))
    return MXFP4(words.contiguous().view(torch.uint8), _in_rows(scales, outputs, inputs // BLOCK).contiguous())


def _in_pieces(rows: Tensor, width: int) -> Tensor:
    """[..., N, W] -> [..., N / 64, W / width, 64, width], filled up with zeros"""
    missing = -rows.shape[-1] % width, -rows.shape[-2] % PANEL
    rows = torch.nn.functional.pad(rows, (0, missing[0], 0, missing[1])) if any(missing) else rows
    pieces: Tensor = rows.unflatten(-1, (-1, width)).unflatten(-3, (-1, PANEL))
    return pieces.transpose(-3, -2).contiguous()


def _in_rows(pieces: Tensor, outputs: int, width: int) -> Tensor:
    """Inverse of _in_pieces()."""
    rows: Tensor = pieces.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return rows[..., :outputs, :width]


def spread_codes(words: Tensor) -> Tensor:
    """words int32 of eight E2M1 codes, the first in the lowest bits -> the same codes where the decoder takes them.

    Code i lies in the lower half of its word, code i + 4 likewise in the higher: magnitudes of codes 0 to 3 begin at
    bits 6, 3, 0 and 9, their signs are bits 15, 12, 13 and 14.
        code 0 is 3 (1.5), code 5 is 9 (-0.5)  ->  0x000000C0 | 1 << (16 + 3) | 1 << (16 + 12)
    """
    spread = torch.zeros_like(words)
    for code in range(8):
        half, register = divmod(code, 4)
        for start, width, place in ((0, 3, _MAGNITUDES[register]), (3, 1, _SIGNS[register])):
            spread |= _moved(words, 4 * code + start, 16 * half + place, width)
    return spread


def gather_codes(words: Tensor) -> Tensor:
    """Inverse of spread_codes()."""
    gathered = torch.zeros_like(words)
    for code in range(8):
        half, register = divmod(code, 4)
        for start, width, place in ((0, 3, _MAGNITUDES[register]), (3, 1, _SIGNS[register])):
            gathered |= _moved(words, 16 * half + place, 4 * code + start, width)
    return gathered


def _moved(words: Tensor, start: int, place: int, width: int) -> Tensor:
    """Bits [start, start + width) of int32 words, at `place`; all others are zero."""
    field = (words >> start) & ((1 << width) - 1)  # the sign that >> brings in is masked off
    return field << place
