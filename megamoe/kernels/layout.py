"""How operands lie for the kernels: gate and up rows in turns, and rows of BF16 in the order in which K is summed."""

# I intermediate   W width of a row   K the summed dimension   R rows

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
