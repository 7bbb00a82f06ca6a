"""The all-to-all transport over NCCL on one GPU, where a group can have one rank only; over gloo in a rehearsal.

A lone rank goes through the whole exchange: pages are gathered, and transfers queued beside compute, though no row
travels. Then two ranks in threads send each other every row as a collective of one rank each, which is a copy in NCCL's
own stream: a wait that queued nothing would read rows that have not come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore

from benchmarks.gpu_kernels.findings import Check, Finding
from benchmarks.gpu_kernels.measure.layer import CHECKED, DISPATCH_FORMATS, inputs, layer
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.stages.ranks import (
    DEADLINE_S,
    WAVES,
    Room,
    ThreadTransport,
    check_ranks,
    stream_of_its_own,
)
from benchmarks.gpu_kernels.stages.task import device_of
from benchmarks.gpu_kernels.stages.verify import run_all
from megamoe import EPGroup, MegaMoE
from megamoe.parallel.group import BACKENDS
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.pairs import Label

_CALLS = 3  # queued one after the other, in buffers that each uses again


def check_all(task: Task) -> Iterator[Finding]:
    device = device_of(task)
    backend = BACKENDS[device.type]
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=DEADLINE_S))
    try:
        yield from run_all(checks(device, backend))
    finally:
        dist.destroy_process_group()


def checks(device: torch.device, backend: str) -> Iterator[tuple[str, Callable[[], Check]]]:
    transport, lock = lone_group(device).transport, threading.Lock()
    assert isinstance(transport, AllToAllTransport)
    for weight_format in DISPATCH_FORMATS:
        yield f"{weight_format} layer, check_lone", partial(check_lone, weight_format, device, backend)
    for weight_format in DISPATCH_FORMATS:
        how = f"two ranks whose rows go through {backend}"
        make = partial(LoopTransport, transport, lock)
        yield f"{weight_format} layer, check_ranks", partial(check_ranks, weight_format, device, make, how)


def lone_group(device: torch.device) -> EPGroup:
    """torch's default group as a layer's, with the transport of groups that have more than one rank."""
    world = dist.group.WORLD
    assert world is not None
    group = EPGroup.of(world, device, deadline_s=DEADLINE_S)
    assert group.clock is not None
    return replace(group, transport=AllToAllTransport(world, group.clock, device))


def check_lone(weight_format: str, device: torch.device, backend: str) -> Check:
    """Calls that are queued without a wait between them, in a stream of their own, give a lone rank's bits."""
    given = [inputs(CHECKED, 33, device, seed) for seed in range(_CALLS)]
    alone = layer(CHECKED, weight_format, device)
    wanted = [alone(*each).clone() for each in given]
    wrong = []
    for waves in WAVES:
        made = exchanging(layer(CHECKED, weight_format, device, lone_group(device), waves=waves))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        with stream_of_its_own(device):
            found = [made(*each).clone() for each in given]
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        if not all(map(torch.equal, found, wanted)):
            wrong.append(waves)
    name = f"{weight_format} layer of one rank through {backend}, a lone rank's bits"
    return Check(name, not wrong, f"others in {', '.join(map(str, wrong))} waves" if wrong else "")


def exchanging(made: MegaMoE) -> MegaMoE:
    """The layer with the calls of a rank that has others, though it is alone and has kernels."""
    made._alone = None
    return made


class LoopTransport(ThreadTransport):
    """Ranks in threads, each of whose pieces goes through a collective of a group of one rank."""

    def __init__(self, lone: AllToAllTransport, lock: threading.Lock, room: Room, rank: int) -> None:
        super().__init__(room, rank)
        self.lone, self.lock = lone, lock

    def put(self, peer: int, label: Label, piece: Tensor) -> None:
        """Sends the piece into a place of its own, from where whoever waits for it takes it."""
        place = torch.empty_like(piece)
        transfer = self.lone.expect(place, [len(piece)], label)
        with self.lock:  # a communicator takes one collective at a time
            transfer.send(piece, [len(piece)])
        self.room.kept.append((piece, place))
        self.room.box(label, self.rank, peer).put((place, transfer.wait))
