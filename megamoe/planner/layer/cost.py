"""How long one expert-parallel layer takes in the fused kernel, part by part, on the rank that is last.

Of all experts of that rank, with R rows:

    compute    their tiles, spread over the SMs (tiles.py)
    memory     (weights + rows that are read and written) / (memory bandwidth * memory_efficiency)
    link       R * bytes of a row there and back / (link * fused_link_efficiency), over the slowest tier that it crosses

All three use the same device at once and get in each other's way: products and memory take their p-norm with
p = memory_overlap, both and the links that with p = overlap, infinite where they overlap perfectly, 1 where one waits
for the other. Tiles of several experts are under way at once, so that one that has many rows computes while the weights
of one that has few are read; what counts is the rank's sum of each.

The waves are then played: dispatch, compute, combine, one link. On top come, once a call, the kernel itself with a
barrier for every doubling of ranks; the sum of the slots, which nothing overlaps (where results come home in fewer bits
than BF16, slot_us for each slot, which is decoded first); and where a module runs it, the
launches in its graph and staging (tokens read, quantised, written).
Ranks in several scale-up domains exchange over the NIC: as long as the slowest tier takes, and no kernel does that from
within, so that exchange_us is paid there and back.
"""

# T tokens of a rank   h hidden   d intermediate   K experts per token   n rows of an expert   P ranks

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import mul
from statistics import fmean
from typing import NamedTuple

from megamoe.planner.layer.device import Device
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.routing import RankLoad, busiest
from megamoe.planner.layer.rule import Tier, landed
from megamoe.planner.layer.tiles import Tiling, products_us, tiling_of
from megamoe.schedule.formats import value_bytes
from megamoe.schedule.schedule import Played, Work, play

_NUMBERS_OF_WAVES = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True, slots=True)
class Hiding:
    """What the waves of a pass took, in microseconds, and how much of its communication does not show in that.

    core_us   the waves, from the first dispatch to the end      alone_us   what they would be without any link
    """

    core_us: float
    alone_us: float
    dispatch_us: float
    combine_us: float

    @property
    def communication_us(self) -> float:
        return self.dispatch_us + self.combine_us

    @property
    def exposed_us(self) -> float:
        return max(0.0, self.core_us - self.alone_us)

    @property
    def hidden(self) -> float:
        """0 to 1; 1 where nothing is sent."""
        if not self.communication_us:
            return 1.0
        return max(0.0, 1 - self.exposed_us / self.communication_us)


@dataclass(frozen=True, slots=True)
class LayerTime(Hiding):
    """Microseconds of one layer; rows and experts_touched of the rank that is last, means over draws of the routing.

    layer_us          fixed_us + core_us + sum_us
    fixed_us          kernel_us (a call, its barriers) + graph_us (launches around it) + stack_us (staging)
    sum_us            the slots summed, once all are there
    core_us           the waves, from the first dispatch to the last result: head_us + busy + stalls + tail_us
    compute_us        products alone             memory_us   weights and rows alone
    alone_us          both together, without any link: what core_us would be if communication were free
    communication_us  the link alone, both ways: dispatch_us + combine_us
    exposed_us        core_us - alone_us         hidden      the share of communication_us that does not show
    """

    layer_us: float
    kernel_us: float
    graph_us: float
    stack_us: float
    sum_us: float
    compute_us: float
    memory_us: float
    head_us: float
    stalls_us: float
    tail_us: float
    waves: int
    rows: float
    experts_touched: float
    played: Played

    @property
    def fixed_us(self) -> float:
        return self.kernel_us + self.graph_us + self.stack_us


def layer_time(
    expert: Expert,
    device: Device,
    *,
    ep: int,
    tokens_per_rank: float,
    routing: str = "balanced",
    redundant: int = 0,
    waves: int | None = None,
    most_waves: int = 16,
    staging: bool = True,
    sent: float = 1.0,
    node_limited: bool = False,
) -> LayerTime:
    """Time of one layer. waves None: as many as are best, up to most_waves.

    staging=False: the fused kernel without the module that feeds it. sent: tokens that travel for a row, less than 1
    where a token goes once to a rank that has several of its experts. node_limited: it goes once to each other
    scale-up domain, and on from there over the domain's own links.

    ValueError for sizes that make no sense, or where ranks lie in domains that nothing is known to join.
    """
    _check(expert, ep, tokens_per_rank, redundant, waves)
    drawn = busiest(routing, expert.num_experts, expert.topk, ep, tokens_per_rank, redundant)
    numbers = [waves] if waves else [each for each in _NUMBERS_OF_WAVES if each <= most_waves]
    tiling = tiling_of(device, tokens_per_rank * ep * expert.topk / (expert.num_experts + redundant))
    once = landed(expert.num_experts, expert.topk, ep, device.scaleup_domain) if node_limited else None
    tiers = device.tiers(ep, sent=sent, once=once)
    last = [
        max(
            (_core(expert, device, load, ep, tokens_per_rank, tiling, numbers, tiers) for load in ranks),
            key=lambda c: c.played.total,
        )
        for ranks in drawn
    ]
    values = tokens_per_rank * expert.hidden
    local = -(-(expert.num_experts + redundant) // ep)
    kernel = device.fixed_us + device.expert_us * local + (device.barrier_us * math.log2(ep) if ep > 1 else 0.0)
    stack = device.staging_us + device.memory_us(values * device.staging_bytes) if staging else 0.0
    graph = device.graph_us if staging else 0.0
    slots = device.memory_us(values * (expert.topk * value_bytes(expert.combine_format) + 2))
    if value_bytes(expert.combine_format) < 2:
        slots += device.slot_us * expert.topk
    core = fmean(each.played.total + each.latency_us for each in last)
    return LayerTime(
        layer_us=kernel + graph + stack + core + slots,
        kernel_us=kernel,
        graph_us=graph,
        stack_us=stack,
        core_us=core,
        sum_us=slots,
        compute_us=fmean(each.compute_us for each in last),
        memory_us=fmean(each.memory_us for each in last),
        alone_us=fmean(each.alone_us for each in last),
        dispatch_us=fmean(each.dispatch_us for each in last),
        combine_us=fmean(each.combine_us for each in last),
        head_us=fmean(each.played.head for each in last),
        stalls_us=fmean(each.played.stalls for each in last),
        tail_us=fmean(each.played.tail for each in last),
        waves=last[0].waves,
        rows=fmean(each.load.rows for each in last),
        experts_touched=fmean(each.load.touched for each in last),
        played=last[0].played,
    )


def _check(expert: Expert, ep: int, tokens_per_rank: float, redundant: int, waves: int | None) -> None:
    if ep < 1:
        raise ValueError(f"an EP size of {ep} makes no sense: it is 1 or more")
    if ep > expert.num_experts + redundant:
        raise ValueError(f"EP{ep} is larger than the {expert.num_experts + redundant} experts that there are to share")
    if tokens_per_rank < 0:
        raise ValueError(f"tokens_per_rank must not be negative, got {tokens_per_rank:g}")
    if redundant < 0:
        raise ValueError(f"redundant experts must not be negative, got {redundant}")
    if waves is not None and waves < 1:
        raise ValueError(f"waves must be at least 1, got {waves}")


@dataclass(frozen=True, slots=True)
class _Core:
    load: RankLoad
    played: Played
    waves: int
    compute_us: float
    memory_us: float
    alone_us: float
    dispatch_us: float
    combine_us: float
    latency_us: float


def _core(
    expert: Expert,
    device: Device,
    load: RankLoad,
    ep: int,
    tokens: float,
    tiling: Tiling,
    waves: list[int],
    tiers: list[Tier],
) -> _Core:
    """One rank's waves in microseconds."""
    rows = load.rows
    if not rows:
        return _Core(load, Played(0.0, 0.0, 0.0, 0.0, ()), 1, *[0.0] * 6)
    own = tokens * expert.topk
    row = row_us(device, ep, rows, own, expert.dispatch_bytes, expert.combine_bytes, tiers, fused=True)
    there, back = rows * row.there_us, rows * row.back_us
    counts, numbers = zip(*load.groups, strict=True)
    products = products_us(expert, device, counts, numbers, tiling)
    compute = device.busy_us(sum(map(mul, products, numbers)), rows * expert.flops)
    memory = device.memory_us(load.touched * expert.weight_bytes + rows * expert.row_bytes)
    alone = device.with_memory(compute, memory)
    played, best = _play(alone, load.touched, there, back, device, waves)
    latency = 2 * device.exchange_us if ep > device.scaleup_domain else 0.0
    return _Core(load, played, best, compute, memory, alone, there, back, latency)


def dispatch_us(expert: Expert, device: Device, *, ep: int, tokens_per_rank: float) -> float:
    """A dispatch alone, in no kernel, of evenly spread tokens: every row to its expert's rank, nothing computed."""
    _check(expert, ep, tokens_per_rank, 0, None)
    rows = tokens_per_rank * expert.topk
    if not rows:
        return device.exchange_us
    row = row_us(device, ep, rows, rows, expert.dispatch_bytes, expert.combine_bytes, device.tiers(ep))
    return device.exchange_us + rows * row.there_us


class Crossing(NamedTuple):
    """Microseconds of link time that a row takes there and back, over the tier that is slowest (None: over none).

    A link carries, each way, what its rank receives and what it gives out for its own pairs: its fuller way so many
    times the bytes of a row both ways.
    """

    there_us: float
    back_us: float
    fuller: float
    tier: Tier | None


def row_us(
    device: Device, ep: int, rows: float, own: float, there: float, back: float, tiers: list[Tier], fused: bool = False
) -> Crossing:
    """A row of the busiest rank, which has so many rows and `own` pairs.

    there, back: bytes of a token and of a result. fused: a fused kernel carries it. Where many ranks send to one, its
    switch port serves them worse than an even exchange.
    """
    slowest = Crossing(0.0, 0.0, 1.0, None)
    for tier in tiers:
        if tier.name == "scale-up":
            bytes_s = device.link_bytes_s(min(ep, device.scaleup_domain), fused=fused) / device.incast(rows, own)
        else:
            bytes_s = device.nic_bytes_s
        out, home = there * tier.f_dispatch, back * tier.f_remote
        fuller = max(rows * out + own * home, rows * home + own * out) / rows / (out + home)
        byte_us = fuller / bytes_s * 1e6
        if (out + home) * byte_us > slowest.there_us + slowest.back_us:
            slowest = Crossing(out * byte_us, home * byte_us, fuller, tier)
    return slowest


def _play(
    alone: float, experts: int, there: float, back: float, device: Device, waves: list[int]
) -> tuple[Played, int]:
    """The schedule that takes least time, of any of these numbers of waves.

    The fused kernel computes a block as soon as the block's rows are there, so that a wave is a share of all rows, not
    of all experts: one expert that most rows want is spread over the waves like the rest. One wave has its links before
    and after it, where they are in nobody's way.
    """
    numbers = waves if len(waves) == 1 else [each for each in waves if each <= experts] or [1]
    best: tuple[Played, int] | None = None
    for number in numbers if there else numbers[:1]:
        time = device.with_links(alone, there + back) if number > 1 else alone
        works = [Work(wave, time / number + device.wave_us) for wave in range(number)]
        played = play(works, [there / number] * number, [back / number] * number)
        if best is None or played.total < best[0].total:
            best = played, number
    assert best is not None
    return best
