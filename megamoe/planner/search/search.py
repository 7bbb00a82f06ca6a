"""The best of thousands of deployments, and the front between a device's throughput and a user's speed.

    Space -> deployments -> those that fit -> those that meet the targets -> best
                                 |-> Pareto front (tokens/s of a device against tokens/s of a user)

Everything that a deployment's batch and split do not change is calculated once for all that share it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from megamoe.catalog import Hardware, Model, Profile
from megamoe.planner.serving.deployment import Deployment, Formats, Phase
from megamoe.planner.serving.memory import Memory, memory
from megamoe.planner.serving.serving import Serving, costs_of, measure
from megamoe.planner.serving.step import Costs

Objective = Literal["tokens_per_s_per_device", "usd_per_million_tokens"]

DECODE_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
PREFILL_BATCHES = (1, 2, 4, 8, 16, 32)
ATTENTION_TP = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Space:
    """What is tried: every combination that is possible. A None among formats is the deployment's own choice."""

    eps: tuple[int, ...]
    attention_tps: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = DECODE_BATCHES
    mtps: tuple[int, ...] = (0,)
    microbatches: tuple[int, ...] = (1,)
    weight_formats: tuple[str | None, ...] = (None,)
    kv_formats: tuple[str, ...] = ("fp8",)
    dispatch_formats: tuple[str | None, ...] = (None,)
    combine_formats: tuple[str, ...] = ("bf16",)

    @classmethod
    def of(cls, model: Model, hardware: Hardware, devices: int | None = None, phase: Phase = "decode") -> Space:
        """All EP sizes that divide the experts (and the devices), attention DP and TP, MTP where the model has it.

        Formats stay as the model has them, but the cache, which is tried in 8 and 16 bits: other weights and a narrower
        way home are other models, which a user names.
        """
        if devices is not None and devices < 1:
            raise ValueError(f"devices is {devices}; it must be 1 or more")
        eps = [ep for ep in range(1, model.num_experts + 1) if model.num_experts % ep == 0]
        tps = [tp for tp in ATTENTION_TP if tp <= hardware.scaleup_domain.value]
        if devices is not None:
            eps, tps = [ep for ep in eps if devices % ep == 0], [tp for tp in tps if devices % tp == 0]
        decode = phase == "decode"
        return cls(
            tuple(eps),
            tuple(tps),
            DECODE_BATCHES if decode else PREFILL_BATCHES,
            (0, 1, 2, 3) if decode and model.mtp_layers else (0,),
            (1, 2),
            kv_formats=("fp8", "bf16"),
        )

    def __len__(self) -> int:
        axes = (self.eps, self.attention_tps, self.batches, self.mtps, self.microbatches, self.weight_formats)
        return math.prod(map(len, (*axes, self.kv_formats, self.dispatch_formats, self.combine_formats)))


@dataclass(frozen=True, slots=True)
class Targets:
    """What a deployment has to reach; None: anything goes."""

    tokens_per_s_per_user: float | None = None
    tpot_ms: float | None = None
    ttft_ms: float | None = None

    def __post_init__(self) -> None:
        for key in ("tokens_per_s_per_user", "tpot_ms", "ttft_ms"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"{key} is {value:g}; a target is above 0")

    def missed(self, served: Serving) -> str | None:
        """The first target that a deployment misses."""
        if self.tokens_per_s_per_user is not None and served.tokens_per_s_per_user < self.tokens_per_s_per_user:
            return "tokens_per_s_per_user"
        if self.tpot_ms is not None and served.tpot_ms is not None and served.tpot_ms > self.tpot_ms:
            return "tpot_ms"
        if self.ttft_ms is not None and served.ttft_ms is not None and served.ttft_ms > self.ttft_ms:
            return "ttft_ms"
        return None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """best is None where nothing fits or nothing meets the targets; then `nearest` came closest.

    tried      deployments that make sense                front    those that fit and that no other beats in both
    rejected   how many fell out, by reason: memory, or the first target missed
    nearest    the fastest for a user of those that fit, else None;  least_gb the least memory that any would need
    """

    best: Serving | None
    front: tuple[Serving, ...]
    tried: int
    rejected: dict[str, int]
    nearest: Serving | None
    least_gb: float


def search(
    model: Model,
    hardware: Hardware,
    profile: Profile,
    *,
    context: int,
    devices: int | None = None,
    phase: Phase = "decode",
    cached: int = 0,
    targets: Targets | None = None,
    objective: Objective = "tokens_per_s_per_device",
    space: Space | None = None,
) -> SearchResult:
    """Try every deployment of the space. devices None: as many as one EP group has. ValueError as Deployment's."""
    if objective == "usd_per_million_tokens" and hardware.usd_per_hour is None:
        raise ValueError(f"{hardware.name} has no price to search by; set hardware.usd_per_hour_neocloud")
    targets = targets or Targets()
    space = space or Space.of(model, hardware, devices, phase)
    base = Deployment(model, hardware, profile, 1, 1, 1, context, phase, cached=cached)
    tally = _Tally(targets, objective)
    for costs, d in deployments(base, space, devices):
        held = memory(costs, d)
        tally.add(held, measure(costs, d, held) if held.fits else None)
    return tally.result()


@dataclass(frozen=True, slots=True)
class Split:
    """Deployments that share formats, EP size and attention groups. costs: those of all of the same formats.

    keys: of a Deployment, but for batch, drafts and micro-batches
    """

    costs: Costs
    devices: int
    keys: dict[str, Any]

    def deployment(self, batch: int, mtp: int, halves: int) -> Deployment:
        """replace() would go through the fields of thousands."""
        return Deployment(**{**self.keys, "batch_per_device": batch, "mtp": mtp, "microbatches": halves})


def deployments(base: Deployment, space: Space, devices: int | None = None) -> Iterator[tuple[Costs, Deployment]]:
    """Every deployment of a space that makes sense."""
    for split in splits(base, space, devices):
        for batch, mtp, halves in itertools.product(space.batches, space.mtps, space.microbatches):
            if halves <= batch:
                yield split.costs, split.deployment(batch, mtp, halves)


def splits(base: Deployment, space: Space, devices: int | None = None) -> Iterator[Split]:
    """The same by what is shared, in the same order."""
    shared: dict[Formats, Costs] = {}
    formats = (space.weight_formats, space.kv_formats, space.dispatch_formats, space.combine_formats)
    for weight, kv, dispatch, combine in itertools.product(*formats):
        like = replace(base, weight_format=weight, kv_format=kv, dispatch_format=dispatch, combine_format=combine)
        costs = shared.setdefault(like.formats, costs_of(like))
        for ep, tp in itertools.product(space.eps, space.attention_tps):
            number = devices or math.lcm(ep, tp)
            if number % ep or number % tp or tp > min(attention.heads for attention in base.model.attention):
                continue
            split = replace(like, devices=number, ep=ep, attention_tp=tp)
            yield Split(costs, number, {field.name: getattr(split, field.name) for field in fields(split)})


class _Tally:
    """Takes the deployments one by one."""

    def __init__(self, targets: Targets, objective: Objective) -> None:
        self.targets, self.objective = targets, objective
        self.tried, self.least_gb = 0, math.inf
        self.rejected: dict[str, int] = {}
        self.best: Serving | None = None
        self.nearest: Serving | None = None
        self.fitting: list[Serving] = []

    def add(self, held: Memory, served: Serving | None) -> None:
        self.tried += 1
        self.least_gb = min(self.least_gb, held.total_gb)
        missed = "memory" if served is None else self.targets.missed(served)
        if missed:
            self.rejected[missed] = self.rejected.get(missed, 0) + 1
        if served is None:
            return
        self.fitting.append(served)
        if self.nearest is None or served.tokens_per_s_per_user > self.nearest.tokens_per_s_per_user:
            self.nearest = served
        if not missed and (self.best is None or self.score(served) > self.score(self.best)):
            self.best = served

    def score(self, served: Serving) -> float:
        usd = served.usd_per_million_tokens
        by_price = self.objective == "usd_per_million_tokens" and usd is not None
        return -usd if by_price and usd is not None else served.tokens_per_s_per_device

    def result(self) -> SearchResult:
        front = pareto_front(self.fitting)
        return SearchResult(self.best, front, self.tried, self.rejected, self.nearest, self.least_gb)


def pareto_front(served: list[Serving]) -> tuple[Serving, ...]:
    """Those that no other beats in both rates, the fastest for a user first."""
    front: list[Serving] = []
    for each in sorted(served, key=lambda s: (s.tokens_per_s_per_user, s.tokens_per_s_per_device), reverse=True):
        if not front or each.tokens_per_s_per_device > front[-1].tokens_per_s_per_device:
            front.append(each)
    return tuple(front)
