"""What a user can get wrong is refused with names and numbers, on every rank, before any data moves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe import MegaMoECluster, TrainableMoE
from megamoe.activations import Activation
from megamoe.formats import MXFP4, quantize_mxfp4
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup, init_group
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, make_weights

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)
Change = Callable[[Batch], Batch]


def changed(**fields: Callable[[Batch], Tensor]) -> Change:
    return lambda batch: dataclasses.replace(batch, **{name: make(batch) for name, make in fields.items()})


def at(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[3, 1] = value
    return tensor


WRONG: dict[str, tuple[Change, str]] = {
    "hidden_too_wide": (changed(hidden=lambda b: b.hidden.repeat(1, 2)), r"hidden .*\[T, 64\], got \[9, 128\]"),
    "hidden_one_dimension": (changed(hidden=lambda b: b.hidden[0]), r"hidden .*\[T, 64\], got \[64\]"),
    "hidden_float16": (changed(hidden=lambda b: b.hidden.half()), r"hidden must be .*bfloat16.* got torch.float16"),
    "ids_too_few": (changed(ids=lambda b: b.ids[:5]), r"topk_ids .*\[9, 2\], got \[5, 2\]"),
    "ids_three_slots": (changed(ids=lambda b: b.ids.repeat(1, 2)[:, :3]), r"topk_ids .*\[9, 2\], got \[9, 3\]"),
    "ids_int32": (changed(ids=lambda b: b.ids.int()), r"topk_ids must be torch.int64, got torch.int32"),
    "weights_bf16": (changed(weights=lambda b: b.weights.bfloat16()), r"topk_weights must be torch.float32"),
    "weights_too_many": (changed(weights=lambda b: b.weights.repeat(2, 1)), r"topk_weights .*got \[18, 2\]"),
    "id_too_large": (changed(ids=lambda b: at(b.ids, 6)), r"topk_ids\[3, 1\] is 6, expected -1 or .*\[0, 6\)"),
    "id_below_minus_one": (changed(ids=lambda b: at(b.ids, -2)), r"topk_ids\[3, 1\] is -2"),
    "weight_nan": (
        changed(ids=lambda b: at(b.ids, 0), weights=lambda b: at(b.weights, float("nan"))),
        r"topk_weights\[3, 1\] is nan, expected a finite number; 1 of 18",
    ),
    "weight_inf": (
        changed(ids=lambda b: at(b.ids, 0), weights=lambda b: at(b.weights, float("inf"))),
        r"topk_weights\[3, 1\] is inf",
    ),
    "wrong_device": (changed(hidden=lambda b: b.hidden.to("meta")), r"hidden is on meta, the layer is on cpu"),
    "not_a_tensor": (changed(ids=lambda b: b.ids.tolist()), r"topk_ids must be a tensor, got list"),  # type: ignore[arg-type,return-value]
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_named_on_one_rank(wrong: str) -> None:
    change, message = WRONG[wrong]
    bad = change(make_batch(SHAPE, 9))
    with pytest.raises(ValueError, match=message):
        make_layer(SHAPE)(bad.hidden, bad.ids, bad.weights)


def test_gradients_are_refused_until_there_is_a_backward() -> None:
    batch = make_batch(SHAPE, 4)
    layer = make_layer(SHAPE)
    hidden = batch.hidden.clone().requires_grad_()
    with pytest.raises(ValueError, match="has no backward: make it a TrainableMoE"):
        layer(hidden, batch.ids, batch.weights)
    with torch.no_grad():
        layer(hidden, batch.ids, batch.weights)


def one_rank_wrong(group: EPGroup, wrong: str) -> Tensor:
    batch = make_batch(SHAPE, 9, seed=group.rank)
    layer = make_layer(SHAPE, group)
    good = layer(batch.hidden, batch.ids, batch.weights)
    bad = WRONG[wrong][0](batch) if group.rank == 1 else batch
    with pytest.raises(ValueError, match=r".") as refusal:
        layer(bad.hidden, bad.ids, bad.weights)
    again = layer(batch.hidden, batch.ids, batch.weights)
    assert torch.equal(good, again), "the group works on after a refusal"
    raise refusal.value


@pytest.mark.parametrize("wrong", ["id_too_large", "weight_nan", "hidden_too_wide", "not_a_tensor"])
def test_wrong_input_on_one_rank_is_heard_on_all_and_the_group_works_on(ranks: LocalRanks, wrong: str) -> None:
    outcomes = ranks.outcomes(one_rank_wrong, wrong, size=3)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, ValueError), outcome
        said = str(outcome)
        assert ("rank 1" in said) == (rank != 1)
        assert WRONG[wrong][1].split(" ")[0].replace("\\", "") in said


def different(group: EPGroup, shapes: list[MoEShape], options: list[dict[str, object]]) -> None:
    layer = make_layer(shapes[group.rank], group, **options[group.rank])  # type: ignore[arg-type]
    batch = make_batch(shapes[group.rank], 5)
    layer(batch.hidden, batch.ids, batch.weights)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"hidden": 128}, {}, "hidden is 64 on ranks 0, 2, 128 on rank 1"),
        ({"num_experts": 500}, {}, "num_experts is 6 on ranks 0, 2, 500 on rank 1"),
        ({"topk": 3}, {}, "topk is 2 on ranks 0, 2, 3 on rank 1"),
        ({"swiglu_limit": 10.0}, {}, "activation is silu on ranks 0, 2, silu clamp before 10.0 on rank 1"),
        ({"activation": Activation("relu2")}, {}, "activation is silu on ranks 0, 2, relu2 on rank 1"),
        ({"bias": True}, {}, "bias is False on ranks 0, 2, True on rank 1"),
        ({}, {"weight_format": "bf16"}, "weight_format is mxfp4 on ranks 0, 2, bf16 on rank 1"),
        ({}, {"dispatch_format": "bf16"}, "dispatch_format is mxfp8 on ranks 0, 2, bf16 on rank 1"),
        ({}, {"waves": 3}, "waves is auto on ranks 0, 2, 3 on rank 1"),
        ({}, {"name": "layers.1"}, "layer is moe on ranks 0, 2, layers.1 on rank 1"),
    ],
    ids=["hidden", "num_experts", "topk", "swiglu_limit", "activation", "bias", "weights", "wire", "waves", "layer"],
)
def test_ranks_that_disagree_all_find_out(
    ranks: LocalRanks, change: dict[str, Any], options: dict[str, object], message: str
) -> None:
    shapes = [SHAPE, dataclasses.replace(SHAPE, **change), SHAPE]
    begun = time.monotonic()
    outcomes = ranks.outcomes(different, shapes, [{}, options, {}], size=3)
    assert time.monotonic() - begun < 20, "found out from the counts, not from a deadline"
    for outcome in outcomes:
        assert isinstance(outcome, ValueError), outcome
        assert message in str(outcome)


def steps_of_two_layers(group: EPGroup) -> None:
    layers = [make_layer(SHAPE, group, name=f"layers.{index}") for index in range(2)]
    batch = make_batch(SHAPE, 5)
    for index in (0, 1) if group.rank else (1,):  # rank 0 leaves a call out
        layers[index](batch.hidden, batch.ids, batch.weights)


def test_a_rank_that_leaves_out_a_layer_is_found_out_at_once(ranks: LocalRanks) -> None:
    for outcome in ranks.outcomes(steps_of_two_layers, size=2):
        assert isinstance(outcome, (ValueError, PeerError))
    assert "layer is layers.1 on rank 0, layers.0 on rank 1" in str(ranks.outcomes(steps_of_two_layers, size=2)[0])


def calls_once_less(group: EPGroup) -> float:
    batch = make_batch(SHAPE, 5)
    layer = make_layer(SHAPE, EPGroup.of(_world(), deadline_s=1.5), name="layers.7")
    layer(batch.hidden, batch.ids, batch.weights)
    if group.rank == 1:
        time.sleep(3.0)  # alive, but elsewhere
        return 0.0
    begun = time.monotonic()
    with pytest.raises(PeerError) as lost:
        layer(batch.hidden, batch.ids, batch.weights)
    assert (lost.value.rank, lost.value.layer, lost.value.phase) == (1, "layers.7", "counts")
    assert lost.value.host == group.host
    assert "rank 1" in str(lost.value)
    return time.monotonic() - begun


def _world() -> torch.distributed.ProcessGroup:
    world = torch.distributed.group.WORLD
    assert world is not None
    return world


def test_a_rank_called_once_less_ends_in_a_named_error_within_the_deadline(ranks: LocalRanks) -> None:
    waited = ranks.run(calls_once_less, size=2)[0]
    assert 1.0 < waited < 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, 4, 2), "hidden must be a positive integer, got 0"),
        ((64, 2.0, 4, 2), "intermediate must be a positive integer, got 2.0"),
        ((64, 32, 4, 5), "topk 5 is larger than num_experts 4"),
        ((64, 32, True, 1), "num_experts must be a positive integer, got True"),
        ((64, 32, 4, 2, float("nan")), "swiglu_limit must be a positive finite number or None, got nan"),
        ((64, 32, 4, 2, -1.0), "swiglu_limit"),
    ],
)
def test_shapes_are_validated(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEShape(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_format": "fp4"}, "weight_format must be one of mxfp4, bf16, got 'fp4'"),
        ({"dispatch_format": "fp8"}, "dispatch_format must be one of mxfp8, bf16, auto, got 'fp8'"),
        ({"combine_format": "fp8"}, "combine_format must be one of bf16, mxfp8, got 'fp8'"),
        ({"waves": 0}, 'waves must be "auto", a positive integer'),
        ({"waves": (2, 0)}, "waves must be"),
        ({"waves": "many"}, "waves must be"),
        ({"group": "world"}, "group must be a torch ProcessGroup, an EPGroup or None, got str"),
        ({"deadline_s": 0}, "deadline_s must be positive and finite, got 0"),
        ({"device": "gpu"}, "device must be one that torch knows, got 'gpu'"),
        ({"name": 5}, "name must be a string, got int"),
        ({"device": "privateuseone:7"}, "device privateuseone:7 is none of this machine's, or not of this build"),
    ],
)
def test_options_are_validated(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegaMoE(SHAPE, **options)  # type: ignore[arg-type]


def test_what_is_no_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"shape must be a MoEShape\(.*\), got tuple"):
        MegaMoE((64, 32, 6, 2))  # type: ignore[arg-type]


def test_sizes_that_do_not_fill_blocks_are_refused_for_mx_formats_only() -> None:
    odd = MoEShape(hidden=60, intermediate=20, num_experts=2, topk=1)
    with pytest.raises(ValueError, match="hidden 60 is not a multiple of 32"):
        MegaMoE(odd)
    with pytest.raises(ValueError, match="intermediate 20 is not a multiple of 32"):
        MegaMoE(dataclasses.replace(odd, hidden=64))
    plain = make_layer(odd, weight_format="bf16", dispatch_format="bf16")
    batch = make_batch(odd, 7)
    assert plain(batch.hidden, batch.ids, batch.weights).shape == (7, 60)


GATE_UP, DOWN = make_weights(SHAPE)


def poisoned(value: float) -> Tensor:
    weights = GATE_UP.clone()
    weights[2, 5, 7] = value
    return weights


def scales_of(value: int) -> MXFP4:
    packed = quantize_mxfp4(DOWN)
    scales = packed.scales.clone()
    scales[1, 0, 0] = value
    return MXFP4(packed.packed, scales)


@pytest.mark.parametrize(
    ("gate_up", "down", "message"),
    [
        (GATE_UP[:4], DOWN, "gate_up holds 4 experts, expected all 6 or this rank's 6"),
        (GATE_UP[:, :40], DOWN, r"gate_up of expert 0 must have shape \[64, 64\], got \[40, 64\]"),
        (GATE_UP, DOWN[..., :16], r"down of expert 0 must have shape \[64, 32\], got \[64, 16\]"),
        (GATE_UP[0], DOWN, r"gate_up must be \[experts, rows, columns\], got \[64, 64\]"),
        (GATE_UP.to(torch.int32), DOWN, "gate_up of expert 0 must be a float tensor or MXFP4, got torch.int32"),
        (poisoned(float("nan")), DOWN, "gate_up of expert 2: .* 1 of 4096 weights are NaN or infinite"),
        (poisoned(float("-inf")), DOWN, "gate_up of expert 2: .* NaN or infinite"),
        (GATE_UP, scales_of(255), "down of expert 1 has a scale byte of 255; above 252"),
        (GATE_UP, scales_of(253), "down of expert 1 has a scale byte of 253"),
        (GATE_UP, (DOWN, DOWN, DOWN), r"down must be a tensor, MXFP4 or \(packed, scales\), got 3 items"),
        (GATE_UP, (DOWN, DOWN), "MXFP4 packed must be of dtype .*, got torch.float32"),
        (
            GATE_UP.to(torch.float8_e4m3fn),
            DOWN,
            "gate_up of expert 0 must be .*float8_e4m3fn, which means nothing",
        ),
        (GATE_UP, DOWN.to(torch.float8_e5m2), "down of expert 0 must be .*float8_e5m2, which means nothing"),
        (
            GATE_UP,
            DOWN.to(torch.float8_e8m0fnu),
            "down of expert 0 must be .*float8_e8m0fnu, which means nothing",
        ),
        (GATE_UP.to(torch.complex64), DOWN, "gate_up of expert 0 must be a float tensor or MXFP4, got torch.complex64"),
        ("weights", DOWN, "gate_up must be .* got str"),
    ],
)
def test_weights_are_validated(gate_up: object, down: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MegaMoE(SHAPE).load_experts(gate_up, down)  # type: ignore[arg-type]


def test_a_layer_without_all_its_weights_says_which_are_missing() -> None:
    layer = MegaMoE(SHAPE, name="layers.3")
    batch = make_batch(SHAPE, 2)
    layer.load_expert(1, GATE_UP[1], DOWN[1])
    with pytest.raises(ValueError, match=r"layer 'layers.3' has no weights for experts 0, 2, 3, 4, 5: load them first"):
        layer(batch.hidden, batch.ids, batch.weights)
    with pytest.raises(ValueError, match="expert 6 is not of this rank, which holds experts 0 to 5"):
        layer.load_expert(6, GATE_UP[0], DOWN[0])
    for wrong in ("3", 3.0, None, True):
        with pytest.raises(ValueError, match=f"expert must be an integer, a global id, got {wrong!r}"):
            layer.load_expert(wrong, GATE_UP[0], DOWN[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "meta", "rank": 0, "size": 1}, "no process-group backend is known for device type 'meta'"),
        ({"rank": 2, "size": 2}, r"rank 2 is not in \[0, 2\)"),
        ({"rank": 0, "size": 1, "deadline_s": -1}, "deadline_s must be positive"),
    ],
)
def test_groups_are_validated(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message), init_group(**options):  # type: ignore[arg-type]
        pass


def entered(**given: Any) -> None:
    with init_group(**given):
        pass


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (MegaMoE, {"shape": SHAPE, "deadline_s": "60"}, "deadline_s must be positive and finite, got '60'"),
        (MegaMoE, {"shape": SHAPE, "machine": "machine.yaml"}, "machine must be what megamoe.catalog.load_machine"),
        (TrainableMoE, {"shape": SHAPE, "seed": "a"}, "seed must be an integer, got 'a'"),
        (MegaMoECluster, {"ranks": 2, "policy": 3}, "policy must be a RestartPolicy, got int"),
        (entered, {"rank": "0", "size": 1}, "rank must be an integer, got '0'"),
        (entered, {"rank": 0, "size": 1.5}, "size must be an integer, got 1.5"),
        (entered, {"rank": 0, "size": 1, "deadline_s": None}, "deadline_s must be positive and finite, got None"),
        (
            entered,
            {"rank": 0, "size": 1, "deadline_s": float("inf")},
            "deadline_s must be positive and finite, got inf",
        ),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(
    make: Callable[..., object], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(**given)


def test_a_group_is_printed_in_a_line_that_says_whether_it_serves() -> None:
    group = EPGroup.of(None)
    assert repr(group) == "EPGroup(rank=0, size=1, deadline_s=60)"
    group.broken.append("rank 1 is dead")
    assert repr(group) == "EPGroup(rank=0, size=1, deadline_s=60, broken: rank 1 is dead)"
