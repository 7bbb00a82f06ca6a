"""The layer's times on one rank: eager, and as a CUDA graph that is replayed, beside torch's own operations."""

# T tokens   H hidden   I intermediate   E experts   K experts per token

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_kernels.findings import BOUND, PARTS, Row, Work, compared
from benchmarks.gpu_kernels.measure.clock import Clock, Run, Times
from benchmarks.gpu_kernels.measure.layer import Call, Inputs, TorchLayer, inputs, layer, torch_layer
from benchmarks.gpu_kernels.measure.operands import grouped_mm_note
from benchmarks.gpu_kernels.measure.products import timed
from benchmarks.gpu_kernels.measure.shapes import Shape
from benchmarks.gpu_kernels.process import first_line
from megamoe import MoEShape
from megamoe.reference import relative_error

NO_GRAPHS = "no CUDA graphs on a CPU"
HOST_TIME = "eager: the host's time where the host takes longer"


@dataclass(frozen=True, slots=True)
class LayerBench:
    """The three layers of one shape by name, copies of each that take turns, and what those raised that are not.

    note   what is to be said of grouped_mm
    """

    shape: Shape
    clock: Clock
    note: str | None
    calls: dict[str, list[Call]]
    failed: dict[str, str]

    @classmethod
    def made(cls, shape: Shape, clock: Clock) -> LayerBench:
        calls: dict[str, list[Call]] = {}
        failed: dict[str, str] = {}
        for name in ("mxfp4", "bf16", "grouped_mm"):
            copies = clock.copies(layer_work(shape.sizes, shape.sizes.num_experts, name).num_bytes)
            try:
                calls[name] = copies_of(name, copies, shape.sizes, clock.device)
            except Exception as error:  # noqa: BLE001  whatever it raises is what the table says of it
                failed[name] = first_line(error)
        return cls(shape, clock, grouped_mm_note(clock.device), calls, failed)

    def measure(self, rows_per_expert: int) -> list[Row]:
        """A row for each, eager and as a graph; T is such that an expert has rows_per_expert rows on average."""
        sizes, device = self.shape.sizes, self.clock.device
        num_tokens = max(1, round(rows_per_expert * sizes.num_experts / sizes.topk))
        given = inputs(sizes, num_tokens, device, seed=rows_per_expert)
        eager = {f"{name} eager": in_turns(calls, given) for name, calls in self.calls.items()}
        times = self.clock.compare(eager, ahead=False)
        if device.type == "cuda":
            graphs, wrong = captured(self.calls, given)
            times |= self.clock.compare(graphs) | dict(wrong)
        else:
            times |= {f"{name} graph": NO_GRAPHS for name in self.calls}
        planned = Row("layer", self.shape.name, rows_per_expert, "", sizes.num_experts, num_tokens * sizes.topk)
        rows = [self._row(replace(planned, what=what), num_tokens, times) for what in PARTS["layer"]]
        return [compared(each, rows) for each in rows]

    def _row(self, row: Row, num_tokens: int, times: Mapping[str, Times | str]) -> Row:
        name, _, how = row.what.partition(" ")
        notes = [HOST_TIME] if how == "eager" else []
        notes += [self.note] if self.note and name == "grouped_mm" else []
        row = replace(row, note="; ".join(notes) or None)
        found = self.failed.get(name) or times[row.what]
        if found == NO_GRAPHS:
            return replace(row, note=NO_GRAPHS)
        return timed(row, found, layer_work(self.shape.sizes, num_tokens, name))


def copies_of(name: str, copies: int, sizes: MoEShape, device: torch.device) -> list[Call]:
    """Layers that differ in where their weights are, in one group, so that they share the other buffers."""
    if name == "grouped_mm":
        return [torch_layer(sizes, device) for _ in range(copies)]
    first = layer(sizes, name, device)
    return [first, *(layer(sizes, name, device, first.group) for _ in range(copies - 1))]


def in_turns(calls: Sequence[Call], given: Inputs) -> Run:
    def run(turn: int) -> Tensor:
        with torch.no_grad():
            return calls[turn % len(calls)](*given)

    return run


def captured(calls: Mapping[str, Sequence[Call]], given: Inputs) -> tuple[dict[str, Run], dict[str, str]]:
    """Each layer as graphs that are replayed in turns, and what those raised that cannot be captured."""
    graphs: dict[str, Run] = {}
    wrong: dict[str, str] = {}
    for name, each in calls.items():
        try:
            graphs[f"{name} graph"] = replayed([graph_of(call, given) for call in each])
        except Exception as error:  # noqa: BLE001
            wrong[f"{name} graph"] = first_line(error)
    return graphs, wrong


def graph_of(call: Call, given: Inputs) -> torch.cuda.CUDAGraph:
    """RuntimeError where a replay's output differs from that of a call."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            wanted = call(*given).clone()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call(*given)
    graph.replay()
    # the weighted sum of torch's sequence adds in any order
    if not torch.equal(out, wanted) and not (isinstance(call, TorchLayer) and relative_error(out, wanted) < BOUND):
        raise RuntimeError(f"FAILED: a replay's output differs from a call's by {relative_error(out, wanted):.3g}")
    return graph


def replayed(graphs: Sequence[torch.cuda.CUDAGraph]) -> Run:
    return lambda turn: graphs[turn % len(graphs)].replay()


def layer_work(sizes: MoEShape, num_tokens: int, name: str) -> Work:
    """Both products of all rows; the weights of experts with rows, tokens in and out once, nothing between."""
    rows = num_tokens * sizes.topk
    experts, values = min(sizes.num_experts, rows), 3 * sizes.hidden * sizes.intermediate
    weight_bytes = values // 2 + values // 32 if name == "mxfp4" else 2 * values
    return Work(2 * rows * values, experts * weight_bytes + 2 * 2 * num_tokens * sizes.hidden)
