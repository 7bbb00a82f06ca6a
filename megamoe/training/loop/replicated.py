"""Sums over the ranks of a group in order of rank: gradients of weights that every rank has whole, and other values."""

# P ranks   n values

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

import torch
from torch import Tensor, nn

from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.pairs import Label
from megamoe.training.distributed.mesh import ranks_of
from megamoe.training.distributed.wrappers import layers_on_several, said_of

_WHAT = "replicated gradients"
_BUCKET = 1 << 20  # values that are exchanged at a time


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], group: EPGroup) -> None:
    """Replaces each parameter's gradient by the sum over the group's ranks, the same bits on all of them.

    parameters   those that every rank has whole, in the same order on all ranks: attention, norms, embeddings. Not an
                 expert layer's, whose gradients are of the global batch already. Those without requires_grad are left
                 out; a rank without a gradient adds zeros, and where no rank has one there is none afterwards

    Sums are in FP32, rank 0 first, and rounded once to the gradient's dtype. A rank receives every other rank's values:
    for a model whose dense part is large, over many ranks, DistributedDataParallel moves less. With a loss that each
    rank divides by the global batch's tokens the sum is the global batch's gradient. ValueError on all ranks, and no
    gradient has changed, where they bring different sizes, and where one brings an expert layer's parameters, or
    gradients that are sparse or DTensors; PeerError where a rank is lost.
    """
    trained = [each for each in parameters if each.requires_grad]
    if group.transport is None or not trained:
        return
    shapes, complaint = [tuple(each.shape) for each in trained], _complaint(trained, group)
    with group.turn(_WHAT, trained[0].device), group.unbroken(_WHAT, group.own_status.calls):
        own = [each.grad is not None for each in trained]
        values, lacking = sum(each.numel() for each in trained), not all(own)
        if _agree(len(trained), values, group, shapes, complaint, lacking):
            own = _gather(torch.tensor(own), group).any(0).tolist()
        for bucket in _buckets([each for each, found in zip(trained, own, strict=True) if found]):
            total = _sum(torch.cat([_flat(each) for each in bucket]), group)
            for each, part in zip(bucket, torch.split(total, [each.numel() for each in bucket]), strict=True):
                if each.grad is None:
                    each.grad = torch.empty_like(each)
                each.grad.copy_(part.view_as(each))


def sum_over_ranks(values: Tensor, group: EPGroup) -> Tensor:
    """values [...] of a float or integer dtype -> their sum over the group's ranks, rank 0 first, in that dtype.

    For a loss, counts, and other few values. Errors as sum_gradients() has them.
    """
    if group.transport is None:
        return values.clone()
    with group.turn(_WHAT, values.device), group.unbroken(_WHAT, group.own_status.calls):
        _agree(1, values.numel(), group)
        total = _sum(values.detach().to("cpu").contiguous().reshape(-1), group)
    return total.view(values.shape).to(values.device)


def _complaint(trained: Sequence[nn.Parameter], group: EPGroup) -> str:
    """What is not the same weights on every rank, "" where all is."""
    layers = layers_on_several(trained, ranks_of(group))
    if layers:
        return (
            f"the parameters have {said_of(layers[0])}, and whose gradients are of the global batch already: sum those "
            "of dense_parameters(model), or leave layer.parameters() out"
        )
    for each in trained:
        if each.grad is not None and (each.grad.layout != torch.strided or hasattr(each.grad, "to_local")):
            kind = "a DTensor" if hasattr(each.grad, "to_local") else f"{each.grad.layout}"
            return f"a gradient is {kind}: only dense ones that every rank has whole are summed here"
    return ""


def _sum(mine: Tensor, group: EPGroup) -> Tensor:
    """mine [n], on the CPU -> the sum, in order of rank"""
    pages = _gather(mine, group)
    total = pages[0]
    for other in pages[1:]:
        total += other
    return total


def _agree(
    tensors: int,
    values: int,
    group: EPGroup,
    shapes: Sequence[tuple[int, ...]] = (),
    complaint: str = "",
    lacking: bool = False,
) -> bool:
    """Whether any rank is lacking a gradient.

    CallRefusedError, on all ranks, where one has a complaint, or sizes and shapes are not what rank 0 brings.
    """
    own = [tensors, values, crc32(repr(shapes).encode()), bool(complaint), lacking]
    pages = _gather(torch.tensor(own, dtype=torch.int64, device="cpu"), group).tolist()
    if complaint:
        raise CallRefusedError(complaint)
    for rank, page in enumerate(pages):
        if page[3]:
            raise CallRefusedError(f"{group.named(rank)} has gradients that cannot be summed: its own error says why")
    for rank, page in enumerate(pages):
        if page[:3] != pages[0][:3]:
            raise CallRefusedError(
                f"{group.named(rank)} sums {page[1]} values in {page[0]} tensors, {group.named(0)} {pages[0][1]} in "
                f"{pages[0][0]}{', in other shapes' if page[:2] == pages[0][:2] else ''}"
            )
    return any(page[4] for page in pages)


def _buckets(trained: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, about as many values at a time as are exchanged at once."""
    bucket, values = list[nn.Parameter](), 0
    for each in trained:
        bucket.append(each)
        values += each.numel()
        if values >= _BUCKET:
            yield bucket
            bucket, values = [], 0
    if bucket:
        yield bucket


def _flat(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device="cpu")
    return parameter.grad.detach().to("cpu", torch.float32).reshape(-1)


def _gather(mine: Tensor, group: EPGroup) -> Tensor:
    """mine [n], on the CPU -> [P, n], in order of rank"""
    assert group.transport is not None
    pages = group.transport.gather(mine.view(torch.uint8), Label(_WHAT, "sum"))
    return pages.view(mine.dtype)
