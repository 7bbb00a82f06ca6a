"""Tries a list of tiles for decode and for prefill on one shape, and makes a table of the best.

All of them sum in the order of the device's own tiles: a table has one order for all rows of a kind. A tile that does
not compile, does not fit, or gives other bits than the device's own is passed over.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu_kernels.findings import Check, Fact, Finding, Table
from benchmarks.gpu_kernels.measure.clock import Clock
from benchmarks.gpu_kernels.measure.operands import Products, Rows, Weights, kind_of
from benchmarks.gpu_kernels.measure.shapes import Shape
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import first_line
from benchmarks.gpu_kernels.stages.task import clock_for, shape_for
from megamoe.kernels.chips.targets import chip_of
from megamoe.kernels.chips.tiles import Table as Tiles
from megamoe.kernels.chips.tiles import Tile, tile_for
from megamoe.kernels.chips.tuned import Tuned, device_name, file_name, table_of, write_tuned

DECODE_ROWS, PREFILL_ROWS = 8, 1024
_FEW = 16  # rows an expert, up to which the tile for decode is taken
_BETTER = 0.99  # of the time, or it is noise
# Rows, columns, depth, warps, stages, programs: as many programs as registers leave room for, and none that spills more
# than a few hundred bytes for SM90. The device's own is among them: its ratio is the noise.
_CANDIDATES: Mapping[int, tuple[Tile, ...]] = {
    DECODE_ROWS: (
        Tile(16, 128, 128, 4, 4, 3),
        Tile(16, 128, 128, 4, 4, 2),
        Tile(16, 128, 128, 4, 5, 3),
        Tile(16, 128, 128, 4, 6, 2),
        Tile(16, 64, 128, 4, 5, 4),
        Tile(16, 128, 128, 8, 4, 2),
        Tile(16, 256, 128, 8, 4, 1),
        Tile(16, 256, 128, 8, 5, 1),
        Tile(16, 256, 128, 4, 4, 2),
        Tile(32, 128, 128, 4, 4, 2),
    ),
    PREFILL_ROWS: (
        Tile(256, 128, 128, 8, 3, 1),
        Tile(256, 128, 128, 8, 2, 1),
        Tile(128, 256, 128, 8, 3, 1),
        Tile(128, 256, 128, 8, 4, 1),
        Tile(128, 128, 128, 8, 3, 1),
        Tile(128, 128, 128, 8, 4, 1),
        Tile(256, 64, 128, 8, 4, 1),
        Tile(64, 256, 128, 8, 3, 1),
    ),
}


def candidates() -> Mapping[int, tuple[Tile, ...]]:
    """By rows an expert: which tiles are tried."""
    return _CANDIDATES


def as_text(tile: Tile) -> str:
    """16x128x128, 4 warps, 4 stages, 2 programs"""
    return f"{tile.label}, {tile.num_warps} warps, {tile.num_stages} stages, {tile.programs} programs"


@dataclass(slots=True)
class Trial:
    """Tiles on one number of rows.

    own       the tile that the device has for them
    wanted    bits of both products by the device's tile for the fewest rows: the same for all rows of a kind
    """

    clock: Clock
    products: Products
    own: Tile
    wanted: list[Tensor]

    @classmethod
    def made(cls, clock: Clock, shape: Shape, weights: Weights, rows_per_expert: int, table: Tiles) -> Trial:
        kind, rows = kind_of("mxfp4", clock.device), Rows.made(shape, rows_per_expert, clock.device)
        products = Products.made(rows, weights, shape.sizes.swiglu_limit, kind)
        own, fewest = tile_for(table, kind, rows_per_expert, 1), tile_for(table, kind, 1, 1)
        return cls(clock, products, own, bits_of(products, fewest))

    def run(self, tile: Tile) -> dict[str, Any]:
        """Microseconds of each product by the tile and by the device's own, in turns; or why it is passed over."""
        if (tile.depth, tile.options) != (self.own.depth, self.own.options):
            return {"problem": "sums in another order than the device's own"}
        try:
            same = all(map(torch.equal, bits_of(self.products, tile), self.wanted))
        except Exception as error:  # noqa: BLE001  of whatever kind the compiler or the launch raises
            return {"problem": first_line(error)}
        if not same:
            return {"problem": "other bits"}
        runs = {
            f"{who} {name}": lambda turn, each=each, run=run: run(turn, each)
            for who, each in (("own", self.own), ("new", tile))
            for name, run in (("linear1", self.products.linear1), ("linear2", self.products.linear2))
        }
        times = self.clock.compare(runs)
        problems = [each for each in times.values() if isinstance(each, str)]
        if problems:
            return {"problem": problems[0]}
        return {name: each.us for name, each in times.items() if not isinstance(each, str)}


def bits_of(products: Products, tile: Tile) -> list[Tensor]:
    """What both products write with a tile, where everything was NaN before; an error in hidden shows in out."""
    products.poison()
    products.both(tile=tile)
    return [products.out.view(torch.int16).clone()]


def ratio(found: Mapping[str, Any]) -> float | None:
    """Time of both products by the tile, over the device's own. None where it was passed over."""
    if "problem" in found:
        return None
    return float((found["new linear1"] + found["new linear2"]) / (found["own linear1"] + found["own linear2"]))


def tune(task: Task) -> Iterator[Finding]:
    """A fact of all tiles so far after each, and a table whenever one is better than all before it."""
    clock, shape = clock_for(task), shape_for(task, task.arguments["shape"])
    device = clock.device
    table, kind = table_of(device), kind_of("mxfp4", device)
    weights = Weights.made(shape, kind, clock)
    refused = not_compiled(task)
    best: dict[int, tuple[float, Tile]] = {}
    found: list[dict[str, Any]] = []
    for rows, tiles in tiles_on_trial(task).items():
        trial = Trial.made(clock, shape, weights, min(rows, 5) if task.rehearsal else rows, table)
        yield Check(
            f"tiles: {rows} rows, the device's own has the bits of that for the fewest rows",
            torch.equal(bits_of(trial.products, trial.own)[0], trial.wanted[0]),
        )
        best[rows] = (_BETTER, trial.own)
        for tile in tiles:
            problem = refused.get(tile)
            result = {"problem": problem} if problem else trial.run(tile)
            found.append({"rows": rows, "tile": as_text(tile), "of the own": ratio(result), **result})
            yield Fact("tiles", list(found))
            now = ratio(result)
            if now is not None and now < best[rows][0]:
                best[rows] = (now, tile)
                changed = with_tiles(table, kind, {rows: tile for rows, (_, tile) in best.items()})
                yield as_file(device, changed)
    yield Fact("best tiles", {str(rows): as_text(tile) for rows, (_, tile) in best.items()})


def tiles_on_trial(task: Task) -> Mapping[int, tuple[Tile, ...]]:
    """In a rehearsal three of those for the fewest rows: the interpreter's time goes with a tile's size."""
    if not task.rehearsal:
        return candidates()
    decode = candidates()[DECODE_ROWS]
    return {DECODE_ROWS: decode[:1], PREFILL_ROWS: decode[-1:]}


def not_compiled(task: Task) -> dict[Tile, str]:
    """Tiles that did not compile in their time: they are not tried again."""
    compiled = task.earlier.get("compile", {}).get("facts", {}).get("compiled", {})
    problems = {}
    for tile in (tile for tiles in candidates().values() for tile in tiles):
        said = next((each for label, each in compiled.items() if label.endswith(_compiled_as(tile))), None)
        if isinstance(said, str) and said != "no time":
            problems[tile] = said
    return problems


def _compiled_as(tile: Tile) -> str:
    return f"{tile.label} {tile.num_warps} warps {tile.num_stages} stages"


def with_tiles(table: Tiles, kind: str, best: Mapping[int, Tile]) -> dict[str, Any]:
    """The table with another tile for few rows, and for as many as come."""
    steps = list(table[kind])
    if len(steps) == 1:
        steps = [(_FEW, steps[0][1]), *steps]
    if DECODE_ROWS in best:
        steps[0] = (steps[0][0], best[DECODE_ROWS])
    if PREFILL_ROWS in best:
        steps[-1] = (None, best[PREFILL_ROWS])
    return {**table, kind: tuple(steps)}


def as_file(device: torch.device, table: Mapping[str, Any]) -> Table:
    """As megamoe/kernels/chips/tables has it."""
    name, today = device_name(device), datetime.date.today().isoformat()
    tuned = Tuned(name, chip_of(device), today, torch.__version__, triton.__version__, dict(table))
    with tempfile.TemporaryDirectory() as folder:
        return Table(file_name(name), write_tuned(tuned, Path(folder)).read_text())
