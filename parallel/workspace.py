"""Buffers that calls use again: fresh ones cost a page fault every 4 KiB, up to a fifth of a large call on a CPU."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from megamoe.parallel.turns import queue_of

_CPU = torch.device("cpu")


class Workspace:
    """Buffers by name, each grown to the largest size asked of it. What is in one is lost when its name is taken again.

    regions are memory that other ranks write to, by the name of the buffer that lies there; kernels are those with
    symmetric memory of their own, by their sizes, since layers of one size share it.

    Shared by all layers of a group, which take turns, on a GPU in whatever streams: see turns.py. While a CUDA graph is
    captured buffers come from the graph's own memory, which is the graph's alone and stays as long as it does.
    """

    def __init__(self, regions: dict[str, Tensor] | None = None) -> None:
        self._buffers: dict[tuple[Hashable, torch.device], Tensor] = {}
        self._pinned: dict[tuple[Hashable, torch.dtype], Tensor] = {}
        self.regions = {} if regions is None else regions
        self.kernels: dict[Hashable, object] = {}

    @property
    def memory_bytes(self) -> int:
        """Bytes that are held, pinned ones of the host apart."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    def take(self, name: Hashable, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of that shape on the device of `like`, of its dtype or the one given; not cleared."""
        dtype = dtype or like.dtype
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return torch.empty(shape, dtype=dtype, device=like.device)
        if name in self.regions and not like.is_cuda:
            region = self.regions[str(name)]
            assert num_bytes <= len(region), f"{name} of {num_bytes} bytes is larger than this machine's memory"
            return region[:num_bytes].view(dtype).view(shape)
        buffer = self._buffers.get((name, like.device))
        if buffer is None or buffer.numel() < num_bytes:
            if buffer is not None:
                _let_go(buffer)
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
            self._buffers[name, like.device] = buffer
        return buffer[:num_bytes].view(dtype).view(shape)

    def address(self, name: Hashable, num_bytes: int) -> int:
        """Of a buffer on the CPU, as take() grows and keeps it; of no bytes too, where a tensor has no address."""
        num_bytes = max(num_bytes, 1)
        buffer = self._buffers.get((name, _CPU))
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[name, _CPU] = torch.empty(num_bytes, dtype=torch.uint8, device=_CPU)
        return buffer.data_ptr()

    def pinned(self, name: Hashable, size: int, dtype: torch.dtype) -> Tensor:
        """[size] on the host, in memory that a GPU copies from and to by itself, where there is one; not cleared."""
        buffer = self._pinned.get((name, dtype))
        if buffer is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=dtype, pin_memory=torch.cuda.is_available())
            self._pinned[name, dtype] = buffer
        return buffer[:size]


def _let_go(buffer: Tensor) -> None:
    """Keeps a buffer's memory from others until the current stream, which comes after all that used it, is done."""
    stream = queue_of(buffer.device)
    if stream is not None:
        buffer.record_stream(stream)  # type: ignore[arg-type]
