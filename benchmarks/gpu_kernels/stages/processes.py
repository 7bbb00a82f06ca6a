"""Two ranks in processes of their own on one device, whose rows lie in memory that both have: CUDA IPC on a GPU.

NCCL refuses two ranks on one GPU. Here a piece is copied by its sender, told of through a queue, and copied once more
by whoever it is for. On a CPU the memory is shared by the host's means.
"""

from __future__ import annotations

import os
import queue
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.gpu_kernels.findings import Check, Finding
from benchmarks.gpu_kernels.measure.layer import CHECKED, DISPATCH_FORMATS, layer
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import end_with, first_line
from benchmarks.gpu_kernels.stages.ranks import DEADLINE_S, TOKENS, WAVES, Boxes, split_inputs
from benchmarks.gpu_kernels.stages.task import device_of
from megamoe import EPGroup
from megamoe.parallel.transport.pairs import Label

SIZE = len(TOKENS)
Key = tuple[str, int | None, str]


@dataclass(frozen=True, slots=True)
class Room:
    """What the processes share: a queue from each rank to each rank, and a place to meet."""

    queues: list[list[Any]]
    rendezvous: Any

    @classmethod
    def made(cls, context: Any) -> Room:
        return cls([[context.Queue() for _ in range(SIZE)] for _ in range(SIZE)], context.Barrier(SIZE))


class ProcessTransport(Boxes):
    """Moves rows between the processes of a room: pieces lie in memory that the peer opens, and copies from."""

    def __init__(self, room: Room, rank: int, name: str) -> None:
        self.rank, self._room, self._name = rank, room, name
        self._come: dict[tuple[int, Key], list[Any]] = defaultdict(list)
        self._gathered = 0

    def gather(self, page: Tensor, label: Label) -> Tensor:
        self._gathered += 1
        key = (label.phase, self._gathered, self._name)
        for peer in range(SIZE):
            self.tell(peer, key, page.numpy().tobytes())
        pages = [torch.frombuffer(bytearray(self.hear(peer, key)), dtype=page.dtype) for peer in range(SIZE)]
        return torch.stack(pages).view(SIZE, *page.shape)

    def abort(self) -> None:
        self._room.rendezvous.abort()

    def put(self, peer: int, label: Label, piece: Tensor) -> None:
        own = piece.clone()  # not in memory that a call uses again
        _wait_for(own.device)  # a queue's own thread knows no streams
        self.tell(peer, (label.phase, label.wave, self._name), own)

    def take(self, peer: int, label: Label, place: Tensor) -> None:
        piece = self.hear(peer, (label.phase, label.wave, self._name))
        place.copy_(piece)
        _wait_for(place.device)  # the piece is the sender's memory, which it may have back now

    def tell(self, peer: int, key: Key, what: object) -> None:
        self._room.queues[self.rank][peer].put((key, what))

    def hear(self, peer: int, key: Key) -> Any:
        """What a peer told under a key. TimeoutError where that does not come."""
        until = time.monotonic() + DEADLINE_S
        while not self._come[peer, key]:
            try:
                other, what = self._room.queues[peer][self.rank].get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"rank {peer} sent no {key} within {DEADLINE_S:g} s") from None
            self._come[peer, other].append(what)
        return self._come[peer, key].pop(0)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def check_all(task: Task) -> Iterator[Finding]:
    """Forks both ranks, and does not touch the device itself."""
    context = multiprocessing.get_context("fork")
    room = Room.made(context)
    pipes, processes = [], []
    for rank in range(SIZE):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(task, room, rank, theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield from _heard(pipes, task.until - 1.0)
    finally:
        for process in processes:
            process.kill()
            process.join(5.0)


def _heard(pipes: Sequence[Any], until: float) -> Iterator[Check]:
    """A check for each format, once both ranks have told of it."""
    for weight_format in DISPATCH_FORMATS:
        said = []
        for rank, pipe in enumerate(pipes):
            if not wait([pipe], max(0.0, until - time.monotonic())):
                said.append(f"rank {rank} said nothing in time")
                continue
            try:
                problem = pipe.recv()
            except EOFError:
                problem = "ended"
            said += [f"rank {rank}: {problem}"] if problem else []
        name = f"{weight_format} layer on two processes that share the device's memory, bits of one rank"
        yield Check(name, not said, "; ".join(said))


def _serve(task: Task, room: Room, rank: int, pipe: Any, parent: int) -> None:
    """One rank: says of each format what was wrong, or ''."""
    end_with(parent)
    device = device_of(task)
    for weight_format in DISPATCH_FORMATS:
        try:
            pipe.send(compared(weight_format, device, partial(ProcessTransport, room, rank)))
        except Exception as error:  # noqa: BLE001
            pipe.send(first_line(error))
            room.rendezvous.abort()
    room.rendezvous.wait(DEADLINE_S)  # no rank's memory goes away while another may read it


def compared(weight_format: str, device: torch.device, make: partial[ProcessTransport]) -> str:
    """What differs from the bits of one rank, '' if nothing does."""
    given, parts = split_inputs(device)
    alone = layer(CHECKED, weight_format, device)(*given)
    wrong = []
    for waves in WAVES:
        transport = make(f"{weight_format} {waves}")
        group = EPGroup(transport.rank, SIZE, transport, DEADLINE_S)
        made = layer(CHECKED, weight_format, device, group, waves=waves)
        _wait_for(device)
        out = made(*parts[transport.rank])
        _wait_for(device)
        if not torch.equal(out, torch.split(alone, TOKENS)[transport.rank]):
            wrong.append(str(waves))
    return f"others in {', '.join(wrong)} waves" if wrong else ""
