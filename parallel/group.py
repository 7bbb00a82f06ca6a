"""The ranks that share the experts of a layer: a process group with a deadline, and the transport that suits it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store

from megamoe.parallel.link import measure_link
from megamoe.parallel.recorder import Notes, Recorder, Recording
from megamoe.parallel.transport import AllToAllTransport, PairTransport, Transport
from megamoe.parallel.workspace import Workspace

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class EPGroup:
    """An expert-parallel group as a layer uses it.

    rank, size       this rank and the number of ranks, in the group's own numbering
    transport        moves rows; None where this rank is alone
    deadline_s       seconds that any single wait may take
    host, hosts      this rank's host name; those of the others, filled in at the first call
    workspace        buffers that the group's layers use in turn
    links            at most one: bytes per second that each rank can send while it receives as many, once measured
    broken           why the group cannot be used any more, empty while it can
    recorders        at most one: takes notes of every call of the group's layers

    Layers that share an EPGroup learn from each other that it is broken; give all layers of a model the same one.
    """

    rank: int
    size: int
    transport: Transport | None
    deadline_s: float
    host: str = field(default_factory=socket.gethostname)
    hosts: dict[int, str] = field(default_factory=dict)
    links: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    workspace: Workspace = field(default_factory=Workspace)
    recorders: list[Recorder] = field(default_factory=list)

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
            self.links.append(measure_link(self.transport, self.rank, self.size, layer, device))
        return self.links[0]

    def notes(self, layer: str, call: int) -> Notes:
        """Where a call notes what it does: nowhere, unless the group is being recorded."""
        return self.recorders[0].call(layer, call) if self.recorders else Notes()

    @contextmanager
    def unbroken(self) -> Iterator[None]:
        """A call's stretch of exchange. What interrupts it breaks the group: its messages may still be on their way.

        ValueError is what all ranks raise together before any row has moved, and breaks nothing. RuntimeError where
        the group is broken already.
        """
        if self.broken:
            raise RuntimeError(f"the group cannot be used any more, an earlier call was interrupted: {self.broken[0]}")
        try:
            yield
        except ValueError:
            raise
        except BaseException as interruption:
            self.broken.append(f"{type(interruption).__name__}: {interruption}")
            raise

    @classmethod
    def of(
        cls,
        group: EPGroup | dist.ProcessGroup | None,
        device: torch.device | str = "cpu",
        *,
        deadline_s: float = DEADLINE_S,
    ) -> EPGroup:
        """Wraps a torch process group. None is one rank; an EPGroup is returned as it is.

        gloo gets point-to-point pairs, every other backend all-to-all. ValueError for anything else.
        """
        if isinstance(group, EPGroup):
            return group
        if deadline_s <= 0:
            raise ValueError(f"deadline_s must be positive, got {deadline_s}")
        if group is None:
            return cls(0, 1, None, deadline_s)
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"group must be a torch ProcessGroup, an EPGroup or None, got {type(group).__name__}")
        hosts: dict[int, str] = {}
        transport: Transport | None = None
        if group.size() > 1 and dist.get_backend(group) == "gloo":
            transport = PairTransport(group, deadline_s, hosts)
        elif group.size() > 1:
            transport = AllToAllTransport(group, deadline_s, hosts, torch.device(device))
        return cls(group.rank(), group.size(), transport, deadline_s, hosts=hosts)


@contextmanager
def init_group(
    device: torch.device | str = "cpu",
    *,
    rank: int,
    size: int,
    store: Store | None = None,
    init_method: str | None = None,
    deadline_s: float = DEADLINE_S,
) -> Iterator[EPGroup]:
    """Starts torch.distributed for this rank with the backend of its device type, and ends it on the way out.

    cuda uses nccl, npu hccl, cpu gloo. Give the store where the ranks meet, or an init_method ("env://" under
    torchrun). deadline_s bounds the rendezvous, every collective and every wait. ValueError for an unknown
    device type or a rank outside of [0, size).
    """
    device = torch.device(device)
    if device.type not in BACKENDS:
        raise ValueError(f"no process-group backend is known for device type {device.type!r}, only {sorted(BACKENDS)}")
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in [0, {size})")
    if deadline_s <= 0:
        raise ValueError(f"deadline_s must be positive, got {deadline_s}")
    dist.init_process_group(
        BACKENDS[device.type],
        init_method=init_method,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=deadline_s),
    )
    try:
        world = dist.group.WORLD
        assert world is not None
        if device.type == "cpu":
            dist.barrier(world)  # a rank that ended its group at once would break the others off in mid-connection
        yield EPGroup.of(world, device, deadline_s=deadline_s)
    finally:
        dist.destroy_process_group()
