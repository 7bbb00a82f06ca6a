"""Ranks of the mega-kernel as forked processes that share memory, and the staged kernels' output for the same tokens.

They are forked by the process in which Triton interprets, so they have all that it has imported.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from megamoe.activations import SWIGLU, Activation
from megamoe.formats import BLOCK, MXFP4, MXFP8, dequantize_mxfp8, quantize_mxfp4
from megamoe.kernels.chips.tiles import Tile
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear1 import grouped_linear1
from megamoe.kernels.grouped_linear2 import grouped_linear2
from megamoe.kernels.layout import Prepacked, Wide, interleave_gate_up
from megamoe.kernels.mega.call import ExpertWeights, MegaKernel
from megamoe.kernels.mega.layout import Layout
from megamoe.kernels.quantize import quantize
from megamoe.kernels.reduce_slots import reduce_slots
from megamoe.kernels.route_slots import route_slots
from megamoe.parallel.transport.buffers import Exchange, map_files
from tests.cases import Batch

_FINISH_S = 200.0
TILE = Tile(16, 64, 128)


@dataclass(frozen=True)
class Case:
    """A layer on ranks: kind of its products, wire, which rank has each expert, blocks of a wave."""

    ranks: int
    owners: tuple[int, ...]
    kind: str = "wide"
    wire: str = "mxfp8"
    tokens: int = 8
    topk: int = 2
    hidden: int = 64
    intermediate: int = 32
    wave: int = 1
    activation: Activation = field(default=SWIGLU.with_limit(3.0))
    bias: bool = False

    @property
    def layout(self) -> Layout:
        most = max(self.owners.count(rank) for rank in range(self.ranks))
        return Layout.of(
            ranks=self.ranks,
            num_experts=len(self.owners),
            most_experts=most,
            topk=self.topk,
            tokens=self.tokens,
            hidden=self.hidden,
            intermediate=self.intermediate,
            linear1_rows=self.intermediate * self.activation.rows_per_output,
            kind=self.kind,
            wire=self.wire,
            rows=TILE.rows,
            columns=TILE.columns,
            wave=self.wave,
        )

    def experts(self, rank: int | None = None) -> ExpertWeights:
        """Of a rank, or of all of them in order."""
        rng = torch.Generator().manual_seed(3)
        mine = [expert for expert, owner in enumerate(self.owners) if rank in (None, owner)]
        rows = self.intermediate * self.activation.rows_per_output
        gate_up = torch.randn(len(self.owners), rows, self.hidden, generator=rng)[mine] * 0.3
        down = torch.randn(len(self.owners), self.hidden, self.intermediate, generator=rng)[mine] * 0.3
        if self.activation.gated:
            gate_up = interleave_gate_up(gate_up)
        biases: list[Tensor | None] = [None, None]
        if self.bias:
            biases = [torch.randn(len(self.owners), size, generator=rng)[mine] for size in (rows, self.hidden)]
        return ExpertWeights(self._held(gate_up), self._held(down), self.activation, *biases)

    def _held(self, weight: Tensor) -> MXFP4 | Prepacked | Tensor:
        if self.kind == "bf16":
            return weight.to(torch.bfloat16)
        packed = quantize_mxfp4(weight)
        return Prepacked.of(packed) if self.kind == "wide" else packed

    def kernel(self, rank: int, exchange: Exchange, deadline_s: float = 120.0) -> MegaKernel:
        layout = self.layout
        return MegaKernel(layout, TILE, map_files(rank, layout.num_bytes, exchange), self.owners, 1, deadline_s)


def staged(case: Case, batch: Batch) -> Tensor:
    """What the staged kernels make of a batch, all experts on one rank."""
    experts, num_slots, width = case.experts(), batch.ids.numel(), case.intermediate
    slots = route_slots(batch.ids, batch.weights, len(case.owners))
    x: MXFP8 | Wide | Tensor = batch.hidden
    if case.wire == "mxfp8":
        rounded = empty(case, len(batch.hidden), case.hidden)
        quantize(batch.hidden, None, rounded)
        x = dequantize_mxfp8(rounded) if case.kind == "bf16" and isinstance(rounded, MXFP8) else rounded
    activated: Any = empty(case, num_slots, width)
    if case.kind == "bf16":
        activated = torch.empty(num_slots, width, dtype=torch.bfloat16)
    counts = slots.tokens_per_expert
    results = torch.zeros(num_slots + 2, case.hidden, dtype=torch.bfloat16)
    if num_slots:
        first = Grouped(x, experts.gate_up, counts, slots.source, bias=experts.gate_up_bias)
        grouped_linear1(first, slots.weights, case.activation, activated, tile=TILE)
        second = Grouped(activated, experts.down, counts, bias=experts.down_bias)
        grouped_linear2(second, slots.order, results, slots.weights, tile=TILE)
    return reduce_slots(results, slots.positions)


def empty(case: Case, rows: int, width: int) -> MXFP8 | Wide:
    if case.kind == "wide":
        return Wide(torch.empty(rows, width, dtype=torch.bfloat16))
    values = torch.empty(rows, width, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return MXFP8(values, torch.empty(rows, width // BLOCK, dtype=torch.uint8))


# ---- processes ----


def on_ranks(size: int, work: Callable[..., Any], *args: Any, within_s: float = _FINISH_S) -> list[Any]:
    """work(rank, exchange, *args) in a forked process for each rank; their results in order of rank.

    An exception of a rank is raised here. RuntimeError where ranks do not end in time or die.
    """
    context = multiprocessing.get_context("fork")
    between = [[context.SimpleQueue() for _ in range(size)] for _ in range(size)]
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(rank, between, theirs, work, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + within_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: Sequence[Connection], until: float) -> list[Any]:
    outcomes: dict[int, Any] = {}
    while len(outcomes) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in outcomes], until - time.monotonic())
        if not ready:
            raise RuntimeError(f"ranks {sorted(set(range(len(pipes))) - set(outcomes))} did not end in time")
        for rank, pipe in enumerate(pipes):
            if pipe in ready:
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError as died:
                    raise RuntimeError(f"rank {rank} died") from died
                if isinstance(outcomes[rank], Exception):
                    raise outcomes[rank]
    return [outcomes[rank] for rank in range(len(pipes))]


def _serve(rank: int, between: Any, pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)

    def exchange(card: bytes) -> list[bytes]:
        for queue in between[rank]:
            queue.put(card)
        return [queues[rank].get() for queues in between]

    try:
        outcome = work(rank, exchange, *args)
    except Exception as error:  # noqa: BLE001  raised again by whoever asked
        outcome = error
    pipe.send_bytes(pickle.dumps(outcome))
