"""Symmetric buffers: each rank has one of a size, and the address of every peer's, which its kernels read and write.

One face, four ways to it: ranks of one host that are CPUs map each other's files, GPUs with a process group of torch's
own use its symmetric memory, processes that share a GPU map each other's memory by CUDA IPC, and ranks of one process
have the addresses anyway.
"""

# P ranks of the group

from __future__ import annotations

import mmap
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.private import open_storage, share_storage, symmetric_memory
from megamoe.parallel.symmetric import available, host_key
from megamoe.parallel.transport.pairs import Label, Transport

# this rank's card -> every rank's, in order of rank: an exchange of bytes that all ranks make together
Exchange = Callable[[bytes], list[bytes]]
_CARD_BYTES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class SymmetricBuffer:
    """This rank's buffer, and where all ranks' are.

    rank        this rank
    local       [n] uint8, this rank's own, zeros at first
    addresses   [P] int64 on the device of local: where this process finds every rank's, its own included
    held        what keeps the peers' memory mapped; a buffer lives as long as this record
    """

    rank: int
    local: Tensor
    addresses: Tensor
    held: Sequence[Any] = field(default_factory=tuple)


def open_buffer(transport: Transport, rank: int, num_bytes: int, device: torch.device, layer: str) -> SymmetricBuffer:
    """A buffer for each rank of a transport's group, which all ranks must ask for together.

    ValueError, on every rank, where one cannot have it or cannot map a peer's: it says which, and why.
    """
    exchange = exchange_over(transport, layer)
    if device.type == "cpu":
        return map_files(rank, num_bytes, exchange)
    group = getattr(transport, "group", None)
    if isinstance(group, dist.ProcessGroup):
        return rendezvous_of_torch(rank, num_bytes, device, group, exchange)
    return map_ipc(rank, num_bytes, device, exchange)


def exchange_over(transport: Transport, layer: str) -> Exchange:
    """Cards as pages of a transport, with its deadline and its errors."""

    def exchange(card: bytes) -> list[bytes]:
        page = torch.frombuffer(
            bytearray(len(card).to_bytes(4, "little") + card.ljust(_CARD_BYTES, b"\0")), dtype=torch.uint8
        )
        pages = [bytes(each.numpy()) for each in transport.gather(page, Label(layer, "counts"))]
        return [each[4 : 4 + int.from_bytes(each[:4], "little")] for each in pages]

    return exchange


def virtual_buffers(size: int, num_bytes: int, device: torch.device) -> list[SymmetricBuffer]:
    """Buffers of ranks that share a process and a device."""
    buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(size)]
    addresses = torch.tensor([each.data_ptr() for each in buffers], dtype=torch.int64, device=device)
    return [SymmetricBuffer(rank, each, addresses, buffers) for rank, each in enumerate(buffers)]


def map_files(rank: int, num_bytes: int, exchange: Exchange) -> SymmetricBuffer:
    """Ranks of one host: anonymous files, which peers find through /proc. ValueError as in open_buffer()."""
    own, card, refusal = -1, b"", ""
    try:
        if sys.platform != "linux" or not available():
            raise OSError("ranks share memory on Linux on x86-64 alone")
        own = os.memfd_create("megamoe-buffer")
        os.ftruncate(own, num_bytes)
        card = f"{host_key()} {os.getpid()} {own}".encode()
    except OSError as refused:
        refusal = str(refused)
    maps = []
    try:
        for peer, theirs in enumerate(exchange(card)):
            try:
                maps.append(_map_file(theirs, num_bytes, own if peer == rank else None))
            except OSError as refused:
                refusal = refusal or f"rank {rank} cannot map the memory of rank {peer}: {refused}"
        _agree(rank, refusal, exchange)  # nobody opens a file any more after this
    finally:
        if own >= 0:
            os.close(own)
    tensors = [torch.frombuffer(each, dtype=torch.uint8) for each in maps]
    return SymmetricBuffer(rank, tensors[rank], torch.tensor([each.data_ptr() for each in tensors]), tensors)


def _map_file(card: bytes, num_bytes: int, own: int | None) -> mmap.mmap:
    if own is not None:
        return mmap.mmap(own, num_bytes)
    if not card:
        raise OSError("it has none to share")
    key, process, file = card.decode().split()
    if key != host_key():
        raise OSError("it is on another host")
    opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
    try:
        return mmap.mmap(opened, num_bytes)
    finally:
        os.close(opened)


def rendezvous_of_torch(
    rank: int, num_bytes: int, device: torch.device, group: dist.ProcessGroup, exchange: Exchange
) -> SymmetricBuffer:
    """GPUs of a process group: torch's symmetric memory (not run on a GPU yet). ValueError as in open_buffer()."""
    symmetric = symmetric_memory()
    refusal, local, handle = "", torch.empty(0, dtype=torch.uint8), None
    try:
        local = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        local.zero_()
    except RuntimeError as refused:
        refusal = f"rank {rank} has no symmetric memory: {refused}"
    _agree(rank, refusal, exchange)
    try:
        handle = symmetric.rendezvous(local, group)
    except RuntimeError as refused:
        refusal = f"rank {rank} cannot map its peers' memory: {refused}"
    torch.cuda.synchronize(device)  # the zeros are there before a peer's kernel begins
    _agree(rank, refusal, exchange)
    assert handle is not None
    offset = getattr(handle, "offset", 0)
    addresses = torch.tensor([each + offset for each in handle.buffer_ptrs], dtype=torch.int64, device=device)
    return SymmetricBuffer(rank, local, addresses, (handle,))


def map_ipc(rank: int, num_bytes: int, device: torch.device, exchange: Exchange) -> SymmetricBuffer:
    """Processes on one GPU, which NCCL refuses: CUDA IPC (not run on a GPU yet). ValueError as in open_buffer()."""
    local = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    refusal, card = "", b""
    try:
        card = pickle.dumps((host_key(), os.getpid(), local.data_ptr(), share_storage(local.untyped_storage())))
    except RuntimeError as refused:
        refusal = f"rank {rank} cannot share its memory: {refused}"
    addresses, storages = [], []
    for peer, theirs in enumerate(exchange(card)):
        try:
            address, storage = _open_ipc(theirs)
            addresses.append(address)
            storages.append(storage)
        except (OSError, RuntimeError) as refused:
            refusal = refusal or f"rank {rank} cannot map the memory of rank {peer}: {refused}"
    _agree(rank, refusal, exchange)
    return SymmetricBuffer(rank, local, torch.tensor(addresses, dtype=torch.int64, device=device), storages)


def _open_ipc(card: bytes) -> tuple[int, torch.UntypedStorage | None]:
    """Where a peer's buffer is here, and what holds it: nothing where it is of this process, a rank's in a thread."""
    if not card:
        raise OSError("it has none to share")
    key, process, address, handle = pickle.loads(card)
    if key != host_key():
        raise OSError("it is on another host")
    if process == os.getpid():
        return address, None
    storage = open_storage(handle)
    return storage.data_ptr(), storage


def _agree(rank: int, refusal: str, exchange: Exchange) -> None:
    """ValueError on every rank with the first one's refusal, if there is any."""
    said = [each.decode() for each in exchange(refusal.encode()[:_CARD_BYTES])]
    found = [each for each in said if each]
    if found:
        raise ValueError(f"no symmetric memory for rank {rank} and its peers: {found[0]}")
