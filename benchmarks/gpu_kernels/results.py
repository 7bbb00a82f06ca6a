"""What a run found: a row for everything that was to be measured, checks, ceilings; what is asked and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.gpu_kernels.clock import Ceilings, Times

BOUND = 5e-3  # of the error against FP64
# what each part compares; the first of each is what the others are held against
PARTS: dict[str, tuple[str, ...]] = {
    "linear1": ("mxfp4", "bf16", "grouped_mm", "unfused"),
    "linear2": ("mxfp4", "bf16", "grouped_mm"),
    "both": ("mxfp4", "bf16", "grouped_mm"),
    "layer": tuple(f"{what} {how}" for how in ("eager", "graph") for what in ("mxfp4", "bf16", "grouped_mm")),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing, measured or not: everything is None until it is, and problem says why it could not be.

    part, shape, rows_per_expert, what   which it is; num_experts and num_rows: what it worked on
    us, us_min, us_max                   of one launch: median, least and most of the repeats
    tflop_s, gb_s                        2 a multiply-add; weights, rows in and rows out, each once
    bound, share                         the ceiling that would take longer, "memory" or "matmul", and the part of it
    error                                against FP64
    over_*                               how many times as fast as that one
    """

    part: str
    shape: str
    rows_per_expert: int
    what: str
    num_experts: int
    num_rows: int
    us: float | None = None
    us_min: float | None = None
    us_max: float | None = None
    tflop_s: float | None = None
    gb_s: float | None = None
    bound: str | None = None
    share: float | None = None
    error: float | None = None
    over_grouped_mm: float | None = None
    over_bf16: float | None = None
    over_unfused: float | None = None
    problem: str | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.part, self.shape, self.rows_per_expert, self.what

    def line(self) -> str:
        """For the terminal."""
        name = f"{self.shape} {self.rows_per_expert:>4} {self.part} {self.what}"
        if self.problem or self.us is None:
            return f"{name}: {self.problem or 'not run'}"
        done = f"{self.tflop_s:.1f} TFLOP/s, {self.gb_s:.0f} GB/s"
        beside = [f"{getattr(self, key):.2f} x {key[5:]}" for key in OVER if getattr(self, key) is not None]
        return f"{name}: {self.us:.1f} us ({self.us_min:.1f}-{self.us_max:.1f}), {', '.join([done, *beside])}"


OVER = ("over_grouped_mm", "over_bf16", "over_unfused")


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch does: multiplications and additions, bytes of memory that it must touch."""

    flops: int
    num_bytes: int

    def of(self, row: Row, times: Times, ceilings: Ceilings) -> Row:
        """The row with its times and what follows from them."""
        matmul_us, memory_us = self.flops / ceilings.tflop_s * 1e-6, self.num_bytes / ceilings.gb_s * 1e-3
        return replace(
            row,
            us=times.us,
            us_min=times.us_min,
            us_max=times.us_max,
            tflop_s=self.flops / times.us * 1e-6,
            gb_s=self.num_bytes / times.us * 1e-3,
            bound="memory" if memory_us > matmul_us else "matmul",
            share=max(memory_us, matmul_us) / times.us,
        )


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """A row of MXFP4 with how many times as fast it is as each of the others of its part; other rows as they are."""
    what, _, how = row.what.partition(" ")
    others = {other.what: other.us for other in rows}
    if what != "mxfp4" or row.us is None:
        return row
    us = {key: others.get(f"{key[5:]} {how}".strip()) for key in OVER}
    ratios: dict[str, Any] = {key: each / row.us for key, each in us.items() if each is not None}
    return replace(row, **ratios)


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold on the device."""

    name: str
    passed: bool
    said: str = ""


@dataclass(slots=True)
class Results:
    """A run. device, torch, triton and ceilings are None where nothing was run; tiles says where they came from."""

    command: str
    date: str
    rows: dict[tuple[str, str, int, str], Row]
    device: str | None = None
    chip: str | None = None
    torch: str | None = None
    triton: str | None = None
    tiles: str | None = None
    ceilings: Ceilings | None = None
    checks: list[Check] = field(default_factory=list)

    def put(self, row: Row) -> None:
        self.rows[row.key] = row
        print(row.line(), flush=True)

    def check(self, check: Check) -> None:
        self.checks.append(check)
        said = f": {check.said}" if check.said else ""
        print(f"check, {check.name}: {'passed' if check.passed else 'FAILED'}{said}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether a check failed or something that was tried did not run."""
        return any(row.problem for row in self.rows.values()) or not all(check.passed for check in self.checks)

    @property
    def goals(self) -> list[Goal]:
        return goals(list(self.rows.values()), self.ceilings)

    def as_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("command", "date", *_FACTS)}
        return {
            **fields,
            "ceilings": asdict(self.ceilings) if self.ceilings else None,
            "checks": [asdict(check) for check in self.checks],
            "goals": [{**asdict(goal), "reached": goal.reached} for goal in self.goals],
            "rows": [asdict(row) for row in self.rows.values()],
        }


_FACTS = ("device", "chip", "torch", "triton", "tiles")


# ---- what is asked on an H100 or H200 ----


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


def goals(rows: Sequence[Row], ceilings: Ceilings | None) -> list[Goal]:
    """Decode is 1 to 8 rows an expert, prefill 2048; both of the products, not of the layer."""
    products = [row for row in rows if row.what == "mxfp4"]
    decode = [row for row in products if row.rows_per_expert <= 8]
    prefill = [row for row in products if row.rows_per_expert == 2048]
    memory = {row.key: row.gb_s / ceilings.gb_s for row in decode if ceilings and row.gb_s is not None}
    return [
        _goal("error against FP64", BOUND, [(row, row.error) for row in rows if row.what != "grouped_mm"], below=True),
        _goal("decode, share of the memory ceiling", 0.7, [(row, memory.get(row.key)) for row in decode]),
        _goal("decode, times grouped_mm", 2.5, [(row, row.over_grouped_mm) for row in decode]),
        _goal("prefill, times grouped_mm (aim 1.3)", 1.0, [(row, row.over_grouped_mm) for row in prefill]),
        _goal("Linear-1, times the unfused sequence", 1.2, [(row, row.over_unfused) for row in products]),
    ]


def _goal(name: str, asked: float, values: Sequence[tuple[Row, float | None]], *, below: bool = False) -> Goal:
    found = [(value, row) for row, value in values if value is not None]
    if not found:
        return Goal(name, asked, None, below=below)
    worst, row = (max if below else min)(found, key=lambda each: each[0])
    return Goal(name, asked, worst, f"{row.shape}, {row.rows_per_expert} rows, {row.part} {row.what}", below)
