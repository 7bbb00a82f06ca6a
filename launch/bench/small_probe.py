"""What calls without waves take on a machine, measured on the spot by layers that few tokens come to.

Seven workloads, of one token and of several, with both formats of weights, one with experts that take next to nothing,
and one with more weights than caches hold.
Their tokens are spread so that all ranks have as many rows, on as many experts. The lower quarter of the rounds' times
counts: other work on a machine only adds, but what waking another rank takes varies, and the least of it is too little.
"""

# H hidden   I intermediate   K experts per token   P ranks

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np
import torch

from megamoe.catalog import Machine
from megamoe.launch.bench.replay import together
from megamoe.launch.bench.small import own_core, stand_ins
from megamoe.launch.bench.workloads import EXPERTS_PER_RANK, TOPK, make_weights
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.pairs import Label
from megamoe.planner.validation.calibrate import nonnegative, with_measured
from megamoe.schedule.limits import cache_bytes
from megamoe.schedule.machine import Run, crowd_of
from megamoe.schedule.small import MEMORY_OVERLAP, SmallAmounts, missed_bytes, small_bytes, small_compute_us
from megamoe.shape import MoEShape

ROUNDS, MOST_ROUNDS = 12, 48
AGREED = 0.67  # of the median, that the lower quarter is where nothing disturbs
_ODD = 2  # workloads that may vary more
_FASTEST_GFLOPS = 1e6  # products too fast to show
_CONSTANTS = ("small_call_us", "small_gflops", "small_weight_ns", "small_packed_gflops", "small_decode_ns")


@dataclass(frozen=True, slots=True)
class Few:
    """One workload: tokens of a rank, H and I."""

    weight_format: str
    tokens: int
    hidden: int = 1024
    intermediate: int = 1024

    def run(self, ranks: int, link_gb_s: float | None, threads_per_rank: int) -> Run:
        """As prediction takes it."""
        sizes = (self.tokens, self.hidden, self.intermediate, EXPERTS_PER_RANK * ranks, TOPK)
        return Run(ranks, link_gb_s, *sizes, self.weight_format, "mxfp8", 1, threads_per_rank, small=True)

    @property
    def amounts(self) -> SmallAmounts:
        """Of every rank, as spread_evenly() has it."""
        rows = self.tokens * TOPK
        return SmallAmounts(rows, min(rows, EXPERTS_PER_RANK))


FEW: tuple[Few, ...] = (
    Few("bf16", 1, 256, 64),
    Few("bf16", 1, 1024, 512),
    Few("bf16", 24, 1024, 512),
    Few("bf16", 6, 1024, 2048),  # two ranks read 100 MB of weights
    *(Few("mxfp4", tokens) for tokens in (1, 6, 24)),
)
_FROM_MEMORY = 3


def measure_small(group: EPGroup) -> list[dict[str, float]]:
    """Milliseconds of each workload of FEW here, lower quarters, and "agreement"; nothing where it took waves."""
    workloads = [_Workload(group, few) for few in FEW]
    with own_core(group):
        for each in workloads:  # one after the other: calls in a row find their weights where the last left them
            for number in range(1, MOST_ROUNDS + 1):
                each.measure()
                if number >= ROUNDS and number % 4 == 0 and _steady(group, each):
                    break
    return [each.lower_quarters() for each in workloads]


def _steady(group: EPGroup, workload: _Workload) -> bool:
    """Whether times agree on every rank; the same answer on all, which measure together."""
    odd = torch.tensor([workload.lower_quarters().get("agreement", 1.0) < AGREED], dtype=torch.uint8)
    pages = odd if group.transport is None else group.transport.gather(odd, Label("bench", "counts"))
    return not pages.any()


def disturbed(found: Sequence[Sequence[dict[str, float]]]) -> str:
    """What tells that others were at work meanwhile, "" where nothing does: lower quarters far below medians."""
    odd = sum(min(each.get("agreement", 1.0) for each in times) < AGREED for times in zip(*found, strict=True))
    return f"times without waves varied by more than a half on {odd} of {len(FEW)} layers" if odd > _ODD else ""


def small_constants(
    found: Sequence[Sequence[dict[str, float]]], runs: Sequence[Run], machine: Machine
) -> dict[str, float]:
    """The constants behind what each rank measured of FEW; none where too little went without waves."""
    slowest = [{name: max(each[name] for each in times) for name in times[0]} for times in zip(*found, strict=True)]
    cached = [each for number, each in enumerate(zip(FEW, runs, slowest, strict=True)) if number != _FROM_MEMORY]
    there = [each for each in cached if each[-1]]
    if len(there) < len(_CONSTANTS) or len({few.weight_format for few, _, times in there if few.tokens > 1}) < 2:
        return {}
    rows = []
    for few, run, _ in there:
        matrices, amounts = 3 * few.hidden * few.intermediate, few.amounts
        products = (2 * matrices * amounts.rows, matrices * amounts.experts)
        both = (0.0, 0.0, *products) if run.packed else (*products, 0.0, 0.0)
        rows.append([each * crowd_of(run, machine) / 1e6 for each in (1e3, *both)])
    computed = [times["compute_ms"] for _, _, times in there]
    constants = dict(zip(_CONSTANTS, nonnegative(np.array(rows), np.array(computed)), strict=True))
    for key in ("small_gflops", "small_packed_gflops"):
        constants[key] = min(_FASTEST_GFLOPS, 1 / max(constants[key], 1e-12))
    if runs[0].ranks > 1:
        beyond = [1e3 * max(0.0, times["overlapped_ms"] - times["compute_ms"]) for *_, times in there]
        constants |= _exchanges([few.tokens for few, *_ in there], [small_bytes(run) for _, run, _ in there], beyond)
    machine = with_measured(machine, machine.fitted, **constants, cache_mb=cache_bytes() / 1e6)
    memory_ns = _memory_ns(runs[_FROM_MEMORY], slowest[_FROM_MEMORY], machine)
    return constants | {"small_memory_ns": memory_ns, "cache_mb": cache_bytes() / 1e6}


def _memory_ns(run: Run, times: dict[str, float], machine: Machine) -> float:
    """What the layer whose weights no cache holds takes beyond computing, by their norm."""
    amounts = FEW[_FROM_MEMORY].amounts
    missed = missed_bytes(run, machine, amounts)
    if not times or not missed:
        return 0.0
    call_us = small_compute_us(run, machine, SmallAmounts(0.0, 0.0))
    both, computing = times["compute_ms"] * 1e3 - call_us, small_compute_us(run, machine, amounts) - call_us
    return float(max(0.0, both**MEMORY_OVERLAP - computing**MEMORY_OVERLAP) ** (1 / MEMORY_OVERLAP)) * 1e3 / missed


def _exchanges(tokens: Sequence[int], num_bytes: Sequence[float], beyond_us: Sequence[float]) -> dict[str, float]:
    """From what calls take beyond computing: of one token, mostly waiting; of most tokens, bytes as well.

    1 and 24 tokens with 4,000 and 54,000 bytes in 104 and 154 us -> 50 us an exchange, 1 ns a byte
    """
    few, many = (
        [each for each in zip(tokens, num_bytes, beyond_us, strict=True) if each[0] == end(tokens)]
        for end in (min, max)
    )
    (_, few_bytes, few_us), (_, many_bytes, many_us) = (map(fmean, zip(*each, strict=True)) for each in (few, many))
    byte_us = max(0.0, (many_us - few_us) / (many_bytes - few_bytes))
    return {"small_exchange_us": max(0.0, few_us - byte_us * few_bytes) / 2, "small_byte_ns": byte_us * 1e3}


def spread_evenly(tokens: int, rank: int, ranks: int) -> torch.Tensor:
    """ids [T, K] int64: the slots of all ranks in turn to the ranks, and on each to its experts.

    2 ranks, 1 token, top-2: rank 0 chooses 0 and 4, rank 1 then 1 and 5
    """
    slots = torch.arange(tokens * TOPK) + rank * tokens * TOPK
    return (slots % ranks * EXPERTS_PER_RANK + slots // ranks % EXPERTS_PER_RANK).view(tokens, TOPK)


class _Workload:
    """A layer and its batch, ready to be timed; times stays empty where its calls go by waves."""

    def __init__(self, group: EPGroup, few: Few) -> None:
        run = few.run(group.size, None, 1)
        shape = MoEShape(run.hidden, run.intermediate, run.num_experts, run.topk)
        self._group, self.times = group, dict[str, list[float]]()
        hidden = torch.randn(few.tokens, few.hidden, generator=torch.Generator().manual_seed(group.rank))
        ids = spread_evenly(few.tokens, group.rank, group.size)
        self._batch = hidden.to(torch.bfloat16), ids, torch.full((few.tokens, TOPK), 1 / TOPK)

        def make(name: str, group: EPGroup) -> MegaMoE:
            return MegaMoE(shape, group, weight_format=few.weight_format, name=f"small probe {name}")

        self._plain = make("plain", group)
        self._plain.load_experts(*make_weights(shape, packed=run.packed))
        self._plain(*self._batch)
        self._small = self._plain.last_call.small
        self._still = self._plain
        if self._small and group.transport is not None:
            noted, silent = stand_ins(group.transport, small=True)
            taped, self._still = (
                make(name, replace(group, transport=each)) for name, each in (("taped", noted), ("still", silent))
            )
            for each in (taped, self._still):
                each.experts = self._plain.experts
                each(*self._batch)

    def measure(self) -> None:
        """One round, each part begun by all ranks together."""
        if self._small:
            for name, layer in (("overlapped_ms", self._plain), ("compute_ms", self._still)):
                self.times.setdefault(name, []).append(self._timed(layer))

    def lower_quarters(self) -> dict[str, float]:
        """Of each time, and as agreement the least part that one has of its median; nothing where there is none."""
        found = {name: sorted(times)[len(times) // 4] for name, times in self.times.items()}
        agreement = [found[name] / median(times) for name, times in self.times.items()]
        return found | ({"agreement": min(agreement)} if agreement else {})

    def _timed(self, work: Callable[..., object]) -> float:
        together(self._group)
        begun = time.perf_counter()
        work(*self._batch)
        return (time.perf_counter() - begun) * 1e3
