"""Symmetric buffers: files that ranks of a host map, and the ways of GPUs through fakes; a refusal is every rank's."""

from __future__ import annotations

import ctypes
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megamoe.parallel.symmetric import host_key
from megamoe.parallel.transport.buffers import (
    Exchange,
    SymmetricBuffer,
    map_files,
    map_ipc,
    open_buffer,
    rendezvous_of_torch,
    virtual_buffers,
)

CPU = torch.device("cpu")
SIZE, BYTES = 2, 4096


def together(open_one: Callable[[int, Exchange], SymmetricBuffer]) -> list[SymmetricBuffer | str]:
    """Both ranks at once, in threads: their buffers, or what a rank was refused with."""
    cards: dict[int, bytes] = {}
    meeting = threading.Barrier(SIZE, timeout=20)

    def of(rank: int) -> SymmetricBuffer | str:
        def exchange(card: bytes) -> list[bytes]:
            cards[rank] = card
            meeting.wait()
            found = [cards[each] for each in range(SIZE)]
            meeting.wait()
            return found

        try:
            return open_one(rank, exchange)
        except ValueError as refused:
            return str(refused)

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(of, range(SIZE)))


def write(buffer: SymmetricBuffer, peer: int, text: bytes) -> None:
    """By address, as a kernel does."""
    ctypes.memmove(int(buffer.addresses[peer]), text, len(text))


def check(buffers: list[Any]) -> None:
    """Whatever a rank writes at a peer's address is in the peer's own buffer."""
    for rank, buffer in enumerate(buffers):
        assert buffer.rank == rank
        assert buffer.addresses.dtype == torch.int64
        assert not buffer.local.any()
    for rank, buffer in enumerate(buffers):
        for peer in range(SIZE):
            write(buffer, peer, bytes([rank + 1, peer + 1]))
            assert buffers[peer].local[:2].tolist() == [rank + 1, peer + 1]


def test_ranks_of_a_host_map_each_others_files() -> None:
    check(together(lambda rank, exchange: map_files(rank, BYTES, exchange)))


def test_ranks_of_one_process_have_the_addresses() -> None:
    check(list(virtual_buffers(SIZE, BYTES, CPU)))


@pytest.mark.parametrize(("host", "said"), [(b"elsewhere", "it is on another host"), (b"", "it has none to share")])
def test_a_rank_that_cannot_share_is_named_on_every_rank(host: bytes, said: str) -> None:
    def refused(rank: int, exchange: Exchange) -> SymmetricBuffer:
        def elsewhere(card: bytes) -> list[bytes]:
            key = host_key().encode()
            return exchange(card.replace(key, host) if host or key not in card else b"")

        return map_files(rank, BYTES, elsewhere if rank else exchange)

    why = f"rank 0 cannot map the memory of rank 1: {said}"
    assert together(refused) == [f"no symmetric memory for rank {rank} and its peers: {why}" for rank in range(SIZE)]


def test_torch_finds_the_addresses_of_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = [torch.full((BYTES,), 7, dtype=torch.uint8) for _ in range(SIZE)]
    handle = SimpleNamespace(buffer_ptrs=[each.data_ptr() - 16 for each in buffers], offset=16)
    waited: list[torch.device] = []
    taken = iter(buffers)
    symmetric = import_module("torch.distributed._symmetric_memory")
    monkeypatch.setattr(symmetric, "empty", lambda size, dtype, device: next(taken))  # noqa: ARG005
    monkeypatch.setattr(symmetric, "rendezvous", lambda *_: handle)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    group: Any = object()
    opened = [
        each if isinstance(each, str) else SymmetricBuffer(rank, buffers[rank], each.addresses)
        for rank, each in enumerate(together(lambda rank, at: rendezvous_of_torch(rank, BYTES, CPU, group, at)))
    ]
    check(opened)
    assert waited == [CPU, CPU]


def test_torch_that_has_no_symmetric_memory_is_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetric = import_module("torch.distributed._symmetric_memory")
    monkeypatch.setattr(symmetric, "empty", mock.Mock(side_effect=RuntimeError("no such backend")))
    group: Any = object()
    said = together(lambda rank, at: rendezvous_of_torch(rank, BYTES, CPU, group, at))
    why = "rank 0 has no symmetric memory: no such backend"
    assert said == [f"no symmetric memory for rank {rank} and its peers: {why}" for rank in range(SIZE)]


class Shared:
    """Storages as CUDA IPC shares them: a handle is the address of one."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


@pytest.mark.parametrize("same_process", [True, False], ids=["threads", "processes"])
def test_processes_on_one_gpu_open_each_others_handles(same_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def open_handle(address: int) -> Shared:
        opened.append(address)
        return Shared(address)

    monkeypatch.setattr(torch.UntypedStorage, "_share_cuda_", lambda self: (self.data_ptr(),), raising=False)
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", open_handle, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)

    def of(rank: int, exchange: Exchange) -> SymmetricBuffer:
        def as_elsewhere(card: bytes) -> list[bytes]:
            if same_process or not card.startswith(b"\x80"):
                return exchange(card)
            key, process, address, handle = pickle.loads(card)
            theirs = exchange(pickle.dumps((key, process + 1, address, handle)))
            theirs[rank] = card
            return theirs

        return map_ipc(rank, BYTES, CPU, as_elsewhere)

    check(together(of))
    assert len(opened) == (0 if same_process else SIZE)


def test_the_device_and_the_group_say_which_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {name: mock.Mock(return_value=name) for name in ("map_files", "map_ipc", "rendezvous_of_torch")}
    for name, way in ways.items():
        monkeypatch.setattr(f"megamoe.parallel.transport.buffers.{name}", way)
    group, gpu = mock.Mock(spec=dist.ProcessGroup), torch.device("cuda:0")
    of_group: Any = SimpleNamespace(group=group, gather=None)
    own: Any = SimpleNamespace(gather=None)
    assert open_buffer(of_group, 0, BYTES, CPU, "moe") == "map_files"  # type: ignore[comparison-overlap]
    assert open_buffer(of_group, 0, BYTES, gpu, "moe") == "rendezvous_of_torch"  # type: ignore[comparison-overlap]
    assert open_buffer(own, 0, BYTES, gpu, "moe") == "map_ipc"  # type: ignore[comparison-overlap]
