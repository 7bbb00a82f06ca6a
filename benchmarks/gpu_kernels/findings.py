"""What a stage finds: measured rows, checks, ceilings, facts and tables, and each of them as a line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias, get_type_hints

BOUND = 5e-3  # of the error against FP64
# what each part compares; the first of each is what the others are held against
PARTS: dict[str, tuple[str, ...]] = {
    "linear1": ("mxfp4", "bf16", "grouped_mm", "unfused"),
    "linear2": ("mxfp4", "bf16", "grouped_mm"),
    "both": ("mxfp4", "bf16", "grouped_mm"),
    "layer": tuple(f"{what} {how}" for how in ("eager", "graph") for what in ("mxfp4", "bf16", "grouped_mm")),
}
OVER = ("over_grouped_mm", "over_bf16", "over_unfused")


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was to be measured: numbers are None until it is, and problem says why it could not be.

    part, shape, rows_per_expert, what   which it is; num_experts and num_rows: what it worked on
    us, us_min, us_max                   of one launch: median, least and most of the repeats
    flops, num_bytes                     2 a multiply-add; weights, rows in and rows out, each once
    bound, share                         the ceiling that would take longer, "memory" or "matmul", and the part of it
    error                                against FP64
    over_*                               how many times as fast as that one
    note                                 what else the times depend on
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
    flops: int | None = None
    num_bytes: int | None = None
    bound: str | None = None
    share: float | None = None
    error: float | None = None
    over_grouped_mm: float | None = None
    over_bf16: float | None = None
    over_unfused: float | None = None
    note: str | None = None
    problem: str | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.part, self.shape, self.rows_per_expert, self.what

    @property
    def tflop_s(self) -> float | None:
        return None if self.us is None or self.flops is None else self.flops / self.us * 1e-6

    @property
    def gb_s(self) -> float | None:
        return None if self.us is None or self.num_bytes is None else self.num_bytes / self.us * 1e-3

    def under(self, ceilings: Ceilings) -> Row:
        """The row with its bound and its share of these ceilings, or as it is where it was not measured."""
        if self.us is None or self.flops is None or self.num_bytes is None:
            return self
        matmul_us, memory_us = self.flops / ceilings.tflop_s * 1e-6, self.num_bytes / ceilings.gb_s * 1e-3
        bound = "memory" if memory_us > matmul_us else "matmul"
        return replace(self, bound=bound, share=max(memory_us, matmul_us) / self.us)

    def line(self) -> str:
        """For the terminal."""
        name = f"{self.shape} {self.rows_per_expert:>4} {self.part} {self.what}"
        if self.problem or self.us is None:
            return f"{name}: {self.problem or 'not run'}"
        done = f"{self.tflop_s or 0:.1f} TFLOP/s, {self.gb_s or 0:.0f} GB/s"
        beside = [f"{getattr(self, key):.2f} x {key[5:]}" for key in OVER if getattr(self, key) is not None]
        said = [done, *beside, *([self.note] if self.note else [])]
        return f"{name}: {self.us:.1f} us ({self.us_min:.1f}-{self.us_max:.1f}), {', '.join(said)}"


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold on the device."""

    name: str
    passed: bool
    said: str = ""

    def line(self) -> str:
        said = f": {self.said}" if self.said else ""
        return f"check, {self.name}: {'passed' if self.passed else 'FAILED'}{said}"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached in a large BF16 matmul and in a large copy, bytes read and bytes written both counted.

    when   "before" or "after" the rows of a stage
    """

    when: str
    tflop_s: float
    gb_s: float

    def line(self) -> str:
        return f"ceilings {self.when} the rows: {self.tflop_s:.1f} TFLOP/s, {self.gb_s:.0f} GB/s"

    @classmethod
    def mean(cls, found: Sequence[Ceilings]) -> Ceilings | None:
        """Of those before and after the rows, or of the ones there are. None of none."""
        if not found:
            return None
        return cls(
            "mean", sum(each.tflop_s for each in found) / len(found), sum(each.gb_s for each in found) / len(found)
        )


@dataclass(frozen=True, slots=True)
class Fact:
    """Anything else that is worth keeping, by name: text, a number, or a list or mapping of such."""

    name: str
    value: Any

    def line(self) -> str:
        text = self.value if isinstance(self.value, str) else json.dumps(self.value)
        return f"{self.name}: {text[:300]}"


@dataclass(frozen=True, slots=True)
class Table:
    """A file of tiles for megamoe/kernels/chips/tables: its name there and its text."""

    name: str
    text: str

    def line(self) -> str:
        return f"table of tiles: {self.name}"


Finding: TypeAlias = Row | Check | Ceilings | Fact | Table
_KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in (Row, Check, Ceilings, Fact, Table)}
_TYPES = {kind: get_type_hints(kind) for kind in _KINDS.values()}


def as_line(finding: Finding) -> str:
    """One line of JSON.    Check("a", True) -> {"check": {"name": "a", "passed": true, "said": ""}}"""
    return json.dumps({type(finding).__name__.lower(): asdict(finding)}, allow_nan=False)


def from_line(line: str) -> Finding:
    """What as_line() wrote. ValueError for anything else: other fields, other types, a number that is not finite."""
    data = json.loads(line, parse_constant=_refuse)
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("a finding is an object with one key")
    ((name, values),) = data.items()
    if name not in _KINDS or not isinstance(values, dict):
        raise ValueError(f"no finding is called {name!r}")
    finding: Finding = from_dict(_KINDS[name], values)
    return finding


def from_dict(kind: type[Any], values: dict[str, Any]) -> Any:
    """A finding of a kind from what asdict() gave. ValueError where fields or their types are others."""
    known, types = {field.name for field in fields(kind)}, _TYPES[kind]
    if set(values) != known:
        raise ValueError(f"a {kind.__name__} has the fields {', '.join(sorted(known))}, got {', '.join(values)}")
    for name, value in values.items():
        if not _fits(value, types[name]):
            raise ValueError(f"{kind.__name__}.{name} cannot be {value!r}"[:200])
    return kind(**values)


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is Any:
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    kinds = getattr(wanted, "__args__", (wanted,))
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of a finding")


@dataclass(frozen=True, slots=True)
class Work:
    """What one launch does: multiplications and additions, bytes of memory that it must touch."""

    flops: int
    num_bytes: int


def compared(row: Row, rows: Sequence[Row]) -> Row:
    """A row of MXFP4 with how many times as fast it is as each of the others of its part; other rows as they are."""
    what, _, how = row.what.partition(" ")
    others = {other.what: other.us for other in rows}
    if what != "mxfp4" or row.us is None:
        return row
    us = {key: others.get(f"{key[5:]} {how}".strip()) for key in OVER}
    ratios: dict[str, Any] = {key: each / row.us for key, each in us.items() if each is not None}
    return replace(row, **ratios)
