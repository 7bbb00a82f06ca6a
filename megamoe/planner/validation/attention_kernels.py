"""Measured decode attention of DeepSeek-V3, kernel and module, and what the planner says to each.

`docs/data/mla_decode_kernels.csv`, from ai-dynamo/aiconfigurator 0.12 (Apache-2.0): generation_mla of SGLang 0.5.14 and
TensorRT-LLM 1.3.0rc20, mla_generation_module of the latter with FP8 products; 128 heads, one query of a sequence.

    core         the attention kernel alone: the memory efficiency of the device's catalog file was fitted to it
    attention    a layer from hidden state to hidden state: projections, norms, rope, cache, core; fitted to nothing
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from megamoe.catalog import find_profile, load_hardware, load_model
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.serving import costs_of
from megamoe.planner.serving.step import Costs, attention_pieces

Part = Literal["core", "attention"]
COLUMNS = ("hardware", "framework", "part", "kv_format", "batch", "context", "latency_us")


@dataclass(frozen=True, slots=True)
class Timed:
    """One row: `batch` sequences of `context` tokens each, one layer, microseconds measured and planned."""

    hardware: str
    framework: str
    part: Part
    kv_format: str
    batch: int
    context: int
    latency_us: float
    planned_us: float

    @property
    def error_pct(self) -> float:
        """100 x (planned / measured - 1)."""
        return 100 * (self.planned_us / self.latency_us - 1)


def attention_kernels(path: Path) -> list[Timed]:
    """Every row of the file. ValueError where it lacks a column."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        return list(_timed(reader))


def _timed(rows: Iterable[dict[str, str]]) -> Iterable[Timed]:
    for row in rows:
        hardware, kv_format, batch, context = row["hardware"], row["kv_format"], int(row["batch"]), int(row["context"])
        part: Part = "core" if row["part"] == "core" else "attention"
        planned = planned_us(hardware, part, kv_format, batch, context)
        yield Timed(hardware, row["framework"], part, kv_format, batch, context, float(row["latency_us"]), planned)


def planned_us(hardware: str, part: Part, kv_format: str, batch: int, context: int) -> float:
    """One layer of DeepSeek-V3 in decode: the core with the launch that it is, or all of attention."""
    costs, base = _costs(hardware, kv_format)
    deployment = Deployment(
        base.model, base.hardware, base.profile, 1, 1, batch_per_device=batch, context=context, kv_format=kv_format
    )
    pieces = attention_pieces(costs, deployment)
    core = next(piece for piece in pieces if piece.name == "mla core")
    return core.us + costs.kernel_us if part == "core" else sum(piece.us for piece in pieces)


@lru_cache(maxsize=32)
def _costs(name: str, kv_format: str) -> tuple[Costs, Deployment]:
    hardware = load_hardware(name)
    sizes = {"devices": 1, "ep": 1, "batch_per_device": 1, "context": 1024, "kv_format": kv_format}
    base = Deployment(load_model("deepseek-v3"), hardware, find_profile(hardware), **sizes)  # type: ignore[arg-type]
    return costs_of(base), base
