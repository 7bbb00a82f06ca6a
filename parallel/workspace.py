"""Buffers that calls use again: fresh ones cost a page fault every 4 KiB, up to a fifth of a large call on a CPU."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class Workspace:
    """Buffers by name, each grown to the largest size asked of it. What is in one is lost when its name is taken again.

    Shared by all layers of a group, which run one at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Hashable, torch.device], Tensor] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes that are held."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def take(self, name: Hashable, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of that shape on the device of `like`, of its dtype or the one given; not cleared."""
        dtype = dtype or like.dtype
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        buffer = self._buffers.get((name, like.device))
        if buffer is None or buffer.numel() < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
            self._buffers[name, like.device] = buffer
        return buffer[:num_bytes].view(dtype).view(shape)
