"""What passes between every pair of ranks, both ways, one pair at a time: gigabytes per second and microseconds.

The sender of a link measures: it says how many bytes come, sends them and waits for one message back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import permutations
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.launch.doctor.check import Link

FIRST_BYTES, MOST_BYTES = 64 * 1024, 16 * 1024 * 1024
_LONG_ENOUGH_S = 0.02  # a message that takes longer says what the link carries
_MOST_PINGS, _REPEATS = 50, 5
_PING, _END = -1, 0


@dataclass(frozen=True, slots=True)
class Line:
    """How a rank talks to another: the group, where its tensors must be, and how long to wait for anything."""

    group: dist.ProcessGroup
    device: torch.device
    wait: timedelta

    def send(self, rows: Tensor, peer: int) -> None:
        self._finish(dist.isend(rows, peer, self.group), rows)

    def receive(self, rows: Tensor, peer: int) -> None:
        self._finish(dist.irecv(rows, peer, self.group), rows)

    def say(self, number: int, peer: int) -> None:
        self.send(torch.tensor([number], device=self.device), peer)

    def hear(self, peer: int) -> int:
        said = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.receive(said, peer)
        return int(said)

    def _finish(self, work: dist.Work | None, rows: Tensor) -> None:
        assert work is not None, "this rank is in the group"
        work.wait(self.wait)
        if self.device.type != "cpu":
            rows[:1].cpu()  # waits for the device, where work.wait() only has its next work wait


def measure(line: Line, rank: int, size: int, seconds: float) -> list[Link]:
    """All ranks must call. The links that start at this rank; seconds bounds all links of all ranks together, roughly.

    RuntimeError where a rank does not answer in time.
    """
    pairs = list(permutations(range(size), 2))
    rows, found = torch.zeros(MOST_BYTES, dtype=torch.uint8, device=line.device), []
    for source, target in pairs:
        if rank == source:
            found.append(_measure_link(line, rank, target, rows, seconds / len(pairs)))
        elif rank == target:
            _answer(line, source, rows)
        dist.barrier(line.group)  # the others wait here without work, so that one pair has the machine
    return found


def _measure_link(line: Line, rank: int, target: int, rows: Tensor, seconds: float) -> Link:
    begun = time.perf_counter()
    trips = _repeat(lambda: _ping(line, target), _MOST_PINGS, seconds / 4)
    trip = median(trips[len(trips) // 5 :])  # the first ones make connections and wake threads
    num_bytes, took = FIRST_BYTES, 0.0
    while True:
        took = _message(line, target, rows[:num_bytes])
        spent = time.perf_counter() - begun
        if took >= _LONG_ENOUGH_S or 2 * num_bytes > MOST_BYTES or spent + 2 * took * _REPEATS > seconds:
            break
        num_bytes *= 2
    again = _repeat(lambda: _message(line, target, rows[:num_bytes]), _REPEATS, seconds - spent)
    line.say(_END, target)
    moving = max(median(again) - trip / 2, 1e-9)  # the answer's way back is no part of it
    return Link(rank, target, round(num_bytes / moving / 1e9, 4), round(trip / 2 * 1e6, 1))


def _answer(line: Line, source: int, rows: Tensor) -> None:
    """The receiver's side of a link, until the sender has seen enough."""
    while (num_bytes := line.hear(source)) != _END:
        if num_bytes != _PING:
            line.receive(rows[:num_bytes], source)
        line.say(num_bytes, source)


def _ping(line: Line, target: int) -> float:
    """Seconds of a number's way there and back."""
    begun = time.perf_counter()
    line.say(_PING, target)
    line.hear(target)
    return time.perf_counter() - begun


def _message(line: Line, target: int, rows: Tensor) -> float:
    """Seconds until all rows are there and the target has said so."""
    line.say(len(rows), target)
    begun = time.perf_counter()
    line.send(rows, target)
    line.hear(target)
    return time.perf_counter() - begun


def _repeat(once: Callable[[], float], most: int, seconds: float) -> list[float]:
    """What once() returned, at least one and at most `most` times, for no longer than seconds if it can be helped."""
    until, found = time.perf_counter() + seconds, [once()]
    while len(found) < most and time.perf_counter() < until:
        found.append(once())
    return found
