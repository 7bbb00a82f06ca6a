"""Batches that ranks share, cut into a slice for each and put together again, with gradients through both."""

# T tokens of the batch   P ranks that share it

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def take_slice(batch: Tensor, group: dist.ProcessGroup) -> Tensor:
    """batch [T, ...], the same on all ranks -> this rank's rows. Every rank's gradient is that of the whole batch.

    7 rows on 3 ranks: rows 0 to 2, 3 to 5, and 6
    """
    if not (torch.is_grad_enabled() and batch.requires_grad):
        return batch[_rows(len(batch), group)]
    out: Tensor = _Take.apply(batch, group)  # type: ignore[no-untyped-call]
    return out


def gather_slices(own: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Each rank's rows, as take_slice() cuts them -> all T on every rank, whose gradients must be the same on all."""
    out: Tensor = _Gather.apply(own, num_tokens, group)  # type: ignore[no-untyped-call]
    return out


def _rows(num_tokens: int, group: dist.ProcessGroup) -> slice:
    size = -(-num_tokens // group.size())
    return slice(group.rank() * size, (group.rank() + 1) * size)


def _gathered(own: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Slices of equal size but for the last ones, which may be shorter or empty, are filled up for the exchange."""
    size = -(-num_tokens // group.size())
    filled = own.new_zeros(size, *own.shape[1:])
    filled[: len(own)] = own
    whole = own.new_zeros(group.size() * size, *own.shape[1:])
    if size:
        dist.all_gather_into_tensor(whole, filled, group=group)
    return whole[:num_tokens]


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, batch: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.num_tokens, ctx.group = len(batch), group
        return batch[_rows(len(batch), group)].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.num_tokens, ctx.group), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.rows = _rows(num_tokens, group)
        return _gathered(own, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.rows], None, None
