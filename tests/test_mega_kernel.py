"""The mega-kernel in Triton's interpreter, a process for each rank: the staged bits, and ranks that never come."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from megamoe.kernels.chips.tiles import TABLES
from megamoe.kernels.mega.call import MOST_ROWS, Report, tile_of
from megamoe.kernels.mega.layout import Layout
from megamoe.parallel.transport.buffers import Exchange
from tests.cases import ACTIVATIONS, Batch
from tests.interpreter import interpreted, interprets_scaled
from tests.mega_ranks import Case, on_ranks, staged

# an expert of rank 0 or 1 in turns, so that neighbours lie apart; a ring of two blocks of 16 rows
TWO = Case(2, (0, 1, 0, 1, 0), tokens=20)


def batch_of(case: Case, tokens: int, seed: int, *, experts: tuple[int, ...] | None = None, mask: bool = True) -> Batch:
    """Tokens that go to some of the experts, by default to all but the last one, with masked slots and repeated ids."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.tensor((*(experts or range(len(case.owners) - 1)), *([-1] * mask)))
    ids = chosen[torch.randint(0, len(chosen), (tokens, case.topk), generator=rng)]
    hidden = torch.randn(tokens, case.hidden, generator=rng).to(torch.bfloat16)
    return Batch(hidden, ids, torch.rand(tokens, case.topk, generator=rng) * 2)


def call_all(rank: int, exchange: Exchange, case: Case, calls: list[list[Batch]]) -> list[Tensor]:
    """All calls, one after the other on the same buffers -> outputs"""
    kernel, experts = case.kernel(rank, exchange), case.experts(rank)
    outputs = [kernel.launch(each[rank].hidden, each[rank].ids, each[rank].weights, experts) for each in calls]
    assert kernel.take() is None
    return outputs


def check(case: Case, calls: list[list[Batch]]) -> None:
    """Every rank's output of every call has the bits of the staged kernels."""
    outputs = on_ranks(case.ranks, call_all, case, calls)
    for number, call in enumerate(calls):
        for rank, batch in enumerate(call):
            expected = staged(case, batch)
            assert torch.equal(outputs[rank][number], expected), f"call {number}, rank {rank}"
            assert len(batch.hidden) == 0 or bool(expected.any())


@interpreted
def test_three_calls_on_two_ranks_have_the_staged_kernels_bits() -> None:
    """Uneven ranks, masked slots; an empty rank while all are on one expert, 40 rows in a ring of 32; one token."""
    uneven = [batch_of(TWO, 7, 0), batch_of(TWO, 3, 1)]
    crowded = [batch_of(TWO, 20, 2, experts=(2,), mask=False), batch_of(TWO, 0, 3)]
    check(TWO, [uneven, crowded, [batch_of(TWO, 1, 4), batch_of(TWO, 1, 5)]])


@pytest.mark.skipif(not interprets_scaled(), reason="this Triton's interpreter has no tl.dot_scaled")
@interpreted
def test_three_ranks_multiply_mxfp4_themselves() -> None:
    case = Case(3, (2, 0, 1, 1), kind="mxfp4")
    check(case, [[batch_of(case, tokens, 10 + tokens) for tokens in sizes] for sizes in ((4, 0, 8), (0, 3, 1))])


@interpreted
def test_four_ranks_of_which_one_has_no_expert_multiply_bf16() -> None:
    case = Case(4, (3, 0, 1), kind="bf16", wire="bf16", hidden=96)
    check(case, [[batch_of(case, tokens, 20 + tokens, experts=(0, 1, 2)) for tokens in (2, 0, 5, 1)]])


@pytest.mark.soak
@interpreted
def test_bf16_weights_take_tokens_that_the_wire_rounds_with_biases_and_without_a_gate() -> None:
    ungated = Case(2, (1, 0), kind="bf16", activation=ACTIVATIONS["nemotron_h"], bias=True, intermediate=64)
    check(ungated, [[batch_of(ungated, 3, 30, experts=(0, 1)), batch_of(ungated, 2, 31, experts=(0, 1))]])
    shifted = replace(ungated, kind="wide", activation=ACTIVATIONS["gpt_oss"])
    check(shifted, [[batch_of(shifted, 2, 32, experts=(0, 1)), batch_of(shifted, 3, 33, experts=(0, 1))]])


# ---- what goes wrong ----


ABSENT_S = 4.0  # longer than a rank that does come can be kept from the CPU by other tests


def call_once(rank: int, exchange: Exchange, case: Case, absent: int) -> tuple[Report | None, float]:
    kernel, experts, batch = case.kernel(rank, exchange, ABSENT_S), case.experts(rank), batch_of(case, 2, rank)
    begun = time.monotonic()
    if rank != absent:
        kernel.launch(batch.hidden, batch.ids, batch.weights, experts)
    took = time.monotonic() - begun
    exchange(b"done")  # memory is there until all have done with it
    return kernel.take(), took


@interpreted
def test_a_rank_that_never_arrives_is_named_by_all_others_within_the_deadline() -> None:
    outcomes = on_ranks(3, call_once, Case(3, (0, 1, 2)), 1)
    assert outcomes[1][0] is None
    for rank in (0, 2):
        report, took = outcomes[rank]
        assert report is not None
        assert report.broken
        assert report.counts == (1,)
        assert took >= ABSENT_S


def lose_the_way_home(rank: int, exchange: Exchange) -> Report | None:
    """Rank 1 is out of time from the start: its counts are pushed, and those of others are not waited for."""
    case = Case(2, (0, 1))
    kernel, experts = case.kernel(rank, exchange, 0.001 if rank else 1.5), case.experts(rank)
    batch = batch_of(case, 2, rank, experts=(0, 1), mask=False)
    if rank == 0:
        exchange(b"rank 1 is through")
    kernel.launch(batch.hidden, batch.ids, batch.weights, experts)
    if rank == 1:
        exchange(b"through")
    exchange(b"done")
    return kernel.take()


@pytest.mark.soak
@interpreted
def test_a_rank_whose_results_do_not_come_is_named() -> None:
    here, there = on_ranks(2, lose_the_way_home)
    assert here == Report(counts=(), results=(1,), stuck=False, wrong=False)
    assert there is not None
    assert there.counts == (0,)


def call_wrongly(rank: int, exchange: Exchange) -> tuple[Tensor, Report | None, str]:
    case = Case(2, (0, 1), tokens=3)
    kernel, experts, batch = case.kernel(rank, exchange), case.experts(rank), batch_of(case, 3, rank, experts=(0, 1))
    ids = batch.ids.clone()
    if rank:
        ids[1, 1] = 2
    out, said = kernel.launch(batch.hidden, ids, batch.weights, experts), ""
    report, again = kernel.take(), kernel.take()
    assert again is None
    try:
        kernel.launch(torch.cat([batch.hidden] * 2), batch.ids, batch.weights, experts)
    except ValueError as refused:
        said = str(refused)
    return out, report, said


@pytest.mark.soak
@interpreted
def test_an_id_that_is_no_expert_makes_its_token_nan_and_is_reported_once() -> None:
    (here, none, _), (there, report, said) = on_ranks(2, call_wrongly)
    case = Case(2, (0, 1), tokens=3)
    assert none is None
    assert torch.equal(here, staged(case, batch_of(case, 3, 0, experts=(0, 1))))
    assert report == Report((), (), stuck=False, wrong=True)
    expected = staged(case, batch_of(case, 3, 1, experts=(0, 1)))
    assert there[1].isnan().all()
    assert torch.equal(there[[0, 2]], expected[[0, 2]])
    assert said == "6 tokens are more than the 3 that a rank may bring to a call"


# ---- sizes ----


def test_the_buffer_of_the_example_has_the_bytes_that_it_says() -> None:
    layout = Case(2, (0, 0, 1, 1), tokens=8).layout
    places = (layout.counts_at, layout.arrived_at, layout.slots_at, layout.weights_at, layout.tokens_at)
    assert places == (0, 256, 512, 768, 1024)
    assert (layout.scales_at, layout.results_at, layout.num_bytes) == (1536, 1792, 3840)


def test_parts_of_the_buffer_do_not_overlap_for_any_sizes() -> None:
    for ranks, tokens, wire in ((1, 1, "bf16"), (3, 5, "mxfp8"), (8, 64, "mxfp8"), (72, 512, "bf16")):
        case = Case(ranks, tuple(range(ranks)) * 2, tokens=tokens, wire=wire, kind="bf16", topk=3)
        layout: Layout = case.layout
        rows = tokens * layout.topk
        ends = (
            layout.counts_at + 16 * ranks * 3,
            layout.arrived_at + 8 * ranks,
            layout.slots_at + 4 * ranks * rows,
            layout.weights_at + 4 * ranks * rows,
            layout.tokens_at + tokens * layout.hidden * (1 if wire == "mxfp8" else 2),
            layout.scales_at + (tokens * layout.hidden // 32 if wire == "mxfp8" else 0),
            layout.results_at + 2 * rows * layout.hidden,
        )
        begins = (layout.arrived_at, layout.slots_at, layout.weights_at, layout.tokens_at, layout.scales_at)
        for end, begin in zip(ends, (*begins, layout.results_at, layout.num_bytes), strict=True):
            assert end <= begin < end + 256


@pytest.mark.parametrize("chip", TABLES)
def test_tiles_are_of_few_rows_and_sum_in_the_staged_kernels_order(chip: str) -> None:
    for kind, steps in TABLES[chip].items():
        for rows in (1, 16, 64, 100_000):
            tile = tile_of(TABLES[chip], kind, rows)
            assert tile.rows <= MOST_ROWS
            assert (tile.depth, tile.options) == (steps[0][1].depth, steps[0][1].options)
