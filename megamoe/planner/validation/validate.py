"""The layer model held against tables of measured layers, products and exchanges (tables.py), and its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import fmean, median

from megamoe.catalog import Hardware, Profile, find_profile
from megamoe.planner.layer.cost import layer_time
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.routing import RankLoad, busiest
from megamoe.planner.layer.stacks import stack_time
from megamoe.planner.layer.staged import (
    CONTIGUOUS_ROWS,
    Kernels,
    contiguous_us,
    low_latency,
    masked_us,
    normal,
    staged_time,
)
from megamoe.planner.validation.tables import Measured, hardware_of

Fitted = Callable[[Hardware], Profile]


@dataclass(frozen=True, slots=True)
class Compared:
    """A measured row and what the planner says, in microseconds; error_pct is 100 * (planned / measured - 1)."""

    row: Measured
    planned_us: float

    @property
    def error_pct(self) -> float:
        return 100 * (self.planned_us / self.row.latency_us - 1)


@dataclass(frozen=True, slots=True)
class Errors:
    """How far off a set of rows is, in percent, whatever the sign."""

    rows: int
    median_abs_pct_error: float
    p95_abs_pct_error: float
    max_abs_pct_error: float

    @classmethod
    def of(cls, compared: Iterable[Compared]) -> Errors:
        found = sorted(abs(each.error_pct) for each in compared)
        return cls(len(found), median(found), quantile(found, 0.95), found[-1])

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def quantile(ordered: list[float], share: float) -> float:
    """Of ascending values, between the two nearest.    [0, 10], 0.95 -> 9.5"""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def compare(rows: Iterable[Measured], profile_of: Fitted | None = None) -> list[Compared]:
    """What the planner says to every row: by the profile that it names or the hardware's own, or by another."""
    return [Compared(row, planned_us(row, (profile_of or _named(row))(hardware_of(row.hardware)))) for row in rows]


def _named(row: Measured) -> Fitted:
    return lambda hardware: _profile(hardware, row.profile)


@lru_cache(maxsize=64)
def _profile(hardware: Hardware, name: str | None) -> Profile:
    return find_profile(hardware, name)


def planned_us(row: Measured, profile: Profile) -> float:
    """Microseconds that the planner gives what a row has timed."""
    hardware = hardware_of(row.hardware)
    if row.nodes:  # as many hosts as the file says, whatever the catalog's machine holds
        hardware = _over_nodes(hardware, -(-row.ep_size // row.nodes))
    expert = row.expert
    device = Device.of(hardware, profile, compute_format(hardware, expert.weight_format, expert.dispatch_format))
    if row.stack.endswith(("dispatch", "combine")):
        tokens = row.tokens_per_rank
        if row.stack.startswith("normal"):
            sent = normal(expert, device, profile, ep=row.ep_size, tokens=tokens, rows=tokens * expert.topk)
        else:
            sent = low_latency(expert, device, profile, ep=row.ep_size, tokens=tokens)
        return sent.dispatch_us if row.stack.endswith("dispatch") else sent.combine_us
    if row.stack in ("masked", "contiguous"):
        return fmean(_products_us(row, device, profile, load) for load in _loads(row))
    given = {"ep": row.ep_size, "tokens_per_rank": row.tokens_per_rank, "routing": row.drawn or row.routing}
    if row.stack == "kernel":
        return layer_time(expert, device, **given, staging=False).layer_us  # type: ignore[arg-type]
    if row.stack in ("staged normal", "staged low latency"):
        kernels: Kernels = "normal" if row.stack.endswith("normal") else "low latency"
        return staged_time(expert, device, profile, **given, kernels=kernels).layer_us  # type: ignore[arg-type]
    stack, two_batch = row.stack.split()[0], row.stack.endswith("two-batch")
    return stack_time(stack, expert, device, profile, two_batch=two_batch, **given).layer_us  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _over_nodes(hardware: Hardware, size: int) -> Hardware:
    """With at most so many devices in a scale-up domain."""
    domain = hardware.scaleup_domain
    if size >= domain.value:
        return hardware
    return hardware.model_copy(update={"scaleup_domain": domain.model_copy(update={"value": float(size)})})


def _products_us(row: Measured, device: Device, profile: Profile, load: RankLoad) -> float:
    if row.stack == "masked":
        return masked_us(row.expert, device, profile, load)[0]
    return contiguous_us(row.expert, device, profile, load, row.tokens_per_rank * row.ep_size)[0]


def _loads(row: Measured) -> list[RankLoad]:
    """The fullest rank of each draw."""
    expert = row.expert
    routing = row.drawn or row.routing
    drawn = busiest(routing, expert.num_experts, expert.topk, row.ep_size, row.tokens_per_rank, draws=row.draws)
    loads = [max(ranks, key=lambda load: load.rows) for ranks in drawn]
    return [_in_blocks(load) for load in loads] if (row.stack, routing) == ("contiguous", "balanced") else loads


def _in_blocks(load: RankLoad) -> RankLoad:
    """The same rows in as few experts as hold whole blocks of them.    64 experts of 32 rows -> 16 of 128"""
    touched = min(load.touched, max(1, -(-int(load.rows) // CONTIGUOUS_ROWS)))
    return replace(load, groups=((load.rows / touched, touched),))


def summary(compared: list[Compared]) -> dict[str, object]:
    """Errors of all rows, and by ep_size, routing and stack, as `megamoe validate --format json` prints them."""
    return {
        **Errors.of(compared).as_dict(),
        "by_ep_size": {str(key): each for key, each in _by(compared, lambda row: row.ep_size).items()},
        "by_routing": _by(compared, lambda row: row.routing),
        "by_stack": _by(compared, lambda row: row.stack),
    }


def _by(compared: list[Compared], key: Callable[[Measured], object]) -> dict[object, dict[str, float]]:
    values = sorted({key(each.row) for each in compared})  # type: ignore[type-var]
    return {value: Errors.of(each for each in compared if key(each.row) == value).as_dict() for value in values}
