"""Gradients of experts summed over data-parallel replicas of an expert-parallel group, in the order of the replicas."""

# R replicas   N values of a bucket

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import DEADLINE_S, EPGroup
from megamoe.parallel.transport.pairs import Label
from megamoe.training.distributed.wrappers import layers_on_several, said_of
from megamoe.training.steps import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_LAYER = "gradients of replicas"
_BUCKET_BYTES = 1 << 25


@torch.no_grad()
def reduce_over_replicas(
    parameters: Tensor | Iterable[Tensor],
    replicas: dist.ProcessGroup | DeviceMesh,
    *,
    average: bool = True,
    deadline_s: float = DEADLINE_S,
) -> None:
    """Makes the gradients of parameters the mean over replicas, or with average=False the sum, in place.

    For ranks that hold the same experts in several expert-parallel groups: `parameters` are a layer's, `replicas` the
    process group, or the mesh of one dimension, of the ranks that hold the same ones. All call once a step, after
    the last backward, with the same parameters in the same order. A replica without a gradient adds zeros; where
    none has one there is none afterwards.

    Values are summed in FP32 in ascending order of the replicas, divided by their number, and rounded once to the
    gradient's dtype: all replicas have the same bits. They depend on the number of replicas, since each sums its own
    tokens first. Each value travels twice, as in a ring; 32 MB are in flight.

    CallRefusedError, on every replica, where their parameters differ; PeerError within deadline_s for one that does
    not call; ValueError for a mesh of several dimensions, and for ranks that share a layer whose parameters these are.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    device = given[0].device if given else torch.device("cpu")
    ranks = _group_of(replicas)
    group = EPGroup.of(ranks, device, deadline_s=deadline_s)
    if group.size == 1:
        return
    layers = layers_on_several(given, dist.get_process_group_ranks(ranks))
    if layers:
        raise ValueError(
            f"the replicas share {said_of(layers[0])}: give the process group of the ranks that hold the same experts"
        )
    trained = [each for each in given if each.requires_grad]
    assert group.clock is not None
    with group.turn(_LAYER, device), group.unbroken(_LAYER, 0):
        with group.clock.naming(ranks, Label(_LAYER, "counts")):
            differing, lacking = _differing(trained, ranks, device, deadline_s)
        if differing:
            raise CallRefusedError(
                f"replicas differ in what they reduce, so no gradient was changed: replica {differing[0]} has other "
                "parameters than replica 0; all must give the same ones, in the same order"
            )
        there = [True] * len(trained)
        if lacking:
            with group.clock.naming(ranks, Label(_LAYER, "counts")):
                there = _there(trained, ranks, device, deadline_s)
        for bucket in _buckets([_gradient_of(each) for each, found in zip(trained, there, strict=True) if found]):
            with group.clock.naming(ranks, Label(_LAYER, "reduce")):
                _reduce(bucket, ranks, average, deadline_s)


def _group_of(replicas: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    if isinstance(replicas, dist.ProcessGroup):
        return replicas
    if getattr(replicas, "ndim", 1) != 1:
        raise ValueError(
            f"replicas is a mesh of {replicas.ndim} dimensions, expected one: the ranks that hold the same experts"
        )
    if not hasattr(replicas, "get_group"):
        raise ValueError(f"replicas must be a ProcessGroup or a DeviceMesh, got {type(replicas).__name__}")
    return replicas.get_group()


def _gradient_of(parameter: Tensor) -> Tensor:
    """What this rank has of the gradient, made where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local(parameter.grad)


def _differing(
    trained: list[Tensor], replicas: dist.ProcessGroup, device: torch.device, deadline_s: float
) -> tuple[list[int], bool]:
    """Replicas whose parameters have other shapes or dtypes than the first one's; whether any lacks a gradient."""
    said = repr([(tuple(local(each.detach()).shape), each.dtype) for each in trained]).encode()
    page = bytearray(hashlib.sha256(said).digest()) + bytes([any(each.grad is None for each in trained)])
    own = torch.frombuffer(page, dtype=torch.uint8).to(device)
    gathered = own.new_empty(replicas.size() * len(own))
    _end(dist.all_gather_into_tensor(gathered, own, group=replicas, async_op=True), deadline_s)
    pages = gathered.view(replicas.size(), len(own)).tolist()
    differing = [rank for rank, each in enumerate(pages) if each[:-1] != pages[0][:-1]]
    return differing, any(each[-1] for each in pages)


def _there(trained: list[Tensor], replicas: dist.ProcessGroup, device: torch.device, deadline_s: float) -> list[bool]:
    """Of each parameter whether any replica has a gradient."""
    own = torch.tensor([each.grad is not None for each in trained], dtype=torch.uint8, device=device)
    gathered = own.new_empty(replicas.size() * len(own))
    _end(dist.all_gather_into_tensor(gathered, own, group=replicas, async_op=True), deadline_s)
    found: list[bool] = gathered.view(replicas.size(), len(own)).any(0).tolist()
    return found


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of one dtype that are reduced together, up to 32 MB of them."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        flat = gradient.view(-1)
        for piece in torch.split(flat, _BUCKET_BYTES // flat.element_size()):
            if bucket and (piece.dtype != bucket[0].dtype or sum(map(_bytes, bucket)) + _bytes(piece) > _BUCKET_BYTES):
                yield bucket
                bucket = []
            bucket.append(piece)
    if bucket:
        yield bucket


def _bytes(piece: Tensor) -> int:
    return piece.numel() * piece.element_size()


def _reduce(bucket: list[Tensor], replicas: dist.ProcessGroup, average: bool, deadline_s: float) -> None:
    """Each replica sums its part of the bucket, and all gather what was summed."""
    size, num_values = replicas.size(), sum(map(len, bucket))
    share = -(-num_values // size)
    sent = bucket[0].new_zeros(size * share)
    torch.cat(bucket, out=sent[:num_values])
    arrived = torch.empty_like(sent)
    _end(dist.all_to_all_single(arrived, sent, group=replicas, async_op=True), deadline_s)
    first, *others = arrived.view(size, share)
    total = first.to(torch.float32)
    for each in others:
        total += each
    own = (total / size if average else total).to(sent.dtype)
    _end(dist.all_gather_into_tensor(sent, own, group=replicas, async_op=True), deadline_s)
    for piece, values in zip(bucket, torch.split(sent[:num_values], [len(each) for each in bucket]), strict=True):
        piece.copy_(values)


def _end(work: dist.Work | None, deadline_s: float) -> None:
    assert work is not None
    work.wait(timedelta(seconds=deadline_s))
