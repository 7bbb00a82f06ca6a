"""Tiles that are found on a device: files that are read or refused, who takes them, and the search for them."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interpreter import interpreted

pytest.importorskip("triton")

from benchmarks.gpu_kernels import tune
from benchmarks.gpu_kernels.clock import HostClock
from megamoe.kernels import load
from megamoe.kernels.ahead import Compiled, compile_build
from megamoe.kernels.chips import tuned
from megamoe.kernels.chips.targets import target
from megamoe.kernels.chips.tiles import TABLES, Tile
from megamoe.kernels.chips.tuned import Tuned, file_name, read_tuned, table_of, tiles_of, write_tuned
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear2 import grouped_linear2
from tests.test_gpu_kernels import CPU, TINY, patched

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


@interpreted
def test_tuning_writes_a_table_that_can_be_read(tmp_path: Path) -> None:
    """Of three candidates one gives other bits and one does not run."""

    def by_rows(product: Any, index: torch.Tensor, out: torch.Tensor, tile: Tile | None = None) -> None:
        if tile and tile.rows == 128:
            raise RuntimeError("out of resource: shared memory")
        plain(product, index, out, tile=tile)
        out[0] += tile.rows == 64 if tile else 0

    plain, printed = grouped_linear2, io.StringIO()
    two_experts = replace(TINY, sizes=replace(TINY.sizes, num_experts=2))
    searched = {"tune__STEPS": {"rows": (16, 64, 128)}, "tune__DEPTHS": (128,), "tune__BOUNDS": ((16, 1), (None, 17))}
    with patched(**searched, operands__grouped_linear2=by_rows), redirect_stdout(printed):
        assert tune.tune(HostClock(CPU), [two_experts], time.monotonic() + 60, tmp_path) == 0
    found = read_tuned(tmp_path / file_name("cpu"))
    assert (found.device, found.chip, found.torch) == ("cpu", "cpu", torch.__version__)
    for kind in ("wide", "bf16"):
        assert [bound for bound, _ in found.table[kind]] == [16, None]
        assert {tile.rows for _, tile in found.table[kind]} <= {16, 32}
    assert found.table["mxfp4"] == TABLES["cpu"]["mxfp4"], "the layer never runs it there"
    assert printed.getvalue().count("passed over: other bits") == 4
    assert printed.getvalue().count("passed over: RuntimeError: out of resource: shared memory") == 4


BEGIN = Tile(16, 128, 128)


def search(monkeypatch: pytest.MonkeyPatch, us: Callable[[Tile], float | str]) -> tune.Search:
    monkeypatch.setattr(tune.Search, "_try", lambda _, tile: us(tile))
    monkeypatch.setattr(tune.Search, "same_bits", lambda *_: True)
    return tune.Search(HostClock(CPU), "mxfp4", None, [], BEGIN)


def test_one_field_is_changed_at_a_time_while_it_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    def us(tile: Tile) -> float | str:
        if tile.num_stages == 4:
            return "passed over: too much shared memory"
        return 100 + abs(tile.columns - 64) + abs(tile.rows - 32) + 10 * abs(tile.num_stages - 3) - 0.2 * tile.programs

    best = tune.descend(search(monkeypatch, us), BEGIN, time.monotonic() + 60)
    assert (best.rows, best.columns, best.num_stages, best.programs) == (32, 64, 3, 1), "0.6 of 100 is noise"
    assert (best.depth, best.options) == (128, ())


def test_a_tile_that_does_not_run_is_replaced_by_one_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    here = search(monkeypatch, lambda tile: 5.0 if tile.num_stages == 3 else "passed over: out of resource")
    assert tune.descend(here, BEGIN, time.monotonic() + 60) == replace(BEGIN, num_stages=3)


def test_a_search_ends_in_time_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    late = time.monotonic() - 1
    here = search(monkeypatch, lambda tile: 100 / tile.rows)
    assert tune.descend(here, BEGIN, late) == BEGIN
    assert tune.best_order([here], late) == [BEGIN]
    assert list(here.tried) == [BEGIN]


def test_tiles_are_not_so_large_that_they_take_minutes_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    here = search(monkeypatch, lambda tile: 1 / tile.rows / tile.columns)
    tune.descend(here, BEGIN, time.monotonic() + 60)
    assert max(tile.rows * tile.columns for tile in here.tried) == 128 * 256


def test_the_order_of_the_sum_is_chosen_by_the_time_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth 64 is best for few rows, 256 for many and in all."""

    def us(tile: Tile) -> float:
        return {64: 10.0, 128: 30.0, 256: 20.0}[tile.depth] if tile.rows == 16 else 1000 / tile.depth

    few = search(monkeypatch, us)
    many = replace(few, begin=replace(BEGIN, rows=64), tried={})
    assert [tile.depth for tile in tune.best_order([few, many], time.monotonic() + 60)] == [256, 256]


def test_an_order_that_is_no_better_than_the_noise_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    here = search(monkeypatch, lambda tile: 100 - tile.depth / 256)
    assert tune.best_order([here], time.monotonic() + 60) == [BEGIN]
    here = search(monkeypatch, lambda tile: 100 - tile.depth / 64)
    assert tune.best_order([here], time.monotonic() + 60) == [replace(BEGIN, depth=256)]


def test_an_order_whose_tiles_differ_in_bits_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    here = search(monkeypatch, lambda tile: 1000 / tile.depth)
    monkeypatch.setattr(tune.Search, "same_bits", lambda _, tile: tile.depth != 256)
    assert tune.best_order([here], time.monotonic() + 60) == [BEGIN]
