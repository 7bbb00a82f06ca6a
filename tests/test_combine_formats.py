"""Results that come home as MXFP8: the oracle's bits for any ranks and waves, the stated error, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor

from megamoe.activations import Activation
from megamoe.catalog import load_machine, load_model
from megamoe.execution.ops import encode_rows, reduce_slots
from megamoe.formats import MXFP8, dequantize_mxfp8, quantize_mxfp8, take_rows
from megamoe.kernels.cpu.library import using
from megamoe.kernels.cpu.paths import Path, runnable
from megamoe.launch.bench.bench import BenchRequest, bench_rank, predict_run
from megamoe.launch.bench.rule import RuleRequest
from megamoe.launch.cluster.worker import Load
from megamoe.launch.launch import LaunchRequest
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.model.experts import RoutedExperts
from megamoe.model.structure import Structure
from megamoe.parallel import symmetric
from megamoe.parallel.group import EPGroup
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.rule import threshold
from megamoe.reference import moe, moe_fp64, relative_error, results, round_mxfp8, sum_slots
from megamoe.routing.waves import Waves
from megamoe.routing.wire import COMBINE_FORMATS, Wire
from megamoe.schedule.machine import Run
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, make_weights, oracle, split

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
BIASED = MoEShape(64, 32, 5, 2, activation=Activation("relu2", gated=False), bias=True)
FORMATS = [("mxfp4", "mxfp8"), ("mxfp4", "bf16"), ("bf16", "bf16")]
WAVES: list[Waves] = [1, 3, (1, 3, 2)]
TOKENS = 61


# ---- the contract ----


def test_every_result_is_rounded_to_mxfp8_and_the_sum_is_what_it_was() -> None:
    batch, (gate_up, down) = make_batch(SHAPE, 9), make_weights(SHAPE)
    given = (SHAPE, batch.hidden, batch.ids, batch.weights, gate_up, down)
    slots = results(*given)
    assert slots.shape == (9, SHAPE.topk, SHAPE.hidden)
    expected = torch.zeros(9, SHAPE.hidden)
    for slot in range(SHAPE.topk):
        expected += dequantize_mxfp8(quantize_mxfp8(slots[:, slot]), torch.float32)
    assert torch.equal(moe(*given, combine_format="mxfp8"), expected.bfloat16())
    assert torch.equal(moe(*given), sum_slots(slots))
    assert not torch.equal(moe(*given), expected.bfloat16())


@pytest.mark.parametrize("weights", ["mxfp4", "bf16"])
def test_the_error_is_the_stated_one(weights: str) -> None:
    shape = MoEShape(512, 256, 8, 3, 10.0)
    batch, held = make_batch(shape, 100), make_weights(shape)
    exact = moe_fp64(shape, batch.hidden, batch.ids, batch.weights, *held, weight_format=weights)
    layer = make_layer(shape, weight_format=weights, combine_format="mxfp8")
    error = relative_error(layer(batch.hidden, batch.ids, batch.weights), exact)
    print(f"{weights} weights, results as MXFP8: relative error {error:.4f}")  # noqa: T201
    assert 0.02 < error < 0.03


def test_a_value_is_off_by_a_seventeenth_or_by_four_millionths_of_its_block_at_most() -> None:
    rng = torch.Generator().manual_seed(5)
    values = (torch.randn(400, 32, generator=rng) * torch.randint(-14, 8, (400, 32), generator=rng).exp2()).bfloat16()
    off = (round_mxfp8(values).double() - values.double()).abs()
    most = values.double().abs().amax(-1, keepdim=True).clamp_min(1e-4)
    assert bool((off <= torch.maximum(values.double().abs() / 17, most * 2.0**-17.8)).all())
    large = values.double().abs() > most / 1000
    assert bool((off > values.double().abs() / 17.5)[large].any())


# ---- any ranks ----


def sweep(group: EPGroup, batch: Batch, shares: list[slice]) -> dict[tuple[str, str, str], Tensor]:
    mine, out = batch.part(shares[group.rank]), {}
    for weights, wire in FORMATS:
        for waves in WAVES:
            layer = make_layer(
                SHAPE, group, weight_format=weights, dispatch_format=wire, combine_format="mxfp8", waves=waves
            )
            for _ in range(2):  # the second time in buffers that hold the first
                out[weights, wire, str(waves)] = layer(mine.hidden, mine.ids, mine.weights)
            record = layer.last_call
            assert record.combine_bytes == record.rows_received * (128 + 4 + 12)
    return out


@pytest.mark.parametrize(("ep_size", "empty"), [(1, None), (2, None), (3, 1), (4, 0)], ids=str)
def test_output_is_the_oracles_for_any_ep_size(ranks: LocalRanks, ep_size: int, empty: int | None) -> None:
    batch = make_batch(SHAPE, TOKENS)
    outputs = ranks.run(sweep, batch, split(TOKENS, ep_size, empty=empty), size=ep_size)
    for weights, wire in FORMATS:
        expected = oracle(SHAPE, batch, weights, wire, "mxfp8")
        for waves in WAVES:
            got = torch.cat([output[weights, wire, str(waves)] for output in outputs])
            assert torch.equal(got, expected), (weights, wire, waves)


def narrowed(batch: Batch, shape: MoEShape) -> Batch:
    """As much of a batch as the shape takes, for five experts."""
    ids, weights = batch.ids[:, : shape.topk] % 5, batch.weights[:, : shape.topk]
    return Batch(batch.hidden[:, : shape.hidden], ids, weights)


def two_hosts(group: EPGroup, batch: Batch) -> list[Tensor]:
    """Ranks 0 and 1 share memory, 2 and 3 do, and between the two go messages."""
    found, kept = [], symmetric.host_key
    symmetric.host_key = lambda: f"host{group.rank // 2}"
    try:
        fresh = EPGroup.of(torch.distributed.group.WORLD, deadline_s=60.0)
        for shape in (SHAPE, BIASED):
            mine = narrowed(batch, shape).part(split(len(batch.hidden), group.size)[group.rank])
            layer = make_layer(shape, fresh, combine_format="mxfp8", waves=2)
            found.append(layer(mine.hidden, mine.ids, mine.weights))
    finally:
        symmetric.host_key = kept
    return found


def test_over_memory_and_messages_and_with_biases_the_bits_are_the_oracles(ranks: LocalRanks) -> None:
    batch = make_batch(SHAPE, TOKENS)
    outputs = ranks.run(two_hosts, batch, size=4)
    for number, shape in enumerate((SHAPE, BIASED)):
        expected = oracle(shape, narrowed(batch, shape), "mxfp4", "mxfp8", "mxfp8")
        assert torch.equal(torch.cat([output[number] for output in outputs]), expected)


def test_values_that_are_not_numbers_stay_in_their_token() -> None:
    batch = make_batch(SHAPE, 20, mask=False)
    layer = make_layer(SHAPE, combine_format="mxfp8")
    plain = layer(batch.hidden, batch.ids, batch.weights)
    hidden = batch.hidden.clone()
    hidden[3, 7] = torch.nan
    got = layer(hidden, batch.ids, batch.weights)
    assert bool(got[3].isnan().all())
    others = torch.arange(20) != 3
    assert torch.equal(got[others], plain[others])


# ---- its operations ----


def columns(rows: Tensor, hidden: int) -> MXFP8:
    found = Wire("bf16", hidden, False, "mxfp8").results(rows)
    assert isinstance(found, MXFP8)
    return found


@pytest.mark.parametrize("path", [None, *runnable()], ids=lambda path: "torch" if path is None else path.name)
@pytest.mark.parametrize(("tokens", "topk", "hidden"), [(0, 2, 64), (1, 1, 32), (40, 8, 1056), (300, 3, 96)])
def test_rows_go_where_they_should_and_are_summed_as_their_values(
    path: Path | None, tokens: int, topk: int, hidden: int
) -> None:
    rng = torch.Generator().manual_seed(tokens)
    num = tokens * topk
    rows = torch.randn(num + 1, hidden, generator=rng) * torch.randint(-40, 40, (num + 1, 1), generator=rng).exp2()
    rows = rows.bfloat16()
    rows[-1] = 0
    if num > 40:
        rows[5, 3], rows[7, 40], rows[9, :32] = torch.inf, torch.nan, -0.0
    goes = torch.cat((torch.randperm(num, generator=rng), torch.tensor([num])))
    held = torch.full(Wire("bf16", hidden, False, "mxfp8").result_rows(num + 1)[0], 0xA5, dtype=torch.uint8)
    positions = torch.randint(0, num + 1, (tokens, topk), generator=rng)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with using(path):
            encode_rows(rows, goes, columns(held, hidden))
            got = reduce_slots(columns(held, hidden), positions)
        assert bool((held[:, hidden + hidden // 32 :] == 0xA5).all()), "what is filled up with is not written"
        rounded = torch.empty_like(rows)
        rounded[goes] = round_mxfp8(rows)
        assert torch.equal(take_rows(columns(held, hidden), goes).nan_to_num(3.0), round_mxfp8(rows).nan_to_num(3.0))
        with using(None):
            expected = reduce_slots(rounded, positions)
        assert torch.equal(got.view(torch.int16)[~got.isnan()], expected.view(torch.int16)[~expected.isnan()])
        assert torch.equal(got.isnan(), expected.isnan())


def test_bytes_of_zero_add_nothing_and_bytes_of_255_are_not_numbers() -> None:
    held = torch.zeros(3, 48, dtype=torch.uint8)
    held[1].fill_(255)
    encode_rows(torch.full((1, 32), 0.5).bfloat16(), torch.tensor([2]), columns(held, 32))
    got = reduce_slots(columns(held, 32), torch.tensor([[0, 2], [2, 1]]))
    assert got[0].tolist() == [0.5] * 32
    assert bool(got[1].isnan().all())


def test_a_result_has_the_bytes_of_its_values_and_its_scales() -> None:
    assert [Wire("bf16", hidden, False, "mxfp8").result_bytes for hidden in (32, 96, 7168)] == [48, 112, 7392]
    assert [Wire("mxfp8", hidden, False).result_bytes for hidden in (32, 33)] == [64, 66]


# ---- what is refused ----


def test_sizes_that_are_no_blocks_are_refused() -> None:
    odd = MoEShape(48, 32, 4, 2)
    with pytest.raises(ValueError, match=r'hidden 48 is not a multiple of 32.*combine_format="bf16" takes any size'):
        MegaMoE(odd, weight_format="bf16", dispatch_format="bf16", combine_format="mxfp8")
    with pytest.raises(ValueError, match="combine_format must be one of bf16, mxfp8, got 'auto'"):
        MegaMoE(replace(odd, hidden=64), combine_format="auto")


def differ(group: EPGroup) -> str:
    layer = make_layer(SHAPE, group, combine_format="mxfp8" if group.rank else "bf16")
    batch = make_batch(SHAPE, 3)
    with pytest.raises(ValueError, match="ranks disagree") as refused:
        layer(batch.hidden, batch.ids, batch.weights)
    return str(refused.value)


def test_ranks_that_combine_differently_are_told(ranks: LocalRanks) -> None:
    for said in ranks.run(differ, size=3):
        assert "combine_format is bf16 on rank 0, mxfp8 on ranks 1, 2" in said


# ---- how it is asked for ----


def test_a_benchmark_runs_with_it_and_is_held_to_the_oracle(ranks: LocalRanks) -> None:
    request = BenchRequest(
        tokens_per_rank=40, hidden=64, intermediate=32, num_experts=8, topk=2, repeats=1, combine_format="mxfp8"
    )
    for found in ranks.run(bench_rank, request, size=2):
        assert found.identical
    plain, rounded = (
        BenchRequest(tokens_per_rank=40, hidden=64, num_experts=8, topk=2, combine_format=each)
        for each in ("bf16", "mxfp8")
    )
    machine = load_machine("cpu")
    assert predict_run(plain, machine) != predict_run(rounded, machine)


WRONG: dict[str, Callable[[], object]] = {
    "bench": lambda: BenchRequest(combine_format="mxfp4"),
    "rule": lambda: RuleRequest(combine_format="mxfp4"),
    "launch": lambda: LaunchRequest(2, combine_format="mxfp4"),
    "worker": lambda: Load(FilePath("anywhere"), combine_format="mxfp4"),
    "model": lambda: RoutedExperts(Structure(64, 32, 4), 2, combine_format="mxfp4"),
}


@pytest.mark.parametrize("asked", WRONG)
def test_formats_that_there_are_not_are_refused_before_anything_starts(asked: str) -> None:
    with pytest.raises(ValueError, match="combine_format must be one of bf16, mxfp8, got 'mxfp4'"):
        WRONG[asked]()


def test_what_asks_for_it_hands_it_on() -> None:
    assert RoutedExperts(Structure(64, 32, 4), 2, combine_format="mxfp8").layer.combine_format == "mxfp8"
    plain, rounded = (RuleRequest(combine_format=each) for each in ("bf16", "mxfp8"))
    assert plain.bytes_per_row - rounded.bytes_per_row == 2 * 1024 - (1024 + 32)


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v4-flash"])
def test_the_planner_counts_the_bytes_that_travel(name: str) -> None:
    for combine in COMBINE_FORMATS:
        expert = Expert.of(load_model(name), combine_format=combine)
        assert expert.combine_bytes == Wire("mxfp8", expert.hidden, False, combine).result_bytes
    d = expert.intermediate
    assert threshold(d, "mxfp8", "mxfp8") == pytest.approx(6 * d / (33 / 32 + 33 / 32))
    assert threshold(d, "fp8", "bf16") == 2 * d
    run = Run(2, 0.125, 2048, 1024, 512, 16, 4, "bf16", "bf16", 4)
    assert replace(run, combine_format="mxfp8").combine_bytes == run.combine_bytes * 33 / 64
