"""Which table of tiles a device has: one that `python -m benchmarks.gpu_kernels` found on it, else its chip's.

A table that was found is a file of `tables/`, called after its device. The device's name alone decides. Files are read
without pydantic, as all that a GPU runs imports torch and Triton alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megamoe.kernels.chips.targets import chip_of
from megamoe.kernels.chips.tiles import TABLES, Table, Tile, check_table

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True, slots=True)
class Tuned:
    """A table that was found on a device.

    device, chip          as torch and as this package call them: "NVIDIA H100 80GB HBM3", "cuda:90"
    date, torch, triton   when, and with which versions
    table                 as tiles.TABLES has them

    ValueError for a table of which not all tiles of a format sum alike.
    """

    device: str
    chip: str
    date: str
    torch: str
    triton: str
    table: dict[str, tuple[tuple[int | None, Tile], ...]]

    def __post_init__(self) -> None:
        check_table(self.table)


def device_name(device: torch.device) -> str:
    """As torch calls it: NVIDIA H100 80GB HBM3; "cpu" """
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def file_name(name: str) -> str:
    """NVIDIA H100 80GB HBM3  ->  NVIDIA_H100_80GB_HBM3.json"""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".json"


def write_tuned(tuned: Tuned, folder: Path) -> Path:
    """Writes the file of its device, in place of what is there -> the file"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(tuned.device)
    path.write_text(json.dumps(asdict(tuned), indent=1) + "\n", encoding="utf-8")
    return path


def read_tuned(path: Path) -> Tuned:
    """ValueError that names the file, where it is not what write_tuned() wrote or breaks what a table must keep."""
    try:
        tuned = _tuned_of(json.loads(path.read_bytes()))
    except json.JSONDecodeError as wrong:
        raise ValueError(f"{path}: invalid JSON: {wrong}") from None
    except ValueError as wrong:
        raise ValueError(f"{path}: {wrong}") from None
    if file_name(tuned.device) != path.name:
        raise ValueError(f"{path}: is of {tuned.device}, whose file is called {file_name(tuned.device)}")
    return tuned


def _tuned_of(found: Any) -> Tuned:
    """ValueError for what is not a table as JSON."""
    _check_fields(found, Tuned, "the file")
    texts = {name: _of_type(found[name], str, name) for name in ("device", "chip", "date", "torch", "triton")}
    table = _of_type(found["table"], dict, "table")
    return Tuned(**texts, table={kind: _steps(steps, f"table.{kind}") for kind, steps in table.items()})


def _steps(found: Any, place: str) -> tuple[tuple[int | None, Tile], ...]:
    steps = []
    for number, step in enumerate(_of_type(found, list, place)):
        here = f"{place}.{number}"
        if len(_of_type(step, list, here)) != 2:
            raise ValueError(f"{here}: must be a bound and a tile")
        bound = None if step[0] is None else _of_type(step[0], int, f"{here}.bound")
        steps.append((bound, _tile(step[1], f"{here}.tile")))
    return tuple(steps)


def _tile(found: Any, place: str) -> Tile:
    _check_fields(found, Tile, place)
    sizes = {name: _of_type(value, int, f"{place}.{name}") for name, value in found.items() if name != "options"}
    options = _of_type(found["options"], list, f"{place}.options")
    pairs = [_of_type(each, list, f"{place}.options") for each in options]
    return Tile(**sizes, options=tuple((str(name), value) for name, value in pairs))


def _check_fields(found: Any, kind: type[Tuned] | type[Tile], place: str) -> None:
    wanted = [each.name for each in fields(kind)]
    if list(_of_type(found, dict, place)) != wanted:
        raise ValueError(f"{place}: must have the fields {', '.join(wanted)}, has {', '.join(map(str, found))}")


def _of_type(value: Any, kind: type[Any], place: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: must be {_NAMES[kind]}, got {value!r:.60}")
    return value


_NAMES: Mapping[type[Any], str] = {str: "text", int: "a whole number", dict: "an object", list: "a list"}


@lru_cache(maxsize=16)
def table_of(device: torch.device) -> Table:
    """The table of tiles of a device. ValueError where neither it nor its chip has one, or its file is not right."""
    name, chip = device_name(device), chip_of(device)
    path = FOLDER / file_name(name)
    if not path.is_file():
        if chip not in TABLES:
            raise ValueError(f"no tiles for {name}, whose chip is {chip}; there are some for {', '.join(TABLES)}")
        return TABLES[chip]
    tuned = read_tuned(path)
    if tuned.chip != chip:
        raise ValueError(f"{path}: is of the chip {tuned.chip}, and {name} is {chip}")
    lacking = [kind for kind in TABLES.get(chip, ()) if kind not in tuned.table]
    if lacking:
        raise ValueError(f"{path}: has no tiles for {', '.join(lacking)}")
    return tuned.table


def tiles_of(chip: str, kind: str) -> dict[str, Tile]:
    """Every tile that some device of a chip may be given for a kind of product, by a label; each is compiled once.

    16x128x128, and of a table that was found 32x128x128 8 warps 3 stages NVIDIA H100 80GB HBM3
    """
    found = {tile.label: tile for _, tile in TABLES[chip].get(kind, ())}
    compiled = {replace(tile, programs=1) for tile in found.values()}
    for tuned in map(read_tuned, sorted(FOLDER.glob("*.json"))):
        for _, tile in tuned.table.get(kind, ()) if tuned.chip == chip else ():
            if replace(tile, programs=1) not in compiled:
                compiled.add(replace(tile, programs=1))
                found[f"{tile.label} {tile.num_warps} warps {tile.num_stages} stages {tuned.device}"] = tile
    return found
