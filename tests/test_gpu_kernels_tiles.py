"""Tiles that are found on a device: files that are read or refused, who takes them, and how the best are found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interpreter import interpreted

pytest.importorskip("triton")

from benchmarks.gpu_kernels.findings import Check, Fact, Table
from benchmarks.gpu_kernels.measure import operands
from benchmarks.gpu_kernels.measure.clock import Times
from benchmarks.gpu_kernels.measure.shapes import SHAPES
from benchmarks.gpu_kernels.plan import PLAN, Task
from benchmarks.gpu_kernels.stages import tiles
from benchmarks.gpu_kernels.stages.compiling import jobs_for
from benchmarks.gpu_kernels.stages.tiles import (
    DECODE_ROWS,
    PREFILL_ROWS,
    Trial,
    candidates,
    not_compiled,
    ratio,
    with_tiles,
)
from megamoe.kernels import load
from megamoe.kernels.ahead import Compiled, compile_build
from megamoe.kernels.chips import tuned
from megamoe.kernels.chips.targets import target
from megamoe.kernels.chips.tiles import TABLES, Tile, check_table
from megamoe.kernels.chips.tuned import Tuned, read_tuned, table_of, tiles_of, write_tuned
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear2 import grouped_linear2

CPU = torch.device("cpu")

# ---- tables that were found ----

H100 = "NVIDIA H100 80GB HBM3"
FOUND = Tuned(H100, "cuda:90", "2026-01-02", "2.13", "3.9", dict(TABLES["cuda:90"]))


def with_first(table: Any, weight_format: str, **fields: Any) -> dict[str, Any]:
    """The table with another tile for the fewest rows of a format."""
    (bound, tile), *others = table[weight_format]
    return {**table, weight_format: ((bound, replace(tile, **fields)), *others)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where tables are looked for."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    table_of.cache_clear()
    yield tmp_path
    table_of.cache_clear()


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_tuned(FOUND, tmp_path)
    assert path.name == "NVIDIA_H100_80GB_HBM3.json"
    assert read_tuned(path) == FOUND
    amd = replace(FOUND, device="AMD Instinct MI355X", chip="hip:gfx950", table=dict(TABLES["hip:gfx950"]))
    assert read_tuned(write_tuned(amd, tmp_path)) == amd


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"depth": 128', '"depth": 64', "tiles of wide must share depth and options, got 2 kinds"),
        ("   [\n    64,", "   [\n    16,", r"bounds of wide must rise and end with none, got \[16, 16, 128, None\]"),
        ("    null,", "    99,", r"bounds of wide must rise and end with none, got \[16, 64, 128, 99\]"),
        ('"bf16":', '"fp16":', "the table has no tiles for bf16"),
        ('"rows": 16', '"rows": 15', "tile rows must be a power of two"),
        (
            '"num_stages": 4',
            '"num_stages": "many"',
            r"table.wide.0.tile.num_stages: must be a whole number, got 'many'",
        ),
        (
            '"programs": 3',
            '"program": 3',
            "must have the fields rows, columns, .*, has rows, columns, .*, program, options",
        ),
        (H100, "NVIDIA H20", "is of NVIDIA H20, whose file is called NVIDIA_H20.json"),
        ('{\n "device"', '[\n "device"', "invalid JSON"),
    ],
)
def test_a_broken_table_is_refused_with_its_name(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = write_tuned(FOUND, tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"NVIDIA_H100_80GB_HBM3.json: .*{said}"):
        read_tuned(path)


def test_a_device_has_the_table_that_was_found_on_it_else_its_chips(folder: Path) -> None:
    assert table_of(CPU) is TABLES["cpu"]
    table: dict[str, Any] = {name: ((None, Tile(32, 64, 64)),) for name in TABLES["cpu"]}
    write_tuned(replace(FOUND, device="cpu", chip="cpu", table=table), folder)
    table_of.cache_clear()
    assert table_of(CPU) == table
    del table["wide"]
    write_tuned(replace(FOUND, device="cpu", chip="cpu", table=table), folder)
    table_of.cache_clear()
    with pytest.raises(ValueError, match=r"cpu.json: has no tiles for wide"):
        table_of(CPU)
    write_tuned(replace(FOUND, device="cpu"), folder)
    table_of.cache_clear()
    with pytest.raises(ValueError, match=r"cpu.json: is of the chip cuda:90, and cpu is cpu"):
        table_of(CPU)


def test_a_product_takes_the_tile_of_its_device(folder: Path) -> None:
    tile = Tile(64, 256, 32, num_warps=8, num_stages=3)
    table: dict[str, Any] = dict.fromkeys(TABLES["cpu"], ((None, tile),))
    write_tuned(replace(FOUND, device="cpu", chip="cpu", table=table), folder)
    launches: list[dict[str, Any]] = []
    product = Grouped(torch.zeros(2, 64).bfloat16(), torch.zeros(1, 64, 64).bfloat16(), torch.tensor([2]).int())
    product.run({(3,): lambda **options: launches.append(options)}, {}, None, None)
    assert [{**options, **tile.launch} == options for options in launches] == [True]


def test_a_chip_without_tiles_is_refused_with_those_that_have_some(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not list(folder.iterdir())
    monkeypatch.setattr(tuned, "device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(tuned, "chip_of", lambda _: "cuda:80")
    with pytest.raises(
        ValueError, match="no tiles for NVIDIA A100, whose chip is cuda:80; there are some for cuda:90, "
    ):
        table_of(torch.device("cuda", 0))


def test_tiles_that_were_found_are_compiled_ahead_too(folder: Path) -> None:
    chip, other = target("cuda:90"), target("cuda:100")
    shipped = [each.label for each in load("grouped_linear2").builds(chip)]
    table = with_first(with_first(FOUND.table, "bf16", num_stages=3), "wide", programs=4)
    write_tuned(replace(FOUND, table=table), folder)
    builds = load("grouped_linear2").builds(chip)
    (new,) = [each for each in builds if each.label not in shipped]
    assert len(builds) == len(shipped) + 1, "another number of programs is not another kernel"
    assert new.label == f"V4-Pro bf16 16x128x64 4 warps 3 stages {H100}"
    assert (new.num_warps, new.num_stages) == (4, 3)
    assert Compiled("grouped_linear2", chip, new, compile_build(new, chip)).problems == []
    assert tiles_of(other.name, "bf16") == {tile.label: tile for _, tile in TABLES[other.name]["bf16"]}


# ---- finding them ----

REHEARSAL = Task("cpu", True, 0.0, ("tiles",), {}, {"shape": "V4-Pro"})


class Clock:
    """A tile's time is what is said of it; the device's own takes 100 us for each product."""

    def __init__(self, us: dict[Tile, float]) -> None:
        self.device, self._us = CPU, us

    def copies(self, _: int) -> int:
        return 1

    def compare(self, runs: dict[str, Any]) -> dict[str, Times]:
        new = next(each.__defaults__[0] for name, each in runs.items() if name.startswith("new"))
        us = {"own": 100.0, "new": self._us.get(new, 100.0)}
        return {name: Times.of([us[name[:3]]]) for name in runs}


@interpreted
def test_the_best_tiles_make_a_table_that_can_be_read(tmp_path: Path) -> None:
    """Of four for few rows one is noise, one gives other bits and one does not run."""

    def by_rows(product: Any, index: torch.Tensor, out: torch.Tensor, tile: Tile | None = None) -> None:
        if tile and tile.rows == 128:
            raise RuntimeError("out of resource: shared memory")
        grouped_linear2(product, index, out, tile=tile)
        out[0] += tile.rows == 64 if tile else 0

    noise, other, large, good = (Tile(rows, 64, 128) for rows in (16, 64, 128, 32))
    trial = {DECODE_ROWS: (noise, other, large, good), PREFILL_ROWS: (Tile(32, 128, 64), replace(good, num_warps=8))}
    clock = Clock({noise: 99.5, other: 1.0, large: 1.0, good: 80.0, replace(good, num_warps=8): 90.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operands, "grouped_linear2", by_rows)
        patch.setattr(tiles, "tiles_on_trial", lambda _: trial)
        patch.setattr(tiles, "clock_for", lambda _: clock)
        found = list(tiles.tune(REHEARSAL))
    assert [each.passed for each in found if isinstance(each, Check)] == [True, True]
    tried = next(each.value for each in reversed(found) if isinstance(each, Fact) and each.name == "tiles")
    assert [each.get("problem") for each in tried] == [
        None,
        "other bits",
        "RuntimeError: out of resource: shared memory",
        None,
        "sums in another order than the device's own",
        None,
    ]
    assert [each["of the own"] for each in tried] == [0.995, None, None, 0.8, None, 0.9]
    tables = [each for each in found if isinstance(each, Table)]
    assert len(tables) == 2, "one whenever there is a better tile"
    path = tmp_path / tables[-1].name
    path.write_text(tables[-1].text)
    table = read_tuned(path)
    assert (table.device, table.chip, table.torch) == ("cpu", "cpu", torch.__version__)
    assert table.table["wide"] == ((16, good), (None, replace(good, num_warps=8)))
    for kind in ("mxfp4", "bf16"):
        assert table.table[kind] == TABLES["cpu"][kind], "nothing of it was tried"


def test_all_candidates_sum_in_the_order_of_the_chips_own() -> None:
    own = TABLES["cuda:90"]["wide"]
    for rows, tried in candidates().items():
        assert len(set(tried)) == len(tried)
        for tile in tried:
            check_table(with_tiles(TABLES["cuda:90"], "wide", {rows: tile}))
            assert tile.rows * tile.columns <= 128 * 256, "more results do not fit in registers"
    other = candidates()[DECODE_ROWS][1]
    changed = with_tiles(TABLES["cuda:90"], "wide", {DECODE_ROWS: other})["wide"]
    assert (changed[0], changed[1:]) == ((16, other), own[1:])
    sizes = {(each.rows, each.columns, each.num_warps, each.num_stages) for each in candidates()[PREFILL_ROWS]}
    assert {(128, 256, 8, 3), (256, 128, 8, 2), (256, 128, 8, 3)} <= sizes


def test_every_candidate_is_compiled_beforehand_and_not_tried_where_it_was_not() -> None:
    jobs = jobs_for(("tiles",))
    tried = {replace(tile, programs=1) for each in candidates().values() for tile in each}
    assert {job.tile for job in jobs if job.tile} == tried
    assert len({job.label for job in jobs}) == len(jobs)
    slow = next(job for job in jobs if job.tile)
    compiled = {job.label: 2.0 for job in jobs} | {slow.label: "did not end within 75 s"}
    earlier = {"compile": {"facts": {"compiled": compiled}}}
    refused = not_compiled(replace(REHEARSAL, earlier=earlier))
    assert {replace(tile, programs=1) for tile in refused} == {slow.tile}
    compiled[slow.label] = "no time"
    assert not_compiled(replace(REHEARSAL, earlier=earlier)) == {}


def test_what_the_chosen_stages_launch_is_compiled_and_no_more() -> None:
    everything = jobs_for(tuple(stage.name for stage in PLAN))
    assert len(set(everything)) == len(everything)
    assert {job.name for job in everything if job.what in ("products", "layer")} == set(SHAPES)
    assert {job.name for job in everything if job.what == "checks"} == {"device-checks", "layer-checks", "rank-checks"}
    assert [job.label for job in jobs_for(("two-processes",))] == ["checks rank-checks"]
    chosen = jobs_for(("prefill-V4-Flash",))
    assert [job.label for job in chosen] == [
        f"products V4-Flash {each} {rows}" for rows in (8, 2048) for each in ("mxfp4", "bf16")
    ]


def test_a_tile_that_fails_to_be_timed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Tile(16, 128, 128)
    products = SimpleNamespace(linear1=None, linear2=None)
    clock = SimpleNamespace(compare=lambda _: {"own linear1": Times(1, 1, 1), "new linear1": "no memory"})
    monkeypatch.setattr(tiles, "bits_of", lambda *_: [])
    trial: Any = Trial
    found = trial(clock, products, own, []).run(replace(own, num_warps=8))
    assert found == {"problem": "no memory"}
    assert ratio(found) is None
