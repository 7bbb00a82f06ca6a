"""Process groups that are not ours: any backend, subgroups, several in a row; what is the user's stays as it is."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store, distributed_c10d

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel import interfaces, rendezvous
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup, init_group
from megamoe.parallel.health.heartbeat import HeartbeatMonitor
from megamoe.parallel.health.status import OwnStatus
from megamoe.parallel.interfaces import Interface, told
from megamoe.parallel.rendezvous import compare_starts, fresh_store, heartbeat_address
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.process_group import backend_for
from megamoe.parallel.transport.threads import gloo_threads
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer, oracle, split

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)
USERS_TIMEOUT_S = 20.0


def left_store() -> Store:
    """What the rank's own group met in; the group is ended, as init_group() lets a program do."""
    store: Store = distributed_c10d._get_default_store()
    dist.destroy_process_group()
    return store


@contextmanager
def users_own(group: EPGroup, backend: str | None = None) -> Iterator[dist.ProcessGroup]:
    """A default group as a user's program makes it, in place of the rank's own."""
    timeout, store = timedelta(seconds=USERS_TIMEOUT_S), PrefixStore("the user's", left_store())
    dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size, timeout=timeout)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def output(group: EPGroup | dist.ProcessGroup) -> Tensor:
    found = EPGroup.of(group)
    mine = make_batch(SHAPE, 41).part(split(41, found.size)[found.rank])
    return make_layer(SHAPE, found)(mine.hidden, mine.ids, mine.weights)


def is_right(outputs: list[Tensor]) -> bool:
    return torch.equal(torch.cat(outputs), oracle(SHAPE, make_batch(SHAPE, 41), "mxfp4", "mxfp8"))


# ---- backends ----


def serves(group: EPGroup, backend: str | None) -> tuple[str, Tensor, float]:
    """The transport's type, the layer's output, and how long rank 0 waits for a rank that does not come."""
    with users_own(group, backend) as world:
        out, impatient = output(world), EPGroup.of(world, deadline_s=0.5)
        begun = time.monotonic()
        if group.rank == 0:
            batch = make_batch(SHAPE, 5)
            with pytest.raises(PeerError):
                make_layer(SHAPE, impatient)(batch.hidden, batch.ids, batch.weights)
        waited = time.monotonic() - begun
        store = distributed_c10d._get_default_store()
        store.set(f"{group.rank} is done", "")
        store.wait(["0 is done"])
        return type(impatient.transport).__name__, out, waited


@pytest.mark.parametrize("backend", [None, "cpu:gloo", "gloo"])
def test_the_backend_of_the_layers_device_counts_and_the_layers_deadline_holds(
    ranks: LocalRanks, backend: str | None
) -> None:
    found = ranks.run(serves, backend, size=2)
    assert [name for name, _, _ in found] == [HostTransport.__name__] * 2
    assert is_right([out for _, out, _ in found])
    assert 0.4 < found[0][2] < 3.0 < USERS_TIMEOUT_S


def refuses(group: EPGroup) -> list[str]:
    """What is said of groups that a layer cannot run on."""
    said = []
    with users_own(group) as world:
        strange = dist.new_group([0])
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
        for wrong, device in ((world, "cuda"), (mesh, "cpu"), (strange, "cpu")):
            if wrong is strange and group.rank == 0:
                continue
            with pytest.raises(ValueError, match=r".") as refusal:
                EPGroup.of(wrong, device)  # type: ignore[arg-type]
            said.append(str(refusal.value))
        assert EPGroup.of(mesh.get_group("ep")).size == 2
    with pytest.raises(ValueError, match="has been destroyed"):
        EPGroup.of(world)
    return said


def test_groups_that_cannot_serve_are_refused_with_what_would(ranks: LocalRanks) -> None:
    _, (device, mesh, outside) = ranks.run(refuses, size=2)
    assert device.startswith("the group has no backend that moves rows between cuda devices, it has cpu:gloo: make it")
    assert 'got DeviceMesh, whose get_group("name of the axis") is one' in mesh
    assert "this rank is not in the group" in outside


def moves_rows_on_gloo(group: EPGroup) -> str:
    assert EPGroup.of(group) is EPGroup.of(group, "cpu") is group
    with pytest.raises(ValueError, match=r"the EPGroup moves rows of cpu devices, the layer is on cuda: make it for"):
        EPGroup.of(group, "cuda:0")
    with pytest.raises(ValueError, match=r"no backend that moves rows between cuda devices") as refusal:
        EPGroup.of(dist.group.WORLD, "cuda:0")
    return str(refusal.value)


def test_gloo_is_not_taken_for_a_backend_of_gpus(ranks: LocalRanks) -> None:
    assert "it has cpu:gloo,cuda:gloo" in ranks.run(moves_rows_on_gloo, size=2)[0]


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_each_device_of_a_group_with_two_backends_has_its_own(device: str, backend: str) -> None:
    with mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
        assert backend_for(mock.Mock(), torch.device(device)) == backend


# ---- names ----


def names(group: EPGroup) -> tuple[str, str, tuple[int, int | None]]:
    """Ranks 1 and 3 are one of two expert-parallel groups; 3 does not come."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = EPGroup.of(pairs[group.rank % 2], deadline_s=0.5)
    if group.rank != 1:
        dist.barrier()
        return mine.named(0), "", (0, None)
    batch = make_batch(SHAPE, 5)
    with pytest.raises(PeerError) as lost:
        make_layer(SHAPE, mine)(batch.hidden, batch.ids, batch.weights)
    dist.barrier()
    return mine.named(1), str(lost.value), (lost.value.rank, lost.value.global_rank)


def test_a_rank_of_a_group_within_the_program_is_called_by_both_its_ranks(ranks: LocalRanks) -> None:
    found = ranks.run(names)
    assert [name for name, _, _ in found] == ["rank 0", "rank 1 (global rank 3)", "rank 0", "rank 0 (global rank 1)"]
    assert found[1][1].startswith("rank 1 (global rank 3) on ")
    assert found[1][2] == (1, 3)


# ---- what is the user's ----


def users_things() -> tuple[object, ...]:
    signals = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    threads = {thread.name for thread in threading.enumerate()}
    return dict(os.environ), signals, threads, torch.get_num_threads(), torch.get_default_dtype()


def policies() -> dict[int, int]:
    return {thread: os.sched_getscheduler(thread) for thread in gloo_threads()}


def leaves_alone(group: EPGroup) -> bool:
    earlier = policies()
    with users_own(group) as world:
        before = users_things()
        output(world)
        assert users_things() == before
        now = policies()
        same = {each for thread, each in now.items() if thread not in earlier} == {os.SCHED_OTHER}
        with (
            pytest.raises(ValueError, match="initialised already"),
            init_group(rank=group.rank, size=group.size, store=HashStore()),
        ):
            pass
        total = torch.ones(1)
        dist.all_reduce(total)
        return same and dist.group.WORLD is world and int(total) == group.size


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="scheduling policies are Linux's")
def test_a_users_group_threads_environment_and_handlers_stay_as_they_are(ranks: LocalRanks) -> None:
    assert ranks.run(leaves_alone, size=2) == [True, True]


def ends_it_alone(group: EPGroup) -> int:
    dist.destroy_process_group()
    return group.rank


def test_a_program_may_end_the_group_by_itself(ranks: LocalRanks) -> None:
    assert ranks.run(ends_it_alone, size=2) == [0, 1]


# ---- several groups, one after another ----


def again_and_again(group: EPGroup) -> list[Tensor]:
    """One store for all, as under torchrun."""
    store, outputs = left_store(), []
    for _ in range(3):
        with init_group(rank=group.rank, size=group.size, store=store, deadline_s=20.0) as fresh:
            outputs.append(output(fresh))
            assert fresh.monitors
    return outputs


def test_groups_follow_each_other_in_one_store(ranks: LocalRanks) -> None:
    outputs = ranks.run(again_and_again, size=3)
    for each in zip(*outputs, strict=True):
        assert is_right(list(each))


def test_a_start_that_failed_on_one_rank_can_be_tried_again() -> None:
    store = HashStore()
    with pytest.raises(RuntimeError, match=r"rank 0 did not come to where the ranks meet within 0\.05 s"):
        fresh_store(store, 1, 0.05)
    for rank in (0, 0, 1):  # rank 0 had given up once before rank 1 came
        part = fresh_store(store, rank, 1.0)
        part.set(f"rank {rank}", "is here")
    assert part.get("rank 0") == b"is here"
    parts = [fresh_store(store, rank, 1.0) for rank in (0, 2, 1)]
    parts[0].set("token", "third")
    assert [each.get("token") for each in parts] == [b"third"] * 3


# ---- ranks that start a group differently ----


def starts_otherwise(group: EPGroup, given: dict[str, Any]) -> tuple[str, bool]:
    """Rank 1 starts it with other arguments -> what it is refused with, and whether all can start one afterwards."""
    store, said = left_store(), ""
    store.set(f"{given}: rank {group.rank} is here", "")
    store.wait([f"{given}: rank {each} is here" for each in range(group.size)], timedelta(seconds=20))
    try:
        other = {"size": group.size, **(given if group.rank == 1 else {})}
        with init_group(rank=group.rank, store=store, deadline_s=20.0, **other):
            pass
    except ValueError as refusal:
        said = str(refusal)
    with init_group(rank=group.rank, size=group.size, store=store, deadline_s=20.0) as fresh:
        return said, len(output(fresh)) > 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"shared_memory": False}, "shared_memory is True on ranks 0, 2, False on rank 1"),
        ({"node_limited": False}, "node_limited is True on ranks 0, 2, False on rank 1"),
        ({"device": "cuda"}, "device is cpu on ranks 0, 2, cuda on rank 1"),
        ({"size": 4}, "size is 3 on rank"),
        ({"size": 2}, "size is 3 on rank"),
    ],
    ids=str,
)
def test_no_rank_starts_a_group_that_one_starts_otherwise(
    ranks: LocalRanks, given: dict[str, Any], expected: str
) -> None:
    begun = time.monotonic()
    for said, goes_on in ranks.run(starts_otherwise, given, size=3):
        assert expected in said
        assert goes_on
    assert time.monotonic() - begun < 15.0


def test_ranks_of_other_versions_start_no_group_together() -> None:
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        starts = [
            pool.submit(compare_starts, store, rank, 2, {"megamoe": version}, 5.0)
            for rank, version in enumerate(("0.1.0", "0.2.0"))
        ]
        for start in starts:
            with pytest.raises(ValueError, match=r"megamoe is 0\.1\.0 on rank 0, 0\.2\.0 on rank 1"):
                start.result(10)


# ---- where the heartbeat is ----

ETH = [Interface("eth1", "10.1.0.7", False, True, 0), Interface("eth10", "10.2.0.7", False, True, 0)]
LOOP = Interface("lo", "127.0.0.1", True, True, 0)


@pytest.mark.parametrize(
    ("kind", "setting", "expected"),
    [
        ("cpu", "eth1", "eth1"),
        ("cpu", "wlan0,eth10", "eth10"),
        ("cpu", "lo", "lo"),
        ("cpu", "eth", None),
        ("cpu", "", None),
        ("cuda", "=eth10", "eth10"),
        ("cuda", "eth1", "eth1"),
        ("cuda", "=eth", None),
        ("cuda", "^eth10,docker", None),
        ("cuda", "^lo", "eth1"),
        ("npu", "ib,eth", "eth1"),
    ],
)
def test_the_interface_that_a_backend_is_told_is_read_as_the_backend_reads_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, expected: str | None
) -> None:
    monkeypatch.setattr(interfaces, "list_interfaces", lambda: [*ETH[(setting == "^eth10,docker") :], LOOP])
    monkeypatch.setenv(interfaces.INTERFACE_VARIABLES[kind], setting)
    found = told(kind)
    assert (found.name if found else None) == expected


def addresses(size: int, given: dict[int, str]) -> list[str]:
    store = HashStore()
    with ThreadPoolExecutor(size) as pool:
        ask = [pool.submit(heartbeat_address, store, "cpu", rank, size, given.get(rank), 5.0) for rank in range(size)]
        return [each.result(10) for each in ask]


def test_a_heartbeat_is_where_the_others_are_though_the_machines_own_name_is_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    names_self, route = iter(["127.0.1.1"]), {"10.1.0.8": "10.1.0.7"}
    monkeypatch.setattr(rendezvous, "local_address", lambda _: next(names_self))
    monkeypatch.setattr(rendezvous, "address_towards", route.__getitem__)
    assert addresses(2, {1: "10.1.0.8"}) == ["10.1.0.7", "10.1.0.8"]


def test_a_heartbeat_follows_the_backends_interface_and_stays_on_loopback_where_all_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "told", lambda _: ETH[0])
    assert addresses(2, {}) == ["10.1.0.7"] * 2
    assert addresses(2, {0: "10.9.9.9"}) == ["10.9.9.9", "10.1.0.7"]
    monkeypatch.setattr(rendezvous, "told", lambda _: None)
    assert addresses(3, {}) == ["127.0.0.1"] * 3


def monitor_of(rank: int, store: Store, address: str, size: int = 2) -> HeartbeatMonitor:
    return HeartbeatMonitor(rank, size, store, OwnStatus(), address=address, host=f"h{rank}", deadline_s=0.3)


def test_a_heartbeat_that_cannot_be_reached_is_named_with_rank_and_address() -> None:
    store = HashStore()
    store.set("heartbeat token", "t")
    store.set("heartbeat 0", '{"host": "h0", "address": "127.0.1.1", "port": 9, "version": 7}')
    with pytest.raises(
        ConnectionError,
        match=r"rank 1 on h1 \(127\.0\.0\.1\) does not reach the heartbeat of rank 0 on h0 at 127\.0\.1\.1 port 9: "
        r".*refused.* GLOO_SOCKET_IFNAME",
    ):
        monitor_of(1, store, "127.0.0.1")
    with pytest.raises(RuntimeError, match=r"rank 1, rank 2 did not come to where the ranks meet within 0\.3 s"):
        monitor_of(0, HashStore(), "127.0.0.1", size=3)
    with pytest.raises(
        ValueError, match=r"rank 0 cannot listen at 198\.51\.100\.9: .*; this machine has .*127\.0\.0\.1"
    ):
        monitor_of(0, HashStore(), "198.51.100.9")
