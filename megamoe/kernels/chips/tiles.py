"""Tiles of the grouped products: which sizes for which chip and how many rows, and which tile belongs to which rows.

A tile is `rows` rows of one expert by `columns` rows of its weight, summed over K in steps of `depth`. The weight is
the left operand of the matrix instruction, x the right one, and the result is turned around at the end: matrix units
take 64 or 128 on the left and 8 or more on the right, so a few rows fill them, and all tiles of a chip sum over K by
instructions of one kind. With one `depth` for each chip that keeps a row's bits the same in any company.
"""

# e experts of this rank   R rows, sorted by expert   N rows of a weight

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of one program's tile, and how it is compiled.

    rows, columns, depth    powers of two; columns a multiple of 64 (32 gates and 32 ups), depth of 32
    num_warps, num_stages   of Triton: warps of a program, steps of K in flight
    programs                how many of them a multiprocessor has at once
    options                 of the chip's compiler, as (name, value)
    """

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 1
    programs: int = 1
    options: tuple[tuple[str, Any], ...] = field(default=())

    def __post_init__(self) -> None:
        for name, multiple in (("rows", 1), ("columns", 64), ("depth", 32)):
            size = getattr(self, name)
            if size < 1 or size & (size - 1) or size % multiple:
                raise ValueError(f"tile {name} must be a power of two and a multiple of {multiple}, got {size}")

    @property
    def label(self) -> str:
        """16x128x128"""
        return f"{self.rows}x{self.columns}x{self.depth}"

    @property
    def launch(self) -> dict[str, Any]:
        """What a launch of a kernel needs to know beside its arguments."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **dict(self.options),
        }


# What multiplies, by the chip's name and the kind of product. The first two fields of v_mfma are what it gives.
INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "cuda:90": dict.fromkeys(("wide", "bf16"), "k16.f32.bf16.bf16"),
    "cuda:100": {
        "mxfp4": "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale",
        "bf16": "tcgen05.mma.cta_group::1.kind::f16",
    },
    "hip:gfx950": {"mxfp4": "v_mfma_scale_f32_16x16x128_f8f6f4", "bf16": "v_mfma_f32_16x16x32_bf16"},
}

# one shape of instruction for all tiles: else MFMA would sum 128 of K at once in small tiles and 64 in large ones
_MFMA = (("matrix_instr_nonkdim", 16),)

# kind of product -> up to so many rows an expert on average, and the tile; the last one has no bound. The kinds are the
# formats of the weights, but for MXFP4 weights that are multiplied by widened rows (`layout.Wide`): "wide"
Table: TypeAlias = Mapping[str, tuple[tuple[int | None, Tile], ...]]

# for prepacked weights with larger scales than any checkpoint is known to have, whatever the rows
LARGE_SCALES = Tile(64, 128, 128, num_warps=4, num_stages=3, programs=2)

# by chip; `tuned` has those that were found on a device
TABLES: Mapping[str, Table] = {
    "cuda:90": {
        "wide": (
            (16, Tile(16, 128, 128, num_warps=4, num_stages=4, programs=3)),
            (64, Tile(64, 128, 128, num_warps=4, num_stages=3, programs=2)),
            (128, Tile(128, 128, 128, num_warps=8, num_stages=3)),
            (None, Tile(256, 128, 128, num_warps=8, num_stages=3)),
        ),
        "bf16": (
            (16, Tile(16, 128, 64, num_warps=4, num_stages=5, programs=2)),
            (64, Tile(64, 128, 64, num_warps=4, num_stages=4, programs=2)),
            (None, Tile(128, 128, 64, num_warps=8, num_stages=4)),
        ),
    },
    "cuda:100": {
        "mxfp4": (
            (16, Tile(16, 128, 128, num_warps=4, num_stages=4, programs=2)),
            (64, Tile(64, 128, 128, num_warps=4, num_stages=3, programs=2)),
            (None, Tile(128, 128, 128, num_warps=4, num_stages=3)),
        ),
        "bf16": (
            (16, Tile(16, 128, 64, num_warps=4, num_stages=5, programs=2)),
            (64, Tile(64, 128, 64, num_warps=4, num_stages=4, programs=2)),
            (None, Tile(128, 128, 64, num_warps=4, num_stages=4)),
        ),
    },
    "hip:gfx950": {
        "mxfp4": (
            (16, Tile(16, 128, 128, num_warps=4, num_stages=2, programs=2, options=_MFMA)),
            (64, Tile(64, 128, 128, num_warps=4, num_stages=2, programs=2, options=_MFMA)),
            (None, Tile(128, 128, 128, num_warps=8, num_stages=2, options=_MFMA)),
        ),
        "bf16": (
            (16, Tile(16, 128, 64, num_warps=4, num_stages=2, programs=2, options=_MFMA)),
            (64, Tile(64, 128, 64, num_warps=4, num_stages=2, programs=2, options=_MFMA)),
            (None, Tile(128, 128, 64, num_warps=8, num_stages=2, options=_MFMA)),
        ),
    },
    # Triton's interpreter knows all kinds
    "cpu": dict.fromkeys(("mxfp4", "wide", "bf16"), ((None, Tile(16, 128, 128)),)),
}


def check_table(table: Table) -> None:
    """ValueError where a table lacks a format, its bounds do not rise to none, or its tiles sum in several orders.

    All tiles of a kind share depth and options: that keeps a row's bits the same in any company.
    """
    for kind in dict.fromkeys(("bf16", "wide" if "wide" in table else "mxfp4", *table)):
        bounds = [bound for bound, _ in table.get(kind, ())]
        if not bounds:
            raise ValueError(f"the table has no tiles for {kind}")
        if bounds[-1] is not None or bounds[:-1] != sorted({bound for bound in bounds if bound is not None}):
            raise ValueError(f"bounds of {kind} must rise and end with none, got {bounds}")
        orders = {(tile.depth, tile.options) for _, tile in table[kind]}
        if len(orders) > 1:
            raise ValueError(f"tiles of {kind} must share depth and options, got {len(orders)} kinds")


def tile_for(table: Table, kind: str, num_rows: int, num_experts: int) -> Tile:
    """The tile for num_rows rows over num_experts experts, were they spread evenly.

    The rows of each expert are known on the device alone; any tile is right for any spread.
        cuda:90, wide, 512 rows, 32 experts  ->  16 rows each: 16x128x128
    """
    rows = -(-num_rows // max(num_experts, 1))
    return next(tile for bound, tile in table[kind] if bound is None or rows <= bound)


def num_programs(device: torch.device, tile: Tile) -> int:
    """Programs of a persistent grid: as many as the device runs at once. Three in Triton's interpreter."""
    if device.type == "cpu":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * tile.programs


@triton.jit
def lay_out(tokens_per_expert, num_experts, COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Rows of each expert, where they end, and where its tiles end: three vectors of EXPERTS int32.

    An expert has COLUMN_TILES tiles for each ROWS of its rows, and an expert without rows has none.
        rows [5, 0, 2], ROWS 4, COLUMN_TILES 3  ->  [5, 0, 2], rows end at [5, 5, 7], tiles at [6, 6, 9]
    """
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(tokens_per_expert + experts, mask=experts < num_experts, other=0)
    return counts, tl.cumsum(counts, 0), tl.cumsum((counts + ROWS - 1) // ROWS * COLUMN_TILES, 0)


@triton.jit
def find(tile, counts, row_ends, tile_ends, COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Whose tile it is: expert, its first row, number of its rows, its column tile.

    Neighbours in time share a piece of the weight, which comes from memory once: row tiles change first.
        as in lay_out(): tile 0 has expert 0, rows 0 to 3, columns 0; tile 1 rows 4 to 4, columns 0; tile 2 rows 0 to 3,
        columns 1; tile 7 expert 2, rows 5 to 6, columns 1
    """
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    here = tl.arange(0, EXPERTS) == expert
    count = tl.sum(tl.where(here, counts, 0), 0)
    row_end = tl.sum(tl.where(here, row_ends, 0), 0)
    tile_end = tl.sum(tl.where(here, tile_ends, 0), 0)
    row_tiles = (count + ROWS - 1) // ROWS
    number = tile - (tile_end - row_tiles * COLUMN_TILES)
    skipped = number % row_tiles * ROWS
    return expert, row_end - count + skipped, tl.minimum(count - skipped, ROWS), number // row_tiles
