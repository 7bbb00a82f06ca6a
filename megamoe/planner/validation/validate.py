"""The layer model held against tables of measured layers.

A table is a CSV file with the columns hardware, model, hidden, intermediate, num_experts, topk, ep_size,
tokens_per_rank, routing and latency_us; others are ignored, but for weight_format, dispatch_format and combine_format,
which say what is otherwise taken from the catalog (a model that it does not know: mxfp4 weights, mxfp8 there, bf16
back). Latency is that of the whole routed module: staging, kernel, routed scale.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median

from megamoe.catalog import Hardware, Model, find_profile, load_hardware, load_model, names
from megamoe.planner.layer.cost import layer_time
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.expert import Expert

COLUMNS = (
    "hardware",
    "model",
    "hidden",
    "intermediate",
    "num_experts",
    "topk",
    "ep_size",
    "tokens_per_rank",
    "routing",
    "latency_us",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of a table."""

    hardware: str
    model: str
    expert: Expert
    ep_size: int
    tokens_per_rank: int
    routing: str
    latency_us: float
    staging: bool = True


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


def read_table(path: Path) -> list[Measured]:
    """The rows of a CSV file; ValueError names the file, the line and what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
        rows = []
        for row in reader:
            try:
                rows.append(_measured({key: value or "" for key, value in row.items() if isinstance(key, str)}))
            except ValueError as wrong:
                raise ValueError(f"{path}, line {reader.line_num}: {wrong}") from wrong
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _measured(row: dict[str, str]) -> Measured:
    sizes = {key: _whole(row, key) for key in ("hidden", "intermediate", "num_experts", "topk")}
    model = _known_model(row["model"])
    expert = Expert(
        **sizes,
        gated=model.gated if model else True,
        weight_format=row.get("weight_format") or (model.weight_format if model else "mxfp4"),
        dispatch_format=row.get("dispatch_format") or "mxfp8",
        combine_format=row.get("combine_format") or "bf16",
    )
    try:
        latency = float(row["latency_us"])
    except ValueError:
        latency = -1.0
    if not 0 < latency < float("inf"):
        raise ValueError(f"latency_us {row['latency_us']!r} is no positive number")
    _hardware(row["hardware"])
    routing = row["routing"] or "balanced"
    return Measured(
        row["hardware"], row["model"], expert, _whole(row, "ep_size"), _whole(row, "tokens_per_rank"), routing, latency
    )


def _whole(row: dict[str, str], key: str) -> int:
    try:
        value = int(row[key])
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"{key} {row[key]!r} is no positive whole number")
    return value


@lru_cache(maxsize=64)
def _known_model(name: str) -> Model | None:
    return load_model(name) if name in names("models") else None


@lru_cache(maxsize=64)
def _hardware(name: str) -> Hardware:
    return load_hardware(name)


def compare(rows: Iterable[Measured]) -> list[Compared]:
    """What the planner says to every row."""
    devices: dict[tuple[str, str], Device] = {}
    compared = []
    for row in rows:
        hardware = _hardware(row.hardware)
        fmt = compute_format(hardware, row.expert.weight_format, row.expert.dispatch_format)
        device = devices.get((row.hardware, fmt))
        if device is None:
            device = devices[row.hardware, fmt] = Device.of(hardware, find_profile(hardware), fmt)
        planned = layer_time(
            row.expert,
            device,
            ep=row.ep_size,
            tokens_per_rank=row.tokens_per_rank,
            routing=row.routing,
            staging=row.staging,
        )
        compared.append(Compared(row, planned.layer_us))
    return compared


def summary(compared: list[Compared]) -> dict[str, object]:
    """Errors of all rows, and by ep_size and by routing, as `megamoe validate --format json` prints them."""
    by_ep = sorted({each.row.ep_size for each in compared})
    by_routing = sorted({each.row.routing for each in compared})
    return {
        **Errors.of(compared).as_dict(),
        "by_ep_size": {
            str(ep): Errors.of(each for each in compared if each.row.ep_size == ep).as_dict() for ep in by_ep
        },
        "by_routing": {
            routing: Errors.of(each for each in compared if each.row.routing == routing).as_dict()
            for routing in by_routing
        },
    }
