"""A machine's constants, measured on the spot by small layers on the ranks that are there, in two to four seconds.

Eleven workloads: both formats of weights and of the wire, few rows and many, one wave and several, three sizes. Each
is timed overlapped, computing alone and communicating alone, as the benchmark does, until two rounds agree on the least
of nearly all of them, or for eight rounds; no time depends on values.
Compute is a sum of amounts times constants, an interval of work one of them: least squares, no constant below zero.
What threads that move bytes take of the core that computes is the link_share that leaves the least error of the
overlapped times. What a shaped link makes of its rate is tc's and not the machine's: it is taken from the profile that
ships, and so is what each byte takes beside, byte_ns, which links of several rates alone would tell. Of two workloads a
backward is timed as well, on a rank by itself: what is left of it beside products and values is its gradients'.
Calls of few tokens have constants of their own: small_probe.py.
"""

# H hidden   I intermediate   E experts of all ranks

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log
from statistics import median

import numpy as np
import torch

from megamoe.catalog import Machine, load_machine
from megamoe.execution.products import products_of
from megamoe.launch.bench import small_probe
from megamoe.launch.bench.replay import Replay, StillTransport, together
from megamoe.launch.bench.small_probe import FEW, measure_small, small_constants
from megamoe.launch.bench.training import make_gradient
from megamoe.launch.bench.workloads import EXPERTS_PER_RANK, TOPK, make_weights
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.pairs import Label
from megamoe.planner.validation.calibrate import nonnegative, with_measured
from megamoe.schedule.kept import Setting, find, keep
from megamoe.schedule.machine import Amounts, Run, communication_us, intervals, predict
from megamoe.schedule.training import backward_work
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE

REPEATS, MOST_REPEATS = 3, 8
QUIET = 0.1  # of the time; what was measured while others took more is not kept
AGREED = 0.93  # of the next to least time, that the least is where two rounds agree; 0.1 ms counts as nothing
_ODD = 2  # workloads that may have no two rounds that agree: the fits leave what is far off aside


@dataclass(frozen=True, slots=True)
class Small:
    """One workload: tokens of a rank, H and I, in so many waves; backward: whether one is timed too."""

    weight_format: str
    tokens: int
    hidden: int
    intermediate: int
    waves: int
    dispatch_format: str = "mxfp8"
    backward: bool = False

    def run(self, ranks: int, link_gb_s: float | None, threads_per_rank: int) -> Run:
        """As calibration and prediction take it."""
        sizes = (self.tokens, self.hidden, self.intermediate, EXPERTS_PER_RANK * ranks, TOPK)
        return Run(ranks, link_gb_s, *sizes, self.weight_format, self.dispatch_format, self.waves, threads_per_rank)


SMALL: tuple[Small, ...] = (
    Small("bf16", 768, 1024, 512, 1),
    Small("bf16", 768, 1024, 512, 4),
    Small("bf16", 128, 1024, 512, 1, backward=True),
    Small("bf16", 768, 1024, 512, 2, "bf16"),
    Small("bf16", 512, 512, 1024, 4),
    Small("bf16", 512, 1024, 1024, 2, backward=True),
    Small("mxfp4", 768, 1024, 512, 1),
    Small("mxfp4", 768, 1024, 512, 4),
    Small("mxfp4", 128, 1024, 512, 1),
    Small("mxfp4", 512, 512, 1024, 4),
    Small("mxfp4", 512, 1024, 1024, 2),
)
_COMPUTE = ("product_gflops", "weight_ns", "decode_ns", "value_ns", "round_ns", "call_us", "wave_us")
_FASTEST_GFLOPS = 1e6  # products too fast to show
_LINK_SHARES = [0.02 * step for step in range(51)]


def machine_here(
    ranks: LocalRanks, link_gb_s: float | None, progress: Callable[[str], None] = lambda _: None, *, few: bool = False
) -> Machine:
    """The constants of this machine: those that were kept, or else measured now, on the ranks, and kept.

    few: those of calls without waves too, which are measured where they are first asked for. Errors are those of
    LocalRanks.run(). Where others had the cores or the links meanwhile, or the cache folder takes no file, the
    constants serve this once, and the title says so.
    """
    shaped, shared_memory = link_gb_s is not None, ranks.shared_memory
    setting = setting_here(ranks.num_ranks, ranks.threads_per_rank, shaped=shaped, shared_memory=shared_memory)
    machine, reason = find(setting), ""
    if machine is None:
        progress("measuring this machine, once")
        found = ranks.run(measure_rank)
        machine = fitted(found, setting, link_gb_s)
        reason = disturbed(found) or keep(setting, machine)
    if few and machine.small_call_us is None:
        progress("measuring calls of few tokens")
        small = ranks.run(measure_small)
        machine = with_small(machine, small, setting, link_gb_s)
        reason = reason or small_probe.disturbed(small) or keep(setting, machine)
    return machine.model_copy(update={"title": f"{machine.title}, not kept: {reason}"}) if reason else machine


def setting_here(ranks: int, threads_per_rank: int, *, shaped: bool, shared_memory: bool = True) -> Setting:
    """What constants are kept for."""
    path = products_of(torch.device("cpu")).path
    return Setting.here(path, threads_per_rank, ranks, shaped=shaped, shared_memory=shared_memory)


def with_small(
    machine: Machine, found: list[list[dict[str, float]]], setting: Setting, link_gb_s: float | None
) -> Machine:
    """The machine with what each rank measured of calls without waves, by measure_small()."""
    runs = [few.run(setting.ranks, link_gb_s, setting.threads_per_rank) for few in FEW]
    return with_measured(machine, machine.fitted, **small_constants(found, runs, machine))


def fitted(found: list[list[dict[str, float]]], setting: Setting, link_gb_s: float | None) -> Machine:
    """The machine behind what each rank measured of SMALL; a workload takes as long as its slowest rank."""
    runs = [small.run(setting.ranks, link_gb_s, setting.threads_per_rank) for small in SMALL]
    slowest = [{name: max(each[name] for each in times) for name in times[0]} for times in zip(*found, strict=True)]
    today = datetime.date.today().isoformat()
    source = f"megamoe bench on {setting.cpu}, {setting.kernels}, {today}"
    machine = load_machine("cpu").model_copy(
        update={
            "name": "here",
            "title": f"this machine, measured {today}",
            "fitted": source,
            "cores": setting.cores,
            "threads_per_rank": setting.threads_per_rank,
        }
    )

    machine = with_measured(machine, source, **_compute(runs, [each["compute_ms"] for each in slowest], machine))
    machine = with_measured(machine, source, **_gradients(runs, slowest, machine))
    if setting.ranks > 1:
        machine = with_measured(machine, source, **_link(runs, [each["communication_ms"] for each in slowest], machine))
    overlapped = [each["overlapped_ms"] for each in slowest]

    def off(machine: Machine) -> float:
        predicted = (predict(run, machine).overlapped_ms for run in runs)
        return sum(abs(log(ms / measured)) for ms, measured in zip(predicted, overlapped, strict=True))

    if link_gb_s is None:
        return machine
    return min((with_measured(machine, source, link_share=share) for share in _LINK_SHARES), key=off)


def _compute(runs: list[Run], measured: list[float], machine: Machine) -> dict[str, float]:
    """The constants of computing alone, from milliseconds."""
    rows = []
    for run in runs:
        steps = intervals(run, machine, run.waves)
        amounts = Amounts.of(run, sum(experts for _, experts in steps))
        weights = (0.0, amounts.weights) if run.packed else (amounts.weights, 0.0)
        amount = (amounts.flops, *weights, amounts.values, amounts.rounded, 1e3, 1e3 * len(steps))
        crowd = max(1.0, run.ranks * run.threads_per_rank / machine.cores)
        rows.append([each * crowd / 1e6 for each in amount])
    found = dict(zip(_COMPUTE, nonnegative(np.array(rows), np.array(measured)), strict=True))
    found["product_gflops"] = min(_FASTEST_GFLOPS, 1 / max(found["product_gflops"], 1e-12))
    return found


def _gradients(runs: list[Run], slowest: list[dict[str, float]], machine: Machine) -> dict[str, float]:
    """What a weight's gradient takes, from backwards beside which everything else is known."""
    bare = machine.model_copy(update={"gradient_ns": machine.gradient_ns.model_copy(update={"value": 0.0})})
    found = []
    for run, times in zip(runs, slowest, strict=True):
        if "backward_ms" in times:
            left_ms = times["backward_ms"] - backward_work(run, bare).total / 1e3
            found.append(left_ms * 1e6 / (3 * run.hidden * run.intermediate * run.spread.experts_per_rank))
    return {"gradient_ns": max(0.0, median(found))} if found else {}


def _link(runs: list[Run], measured: list[float], machine: Machine) -> dict[str, float]:
    """What a message takes, and over loopback a byte, from milliseconds of communicating alone."""
    messages = [1 + 2 * run.waves for run in runs]
    if runs[0].link_gb_s is not None:
        bare = machine.model_copy(update={"exchange_us": machine.exchange_us.model_copy(update={"value": 0.0})})
        beyond = [1e3 * ms - communication_us(run, bare, run.waves) for run, ms in zip(runs, measured, strict=True)]
        return {"exchange_us": max(0.0, median(us / number for us, number in zip(beyond, messages, strict=True)))}
    rows = [
        [(run.dispatch_bytes + run.combine_bytes) / 1e6, number / 1e3]
        for run, number in zip(runs, messages, strict=True)
    ]
    byte, message = nonnegative(np.array(rows), np.array(measured))
    return {"exchange_us": message} | ({"loopback_gb_s": 1 / byte} if byte > 0 else {})


def disturbed(found: list[list[dict[str, float]]]) -> str:
    """What tells that others were at work meanwhile, "" where nothing does.

    Computing took longer than its own core time, at the median; or workloads had no two rounds that agree.
    """
    taken = median(each["wall_ms"] / max(each["compute_ms"], 1e-9) - 1 for rank in found for each in rank)
    if taken > QUIET:
        return f"computing took {taken:.0%} longer than its own core time"
    odd = sum(min(each["agreement"] for each in times) < AGREED for times in zip(*found, strict=True))
    if odd > _ODD:
        return f"no two rounds agreed on {odd} of {len(found[0])} layers"
    return ""


def measure_rank(group: EPGroup) -> list[dict[str, float]]:
    """Milliseconds of every workload of SMALL on this rank: the least of the rounds, since disturbances only add.

    Rounds go through all workloads, so that what disturbs for a moment is in one round of some. Computing alone is
    core time where one thread computes, which others do not lengthen; wall_ms is what went by meanwhile. agreement is
    the least part that the least time, wall_ms aside, has of the next to least.
    """
    workloads = [_Workload(group, small) for small in SMALL]
    rounds: list[list[dict[str, float]]] = []
    while len(rounds) < REPEATS or (len(rounds) < MOST_REPEATS and not _steady(group, rounds)):
        rounds.append([each.measure() for each in workloads])
    found = [
        {name: min(each[name] for each in times) for name in times[0]} | {"agreement": agreement(times)}
        for times in zip(*rounds, strict=True)
    ]
    for small, times in zip(SMALL, found, strict=True):
        if small.backward and torch.get_num_threads() == 1:
            times["backward_ms"] = measure_backward(small)
    return [each | {"serial_ms": each["compute_ms"] + each["communication_ms"]} for each in found]


def agreement(rounds: Sequence[dict[str, float]]) -> float:
    """Of at least two rounds of a workload.    compute_ms 10, 14, 12.5 and the same of the others -> 0.808"""
    both = (sorted(each[name] for each in rounds)[:2] for name in rounds[0] if name != "wall_ms")
    return min(min(1.0, (least + 0.1) / max(second, 1e-9)) for least, second in both)


def _steady(group: EPGroup, rounds: list[list[dict[str, float]]]) -> bool:
    """Whether rounds agree on nearly all workloads on every rank; the same answer on all, which measure together."""
    odd = torch.tensor([agreement(times) < AGREED for times in zip(*rounds, strict=True)], dtype=torch.uint8)
    pages = odd[None] if group.transport is None else group.transport.gather(odd, Label("bench", "counts"))
    return int(pages.any(0).sum()) <= _ODD


def measure_backward(small: Small) -> float:
    """Milliseconds of core time of a backward of so many tokens, by a rank alone that has its experts of the layer."""
    shape = MoEShape(small.hidden, small.intermediate, EXPERTS_PER_RANK, TOPK)
    formats = {"weight_format": small.weight_format, "dispatch_format": small.dispatch_format}
    layer = TrainableMoE(shape, name="probe backward", **formats)  # type: ignore[arg-type]
    batch, gradient = _batch(shape, 0, small.tokens), make_gradient(0, shape, small.tokens)
    times = []
    for _ in range(REPEATS):
        hidden = batch[0].detach().requires_grad_()
        with torch.enable_grad():
            out = layer(hidden, *batch[1:])
            begun = time.thread_time()
            torch.autograd.grad(out, (hidden, *layer.experts.masters), gradient)
            times.append((time.thread_time() - begun) * 1e3)
    return min(times)


class _Workload:
    """A small layer with its batch, ready to be timed."""

    def __init__(self, group: EPGroup, small: Small) -> None:
        run = small.run(group.size, None, 1)
        shape = MoEShape(run.hidden, run.intermediate, run.num_experts, run.topk)
        self._group, self._replay = group, Replay(group.transport)
        self._batch = _batch(shape, group.rank, run.tokens_per_rank)
        transports = {"plain": group.transport}
        if group.transport:
            transports |= {"taped": self._replay, "still": StillTransport(self._replay)}
        layers = {
            name: MegaMoE(
                shape,
                replace(group, transport=transport),
                weight_format=small.weight_format,
                dispatch_format=small.dispatch_format,
                waves=small.waves,
                name=f"probe {name}",
            )
            for name, transport in transports.items()
        }
        self._plain, self._still = layers["plain"], layers.get("still", layers["plain"])
        self._plain.load_experts(*make_weights(shape, packed=run.packed))
        for each in layers.values():
            each.experts = self._plain.experts
            each(*self._batch)

    def measure(self) -> dict[str, float]:
        """One round, each part begun by all ranks together."""
        overlapped, _ = self._timed(lambda: self._plain(*self._batch))
        wall, core = self._timed(lambda: self._still(*self._batch))
        communication, _ = self._timed(self._replay.replay)
        compute = core if torch.get_num_threads() == 1 else wall
        return {
            "overlapped_ms": overlapped,
            "compute_ms": compute,
            "wall_ms": wall,
            "communication_ms": communication,
        }

    def _timed(self, work: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds that went by, and of this thread's core."""
        together(self._group)
        begun, own = time.perf_counter(), time.thread_time()
        work()
        return (time.perf_counter() - begun) * 1e3, (time.thread_time() - own) * 1e3


def _batch(shape: MoEShape, rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens whose pairs are spread evenly over the experts."""
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    ids = torch.rand(tokens, shape.num_experts, generator=generator).topk(shape.topk).indices
    return hidden, ids, torch.full((tokens, shape.topk), 1 / shape.topk)
