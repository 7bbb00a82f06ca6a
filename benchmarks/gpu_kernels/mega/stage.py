"""The stage of the mega-kernel: bits of virtual ranks, many calls in one memory, times beside the staged path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu_kernels.findings import Check, Fact, Finding
from benchmarks.gpu_kernels.measure.clock import Times
from benchmarks.gpu_kernels.measure.layer import CHECKED, DISPATCH_FORMATS, Inputs, inputs, layer
from benchmarks.gpu_kernels.mega.virtual import Ranks, staged
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import first_line
from benchmarks.gpu_kernels.stages.task import clock_for, device_of, shape_for
from megamoe import MoEShape
from megamoe.parallel.transport.buffers import Exchange

_TOKENS = 20  # most of a rank in a checked call


def check_all(task: Task) -> Iterator[Finding]:
    """Two, four and eight ranks of each format, then many calls on the same buffers."""
    device = device_of(task)
    for size in task.arguments["ranks"] if not task.rehearsal else (2,):
        for weight_format in DISPATCH_FORMATS if not task.rehearsal else ("mxfp4",):
            yield _bits(
                f"{size} virtual ranks, {weight_format}: the staged kernels' bits", size, weight_format, device, 3
            )
    calls = task.arguments["calls"] if not task.rehearsal else 2
    yield _bits(f"4 virtual ranks, {calls} calls", 2 if task.rehearsal else 4, "mxfp4", device, calls)


def batches(size: int, number: int, device: torch.device) -> list[Inputs]:
    """What each rank brings to a call: uneven numbers of tokens, one rank without any, all on one expert in turns."""
    found = []
    for rank in range(size):
        tokens = 0 if (rank + number) % (size + 1) == 0 else 1 + (7 * rank + 5 * number) % _TOKENS
        hidden, ids, weights = inputs(CHECKED, tokens, device, seed=100 * number + rank)
        if number % 3 == 1:
            ids = torch.full_like(ids, number % CHECKED.num_experts)
        elif number % 3 == 2:
            ids[::3, 0] = -1
        found.append((hidden, ids, weights))
    return found


def _bits(name: str, size: int, weight_format: str, device: torch.device, calls: int) -> Check:
    try:
        said = _compared(size, weight_format, device, calls)
    except Exception as error:  # noqa: BLE001  the next check is worth having
        said = first_line(error)
    return Check(name, not said, said)


def _compared(size: int, weight_format: str, device: torch.device, calls: int) -> str:
    given = [batches(size, number, device) for number in range(min(calls, 6))]
    wanted = [staged(CHECKED, weight_format, device, each) for each in given]
    if device.type == "cpu":
        from tests.mega_ranks import on_ranks

        found = on_ranks(size, _one_rank, size, weight_format, given, calls)
        said = [said for _, said in found if said]
        outputs = [[found[rank][0][number] for rank in range(size)] for number in range(len(given))]
        return "; ".join(said) or _difference(outputs, wanted)
    ranks = Ranks(CHECKED, weight_format, device, size, _TOKENS)
    ranks.prepare(given[0])
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    for number in range(calls):
        outputs = ranks.call(given[number % len(given)])
        for out, expected in zip(outputs, wanted[number % len(given)], strict=True):
            wrong += (out != expected).any() & (number >= 0)
        if number % 100 == 99 and (problem := ranks.problem()):
            return f"by call {number + 1}: {problem}"
    problem = ranks.problem()
    differing = int(wrong.item())
    return problem or (f"{differing} outputs of {calls * size} have other bits" if differing else "")


def _one_rank(
    rank: int, exchange: Exchange, size: int, weight_format: str, given: list[list[Inputs]], calls: int
) -> tuple[list[Tensor], str]:
    """In a rehearsal, one rank's process: the outputs of the different calls, and what was wrong."""
    cpu = torch.device("cpu")
    ranks = Ranks(CHECKED, weight_format, cpu, size, _TOKENS, rank=rank, exchange=exchange)
    outputs: dict[int, Tensor] = {}
    for number in range(calls):
        (out,) = ranks.call(given[number % len(given)])
        kept = outputs.setdefault(number % len(given), out)
        if not torch.equal(kept, out):
            return [], f"rank {rank}: call {number} has other bits than the same call before"
    return list(outputs.values()), ranks.problem()


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
            found[f"{size} ranks, {number} tokens each"] = _timed(clock.compare, ranks, sizes, given)
            yield Fact("mega-kernel, microseconds", dict(found))
            if problem := ranks.problem():
                yield Check(f"{size} ranks, {number} tokens: nobody waits in vain", False, problem)
                return
    yield Check("nobody waited in vain while calls were timed", True)


def _timed(compare: object, ranks: Ranks, sizes: MoEShape, given: list[Inputs]) -> dict[str, float | str]:
    """Of the mega-kernel and the staged layer, as they are queued and as graphs on a GPU, and their ratios."""
    together: Inputs = tuple(torch.cat(each) for each in zip(*given, strict=True))  # type: ignore[assignment]
    made = layer(sizes, "mxfp4", ranks.device)
    runs = {"mega": lambda _: ranks.call(given), "staged": lambda _: made(*together)}
    if ranks.device.type == "cuda":
        for name in ("mega", "staged"):
            runs[f"{name} graph"] = _captured(runs[name], ranks.device)
    times: dict[str, Times | str] = compare(runs)  # type: ignore[operator]
    said: dict[str, float | str] = {
        name: round(each.us, 2) if isinstance(each, Times) else each for name, each in times.items()
    }
    for how in ("", " graph"):
        mega, plain = times.get(f"mega{how}"), times.get(f"staged{how}")
        if isinstance(mega, Times) and isinstance(plain, Times):
            said[f"staged over mega{how}"] = round(plain.us / mega.us, 3)
    return said


def _captured(run: object, device: torch.device) -> object:
    """A launch as a CUDA graph."""
    run(0)  # type: ignore[operator]
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(0)  # type: ignore[operator]
    return lambda _: graph.replay()
