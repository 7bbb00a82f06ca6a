"""Row numbers that follow from counts: a device gets them as a few segments, in one copy, and expands them there."""

# J segments   n numbers that they have together

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamoe.parallel.streams import synchronize
from megamoe.parallel.workspace import Workspace
from megamoe.routing.messages import Array


def on_host(device: torch.device) -> bool:
    """Whether the device's memory is the host's, so that nothing is copied and nothing waited for."""
    return device.type == "cpu"


def to_device(arrays: Sequence[Array], device: torch.device, workspace: Workspace, name: Hashable) -> list[Tensor]:
    """The arrays, int64 of any shapes, on the device: one copy, which the host does not wait for.

    They go through the workspace's pinned buffer `name`. Do not reuse it until the copy has finished: in a call of a
    layer the exchange of counts comes in between.
    """
    if on_host(device):
        return [torch.from_numpy(array) for array in arrays]
    flat = np.concatenate([array.ravel() for array in arrays])
    pinned = workspace.pinned(name, len(flat), torch.int64)
    pinned.numpy()[:] = flat
    parts = torch.split(pinned.to(device, non_blocking=True), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def exclusive_sum(lengths: Array) -> Array:
    """Where each segment begins.    [2, 0, 3]  ->  [0, 2, 2]"""
    ends: Array = lengths.cumsum()
    return ends - lengths


@dataclass(frozen=True, slots=True)
class Segments:
    """Consecutive numbers in segments of `lengths` [J]; a segment begins with `firsts` [..., J]. n numbers in all.

    lengths [2, 0, 3], firsts [10, 5, 7]  ->  10 11 | 7 8 9
    """

    lengths: Array
    firsts: Array

    def offsets(self) -> Array:
        """Of each segment: its first number, less where the segment begins."""
        return self.firsts - exclusive_sum(self.lengths)

    def expand(self) -> Array:
        """All numbers, one segment after the other, [..., n]."""
        numbers: Array = self.offsets().repeat(self.lengths, -1)
        numbers += np.arange(numbers.shape[-1])
        return numbers


def expand_all(
    segments: Sequence[Segments], others: Sequence[Array], device: torch.device, workspace: Workspace, name: Hashable
) -> tuple[list[Tensor], list[Tensor]]:
    """The numbers of all segments, and other arrays, int64 on the device: to_device(), and expanded there."""
    if on_host(device):
        return [torch.from_numpy(each.expand()) for each in segments], [torch.from_numpy(each) for each in others]
    arrays = [array for each in segments for array in (each.lengths, each.offsets())]
    copied = to_device((*arrays, *others), device, workspace, name)
    pairs = zip(segments, copied[::2], copied[1::2], strict=False)
    expanded = [repeat(offsets, lengths, int(each.lengths.sum())) for each, lengths, offsets in pairs]
    for numbers in expanded:
        numbers += torch.arange(numbers.shape[-1], device=device)
    return expanded, copied[len(arrays) :]


def repeat(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Each segment's value for all of its numbers: values [..., J], lengths [J] int64, `total` in all -> [..., total].

    values [7, 8, 9], lengths [2, 0, 1]  ->  7 7 9
    """
    if on_host(values.device):  # numpy is ten times as quick for a few
        return torch.from_numpy(values.numpy().repeat(lengths.numpy(), -1))
    return torch.repeat_interleave(values, lengths, dim=-1, output_size=total)


def select(values: Tensor, mask: Tensor, number: Tensor, count: int) -> Tensor:
    """values [n] where mask [n] is set, which is count times; number [n]: its cumulative sum. The host does not wait.

    values [7, 8, 9], mask [1, 0, 1], number [1, 1, 2]  ->  7 9
    """
    if on_host(values.device):
        return values[mask]
    found = values.new_empty(count + 1)  # the last takes what is not selected
    found.scatter_(0, torch.where(mask, number - 1, count), values)
    return found[:count]


def to_host(counts: Tensor, workspace: Workspace, name: Hashable) -> Tensor:
    """Copies counts [n] to the CPU through the workspace's pinned buffer `name`, and waits for the device."""
    if on_host(counts.device):
        return counts
    pinned = workspace.pinned(name, len(counts), counts.dtype)
    pinned.copy_(counts, non_blocking=True)
    synchronize(counts.device)
    return pinned.clone()
