"""A row of a grouped product has the same bits in any company, any run and any grid; tables and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.activations import SWIGLU
from megamoe.formats import quantize_mxfp8
from tests.interpreter import interpreted, is_interpreted

pytest.importorskip("triton")

from megamoe.kernels.chips.targets import TARGETS
from megamoe.kernels.chips.tiles import INSTRUCTIONS, TABLES, Tile, check_table, tile_for
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear1 import grouped_linear1
from megamoe.kernels.grouped_linear2 import grouped_linear2
from megamoe.kernels.layout import Wide
from tests.kernel_cases import WAYS, as_bytes, as_fp64, drawn, every_way, grouped, linear1, linear2, normal

# ---- the same bits ----


def row_bytes(product: Grouped, **options: Any) -> Tensor:
    """[R, B] uint8: what both products give each row, side by side"""
    hidden = linear1(product, weights=torch.full((product.num_rows,), 0.75), **options)
    return torch.cat((as_bytes(hidden), as_bytes(linear2(product, **options))), 1)


@every_way
@interpreted
def test_a_token_alone_has_the_bits_it_has_among_57(way: str) -> None:
    x, weight = normal(57, 160, seed=18), normal(3, 128, 160, seed=19)
    crowd = row_bytes(grouped(x, weight, [20, 0, 37], way), tile=WAYS[way])
    for row in (0, 17, 19, 20, 31, 56):
        counts = [1, 0, 0] if row < 20 else [0, 0, 1]
        alone = row_bytes(grouped(x[row : row + 1], weight, counts, way), tile=WAYS[way])
        assert torch.equal(alone[0], crowd[row])


@every_way
@interpreted
def test_neither_another_run_nor_another_number_of_programs_changes_a_bit(way: str) -> None:
    product = drawn([7, 0, 21], 96, 192, way)  # six tiles
    first = row_bytes(product, tile=WAYS[way], programs=3)
    for programs in (3, 1, 5, 64):
        assert torch.equal(row_bytes(product, tile=WAYS[way], programs=programs), first)
    assert torch.equal(row_bytes(replace(product, oversubscription=4), tile=WAYS[way]), first)


@every_way
@interpreted
def test_other_rows_in_a_tile_of_the_same_depth_change_no_bit(way: str) -> None:
    product = drawn([7, 0, 21], 96, 320, way)
    assert torch.equal(*(row_bytes(product, tile=replace(WAYS[way], rows=rows)) for rows in (16, 64)))


@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0], [0, 9, 1]], ids=str)
@every_way
@interpreted
def test_a_row_that_a_source_names_has_the_bits_it_has_in_its_place(way: str, counts: list[int]) -> None:
    source = torch.tensor(
        [3, 0, 3, 3, 1, 2, 0, 1, 2, 3, 99], dtype=torch.int32
    )  # beyond the counts it may say anything
    x, weight, rows = normal(4, 96, seed=20), normal(3, 192, 96, seed=21), source[: sum(counts)].long()
    apart, together = grouped(x, weight, counts, way), grouped(x[rows], weight, counts, way)
    named = Grouped(apart.x, apart.weight, apart.tokens_per_expert, source)
    assert torch.equal(row_bytes(named, tile=WAYS[way])[: len(rows)], row_bytes(together, tile=WAYS[way]))
    assert torch.equal(linear2(named, twin=True)[: len(rows)], linear2(together, twin=True))


@every_way
@interpreted
def test_a_row_that_is_not_a_number_stays_one_and_leaves_the_others_as_they_are(way: str) -> None:
    x, weight = normal(5, 64, seed=11), normal(2, 128, 64, seed=12)
    clean = grouped(x, weight, [3, 2], way)
    x[1, 40] = torch.nan
    marked = grouped(x, weight, [3, 2], way)
    others = [0, 2, 3, 4]
    for operation in (linear1, linear2):
        before, after = (operation(each, tile=WAYS[way]) for each in (clean, marked))
        assert bool(as_fp64(after)[1].isnan().all())
        assert torch.equal(as_bytes(after)[others], as_bytes(before)[others])


# ---- tables, and what is refused ----


@pytest.mark.parametrize("chip", TABLES)
def test_a_chip_sums_in_one_order_whatever_the_rows(chip: str) -> None:
    check_table(TABLES[chip])
    for kind, (*others, (bound, last)) in TABLES[chip].items():
        mixed = {**TABLES[chip], kind: ((8, replace(last, depth=2 * last.depth)), *others, (bound, last))}
        with pytest.raises(ValueError, match="must share depth and options, got 2 kinds"):
            check_table(mixed)


def test_every_chip_has_tiles_and_an_instruction_for_both_formats() -> None:
    assert set(TABLES) == {*INSTRUCTIONS, "cpu"}
    assert all(set(kinds) == set(TABLES[chip]) for chip, kinds in INSTRUCTIONS.items())
    for each in TARGETS:
        assert set(TABLES[each.name]) == {"mxfp4" if each.scaled else "wide", "bf16"}


def test_tiles_follow_rows_per_expert() -> None:
    rows = [tile_for(TABLES["cuda:100"], "mxfp4", num_rows, 8).rows for num_rows in (0, 1, 8, 128, 129, 512, 513, 4096)]
    assert rows == [16, 16, 16, 16, 64, 64, 128, 128]


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight, counts = torch.zeros(2, 64).bfloat16(), torch.zeros(1, 64, 64).bfloat16(), torch.ones(1).int()
    with pytest.raises(ValueError, match=r"MXFP8 rows by MXFP4 weights, .* got MXFP8 by Tensor"):
        Grouped(quantize_mxfp8(x), weight, counts)
    with pytest.raises(ValueError, match="sums over 64 of the weights and 32 of the rows"):
        Grouped(x[:, :32], weight, counts)
    with pytest.raises(ValueError, match=r"must be int32 \[1\], got torch.int64 \[1\]"):
        Grouped(x, weight, counts.long())
    with pytest.raises(ValueError, match=r"source must be int32 \[R\], got torch.int64 \[2\]"):
        Grouped(x, weight, counts, torch.zeros(2).long())
    with pytest.raises(ValueError, match="writes MXFP8 for MXFP4 weights, widened or not, and BF16 for BF16"):
        grouped_linear1(Grouped(x, weight, counts), torch.ones(2), SWIGLU, Wide(x[:, :32]))
    with pytest.raises(ValueError, match="columns must be a power of two and a multiple of 64, got 96"):
        Tile(16, 96, 64)
    product = Grouped(x, weight, counts)
    with pytest.raises(ValueError, match=r"index \[2\] and out \[W, 64\], got \[1\] and \[2, 64\]"):
        grouped_linear2(product, torch.zeros(1).long(), x)
    with pytest.raises(ValueError, match=r"weights \[2\] and out \[2, 32\], got \[2\] and \[2, 64\]"):
        grouped_linear1(product, torch.ones(2), SWIGLU, x)


# ---- what runs ahead of its turn ----

MARKS = {
    "none": (pytest.mark.soak, True),
    "skip": (pytest.mark.skip, False),
    "skipif_holds": (pytest.mark.skipif(True, reason="no such chip"), False),
    "skipif_does_not": (pytest.mark.skipif(False, reason="no such chip"), True),
}


@interpreted
def does_nothing() -> None:
    """For pytest.Function, which makes a test of it."""


@pytest.mark.parametrize("mark", MARKS)
def test_the_interpreter_begins_with_no_test_that_is_skipped(request: pytest.FixtureRequest, mark: str) -> None:
    item = pytest.Function.from_parent(request.node.parent, name="made", callobj=does_nothing)
    marker, begun = MARKS[mark]
    item.add_marker(marker)
    assert is_interpreted(item) == begun
