"""How weights lie for the kernels: gate and up rows in turns, so that a tile of Linear-1 has both of each column."""

# I intermediate   W width of a row

from __future__ import annotations

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
