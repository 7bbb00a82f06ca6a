"""What is asked on an H100 or H200, and what the worst row reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu_kernels.findings import BOUND, Row

# A product that reads less ends before the device has ramped up and drained: Qwen3's Linear-2 takes about 12 us of
# memory time, about 5 of which are those two.
LARGE_BYTES = 200_000_000
MEMORY_SHAPE = "V4-Pro"
_DECODE_ROWS, _PREFILL_ROWS = 8, 512  # at most, at least


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of the worst of some rows: worst is None where none of them was measured."""

    name: str
    asked: float
    worst: float | None
    where: str = ""
    below: bool = False

    @property
    def reached(self) -> bool | None:
        if self.worst is None:
            return None
        return self.worst < self.asked if self.below else self.worst >= self.asked

    @property
    def wanted(self) -> str:
        return f"{'<' if self.below else '>='} {self.asked:g}"


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Decode is up to 8 rows an expert, prefill 512 and more; of the products, not of the layer."""
    products = [row for row in rows if row.what == "mxfp4" and not row.problem]
    decode = [row for row in products if row.rows_per_expert <= _DECODE_ROWS]
    prefill = [row for row in products if row.rows_per_expert >= _PREFILL_ROWS]
    large = [row for row in decode if (row.num_bytes or 0) > LARGE_BYTES]
    memory = [row for row in decode if row.shape == MEMORY_SHAPE and row.bound == "memory"]
    checked = [row for row in rows if row.what != "grouped_mm"]
    return [
        _goal("error against FP64", BOUND, checked, lambda row: row.error, below=True),
        _goal(f"decode, {MEMORY_SHAPE}: share of the memory ceiling", 0.7, memory, lambda row: row.share),
        _goal("decode, over 200 MB: times grouped_mm", 2.5, large, lambda row: row.over_grouped_mm),
        _goal("prefill: times grouped_mm", 1.0, prefill, lambda row: row.over_grouped_mm),
        _goal("Linear-1: times the unfused sequence", 1.2, products, lambda row: row.over_unfused),
    ]


def _goal(
    name: str, asked: float, rows: Sequence[Row], value: Callable[[Row], float | None], *, below: bool = False
) -> Goal:
    found = [(each, row) for row in rows if (each := value(row)) is not None]
    if not found:
        return Goal(name, asked, None, below=below)
    worst, row = (max if below else min)(found, key=lambda each: each[0])
    return Goal(name, asked, worst, f"{row.shape}, {row.rows_per_expert} rows, {row.part} {row.what}", below)
