"""The stage of the mega-kernel: bits of virtual ranks, many calls in one memory, times beside the staged path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_kernels.findings import Check, Fact, Finding
from benchmarks.gpu_kernels.measure.clock import Clock, Run, Times
from benchmarks.gpu_kernels.measure.layer import CHECKED, DISPATCH_FORMATS, Inputs, inputs, layer
from benchmarks.gpu_kernels.mega.virtual import Ranks, staged
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import first_line
from benchmarks.gpu_kernels.stages.task import clock_for, device_of, shape_for
from megamoe import MoEShape
from megamoe.parallel.transport.buffers import Exchange

_TOKENS = 20  # most of a rank in a checked call
_REHEARSED, _REHEARSED_TOKENS = MoEShape(hidden=64, intermediate=32, num_experts=3, topk=2), 4


@dataclass(frozen=True, slots=True)
class Checked:
    """What is checked: a layer's sizes, most tokens of a rank, ranks, format of the weights, and how many calls."""

    sizes: MoEShape
    tokens: int
    ranks: int
    weight_format: str
    calls: int

    def batches(self, number: int, device: torch.device) -> list[Inputs]:
        """What each rank brings to a call: uneven numbers of tokens, a rank without any, in turns all on one expert."""
        found = []
        for rank in range(self.ranks):
            tokens = 0 if (rank + number) % (self.ranks + 1) == 0 else 1 + (7 * rank + 5 * number) % self.tokens
            hidden, ids, weights = inputs(self.sizes, tokens, device, seed=100 * number + rank)
            if number % 3 == 1:
                ids = torch.full_like(ids, number % self.sizes.num_experts)
            elif number % 3 == 2:
                ids[::3, 0] = -1
            found.append((hidden, ids, weights))
        return found


def check_all(task: Task) -> Iterator[Finding]:
    """Two, four and eight ranks of each format, then many calls in one memory. In a rehearsal little of each."""
    device = device_of(task)
    if task.rehearsal:
        tiny = [Checked(_REHEARSED, _REHEARSED_TOKENS, 2, "mxfp4", calls) for calls in (1, 2)]
        yield from (_bits(each, device) for each in tiny)
        return
    for ranks in task.arguments["ranks"]:
        for weight_format in DISPATCH_FORMATS:
            yield _bits(Checked(CHECKED, _TOKENS, ranks, weight_format, 6), device)
    yield _bits(Checked(CHECKED, _TOKENS, 4, "mxfp4", task.arguments["calls"]), device)


def _bits(asked: Checked, device: torch.device) -> Check:
    try:
        said = _compared(asked, device)
    except Exception as error:  # noqa: BLE001  the next check is worth having
        said = first_line(error)
    name = f"{asked.ranks} virtual ranks, {asked.weight_format}, {asked.calls} calls: the staged kernels' bits"
    return Check(name, not said, said)


def _compared(asked: Checked, device: torch.device) -> str:
    """What differs, '' if nothing does."""
    given = [asked.batches(number, device) for number in range(min(asked.calls, 6))]
    wanted = [staged(asked.sizes, asked.weight_format, device, each) for each in given]
    if device.type == "cpu":
        from tests.mega_ranks import on_ranks

        found = on_ranks(asked.ranks, _one_rank, asked, given)
        said = [said for _, said in found if said]
        by_call = [[found[rank][0][number] for rank in range(asked.ranks)] for number in range(len(given))]
        return "; ".join(said) or _difference(by_call, wanted)
    ranks = Ranks(asked.sizes, asked.weight_format, device, asked.ranks, asked.tokens)
    ranks.prepare(given[0])
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    for number in range(asked.calls):
        outputs = ranks.call(given[number % len(given)])
        for out, expected in zip(outputs, wanted[number % len(given)], strict=True):
            wrong += torch.ne(out, expected).any()
        if number % 100 == 99 and (problem := ranks.problem()):
            return f"by call {number + 1}: {problem}"
    problem = ranks.problem()
    differing = int(wrong.item())
    return problem or (f"{differing} outputs of {asked.calls * asked.ranks} have other bits" if differing else "")


def _one_rank(rank: int, exchange: Exchange, asked: Checked, given: list[list[Inputs]]) -> tuple[list[Tensor], str]:
    """In a rehearsal, one rank's process: the outputs of its calls, and what was wrong."""
    cpu = torch.device("cpu")
    ranks = Ranks(asked.sizes, asked.weight_format, cpu, asked.ranks, asked.tokens, rank=rank, exchange=exchange)
    outputs = [ranks.call(each)[0] for each in given]
    return outputs, ranks.problem()


def _difference(outputs: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> str:
    wrong = [
        f"call {number}, rank {rank}"
        for number, (call, expected) in enumerate(zip(outputs, wanted, strict=True))
        for rank, (out, each) in enumerate(zip(call, expected, strict=True))
        if not torch.equal(out, each)
    ]
    return f"other bits: {'; '.join(wrong[:4])}" if wrong else ""


def time_all(task: Task) -> Iterator[Finding]:
    """Microseconds of a call of all ranks together, and of the staged layer on one rank for the same tokens."""
    clock, device = clock_for(task), torch.device(task.device)
    sizes = shape_for(task, task.arguments["shape"]).sizes
    rooms = task.arguments["rooms"] if not task.rehearsal else ((1, 4, (1,)),)
    found: dict[str, dict[str, float | str]] = {}
    for size, room, tokens in rooms:
        ranks = Ranks(sizes, "mxfp4", device, size, room)
        for number in tokens:
            given = [inputs(sizes, number, device, seed=rank) for rank in range(size)]
            ranks.prepare(given)
            found[f"{size} ranks, {number} tokens each"] = _timed(clock, ranks, sizes, given)
            yield Fact("mega-kernel, microseconds", dict(found))
            if problem := ranks.problem():
                yield Check(f"{size} ranks, {number} tokens: nobody waits in vain", False, problem)
                return
    yield Check("nobody waited in vain while calls were timed", True)


def _timed(clock: Clock, ranks: Ranks, sizes: MoEShape, given: list[Inputs]) -> dict[str, float | str]:
    """Of the mega-kernel and the staged layer, as they are queued and as graphs on a GPU, and their ratios."""
    together: Inputs = tuple(torch.cat(each) for each in zip(*given, strict=True))  # type: ignore[assignment]
    made = layer(sizes, "mxfp4", ranks.device)
    runs: dict[str, Run] = {"mega": lambda _: ranks.call(given), "staged": lambda _: made(*together)}
    if ranks.device.type == "cuda":
        for name in ("mega", "staged"):
            runs[f"{name} graph"] = _captured(runs[name], ranks.device)
    times = clock.compare(runs)
    said: dict[str, float | str] = {
        name: round(each.us, 2) if isinstance(each, Times) else each for name, each in times.items()
    }
    for how in ("", " graph"):
        mega, plain = times.get(f"mega{how}"), times.get(f"staged{how}")
        if isinstance(mega, Times) and isinstance(plain, Times):
            said[f"staged over mega{how}"] = round(plain.us / mega.us, 3)
    return said


def _captured(run: Run, device: torch.device) -> Run:
    """A launch as a CUDA graph."""
    run(0)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0)
    return lambda _: graph.replay()
