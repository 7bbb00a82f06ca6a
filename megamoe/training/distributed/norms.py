"""Norms of gradients by partial sums in a written order, so that their bits depend on values and shapes alone.

Of a tensor [D, ...] each slice along dimension 0 has a partial sum of its own. A slice's values are cut into blocks
of BLOCK, the last one filled up with zeros; blocks are added to each other ascending, lane by lane; then lanes are
halved, the upper half added to the lower, until one is left. Slices are halved likewise. All of it is in FP64, where
squares of FP32 and BF16 values are exact.
"""

# D slices   N values of a slice

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 14
_AT_ONCE = 1 << 16  # values that are in FP64 at one time


@dataclass(frozen=True, slots=True)
class Norm:
    """The p-norm: (sum of |x|^p)^(1/p), or the largest |x| where p is infinite. ValueError where p is not above 0."""

    p: float

    def __post_init__(self) -> None:
        if not self.p > 0:
            raise ValueError(f"norm_type must be above 0, math.inf included, got {self.p}")

    @property
    def largest(self) -> bool:
        """Whether it is a maximum, and no sum."""
        return math.isinf(self.p)

    def of_slices(self, x: Tensor) -> Tensor:
        """x [D, ...] floats -> [D] float64, what each slice adds to the norm; a scalar has one slice.

        [[3., 4.], [0., 1.]] -> [25., 1.] where p is 2
        """
        if not x.numel():
            return x.new_zeros(len(x), dtype=torch.float64)
        rows = x.detach().reshape(len(x) if x.dim() else 1, -1)
        if self.largest:
            return rows.abs().amax(1).to(torch.float64)
        width = min(BLOCK, 1 << (rows.shape[1] - 1).bit_length())
        num_rows = max(1, _AT_ONCE // width)
        return torch.cat([self._of_rows(some, width) for some in torch.split(rows, num_rows)])

    def _of_rows(self, rows: Tensor, width: int) -> Tensor:
        first, *others = torch.split(rows, width, 1)
        sums = rows.new_zeros(len(rows), width, dtype=torch.float64)
        sums[:, : first.shape[1]] = self._powers(first)
        for block in others:
            sums[:, : block.shape[1]] += self._powers(block)
        return _halved(sums)

    def _powers(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        if self.p == 2:
            return wide.mul_(wide)
        wide = wide.abs_()
        return wide if self.p == 1 else wide.pow_(self.p)

    def joined(self, partials: Tensor) -> Tensor:
        """Partials [D] float64 of slices or of tensors -> what they add together, a scalar."""
        if not len(partials):
            return partials.new_zeros(())
        return partials.amax() if self.largest else _halved(partials.unsqueeze(0)).squeeze(0)

    def total(self, joined: Tensor) -> Tensor:
        """What all of it adds -> the norm, a scalar of float32."""
        if self.largest or self.p == 1:
            return joined.to(torch.float32)
        return (joined.sqrt() if self.p == 2 else joined.pow(1 / self.p)).to(torch.float32)


def _halved(sums: Tensor) -> Tensor:
    """[M, W] -> [M]: 1 2 3 4 5 -> 1+4 2+5 3 -> 1+4+3 2+5 -> 1+4+3+2+5"""
    while sums.shape[1] > 1:
        half = -(-sums.shape[1] // 2)
        lower, upper = sums[:, :half].clone(), sums[:, half:]
        lower[:, : upper.shape[1]] += upper
        sums = lower
    return sums[:, 0]
