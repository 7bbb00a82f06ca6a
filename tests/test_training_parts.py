"""The parts of a backward, each alone: its schedule, its kernels, what it keeps, and the benchmarks of it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.peers.measure import Workload, measure_rank
from benchmarks.peers.report import compare
from benchmarks.peers.training import TRAINING_PEERS
from megamoe.formats import WEIGHT_FORMATS
from megamoe.kernels.cpu.layout import pack_bf16
from megamoe.kernels.cpu.library import chosen, using
from megamoe.kernels.cpu.paths import Path, runnable
from megamoe.launch.bench.bench import BenchRequest, run_traced
from megamoe.schedule.backward import BackwardLoad, BackwardStep, play_backward, schedule_backward
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from megamoe.training.derivatives import activate_backward, sum_in_lanes
from megamoe.training.reference import moe_backward
from megamoe.training.rounding import Place, chance, mixed, round_stochastically
from tests.cases import ACTIVATIONS, make_batch
from tests.conftest import Pool
from tests.training_cases import (
    backward,
    backward_on_ranks,
    differences,
    joined,
    make_gradient,
    make_problem,
    make_trainable,
)

SHAPE = MoEShape(hidden=64, intermediate=96, num_experts=5, topk=3, swiglu_limit=3.0)

# ---- schedule ----


def names(load: BackwardLoad) -> str:
    return " ".join(f"{step.work[0]}{step.wave}" for step in schedule_backward(load))


@pytest.mark.parametrize(
    ("dispatch", "expected"),
    [
        ([0.1] * 3, "r0 d0 r1 d1 r2 d2 w0 w1 w2"),
        ([1, 9, 9], "r0 d0 r1 r2 w0 d1 w1 d2 w2"),
        ([50] * 3, "r0 r1 r2 d0 w0 d1 w1 d2 w2"),
    ],
    ids=["fast link", "later waves are late", "slow link"],
)
def test_what_needs_no_link_fills_the_gaps(dispatch: list[float], expected: str) -> None:
    assert names(BackwardLoad([2.0] * 3, [2.0] * 3, [2.0] * 3, dispatch, [1.0] * 3)) == expected


def test_without_overlap_rows_come_before_anything_is_computed_and_leave_after_it() -> None:
    call = mock.Mock()
    TrainableMoE(SHAPE, overlap=False)._run(call)
    done = [(name, *arguments) for name, arguments, _ in call.method_calls]
    assert done == [(name, 0) for name in ("dispatch", "arrive", "recompute", "data", "weights", "combine")]


def test_every_wave_is_recomputed_before_its_data_and_its_weights_come_last() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        num_waves = int(torch.randint(1, 9, (1,), generator=rng))
        recompute, data, weights, dispatch, combine = (
            torch.rand(5, num_waves, generator=rng) * torch.tensor([2.0, 3, 3, 6, 6])[:, None]
        ).tolist()
        played = play_backward(BackwardLoad(recompute, data, weights, dispatch, combine))
        steps = [step for step, _, _ in played.steps]
        assert len(set(steps)) == len(steps) == 3 * num_waves
        for wave in range(num_waves):
            places = [steps.index(BackwardStep(work, wave)) for work in ("recompute", "data", "weights")]
            assert places == sorted(places)
        assert all(a[2] <= b[1] for a, b in zip(played.steps, played.steps[1:], strict=False))
        compute, link = sum(recompute + data + weights), sum(dispatch + combine)
        assert max(compute, link) <= played.total + 1e-9 <= compute + link + 2e-9


def test_weight_gradients_cover_the_last_way_home() -> None:
    even = BackwardLoad([2.0] * 4, [3.0] * 4, [3.0] * 4, [4.0] * 4, [4.0] * 4)
    assert play_backward(even).total < 1.15 * 32  # compute and link both take 32
    empty: list[float] = [0.0] * 4
    assert play_backward(BackwardLoad(empty, [8.0] * 4, empty, [4.0] * 4, [4.0] * 4)).total > 1.15 * 32


# ---- kernels ----

PATHS: list[Path | None] = [None, *runnable()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "torch" if path is None else path.name)
def test_gradients_are_the_oracles_on_every_path(path: Path | None) -> None:
    with using(path):
        for weight_format in ("mxfp4", "bf16"):
            batch = make_batch(SHAPE, 50)
            problem = make_problem(SHAPE, batch, weight_format=weight_format)
            layer = make_trainable(SHAPE, weight_format=weight_format, waves=2)
            gradient = make_gradient(batch)
            assert not differences(backward(layer, batch, gradient), moe_backward(problem, gradient))


@pytest.mark.parametrize("family", ACTIVATIONS)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_activations_kernel_has_the_bits_of_torch(family: str, quantized: bool) -> None:
    shape = MoEShape(64, 96, 2, 1, activation=ACTIVATIONS[family])
    tables = make_trainable(shape).experts.tables
    rng = torch.Generator().manual_seed(1)
    for num_rows in (0, 1, 37):
        linear1 = (torch.randn(num_rows, shape.linear1_rows, generator=rng) * 3).to(torch.bfloat16)
        weights = torch.randn(num_rows, generator=rng)
        gradient = torch.randn(num_rows, 96, generator=rng)
        found = []
        for path in (None, runnable()[0]):
            with using(path):
                changed, activated = linear1.clone(), torch.empty(num_rows, 96, dtype=torch.bfloat16)
                of_weights = activate_backward(
                    changed, weights, gradient, tables, quantized=quantized, activated=activated
                )
                found.append((changed, activated, of_weights))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("path", runnable(), ids=lambda path: path.name)
@pytest.mark.parametrize("num_rows", [1, 2, 31, 32, 77])
@pytest.mark.parametrize("width", [1, 32, 45, 96])
def test_rows_are_turned_and_packed(path: Path, num_rows: int, width: int) -> None:
    rng = torch.Generator().manual_seed(2)
    wide = torch.randn(90, width + 5, generator=rng).to(torch.bfloat16)
    x, pitch = wide[:, :width], -(-num_rows // 32) * 32
    for source in (None, torch.randint(0, 90, (num_rows,), generator=rng)):
        rows = x[:num_rows] if source is None else x[source]
        given = rows if source is None else x
        columns = torch.full((width, pitch), float("nan"), dtype=torch.bfloat16)
        packed = torch.full((-(-width // 32), pitch // 2, 32, 2), float("nan"), dtype=torch.bfloat16)
        with using(path):
            library = chosen()
            assert library is not None
            library.turn_rows(given, source, columns)
            library.pack_rows(given, source, packed)
        assert torch.equal(columns[:, :num_rows], rows.T)
        assert not columns[:, num_rows:].any()
        assert torch.equal(packed, pack_bf16(rows.T.contiguous()))


def test_lanes_are_summed_in_the_order_that_is_written() -> None:
    values = torch.randn(70, 3, generator=torch.Generator().manual_seed(3)) * 1e4
    lanes = [torch.zeros(3) for _ in range(32)]
    for index, row in enumerate(values):
        lanes[index % 32] = lanes[index % 32] + row
    expected = torch.zeros(3)
    for lane in lanes:
        expected = expected + lane
    assert torch.equal(sum_in_lanes(values, 0), expected)
    assert torch.equal(sum_in_lanes(values.T.contiguous(), 1), expected)


# ---- stochastic rounding ----


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_stochastic_rounding_is_unbiased_and_between_neighbours(weight_format: str) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    held = WEIGHT_FORMATS[weight_format]
    rounded = torch.stack(
        [held.dense(round_stochastically(weight, weight_format, Place(0, step, 3, 1))) for step in range(400)]
    ).to(torch.float64)
    low, high = rounded.amin(0), rounded.amax(0)
    width = high - low
    assert ((rounded == low) | (rounded == high)).all()
    assert (width > 0).double().mean() > 0.9
    assert ((rounded.mean(0) - weight).abs() <= 0.13 * width + 0.02 * weight.abs().clamp_min(0.5)).all()
    exact = held.dense(held.take(weight)).to(torch.float32)
    assert torch.equal(
        held.dense(round_stochastically(exact, weight_format, Place(0, 1, 3, 1))).to(torch.float32), exact
    )


def test_chance_is_that_of_splitmix64() -> None:
    """Its first two numbers from state 0: 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4."""
    golden = -0x61C8864680B583EB
    found = mixed(torch.tensor([0, golden]))
    assert [int(each) % 2**64 for each in found] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    places = [Place(0, 1, 2, 0), Place(0, 1, 2, 1), Place(0, 1, 3, 0), Place(0, 2, 2, 0), Place(1, 1, 2, 0)]
    numbers = [chance((4, 8), place, torch.device("cpu")) for place in places]
    assert all(not torch.equal(numbers[0], other) for other in numbers[1:])
    assert all(bool(((each >= 0) & (each < 1)).all()) for each in numbers)


def test_stochastic_weights_do_not_depend_on_ranks(pool: Pool) -> None:
    batch = make_batch(SHAPE, 30)
    sweep = [{"rounding": "stochastic", "seed": 5}]
    expected = backward(make_trainable(SHAPE, rounding="stochastic", seed=5), batch, make_gradient(batch))
    outputs = pool.get().run(backward_on_ranks, SHAPE, batch, None, sweep, size=3)
    found = joined([output[0] for output in outputs])
    assert all(torch.equal(each, found[name]) for name, each in expected.items())
    plain = backward(make_trainable(SHAPE), batch, make_gradient(batch))
    assert not torch.equal(plain["hidden"], expected["hidden"])


def test_a_state_dict_goes_on_with_the_same_chance() -> None:
    batch = make_batch(SHAPE, 30)
    first, second = (TrainableMoE(SHAPE, rounding="stochastic") for _ in range(2))
    for _ in range(3):
        first.quantize()
    second.load_state_dict(first.state_dict())
    first.quantize()
    assert second.experts.rounding_step == 3
    assert torch.equal(second(batch.hidden, batch.ids, batch.weights), first(batch.hidden, batch.ids, batch.weights))


# ---- memory ----


@pytest.mark.parametrize("saved", ["tokens", "activations", "dispatch-again"])
def test_a_forward_keeps_what_the_docs_say(saved: str) -> None:
    """A rank alone: no token comes from others."""
    batch = make_batch(SHAPE, 50)
    layer = make_trainable(SHAPE, saved=saved)
    given = {id(each) for each in (batch.hidden, batch.ids, batch.weights, *layer.parameters())}
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in given and tensor.data_ptr() not in {batch.hidden.data_ptr(), *pointers}:
            kept.append(tensor.nbytes)
        return tensor

    pointers = {each.data_ptr() for each in (batch.ids, batch.weights, *layer.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(batch.hidden, batch.ids, batch.weights)
    num_rows, tokens = int((batch.ids >= 0).sum()), len(batch.ids)
    per_rank = 8 * (1 + 2 * SHAPE.num_experts) + 8
    expected = {
        "tokens": tokens * 80 + 12 * num_rows,  # a row of the wire: 64 + 2 bytes, up to a multiple of 16
        "activations": tokens * 80 + 12 * num_rows + num_rows * (4 * SHAPE.intermediate + 8),
        "dispatch-again": 0,
    }
    assert sum(kept) == expected[saved] + per_rank


def test_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="saved must be one of tokens, activations, dispatch-again, got 'all'"):
        TrainableMoE(SHAPE, saved="all")
    with pytest.raises(ValueError, match="gradient_format must be one of bf16, mxfp8, got 'fp8'"):
        TrainableMoE(SHAPE, gradient_format="fp8")
    with pytest.raises(ValueError, match=r"master_dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        TrainableMoE(SHAPE, master_dtype=torch.float16)
    with pytest.raises(ValueError, match="hidden 48 is not a multiple of 32"):
        TrainableMoE(MoEShape(48, 32, 2, 1), weight_format="bf16", dispatch_format="bf16", gradient_format="mxfp8")


def test_parameters_begin_as_those_of_linear_layers_and_biases_at_zero() -> None:
    layer = TrainableMoE(MoEShape(hidden=64, intermediate=96, num_experts=5, topk=3, bias=True))
    with torch.no_grad():
        for master in layer.experts.masters:
            master.fill_(7.0)
    layer.reset_parameters(3)
    gate_up, down, *biases = layer.experts.masters
    for master, inputs in ((gate_up, 64), (down, 96)):
        assert 0.99 < float(master.detach().abs().max()) * inputs**0.5 <= 1.0
    assert len(biases) == 2
    assert not any(bool(bias.any()) for bias in biases)


def test_a_layer_trains_its_own_parameters_in_whatever_order_and_no_others() -> None:
    layer, batch = TrainableMoE(SHAPE), make_batch(SHAPE, 9)
    expected = layer(batch.hidden, batch.ids, batch.weights)
    gate_up = layer.experts.gate_up
    del layer.experts.gate_up
    layer.experts.gate_up = gate_up
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), expected)
    layer.experts.lora = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="have the parameters gate_up, down, found down, gate_up, lora"):
        layer(batch.hidden, batch.ids, batch.weights)
    del layer.experts.lora
    parametrize.register_parametrization(layer.experts, "down", nn.Identity())
    with pytest.raises(ValueError, match="TrainableExperts has a parametrization of down"):
        layer(batch.hidden, batch.ids, batch.weights)


# ---- benchmarks ----


def test_the_benchmark_measures_a_step_and_holds_it_against_the_oracle() -> None:
    request = BenchRequest(
        tokens_per_rank=24, hidden=64, intermediate=32, num_experts=4, topk=2, repeats=1, backward=True, trace=True
    )
    report, timeline = run_traced(request)
    assert report.identical
    assert report.backward
    assert report.hidden_percent is not None
    assert timeline is not None
    layers = {run.layer: run for run in timeline.runs()}
    assert set(layers) == {"serial", "serial (backward)", "overlapped", "overlapped (backward)"}
    lanes = layers["overlapped (backward)"].lanes
    assert {"dispatch", "combine", "weight gradient", "linear-1 gradient"} <= set(lanes)
    assert "weight gradient" not in layers["overlapped"].lanes


def test_peers_that_train_have_the_gradients_of_fp32(pool: Pool) -> None:
    workload = Workload("tiny", (40, 7), shape=MoEShape(hidden=128, intermediate=64, num_experts=6, topk=2))
    present = [peer for peer in TRAINING_PEERS if peer.missing is None]
    outcomes = pool.get().run(measure_rank, workload, present, 1, True, size=2, timeout_s=200.0)
    comparison = compare(workload, TRAINING_PEERS, 1, outcomes)
    assert not comparison.failed
    assert {row.name for row in comparison.rows if row.problem is None} == {peer.name for peer in present}
