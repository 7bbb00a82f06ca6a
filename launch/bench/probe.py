"""A machine's constants, measured on the spot: small layers on the ranks that are there, fitted as calibrate does it.

Eight workloads of two seconds together on an idle machine: both formats of weights, few rows and many, one wave and
several, three sizes of experts. Each is timed overlapped, computing alone and communicating alone, as the benchmark
does; values are random, since no time depends on them.
"""

# H hidden   I intermediate   E experts of all ranks

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from megamoe.catalog import Machine, load_machine
from megamoe.execution.products import products_of
from megamoe.formats import MXFP4
from megamoe.launch.bench.replay import Replay, StillTransport, together
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.planner.validation.calibrate import calibrate
from megamoe.schedule.kept import Setting, find, keep
from megamoe.schedule.machine import Run
from megamoe.shape import MoEShape

REPEATS = 3
QUIET = 0.1  # of the time; what was measured while others took more is not kept
_TOPK, _EXPERTS_PER_RANK = 2, 4


@dataclass(frozen=True, slots=True)
class Small:
    """One workload: tokens of a rank, H and I, in so many waves."""

    weight_format: str
    tokens: int
    hidden: int
    intermediate: int
    waves: int

    def run(self, ranks: int, link_gb_s: float | None, threads_per_rank: int) -> Run:
        """As calibration and prediction take it."""
        sizes = (self.tokens, self.hidden, self.intermediate, _EXPERTS_PER_RANK * ranks, _TOPK)
        return Run(ranks, link_gb_s, *sizes, self.weight_format, "mxfp8", self.waves, threads_per_rank)


SMALL: tuple[Small, ...] = (
    Small("bf16", 768, 1024, 512, 4),
    Small("bf16", 128, 1024, 512, 1),
    Small("bf16", 512, 512, 1024, 1),
    Small("bf16", 512, 1024, 1024, 2),
    Small("mxfp4", 768, 1024, 512, 1),
    Small("mxfp4", 128, 1024, 512, 4),
    Small("mxfp4", 512, 512, 1024, 4),
    Small("mxfp4", 512, 1024, 1024, 1),
)


def machine_here(
    ranks: LocalRanks, link_gb_s: float | None, progress: Callable[[str], None] = lambda _: None
) -> Machine:
    """The constants of this machine: those that were kept, or else measured now, on the ranks, and kept.

    Errors are those of LocalRanks.run(). Where others had the cores meanwhile, or the cache folder takes no file, the
    constants serve this once, and the title says so.
    """
    setting = setting_here(ranks.num_ranks, ranks.threads_per_rank, shaped=link_gb_s is not None)
    kept = find(setting)
    if kept is not None:
        return kept
    progress("measuring this machine, once")
    found = ranks.run(measure_rank)
    machine, taken = fitted(found, setting, link_gb_s), disturbed(found)
    if taken > QUIET:
        return machine.model_copy(update={"title": f"{machine.title} while others took {taken:.0%} more; not kept"})
    reason = keep(setting, machine)
    return machine.model_copy(update={"title": f"{machine.title}, not kept: {reason}"}) if reason else machine


def setting_here(ranks: int, threads_per_rank: int, *, shaped: bool) -> Setting:
    """What constants are kept for."""
    return Setting.here(products_of(torch.device("cpu")).path, threads_per_rank, ranks, shaped=shaped)


def fitted(found: list[list[dict[str, float]]], setting: Setting, link_gb_s: float | None) -> Machine:
    """The machine behind what each rank measured of SMALL; a workload takes as long as its slowest rank."""
    reports: list[dict[str, Any]] = []
    for small, times in zip(SMALL, zip(*found, strict=True), strict=True):
        slowest = {name: max(each[name] for each in times) for name in times[0]}
        reports.append({**asdict(small.run(setting.ranks, link_gb_s, setting.threads_per_rank)), **slowest})
    today = datetime.date.today().isoformat()
    source = f"megamoe bench on {setting.cpu}, {setting.kernels}, {today}"
    machine = calibrate(reports, load_machine("cpu"), name="here", cores=setting.cores, source=source)
    return machine.model_copy(update={"title": f"this machine, measured {today}"})


def disturbed(found: list[list[dict[str, float]]]) -> float:
    """How much longer computing took than its own core time, at the median: what others took.    0.02 is quiet"""
    return median(each["wall_ms"] / max(each["compute_ms"], 1e-9) - 1 for rank in found for each in rank)


def measure_rank(group: EPGroup) -> list[dict[str, float]]:
    """Milliseconds of every workload of SMALL on this rank: the least of the rounds, since disturbances only add.

    Rounds go through all workloads, so that what disturbs for a moment is in one round of some. Computing alone is
    core time where one thread computes, which others do not lengthen; wall_ms is what went by meanwhile.
    """
    workloads = [_Workload(group, small) for small in SMALL]
    rounds = [[each.measure() for each in workloads] for _ in range(REPEATS)]
    found = [{name: min(each[name] for each in times) for name in times[0]} for times in zip(*rounds, strict=True)]
    return [each | {"serial_ms": each["compute_ms"] + each["communication_ms"]} for each in found]


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
                dispatch_format="mxfp8",
                waves=small.waves,
                name=f"probe {name}",
            )
            for name, transport in transports.items()
        }
        self._plain, self._still = layers["plain"], layers.get("still", layers["plain"])
        self._plain.load_experts(*_weights(shape, packed=run.packed))
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


def _weights(shape: MoEShape, *, packed: bool) -> tuple[Any, Any]:
    """One expert's random weights for all experts, as a layer takes them, without making a copy of each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for outputs, inputs in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        if packed:
            values = torch.randint(0, 256, (1, outputs, inputs // 2), generator=generator, dtype=torch.uint8)
            scales = torch.full((1, outputs, inputs // 32), 121, dtype=torch.uint8)
            found.append(MXFP4(*(each.expand(shape.num_experts, -1, -1) for each in (values, scales))))
        else:
            value = torch.randn(1, outputs, inputs, generator=generator) / inputs**0.5
            found.append(value.to(torch.bfloat16).expand(shape.num_experts, -1, -1))
    return found[0], found[1]
