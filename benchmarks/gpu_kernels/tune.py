"""Finds the tiles of a device: the order of the sum first, for all numbers of rows, then a tile for each of them.

The order is the depth, by the time of both products over all numbers of rows. Then one field of a tile is changed at a
time for as long as that helps. A tile that does not compile, does not fit, or gives other bits than the first tile of
its order is passed over, and so is an order whose tiles differ.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu_kernels.clock import Clock, Run, first_line
from benchmarks.gpu_kernels.operands import FORMATS, Products, Rows, Shape, Weights, kind_of
from megamoe.kernels.chips.targets import chip_of
from megamoe.kernels.chips.tiles import Table, Tile, tile_for
from megamoe.kernels.chips.tuned import Tuned, device_name, table_of, write_tuned

Steps = tuple[tuple[int | None, Tile], ...]

# up to so many rows an expert: measured with so many
BOUNDS: tuple[tuple[int | None, int], ...] = ((16, 8), (64, 64), (128, 128), (None, 1024))
DEPTHS = (64, 128, 256)
# what a field is changed to, in this order
STEPS: dict[str, tuple[int, ...]] = {
    "rows": (16, 32, 64, 128, 256),
    "columns": (64, 128, 256),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5, 6),
    "programs": (1, 2, 3, 4),
}
_LARGEST = 128 * 256  # results of a tile: more do not fit in registers, and take minutes to compile
_BETTER = 0.99  # of the time, or it is noise


@dataclass(slots=True)
class Search:
    """What is tried on: both products of every shape for one kind and number of rows.

    begin   the tile that the device has for them
    bits    what comes out, by order of the sum
    """

    clock: Clock
    kind: str
    bound: int | None
    products: list[Products]
    begin: Tile
    bits: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    tried: dict[Tile, float | None] = field(default_factory=dict)

    def us(self, tile: Tile) -> float | None:
        """Microseconds of both products of all shapes, None where the tile is passed over. Said once for each tile."""
        if tile not in self.tried:
            found = self._try(tile)
            self.tried[tile] = None if isinstance(found, str) else found
            print(f"  {as_text(tile)}: {found if isinstance(found, str) else f'{found:.1f} us'}", flush=True)
        return self.tried[tile]

    def _try(self, tile: Tile) -> float | str:
        try:
            if not self.same_bits(tile):
                return "passed over: other bits"
        except Exception as error:  # noqa: BLE001  of whatever kind the compiler or the launch raises
            return f"passed over: {first_line(error)}"
        runs: dict[str, Run] = {str(place): with_tile(each, tile) for place, each in enumerate(self.products)}
        times = self.clock.compare(runs)
        problems = [found for found in times.values() if isinstance(found, str)]
        return (
            f"passed over: {problems[0]}"
            if problems
            else sum(found.us for found in times.values() if not isinstance(found, str))
        )

    def same_bits(self, tile: Tile) -> bool:
        """Whether out is what the first tile of this order gave; an error in hidden shows in it."""
        found = []
        for each in self.products:
            each.poison()
            each.both(tile=tile)
            found.append(each.out.view(torch.int16).clone())
        wanted = self.bits.setdefault(order_of(tile), found)
        return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def with_tile(products: Products, tile: Tile) -> Run:
    return lambda turn: products.both(turn, tile)


def order_of(tile: Tile) -> tuple[Any, ...]:
    return tile.depth, tile.options


def as_text(tile: Tile) -> str:
    """16x128x128, 4 warps, 4 stages, 2 programs"""
    return f"{tile.label}, {tile.num_warps} warps, {tile.num_stages} stages, {tile.programs} programs"


def tune(clock: Clock, shapes: Sequence[Shape], until: float, folder: Path) -> int:
    """Writes the table found by then, and prints every tile before and after. Exit code 0."""
    before = table_of(clock.device)
    after: dict[str, Steps] = dict(before)
    begun = time.monotonic()
    for place, weight_format in enumerate(FORMATS):
        searches = searches_of(clock, shapes, weight_format, before)
        found = found_tiles(searches, begun + (until - begun) * (place + 1) / len(FORMATS))
        after[searches[0].kind] = tuple((search.bound, tile) for search, tile in zip(searches, found, strict=True))
        for search, tile in zip(searches, found, strict=True):
            print(f"{search.kind}, up to {search.bound or 'any'} rows: {_change(search, tile)}", flush=True)
    name, chip, today = device_name(clock.device), chip_of(clock.device), datetime.date.today().isoformat()
    path = write_tuned(Tuned(name, chip, today, torch.__version__, triton.__version__, after), folder)
    print(f"wrote {path}", flush=True)
    return 0


def searches_of(clock: Clock, shapes: Sequence[Shape], weight_format: str, before: Table) -> list[Search]:
    """One for each of BOUNDS, on the same weights, of the kind that the layer runs."""
    kind, device = kind_of(weight_format, clock.device), clock.device
    weights = [Weights.made(shape, weight_format, clock) for shape in shapes]
    return [
        Search(
            clock,
            kind,
            bound,
            [
                Products.made(Rows.made(shape, rows, device), each, shape.sizes.swiglu_limit, kind)
                for shape, each in zip(shapes, weights, strict=True)
            ],
            tile_for(before, kind, rows, 1),
        )
        for bound, rows in BOUNDS
    ]


def found_tiles(searches: Sequence[Search], ends: float) -> list[Tile]:
    """A tile for each search, all of one order; where the time was over before a better one, that of before."""
    tiles = []
    for place, (search, tile) in enumerate(zip(searches, best_order(searches, ends), strict=True)):
        now = time.monotonic()
        tiles.append(descend(search, tile, now + (ends - now) / (len(searches) - place)))
    return tiles


def best_order(searches: Sequence[Search], ends: float) -> list[Tile]:
    """Every search's tile with the depth that takes least time over all of them."""
    begins = [search.begin for search in searches]
    totals: list[tuple[float, list[Tile]]] = []
    for tiles in orders(begins):
        if totals and time.monotonic() > ends:
            break
        times = [search.us(tile) for search, tile in zip(searches, tiles, strict=True)]
        found = [each for each in times if each is not None]
        if len(found) == len(times) and one_order(searches, tiles):
            totals.append((sum(found) * (_BETTER if tiles == begins else 1), tiles))
    return min(totals, key=lambda each: each[0])[1] if totals else begins


def one_order(searches: Sequence[Search], tiles: Sequence[Tile]) -> bool:
    """Whether all tiles give the same bits, tried on the most rows."""
    return all(searches[-1].same_bits(tile) for tile in tiles)


def orders(begins: list[Tile]) -> Iterator[list[Tile]]:
    """begins, then with every other depth."""
    yield begins
    for depth in DEPTHS:
        other = [replace(tile, depth=depth) for tile in begins]
        if other != begins:
            yield other


def descend(search: Search, tile: Tile, ends: float) -> Tile:
    """Changes one field at a time while that helps and there is time. A tile that does not run is worse than all."""
    best, us, improved = tile, search.us(tile) or math.inf, True
    while improved:
        improved = False
        for name, values in STEPS.items():
            for value in values:
                if time.monotonic() > ends:
                    return best
                change: dict[str, Any] = {name: value}
                other = replace(best, **change)
                found = search.us(other) if other.rows * other.columns <= _LARGEST else None
                if found is not None and found < _BETTER * us:
                    best, us, improved = other, found, True
    return best


def _change(search: Search, new: Tile) -> str:
    """Before and after, both timed once more, in turns."""
    old = search.begin
    if old == new:
        return f"{as_text(old)} stays"
    sums = dict.fromkeys((old, new), 0.0)
    for products in search.products:
        times = search.clock.compare({"old": with_tile(products, old), "new": with_tile(products, new)})
        for tile, found in zip((old, new), (times["old"], times["new"]), strict=True):
            sums[tile] += math.nan if isinstance(found, str) else found.us
    return f"{as_text(old)}, {sums[old]:.1f} us  ->  {as_text(new)}, {sums[new]:.1f} us"
