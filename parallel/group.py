"""The ranks that share the experts of a layer: a process group with a deadline, and the transport that suits it."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from numbers import Integral, Real
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous

import megamoe
from megamoe.parallel.errors import CallRefusedError, PeerError, named
from megamoe.parallel.health.heartbeat import HeartbeatMonitor
from megamoe.parallel.health.runs import check_name, list_rank
from megamoe.parallel.health.status import RAISED, OwnStatus
from megamoe.parallel.private import known_groups
from megamoe.parallel.recorder import CallNotes, Notes, Recorder, Recording
from megamoe.parallel.rendezvous import compare_starts, fresh_store, heartbeat_address, store_of_one
from megamoe.parallel.streams import Streams
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.host import Host, HostTransport
from megamoe.parallel.transport.link import measure_link
from megamoe.parallel.transport.pairs import Clock, Label, PairTransport, Transport
from megamoe.parallel.transport.process_group import (
    backend_for,
    backend_timeout_s,
    check_group,
    check_made_for,
    end_group,
    global_ranks,
)
from megamoe.parallel.transport.threads import await_gloo_threads, calm_gloo_threads, gloo_threads
from megamoe.parallel.transport.watch import WatchedTransport
from megamoe.parallel.turns import Turns
from megamoe.parallel.workspace import Workspace

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_log = logging.getLogger(__name__)
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EPGroup:
    """An expert-parallel group as a layer uses it.

    rank, size       this rank and the number of ranks, in the group's own numbering
    transport        moves rows; None where this rank is alone
    deadline_s       seconds that a rank may be kept waiting: over gloo in one call of a layer, all its waits together;
                     over other backends in each collective
    clock            turns a failure of the transport into an error that names a rank
    host, hosts      this rank's host name; those of the others, filled in at the first call
    workspace        buffers that the group's layers use in turn
    links            at most one: bytes per second that each rank can send while it receives as many, once measured
    own_status       where this rank is, noted as it goes
    monitors         at most one heartbeat: tells the others, and knows where they are; a group of init_group() has it
    wave_costs       at most one: seconds that a wave takes beside its rows on the slowest rank, once it is agreed on
    broken           why the group cannot be used any more, empty while it can; always, where a rank is alone
    turns            whose turn it is to call, and which layers there are
    recorders        at most one: takes notes of every call of the group's layers
    streams          of each device that its layers are on: where messages are queued
    node_limited     whether a token goes once to each other host, where ranks of a host share memory

    Calls of a group take turns: see turns.py. EPGroups of one process group share turns and broken, since they share
    its messages; give all layers of a model the same one, and they share buffers too.
    """

    rank: int
    size: int
    transport: Transport | None
    deadline_s: float
    clock: Clock | None = None
    host: str = field(default_factory=socket.gethostname)
    hosts: dict[int, str] = field(default_factory=dict)
    links: list[float] = field(default_factory=list)
    wave_costs: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)
    own_status: OwnStatus = field(default_factory=OwnStatus)
    monitors: list[HeartbeatMonitor] = field(default_factory=list)
    workspace: Workspace = field(default_factory=Workspace)
    recorders: list[Recorder] = field(default_factory=list)
    streams: dict[torch.device, Streams] = field(default_factory=dict)
    node_limited: bool = True

    def __repr__(self) -> str:
        broken = f", broken: {self.broken[0]}" if self.broken else ""
        return f"EPGroup(rank={self.rank}, size={self.size}, deadline_s={self.deadline_s:g}{broken})"

    def __deepcopy__(self, memo: dict[int, Any]) -> EPGroup:
        """Of several ranks there is one connection, which copies of a layer share; a rank alone gets all of its own."""
        if self.size > 1:
            return self
        return replace(self, **{each.name: deepcopy(getattr(self, each.name), memo) for each in fields(self)})

    def __reduce__(self) -> tuple[Any, ...]:
        """TypeError where there are several ranks."""
        if self.size > 1:
            raise TypeError("a group of several ranks cannot be pickled, nor a layer with it: save layer.state_dict()")
        return EPGroup, tuple(getattr(self, each.name) for each in fields(self))

    def streams_of(self, device: torch.device) -> Streams:
        """The device's streams, made when first asked for."""
        if device not in self.streams:
            self.streams[device] = Streams(device)
        return self.streams[device]

    @contextmanager
    def record(self, recording: Recording) -> Iterator[None]:
        """Has every call in the block take notes. RuntimeError where another recorder does already."""
        if self.recorders:
            raise RuntimeError("the group is being recorded already")
        recorder = Recorder(recording)
        self.recorders.append(recorder)
        try:
            yield
        finally:
            self.recorders.clear()
            recorder.stop()

    def link(self, layer: str, device: torch.device) -> float:
        """Bytes per second of the link, measured when first asked for: all ranks must then ask."""
        assert self.transport is not None, "a rank alone has no link"
        if not self.links:
            self.links.append(measure_link(self.transport, self.rank, self.size, layer, device, self.workspace))
            _log.info("rank %d: the link carries %.3g GB/s one way", self.rank, self.links[0] / 1e9)
        return self.links[0]

    def nodes(self, layer: str) -> tuple[int, ...]:
        """Of each rank the lowest rank of its host, where a token goes to a host once, else (). All ranks must ask."""
        found: tuple[int, ...] = getattr(self.transport, "nodes", _no_nodes)(layer)
        return found if self.node_limited else ()

    @property
    def far(self) -> list[int]:
        """Ranks that this one shares no memory with."""
        return [rank for rank in range(self.size) if rank != self.rank and rank not in self.near]

    @property
    def near(self) -> list[int]:
        """Ranks that this one shares memory with; none before the first exchange has found out."""
        return list(getattr(getattr(self.transport, "host", None), "near", ()))

    @property
    def shared_memory(self) -> bool:
        """Whether ranks of a host share memory where they can; True where the transport does not ask."""
        return bool(getattr(getattr(self.transport, "host", None), "shares", True))

    def wave_cost(self, layer: str, own_s: float) -> float:
        """Seconds that a wave takes beside its rows, the most of all ranks'; when first asked for, all must ask."""
        assert self.transport is not None, "a rank alone has no waves"
        if not self.wave_costs:
            page = torch.tensor([own_s], dtype=torch.float64).view(torch.uint8)
            pages = self.transport.gather(page, Label(layer, "link"))
            self.wave_costs.append(float(pages.view(torch.float64).max()))
        return self.wave_costs[0]

    def notes(self, layer: str, call: int) -> Notes:
        """Where a call notes what it does: the group's status, and the recorder if there is one."""
        if self.recorders:
            return self.recorders[0].call(layer, call, self.own_status)
        on_gpu = getattr(self.transport, "device_type", None) == "cuda"
        return Notes(self.own_status, torch.cuda.nvtx.range if on_gpu else None)

    def watched(self, notes: Notes) -> Transport | None:
        """The transport as a call uses it: watched while the group is recorded."""
        transport = self.transport
        return WatchedTransport(transport, notes) if transport and isinstance(notes, CallNotes) else transport

    def turn(self, layer: str, device: torch.device) -> AbstractContextManager[None]:
        """This group's turn for the block: see Turns.take()."""
        return self.turns.take(f"layer {layer!r}", device, self.deadline_s)

    def unbroken(self, layer: str, call: int) -> _Unbroken:
        """A call's exchange. What interrupts it breaks the group: its messages may still be on their way.

        CallRefusedError is what all ranks raise together before any row has moved, and breaks nothing. Nor does
        anything where a rank is alone, which has no messages. RuntimeError where the group is broken already; PeerError
        where a peer is known to be lost.
        """
        return _Unbroken(self, layer, call)

    def _interrupted(self, interruption: BaseException) -> None:
        """A call ends in an exception."""
        if self.size == 1 or isinstance(interruption, CallRefusedError):
            self.own_status.leave()
            return
        said = str(interruption).partition("\n")[0]
        self.broken.append(f"an earlier call was interrupted: {type(interruption).__name__}: {said}")
        _log.info("rank %d: the group cannot be used any more, %s", self.rank, self.broken[0])
        self.announce(interruption)

    def _refuse_lost(self, layer: str) -> None:
        lost = self.monitors[0].lost() if self.monitors else None
        if lost is not None:
            assert self.clock is not None
            raise self.clock.error(lost, Label(layer, "begin"), time.monotonic(), "it was lost between calls")

    def named(self, rank: int) -> str:
        """A rank of this group as messages call it, with its rank in the whole program where that is another."""
        known = self.clock.global_ranks if self.clock is not None else ()
        return named(rank, known[rank] if known else None)

    def announce(self, interruption: BaseException) -> None:
        """Tells the others why this rank will not go on, so that they name the same rank, and at once."""
        if isinstance(interruption, PeerError):
            self.own_status.end(RAISED, interruption.rank, interruption.condition)
        else:
            said = str(interruption).partition("\n")[0][:200]
            self.own_status.end(RAISED, None, f"{type(interruption).__name__}: {said}")
        for monitor in self.monitors:
            monitor.say()

    @classmethod
    def of(
        cls,
        group: EPGroup | dist.ProcessGroup | None,
        device: torch.device | str | None = None,
        *,
        deadline_s: float = DEADLINE_S,
        shared_memory: bool = True,
        node_limited: bool = True,
    ) -> EPGroup:
        """Wraps a torch process group for layers on a device, by default the CPU. None is one rank; an EPGroup is
        returned as it is.

        What the group has for the layer's device decides: gloo gets point-to-point pairs, and memory between ranks
        that share a host, which shared_memory=False, on all ranks, does without; every other backend all-to-all. Where
        ranks share memory on a host, and there are other hosts, a token goes once to each of those: node_limited=False,
        on all ranks, sends it to each rank that needs it instead. The group stays its owner's: no thread, setting or
        deadline of it is changed, and nothing of it is ended.
        ValueError for anything else, for a group that this rank is not in, and for one without a backend for
        the device.
        """
        if isinstance(group, EPGroup):
            check_made_for(getattr(group.transport, "device_type", None), device)
            return group
        _check_deadline(deadline_s)
        if group is None:
            return cls(0, 1, None, deadline_s)
        check_group(group)
        device, size = torch.device(device or "cpu"), group.size()
        world = global_ranks(group)
        hosts: dict[int, str] = {}
        own_status = OwnStatus()
        clock = Clock(deadline_s, hosts, own_status, world)
        shared = _SHARED.setdefault(group, _Shared())
        transport: Transport | None = None
        if size > 1 and backend_for(group, device) == "gloo":
            pairs = PairTransport(group, clock)
            transport = HostTransport(pairs, shared.hosts[shared_memory], shared.hosts[True])
        elif size > 1:
            transport = AllToAllTransport(group, clock, device)
        return cls(
            group.rank(),
            size,
            transport,
            deadline_s,
            clock,
            hosts=hosts,
            own_status=own_status,
            workspace=Workspace(shared.hosts[shared_memory].regions),
            broken=shared.broken,
            turns=shared.turns,
            node_limited=node_limited,
        )


class _Unbroken:
    """EPGroup.unbroken() as a block. A class, since a generator costs a call of few tokens several times as much."""

    def __init__(self, group: EPGroup, layer: str, call: int) -> None:
        self._group, self._layer, self._call = group, layer, call

    def __enter__(self) -> None:
        group = self._group
        if group.broken:
            raise RuntimeError(f"the group cannot be used any more, {group.broken[0]}")
        try:
            group.own_status.enter(self._layer, self._call)
            group._refuse_lost(self._layer)
        except BaseException as interruption:
            group._interrupted(interruption)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if raised is None:
            self._group.own_status.leave()
        else:
            self._group._interrupted(raised)


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """What all EPGroups of one process group have in common, since its messages do not know one from another."""

    broken: list[str] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)
    hosts: dict[bool, Host] = field(default_factory=lambda: {shares: Host(shares) for shares in (False, True)})


_SHARED: WeakKeyDictionary[dist.ProcessGroup, _Shared] = WeakKeyDictionary()


def _leave_to_parent() -> None:
    """In a process that was forked: its calls would read and write what the parent's peers send to the parent. Nor may
    it end the group, also not when it ends itself: it would wait for threads that the parent alone has.
    """
    for group in {*_SHARED, *(known_groups() if _SHARED else ())}:  # of others the user's program has the same threads
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    for group, shared in _SHARED.items():
        if group.size() > 1:
            shared.broken.append(f"this process was forked from that of rank {group.rank()}, which goes on")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def init_group(
    device: torch.device | str = "cpu",
    *,
    rank: int,
    size: int,
    store: Store | None = None,
    init_method: str | None = None,
    address: str | None = None,
    run: str | None = None,
    deadline_s: float = DEADLINE_S,
    shared_memory: bool = True,
    node_limited: bool = True,
) -> Iterator[EPGroup]:
    """Starts torch.distributed for this rank with the backend of its device type, and ends it on the way out.

    cuda uses nccl, npu hccl, cpu gloo. Give the store where the ranks meet, or an init_method ("env://" under
    torchrun). deadline_s bounds the rendezvous, every collective and every wait. Every rank has a heartbeat monitor,
    which listens on address, by default the one that this rank reaches the store's host from. Under the name of a
    run, `megamoe doctor --run` finds the ranks of this machine. shared_memory and node_limited are those of
    EPGroup.of(). ValueError for an unknown device type or a rank outside of [0, size), and, on all ranks before they
    connect, where they differ in device type, size, shared_memory, node_limited or version of megamoe.
    """
    device = torch.device(device)
    if device.type not in BACKENDS:
        raise ValueError(f"no process-group backend is known for device type {device.type!r}, only {sorted(BACKENDS)}")
    _check_integers(rank=rank, size=size)
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in [0, {size})")
    _check_deadline(deadline_s)
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed is initialised already, and that group is not this function's to replace: give its "
            "ProcessGroup to the layer, or to EPGroup.of(), or end it first with destroy_process_group()"
        )
    if run is not None:
        check_name(run)
    process, store = os.getpid(), _meet(store, init_method, rank, size, deadline_s)
    said = {"device": device.type, "shared_memory": shared_memory, "node_limited": node_limited}
    compare_starts(store, rank, size, {**said, "megamoe": megamoe.__version__}, deadline_s)
    others = gloo_threads()  # of groups that are not ours, and stay as they are
    world = _start(device, store, rank, size, deadline_s)
    group: EPGroup | None = None
    try:
        group = EPGroup.of(world, device, deadline_s=deadline_s, shared_memory=shared_memory, node_limited=node_limited)
        if size == 1:
            yield group
            return
        own = heartbeat_address(store, device.type, rank, size, address, deadline_s)
        with _monitor(group, PrefixStore("heartbeat", store), own, run):
            if device.type == "cpu":
                await_gloo_threads(others)
            calm_gloo_threads(others=others)
            yield group
    finally:
        if process == os.getpid():  # not one that was forked in the block and leaves it as well
            if group is not None and isinstance(group.transport, HostTransport):
                group.transport.host.release()
            if dist.group.WORLD is world:  # else the block has ended it by itself
                end_group(world, device, in_peace=group is not None and not group.broken)


def _check_integers(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer, got {value!r}")


def _check_deadline(deadline_s: object) -> None:
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, Real) or not 0 < float(deadline_s) < math.inf:
        raise ValueError(f"deadline_s must be positive and finite, got {deadline_s!r}")


def _meet(store: Store | None, init_method: str | None, rank: int, size: int, deadline_s: float) -> Store:
    """Where the ranks meet, in a part of it that no earlier group has used."""
    if store is None and init_method is None and size == 1:
        return store_of_one()
    if store is None:
        store, _, _ = next(rendezvous(init_method or "env://", rank, size, timeout=timedelta(seconds=deadline_s)))
    return fresh_store(store, rank, deadline_s)


def _start(device: torch.device, store: Store, rank: int, size: int, deadline_s: float) -> dist.ProcessGroup:
    """torch's default group, connected."""
    timeout = timedelta(seconds=backend_timeout_s(device, deadline_s))
    try:
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=size, timeout=timeout)
        world = dist.group.WORLD
        assert world is not None
        if device.type == "cpu":
            dist.barrier(world)  # a rank that ended its group at once would break the others off in mid-connection
    except BaseException:
        _forget_failed_start()
        raise
    return world


@contextmanager
def _monitor(group: EPGroup, store: Store, address: str, run: str | None) -> Iterator[None]:
    """Lights the group's heartbeat for the block; what ends the block early is told to the others."""
    assert group.clock is not None
    assert group.transport is not None
    where = group.own_status
    monitor = HeartbeatMonitor(
        group.rank, group.size, store, where, address=address, host=group.host, deadline_s=group.deadline_s
    )
    monitor.trouble, monitor.pulse = group.transport.abort, getattr(group.transport, "tend", _nothing)
    monitor.near, monitor.collective = lambda: group.near, isinstance(group.transport, AllToAllTransport)
    group.monitors.append(monitor)
    group.clock.monitors.append(monitor)
    listed = list_rank(run, group.rank, monitor.address, monitor.port, monitor.token) if run else nullcontext()
    process = os.getpid()
    try:
        with listed:
            yield
    except GeneratorExit:
        raise
    except BaseException as error:
        if process == os.getpid():
            group.announce(error)
        raise
    finally:
        if process == os.getpid():
            monitor.leave()
            group.monitors.clear()  # what is left of the group must not hold itself, and its connections, alive
            group.clock.monitors.clear()
            monitor.trouble = monitor.pulse = _nothing
            monitor.near = tuple


def _forget_failed_start() -> None:
    """After it torch would look for the next group under another name than ranks whose last start did not fail."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=store_of_one(), rank=0, world_size=1)
    dist.destroy_process_group()


def _no_nodes(layer: str) -> tuple[int, ...]:
    """Of a transport that knows nothing of hosts."""
    del layer
    return ()


def _nothing() -> None:
    """What a heartbeat does about trouble when its group has been left."""
