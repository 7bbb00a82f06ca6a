"""One rank's part of published layers, as plain numbers: a lent machine has nothing that reads the catalog."""

# R rows, sorted by expert   H hidden   I intermediate

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.shape import MoEShape

_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Shape:
    """Its sizes, with num_experts the experts of this rank."""

    name: str
    sizes: MoEShape

    def row_bytes(self) -> int:
        """Bytes that a row takes in all buffers of a measurement, generously."""
        return 16 * self.sizes.hidden + 24 * self.sizes.intermediate

    def fitting(self, rows_per_expert: int, free_bytes: int) -> Shape:
        """This shape with as many experts as have room for their rows, top-k at least."""
        room = int(free_bytes * _MEMORY_SHARE) // (rows_per_expert * self.row_bytes())
        experts = min(self.sizes.num_experts, max(self.sizes.topk, room))
        return replace(self, sizes=replace(self.sizes, num_experts=experts))


# name -> the catalog's name, and the number of ranks over which a usual deployment shares the experts out
SOURCES = {
    "V4-Pro": ("deepseek-v4-pro", 16),
    "V4-Flash": ("deepseek-v4-flash", 8),
    "Qwen3-235B": ("qwen3-235b-a22b", 8),
}
SHAPES = {
    "V4-Pro": Shape("V4-Pro", MoEShape(7168, 3072, 384 // 16, 6, 10.0)),
    "V4-Flash": Shape("V4-Flash", MoEShape(4096, 2048, 256 // 8, 6, 10.0)),
    "Qwen3-235B": Shape("Qwen3-235B", MoEShape(4096, 1536, 128 // 8, 8, None)),
}
TINY = MoEShape(hidden=64, intermediate=32, num_experts=2, topk=2, swiglu_limit=10.0)


def shape_of(name: str, *, rehearsal: bool) -> Shape:
    """The shape of that name; in a rehearsal a tiny one that is called the same."""
    shape = SHAPES[name]
    return (
        replace(shape, sizes=replace(TINY, activation=shape.sizes.activation, swiglu_limit=None))
        if rehearsal
        else shape
    )


def rows_of(rows: tuple[int, ...], *, rehearsal: bool) -> tuple[int, ...]:
    """Rows an expert; in a rehearsal the first number alone, and that small.    (512, 2048) -> (5,)"""
    return (min(rows[0], 5),) if rehearsal else rows
