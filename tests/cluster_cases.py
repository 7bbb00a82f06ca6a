"""What the tests of the cluster share: workers that can be interfered with, faults inside a rank, and the oracle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.launch.cluster.worker_handle import WorkerHandle, WorkerPool
from megamoe.model.deepseek_v4.blocks import ExpertStack, MoEBlock
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.parallel.group import EPGroup


class WatchedHandle:
    """A worker that says what it is asked before it is."""

    def __init__(self, handle: WorkerHandle, before: Callable[[WorkerHandle, str], None]) -> None:
        self.number, self.host, self.pid = handle.number, handle.host, handle.pid
        self._handle, self._before = handle, before

    def call(self, method: str, *args: Any) -> Future[Any]:
        self._before(self, method)
        return self._handle.call(method, *args)

    @property
    def alive(self) -> bool:
        return self._handle.alive

    def kill(self) -> None:
        self._handle.kill()


class WatchedPool:
    """Workers from elsewhere. before is called with a worker and a method; what is in refused cannot be opened."""

    def __init__(self, source: WorkerPool) -> None:
        self._source = source
        self.before: Callable[[WorkerHandle, str], None] = lambda *_: None
        self.refused: set[int] = set()

    def open(self, number: int, deadline_s: float) -> WorkerHandle:
        if number in self.refused:
            raise RuntimeError(f"worker {number} has no machine")
        return WatchedHandle(self._source.open(number, deadline_s), lambda handle, method: self.before(handle, method))

    def close(self) -> None:
        self._source.close()

    def strike(self, number: int, wanted: str) -> None:
        """Has a worker's process killed as soon as it has been asked something, once."""

        def before(handle: WorkerHandle, method: str) -> None:
            if (handle.number, method) == (number, wanted):
                self.before = lambda *_: None
                os.kill(handle.pid, signal.SIGKILL)

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
