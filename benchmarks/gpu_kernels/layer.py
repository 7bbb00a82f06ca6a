"""The whole layer on one rank: checked, then timed eager and as a CUDA graph beside the same in torch alone."""

# T tokens   H hidden   I intermediate   E experts   K experts per token

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_kernels.clock import Ceilings, Clock, Run, Times, first_line
from benchmarks.gpu_kernels.operands import Shape, grouped_mm, random_bf16, random_mxfp4
from benchmarks.gpu_kernels.results import BOUND, PARTS, Check, Row, Work, compared
from megamoe import EPGroup, MegaMoE, MoEShape
from megamoe.formats import MXFP4
from megamoe.reference import relative_error

DISPATCH_FORMATS = {"mxfp4": "mxfp8", "bf16": "bf16"}  # by the format of the weights
CHECKED = MoEShape(hidden=256, intermediate=128, num_experts=8, topk=2, swiglu_limit=10.0)
_CALLS = 20
Inputs = tuple[Tensor, Tensor, Tensor]
Call = Callable[..., Tensor]


def inputs(sizes: MoEShape, num_tokens: int, device: torch.device, seed: int = 0) -> Inputs:
    """hidden [T, H] bfloat16, topk_ids [T, K] int64 in turns over all experts, topk_weights [T, K] float32"""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_tokens, sizes.hidden, device=device, generator=generator).to(torch.bfloat16)
    ids = torch.arange(num_tokens * sizes.topk, device=device).view(num_tokens, sizes.topk) % sizes.num_experts
    return hidden, ids, torch.rand(num_tokens, sizes.topk, device=device, generator=generator) + 0.25


def weights(sizes: MoEShape, weight_format: str, device: torch.device) -> tuple[MXFP4 | Tensor, MXFP4 | Tensor]:
    """gate_up [E, 2I, H], gate rows first, and down [E, H, I]"""
    make = random_mxfp4 if weight_format == "mxfp4" else random_bf16
    return (
        make((sizes.num_experts, 2 * sizes.intermediate, sizes.hidden), 0, device),
        make((sizes.num_experts, sizes.hidden, sizes.intermediate), 1, device),
    )


def layer(
    sizes: MoEShape, weight_format: str, device: torch.device, group: EPGroup | None = None, *, waves: int = 1
) -> MegaMoE:
    made = empty_layer(sizes, weight_format, device, group, waves=waves)
    made.load_experts(*weights(sizes, weight_format, device))
    return made


def empty_layer(
    sizes: MoEShape, weight_format: str, device: torch.device, group: EPGroup | None = None, *, waves: int = 1
) -> MegaMoE:
    wire = DISPATCH_FORMATS[weight_format]
    return MegaMoE(sizes, group, weight_format=weight_format, dispatch_format=wire, waves=waves, device=device)


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """The layer of torch's own operations in BF16: sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum."""

    gate_up: Tensor
    down: Tensor
    limit: float | None

    def __call__(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As MegaMoE takes and gives it; no slot may be masked."""
        experts, order = topk_ids.flatten().sort(stable=True)
        tokens = order // topk_ids.shape[1]
        ids = torch.arange(len(self.gate_up), device=hidden.device)
        ends = torch.searchsorted(experts, ids, right=True).to(torch.int32)
        gate, up = grouped_mm(hidden[tokens], self.gate_up, ends).chunk(2, -1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, self.down, ends)
        weighted = rows * topk_weights.flatten()[order].unsqueeze(1)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return out.index_add_(0, tokens, weighted).to(torch.bfloat16)


def torch_layer(sizes: MoEShape, device: torch.device) -> TorchLayer:
    gate_up, down = weights(sizes, "bf16", device)
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    return TorchLayer(gate_up, down, sizes.swiglu_limit)


# ---- checks ----


def layer_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Of a small shape; two of each format are of a GPU alone."""
    of_all, of_gpus = (check_against_host, check_bits), (check_waits, check_memory)
    for weight_format in DISPATCH_FORMATS:
        for check in (*of_all, *(of_gpus if device.type == "cuda" else ())):
            yield f"{weight_format} layer, {check.__name__}", partial(check, weight_format, device)
    yield "torch's sequence", partial(check_torch_layer, device)


def to_host(weight: MXFP4 | Tensor) -> MXFP4 | Tensor:
    return MXFP4(weight.packed.cpu(), weight.scales.cpu()) if isinstance(weight, MXFP4) else weight.cpu()


def check_against_host(weight_format: str, device: torch.device) -> Check:
    here, there = layer(CHECKED, weight_format, device), empty_layer(CHECKED, weight_format, torch.device("cpu"))
    there.load_experts(*(to_host(each) for each in weights(CHECKED, weight_format, device)))
    given = inputs(CHECKED, 33, device)
    error = relative_error(here(*given).cpu(), there(*(each.cpu() for each in given)))
    return Check(f"{weight_format} layer as on the host", error < BOUND, f"error {error:.3g}, must be below {BOUND:g}")


def check_bits(weight_format: str, device: torch.device) -> Check:
    """The same output in another run, and for a token that comes alone."""
    made, given = layer(CHECKED, weight_format, device), inputs(CHECKED, 257, device)
    first = made(*given).clone()
    again = torch.equal(made(*given), first)
    alone = torch.equal(made(*(each[200:201].clone() for each in given))[0], first[200])
    return Check(f"{weight_format} layer, bits in another run and of a token alone", again and alone)


def check_waits(weight_format: str, device: torch.device) -> Check:
    """A call that was made before makes the host wait for nothing."""
    made, given = layer(CHECKED, weight_format, device), inputs(CHECKED, 33, device)
    _warmed_up(made, given)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    name = f"{weight_format} layer waits for nothing"
    try:
        made(*given)
    except RuntimeError as waited:
        return Check(name, False, first_line(waited))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return Check(name, True)


def check_memory(weight_format: str, device: torch.device) -> Check:
    """Later calls ask the driver for no memory."""
    made, given = layer(CHECKED, weight_format, device), inputs(CHECKED, 33, device)
    _warmed_up(made, given)
    before = _asked_of_the_driver(device)
    for _ in range(_CALLS):
        made(*given)
    torch.cuda.synchronize(device)
    after = _asked_of_the_driver(device)
    name = f"{weight_format} layer asks for no memory in {_CALLS} calls"
    return Check(name, before == after, f"allocations, segments {before} before, {after} after")


def check_torch_layer(device: torch.device) -> Check:
    """What the layer is held against computes the same."""
    gate_up, down = weights(CHECKED, "bf16", device)
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    given = inputs(CHECKED, 33, device)
    error = relative_error(
        TorchLayer(gate_up, down, CHECKED.swiglu_limit)(*given), layer(CHECKED, "bf16", device)(*given)
    )
    return Check("torch's sequence computes what the BF16 layer does", error < 2 * BOUND, f"error {error:.3g}")


def _warmed_up(made: MegaMoE, given: Inputs) -> None:
    for _ in range(3):
        made(*given)
    torch.cuda.synchronize(given[0].device)


def _asked_of_the_driver(device: torch.device) -> tuple[int, int]:
    stats = torch.cuda.memory_stats(device)
    return int(stats.get("num_device_alloc", 0)), int(stats.get("segment.all.current", 0))


# ---- times ----


@dataclass(frozen=True, slots=True)
class LayerBench:
    """The three layers of one shape by name, copies of each that take turns, and what those raised that are not."""

    shape: Shape
    clock: Clock
    ceilings: Ceilings
    calls: dict[str, list[Call]]
    failed: dict[str, str]

    @classmethod
    def made(cls, shape: Shape, clock: Clock, ceilings: Ceilings) -> LayerBench:
        calls: dict[str, list[Call]] = {}
        failed: dict[str, str] = {}
        for name in ("mxfp4", "bf16", "grouped_mm"):
            copies = clock.copies(layer_work(shape.sizes, shape.sizes.num_experts, name).num_bytes)
            try:
                calls[name] = copies_of(name, copies, shape.sizes, clock.device)
            except Exception as error:  # noqa: BLE001  whatever it raises is what the table says of it
                failed[name] = first_line(error)
        return cls(shape, clock, ceilings, calls, failed)

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
        planned = Row("layer", self.shape.name, rows_per_expert, "", sizes.num_experts, num_tokens * sizes.topk)
        rows = [self._row(replace(planned, what=what), num_tokens, times) for what in PARTS["layer"]]
        return [compared(each, rows) for each in rows]

    def _row(self, row: Row, num_tokens: int, times: Mapping[str, Times | str]) -> Row:
        name = row.what.split()[0]
        found = self.failed.get(name) or times.get(row.what)
        if isinstance(found, str):
            return replace(row, problem=found)
        return layer_work(self.shape.sizes, num_tokens, name).of(row, found, self.ceilings) if found else row


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
