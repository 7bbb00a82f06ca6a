"""What the tests of the cluster share: seats that can be interfered with, faults inside a rank, and the oracle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.launch.cluster.worker_handle import Seat, Seats
from megamoe.model.deepseek_v4.blocks import ExpertStack, MoEBlock
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.parallel.group import EPGroup


class WatchedSeat:
    """A seat that says what it is asked before it is."""

    def __init__(self, seat: Seat, before: Callable[[Seat, str], None]) -> None:
        self.number, self.host, self.pid = seat.number, seat.host, seat.pid
        self._seat, self._before = seat, before

    def call(self, method: str, *args: Any) -> Future[Any]:
        self._before(self, method)
        return self._seat.call(method, *args)

    @property
    def alive(self) -> bool:
        return self._seat.alive

    def kill(self) -> None:
        self._seat.kill()


class WatchedSeats:
    """Seats from elsewhere. before is called with a seat and a method; what is in refused cannot be opened."""

    def __init__(self, source: Seats) -> None:
        self._source = source
        self.before: Callable[[Seat, str], None] = lambda *_: None
        self.refused: set[int] = set()

    def open(self, number: int, deadline_s: float) -> Seat:
        if number in self.refused:
            raise RuntimeError(f"seat {number} has no machine")
        return WatchedSeat(self._source.open(number, deadline_s), lambda seat, method: self.before(seat, method))

    def close(self) -> None:
        self._source.close()

    def strike(self, number: int, wanted: str) -> None:
        """Has the process in a seat killed as soon as it has been asked something, once."""

        def before(seat: Seat, method: str) -> None:
            if (seat.number, method) == (number, wanted):
                self.before = lambda *_: None
                os.kill(seat.pid, signal.SIGKILL)

        self.before = before


def break_next_forward(group: EPGroup, rank: int, kind: str) -> None:
    """On one rank the second layer of the next batch "loops" for ever in Python, or "raises"."""
    if group.rank != rank:
        return
    whole, calls = MoEBlock.forward, []

    def forward(self: MoEBlock, *args: Tensor) -> Tensor:
        calls.append(self)
        if len(calls) < 2:
            return whole(self, *args)
        MoEBlock.forward = whole  # type: ignore[method-assign]
        while kind == "loops":
            pass
        raise RuntimeError("the fan has stopped")

    MoEBlock.forward = forward  # type: ignore[assignment, method-assign]


def batches_and_outputs(checkpoint: Path, num_batches: int, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Random batches, and what the model makes of each on one rank."""
    drawn = torch.Generator().manual_seed(0)
    with Checkpoint.open(checkpoint) as opened:
        model, vocabulary = ExpertStack.load(opened), opened.config.vocab_size
        batches = [torch.randint(0, vocabulary, (num_tokens,), generator=drawn) for _ in range(num_batches)]
        return [(ids, model(opened.embedding(ids), ids)) for ids in batches]
