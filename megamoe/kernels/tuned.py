"""Which table of tiles a device has: one found on it by `python -m benchmarks.gpu_kernels --tune`, else its chip's.

A table that was found is a file of `tables/`, called after its device. The device's name alone decides.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from megamoe.kernels.targets import chip_of
from megamoe.kernels.tiles import TABLES, Table, Tile, check_table

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


_FORMAT = TypeAdapter(Tuned)


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
    path.write_bytes(_FORMAT.dump_json(tuned, indent=1) + b"\n")
    return path


def read_tuned(path: Path) -> Tuned:
    """ValueError that names the file, where it is not what write_tuned() wrote or breaks what a table must keep."""
    try:
        text = path.read_bytes()
        tuned = _FORMAT.validate_json(text)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False)[0]
        place, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {place + ': ' if place else ''}{said}") from None
    if json.loads(_FORMAT.dump_json(tuned)) != json.loads(text):
        raise ValueError(f"{path}: has other fields than those of a table")
    if file_name(tuned.device) != path.name:
        raise ValueError(f"{path}: is of {tuned.device}, whose file is called {file_name(tuned.device)}")
    return tuned


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
