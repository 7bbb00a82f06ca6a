"""A layer of separate kernels: DeepEP carries tokens and results, grouped products compute between.

Low latency (decode): every row by itself, straight to its expert.

    dispatch   ll_dispatch_us + experts * ll_dispatch_expert_us + tokens of an SM * ll_dispatch_token_us + link
    combine    the same with its own constants
    link       rows * bytes * f_remote / (link * ll_*_efficiency), shared by more than 8 ranks of a domain as an
               all-to-all is, or over the NIC; between nodes ll_node_us more, and once more for every doubling of them
    products   masked: each of the two a launch, rows of an expert in tiles of 64 or 128, and masked_expert_us for every
               expert of the rank

DeepEP gives an expert's group of warps an SM: with 8 experts only 8 SMs send. Normal (prefill): a token goes once to
each rank that wants it, rows are scattered to their experts in whole blocks of 128 and gathered again, and launches
come from the host: host_us at least, and what lies between the products in proportion to it. A stage waits for the one
before it; with two-batch overlap the links of one half of the tokens run while the other half computes.
"""

# T tokens of a rank   P ranks   E experts   n rows of an expert   S SMs

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from megamoe.catalog import Profile
from megamoe.planner.layer.cost import LayerTime
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.routing import RankLoad, busiest
from megamoe.planner.layer.tiles import grouped_us
from megamoe.schedule.formats import value_bytes
from megamoe.schedule.schedule import Work, play

Kernels = Literal["low latency", "normal"]
LOW_LATENCY_TOKENS = 2048  # of a rank, the most that its buffers were made for: SGLang's runs on GB200, 1408 in use
CONTIGUOUS_ROWS = 128  # an expert's rows, padded to whole blocks
_RANKS_OF_WARPS = 8  # at most, in one domain of DeepEP's normal kernels
_HEADER_BYTES = 16  # of a row in DeepEP's low-latency message


@dataclass(frozen=True, slots=True)
class Exchange:
    """Microseconds of a dispatch and of a combine."""

    dispatch_us: float
    combine_us: float


def low_latency(
    expert: Expert, device: Device, profile: Profile, *, ep: int, tokens: float, rows: float | None = None
) -> Exchange:
    """Both journeys of T tokens a rank; rows: those that the busiest rank receives (None: as many as it sends)."""
    used = math.ceil(expert.num_experts / math.ceil(expert.num_experts / device.sms))
    of_an_sm = math.ceil(tokens / used)
    nodes = -(-ep // device.scaleup_domain)
    far = profile.ll_node_us.value * (1 + math.log2(nodes)) if nodes > 1 else 0.0
    most = max(tokens * expert.topk, rows or 0.0)

    def way(name: str, row_bytes: float, efficiency: float) -> float:
        fixed = device.ll_us + getattr(profile, f"ll_{name}_us").value
        fixed += getattr(profile, f"ll_{name}_expert_us").value * expert.num_experts
        sent = getattr(profile, f"ll_{name}_token_us").value * of_an_sm
        reached = {"scale-up": efficiency * device.congestion(min(ep, device.scaleup_domain))}
        slowest = max(
            (tier.f_remote / (tier.gb_s * reached.get(tier.name, device.nic_efficiency)) for tier in device.tiers(ep)),
            default=0.0,
        )
        return float(fixed + far + sent + most * row_bytes * slowest * 1e-3)

    return Exchange(
        way("dispatch", expert.dispatch_bytes + _HEADER_BYTES, device.ll_dispatch_efficiency),
        way("combine", expert.combine_bytes, device.ll_combine_efficiency),
    )


def normal(expert: Expert, device: Device, profile: Profile, *, ep: int, tokens: float, rows: float) -> Exchange:
    """Both journeys where a token goes once to every rank that wants it, and once to every node.

    Its SMs take their time for a token, however narrow: their warps are shared out among 8 ranks, of which each has to
    look at every token and sends on those that its own rank wants. That fewer ranks have more warps each, and take less
    in proportion, is assumed: every row that was measured is of 8.
    """
    skew = max(1.0, rows / (tokens * expert.topk)) if tokens else 1.0
    slowest = 0.0
    for tier in device.tiers(ep):
        if tier.name == "scale-up":
            copies, rate = reached_by(ep, expert.topk), tier.gb_s * profile.normal_efficiency.value
        else:
            copies, rate = reached_by(-(-ep // device.scaleup_domain), expert.topk), tier.gb_s * device.nic_efficiency
        slowest = max(slowest, copies * tier.f_remote / rate)
    moved = tokens * skew * slowest * 1e-3
    inside = min(ep, device.scaleup_domain)
    wanted, warps = reached_by(inside, expert.topk) / inside, tokens * min(1.0, inside / _RANKS_OF_WARPS)

    def way(name: str, row_bytes: float) -> float:
        looked, sent = (getattr(profile, f"normal_{name}_{each}_us").value for each in ("token", "sent"))
        return float(max(moved * row_bytes, warps * (looked + sent * wanted)))

    return Exchange(way("dispatch", expert.dispatch_bytes), way("combine", expert.combine_bytes))


def reached_by(places: int, topk: int) -> float:
    """Different places that a token of K evenly spread choices goes to.    8 ranks, 6 -> 4.41"""
    return float(places * (1 - (1 - 1 / places) ** topk))


def masked_us(expert: Expert, device: Device, profile: Profile, load: RankLoad) -> tuple[float, float, float]:
    """Grouped products in a captured graph: all, and their compute and their memory alone."""
    if not load.groups:
        return 0.0, 0.0, 0.0
    rows, number = zip(*load.groups, strict=True)
    compute = grouped_us(expert, device, rows, number)
    memory = [device.memory_us(expert.weight_bytes + each * _row_bytes(expert)) for each in rows]
    both = [device.with_memory(c, m) for c, m in zip(compute, memory, strict=True)]
    total = [
        sum(each * count for each, count in zip(values, number, strict=True)) for values in (both, compute, memory)
    ]
    fixed = profile.masked_us.value + profile.masked_expert_us.value * max(load.experts, load.touched)
    return fixed + total[0], total[1], total[2]


def contiguous_us(
    expert: Expert, device: Device, profile: Profile, load: RankLoad, tokens: float
) -> tuple[float, float, float]:
    """The same launched by the host, from `tokens` that the rank received: scattered, computed, gathered."""
    if not load.groups:
        return device.host_us, 0.0, 0.0
    rows, number = zip(*load.groups, strict=True)
    padded = [math.ceil(each / CONTIGUOUS_ROWS) * CONTIGUOUS_ROWS for each in rows]
    compute = grouped_us(expert, device, padded, number)
    weights = device.memory_us(expert.weight_bytes)
    moved = expert.dispatch_bytes + 2 * expert.hidden
    rows_us = device.memory_us(load.rows * (_row_bytes(expert) + moved) + tokens * moved)
    products = sum(device.with_memory(each, weights) * count for each, count in zip(compute, number, strict=True))
    alone = sum(each * count for each, count in zip(compute, number, strict=True))
    slower = device.host_us / profile.host_us.value if profile.host_us.value else 1.0  # launches wait for the host
    between = profile.contiguous_us.value * slower
    total = between + products + rows_us
    return max(device.host_us, total), alone, weights * load.touched + rows_us


def _row_bytes(expert: Expert) -> float:
    """Of one row through the two products with the activation between them, which writes and reads BF16."""
    first = (2 if expert.gated else 1) * expert.intermediate
    between = 2 * 2 * first + 2 * expert.intermediate * value_bytes(expert.dispatch_format)
    return expert.dispatch_bytes + between + 2 * expert.hidden


def staged_time(
    expert: Expert,
    device: Device,
    profile: Profile,
    *,
    ep: int,
    tokens_per_rank: float,
    routing: str = "balanced",
    redundant: int = 0,
    two_batch: bool = False,
    kernels: Kernels | None = None,
) -> LayerTime:
    """A layer by one of the two kinds of kernels that DeepEP has, None for the faster. two_batch: in two halves."""
    kinds: list[Kind] = [_normal_stages] if kernels != "low latency" else []
    if kernels == "low latency" or (kernels is None and tokens_per_rank <= LOW_LATENCY_TOKENS):
        kinds.append(_low_latency_stages)
    device = device.under_load()
    halves = 2 if two_batch and tokens_per_rank > 1 else 1
    tokens = tokens_per_rank / halves
    loads = [
        max(ranks, key=lambda load: load.rows)
        for ranks in busiest(routing, expert.num_experts, expert.topk, ep, tokens, redundant)
    ]
    tried = []
    for kind in kinds:
        drawn = [_run(kind(expert, device, profile, ep, tokens, load), load, halves) for load in loads]
        tried.append(_mean(drawn))
    return min(tried, key=lambda found: found.layer_us)


@dataclass(frozen=True, slots=True)
class _Stages:
    exchange: Exchange
    products: tuple[float, float, float]


Kind = Callable[[Expert, Device, Profile, int, float, RankLoad], _Stages]


def _low_latency_stages(
    expert: Expert, device: Device, profile: Profile, ep: int, tokens: float, load: RankLoad
) -> _Stages:
    sent = low_latency(expert, device, profile, ep=ep, tokens=tokens, rows=load.rows)
    return _Stages(sent if ep > 1 else Exchange(0.0, 0.0), masked_us(expert, device, profile, load))


def _normal_stages(expert: Expert, device: Device, profile: Profile, ep: int, tokens: float, load: RankLoad) -> _Stages:
    sent = normal(expert, device, profile, ep=ep, tokens=tokens, rows=load.rows)
    received = tokens * reached_by(ep, expert.topk) if ep > 1 else tokens
    products = contiguous_us(expert, device, profile, load, received)
    return _Stages(sent if ep > 1 else Exchange(0.0, 0.0), products)


def _run(stages: _Stages, load: RankLoad, halves: int) -> LayerTime:
    """One rank's stages, played: one after the other, or two halves whose links and products take turns."""
    exchange, (alone, compute, memory) = stages.exchange, stages.products
    works = [Work(half, alone) for half in range(halves)]
    played = play(works, [exchange.dispatch_us] * halves, [exchange.combine_us] * halves)
    return LayerTime(
        layer_us=played.total,
        kernel_us=0.0,
        graph_us=0.0,
        stack_us=0.0,
        core_us=played.total,
        sum_us=0.0,
        compute_us=compute * halves,
        memory_us=memory * halves,
        alone_us=alone * halves,
        dispatch_us=exchange.dispatch_us * halves,
        combine_us=exchange.combine_us * halves,
        head_us=played.head,
        stalls_us=played.stalls,
        tail_us=played.tail,
        waves=halves,
        rows=load.rows * halves,
        experts_touched=load.touched,
        played=played,
    )


_MEANS = (
    *("layer_us", "core_us", "compute_us", "memory_us", "alone_us", "dispatch_us", "combine_us"),
    *("head_us", "stalls_us", "tail_us", "rows", "experts_touched"),
)


def _mean(drawn: list[LayerTime]) -> LayerTime:
    means: dict[str, Any] = {key: fmean(getattr(each, key) for each in drawn) for key in _MEANS}
    return replace(drawn[0], **means)
