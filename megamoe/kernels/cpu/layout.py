"""How the CPU's products hold weights: blocks of 32 outputs, so that one load has what many outputs need next.

Rows of the weight are padded with zeros to a multiple of 32, and so is K for BF16. Packing only moves bits.
"""

# N outputs   K inputs   B blocks of 32 outputs   G groups of 32 along K

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4

OUTPUTS = 32
_BLOCKS_AT_ONCE = 8  # so that what packing needs meanwhile is small
# Of codes [block, h, l, o, eight, a, b, c], output 16 h + 4 l + o and K 8 eight + 4 a + 2 b + c: the dimensions as they
# lie in memory, the two nibbles of a byte last.
_ORDERS = {"bytes": (0, 4, 5, 2, 1, 3, 7, 6), "words": (0, 4, 1, 2, 3, 7, 5, 6)}


def num_blocks(outputs: int) -> int:
    """B"""
    return -(-outputs // OUTPUTS)


def mxfp4_shapes(outputs: int, inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the packed values and of the scales, both uint8."""
    blocks = num_blocks(outputs)
    return (blocks, inputs // 4, 64), (blocks, inputs // BLOCK, OUTPUTS)


def bf16_shape(outputs: int, inputs: int) -> tuple[int, ...]:
    """Shape of the values, bfloat16: a block has pairs of K, each for 32 outputs."""
    return num_blocks(outputs), -(-inputs // BLOCK) * BLOCK // 2, OUTPUTS, 2


def pack_mxfp4(weight: MXFP4, order: str = "bytes", out: MXFP4Blocks | None = None) -> MXFP4Blocks:
    """weight [N, K] -> packed uint8 [B, K/4, 64], scales uint8 [B, G, 32], in `out` if there is one.

    order "bytes": byte 16 l + 8 h + 2 o + j of the 64 belongs to output 16 h + 4 l + o: its low nibble to the 4 values'
    j, its high nibble to their 2 + j.
    order "words": byte 64 h + 4 o + 2 p + b of two times 64 belongs to output 16 h + o: its low nibble to the 8 values'
    4 b + p, its high nibble to their 4 b + 2 + p.
    """
    outputs, inputs = weight.shape
    shapes = mxfp4_shapes(outputs, inputs)
    packed, scales = out or (weight.packed.new_empty(shapes[0]), weight.packed.new_empty(shapes[1]))
    for first in range(0, shapes[0][0], _BLOCKS_AT_ONCE):
        rows = slice(first * OUTPUTS, (first + _BLOCKS_AT_ONCE) * OUTPUTS)
        part = packed[first : first + _BLOCKS_AT_ONCE]
        eights = _pad(weight.packed[rows].clone(memory_format=torch.contiguous_format), OUTPUTS, 0).view(torch.int32)
        _swap(eights, 4, 0x00F000F0)  # codes 4 a + 2 b + c of eight to 4 a + 2 c + b
        if order == "words":
            _swap(eights, 8, 0x0000FF00)  # and to 4 c + 2 a + b
            part.view(torch.int32).view(-1, inputs // 8, OUTPUTS).copy_(eights.view(-1, OUTPUTS, inputs // 8).mT)
        else:
            fours = eights.view(torch.int16).view(-1, 2, 4, 4, inputs // 4).permute(0, 4, 2, 1, 3)
            part.view(torch.int16).view(fours.shape).copy_(fours)
        block_scales = _pad(weight.scales[rows], OUTPUTS, 0).view(-1, OUTPUTS, inputs // BLOCK)
        scales[first : first + _BLOCKS_AT_ONCE] = block_scales.transpose(1, 2)
    return packed, scales


def _swap(words: Tensor, distance: int, low: int) -> None:
    """In place, the bits of the mask `low` in each word of 32 change places with those `distance` above them."""
    moved = (words >> distance).bitwise_xor_(words).bitwise_and_(low)
    words.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(distance))


def unpack_mxfp4(packed: Tensor, scales: Tensor, outputs: int, order: str = "bytes") -> MXFP4:
    """Inverse of pack_mxfp4(), for any number of matrices: packed [..., B, K/4, 64] -> MXFP4 [..., N, K]"""
    *lead, blocks, fours, _ = packed.shape
    sizes = (-1, 2, 4, 4, fours // 2, 2, 2, 2)
    permuted = [sizes[dim] for dim in _ORDERS[order][:-1]]
    bytes_ = packed.reshape(permuted)
    codes = torch.stack((bytes_ & 15, bytes_ >> 4), -1)
    codes = codes.permute([_ORDERS[order].index(dim) for dim in range(8)])
    rows = (codes[..., 0] | (codes[..., 1] << 4)).reshape(*lead, blocks * OUTPUTS, fours * 2)
    plain = scales.transpose(-1, -2).reshape(*lead, blocks * OUTPUTS, fours * 4 // BLOCK)
    return MXFP4(rows[..., :outputs, :].contiguous(), plain[..., :outputs, :].contiguous())


def pack_bf16(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """weight [N, K] bfloat16 -> [B, ceil(K/32) * 16, 32, 2], in `out` if there is one."""
    padded = _pad(_pad(weight, OUTPUTS, 0), BLOCK, 1)
    rows, inputs = padded.shape
    # pairs as words of 32: those move three times as fast
    pairs = padded.contiguous().view(torch.int32).view(rows // OUTPUTS, OUTPUTS, inputs // 2)
    if out is None:
        out = weight.new_empty(rows // OUTPUTS, inputs // 2, OUTPUTS, 2)
    out.view(torch.int32).squeeze(-1).copy_(pairs.mT)
    return out


def unpack_bf16(blocks: Tensor, outputs: int, inputs: int) -> Tensor:
    """Inverse of pack_bf16(), for any number of matrices: [..., B, ., 32, 2] -> [..., N, K]"""
    plain = blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)
    return plain[..., :outputs, :inputs].contiguous()


def _pad(matrix: Tensor, multiple: int, dim: int) -> Tensor:
    missing = -matrix.shape[dim] % multiple
    if not missing:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat((matrix, matrix.new_zeros(shape)), dim)


MXFP4Blocks = tuple[Tensor, Tensor]
