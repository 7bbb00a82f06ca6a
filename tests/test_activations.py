"""Activations as data, and biases: what is refused, the plain formulas of families, and the layer's bits for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megamoe.activations import SWIGLU, Activation
from megamoe.formats import dequantize_mxfp4, quantize_mxfp4
from megamoe.kernels.cpu.library import using
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.reference import moe_fp64, relative_error
from megamoe.shape import MoEShape
from tests.cases import ACTIVATIONS, Batch, make_batch, make_biases, make_layer, make_weights, oracle, split

FORMATS = [(weights, wire) for weights in ("mxfp4", "bf16") for wire in ("mxfp8", "bf16")]


def shape_of(activation: Activation, bias: bool) -> MoEShape:
    return MoEShape(hidden=64, intermediate=96, num_experts=5, topk=3, activation=activation, bias=bias)


SHAPES = {
    f"{name}{'-bias' if bias else ''}": shape_of(activation, bias)
    for name, activation in ACTIVATIONS.items()
    for bias in (False, True)
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


# ---- the description ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"function": "gelu"}, "function must be one of silu, gelu_tanh, relu2, got 'gelu'"),
        ({"clamp": "around"}, "clamp must be one of before, after, tanh, got 'around'"),
        ({"gated": 1}, "gated must be True or False, got 1"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"up_shift": True}, "up_shift must be a finite number, got True"),
        ({"limit": 0.0}, "limit must be a positive finite number or None, got 0.0"),
        ({"limit": 2.0, "up_limit": -1.0}, "up_limit must be a positive finite number or None, got -1.0"),
        ({"limit": 10**400}, "limit must be a positive finite number or None"),
        ({"up_limit": 2.0}, "up_limit 2.0 needs a limit of the gate"),
        ({"function": "relu2", "alpha": 1.5}, "alpha 1.5 is of silu; relu2 has none"),
        ({"clamp": "tanh"}, 'clamp "tanh" needs silu and a limit, got silu and limit None'),
        ({"function": "relu2", "clamp": "tanh", "limit": 1.0}, 'clamp "tanh" needs silu and a limit, got relu2'),
        ({"gated": False, "up_shift": 1.0}, "without a gate there is no up, got up_shift 1.0"),
    ],
    ids=lambda each: "-".join(each) if isinstance(each, dict) else "",
)
def test_what_an_activation_cannot_be_is_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        Activation(**given)  # type: ignore[arg-type]


def test_no_two_activations_have_the_same_words() -> None:
    words = [str(each) for each in ACTIVATIONS.values()]
    assert len(set(words)) == len(words)
    assert str(ACTIVATIONS["gpt_oss"]) == "silu clamp before 5.0 alpha 1.702 up + 1.0"
    assert str(ACTIVATIONS["inkling2"]) == "silu clamp tanh 4.0 and 2.5"
    assert str(Activation(limit=10)) == str(Activation(limit=10.0)), "ranks may write a number either way"


def test_swiglu_limit_is_short_for_an_activation() -> None:
    short, full = MoEShape(64, 32, 4, 2, 10.0), MoEShape(64, 32, 4, 2, activation=SWIGLU.with_limit(10.0))
    assert short == full == MoEShape(64, 32, 4, 2, 10.0, activation=SWIGLU.with_limit(10.0))
    assert hash(short) == hash(full)
    assert full.swiglu_limit == 10.0
    assert MoEShape(64, 32, 4, 2).activation == SWIGLU
    assert replace(short, hidden=32) == MoEShape(32, 32, 4, 2, 10.0)
    assert replace(short, swiglu_limit=3.0, activation=SWIGLU).activation.limit == 3.0
    other = MoEShape(64, 32, 4, 2, activation=ACTIVATIONS["gpt_oss"])
    assert other.swiglu_limit is None, "which alone would say less than the activation"
    assert MoEShape(64, 32, 4, 2, activation=ACTIVATIONS["nemotron_h"]).linear1_rows == 32
    assert other.linear1_rows == 64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"swiglu_limit": 7.0, "activation": ACTIVATIONS["gpt_oss"]},
            "swiglu_limit 7.0 is short for the activation 'silu clamp before 7.0', and activation is "
            "'silu clamp before 5.0 alpha 1.702 up + 1.0': give one of them",
        ),
        ({"swiglu_limit": 7.0, "activation": SWIGLU.with_limit(3.0)}, "swiglu_limit 7.0 is short for"),
        ({"swiglu_limit": 7.0, "activation": Activation(clamp="after")}, "swiglu_limit 7.0 is short for"),
        ({"activation": "silu"}, "activation must be a megamoe.Activation, such as .*, got 'silu'"),
        ({"bias": 1}, "bias must be True or False, got 1"),
    ],
)
def test_a_shape_that_contradicts_itself_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("+", r"\+")):
        MoEShape(64, 32, 4, 2, **given)  # type: ignore[arg-type]


# ---- the oracle against the formulas of families, as transformers computes them, in FP64 ----


def plain_activation(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """What each family's gate does, written as its model writes it."""
    a = ACTIVATIONS[name]
    limit = torch.inf if a.limit is None else a.limit
    above = limit if a.up_limit is None else a.up_limit
    if name == "deepseek_v4":
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)
    if name == "gpt_oss":
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    if name == "step3p7":
        return torch.nn.functional.silu(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)
    if name == "inkling2":
        return torch.tanh(gate / limit) * limit * torch.sigmoid(gate) * (torch.tanh(up / above) * above)
    if name == "gemma4":
        inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    assert name == "swiglu", name
    return gate / (1 + torch.exp(-gate)) * up


def plain_moe(name: str, batch: Batch, weights: tuple[Tensor, Tensor], biases: dict[str, Tensor]) -> Tensor:
    """As a family's experts compute it: the weight after the second product and its bias, nothing rounded -> float64"""
    gate_up, down = (each.double() for each in weights)
    out = torch.zeros(batch.hidden.shape, dtype=torch.float64)
    for token, (x, ids, scores) in enumerate(
        zip(batch.hidden.double(), batch.ids.tolist(), batch.weights, strict=True)
    ):
        for expert, score in zip(ids, scores.double(), strict=True):
            if expert < 0:
                continue
            first = gate_up[expert] @ x + (biases["gate_up_bias"][expert].double() if biases else 0)
            activated = torch.relu(first).square() if name == "nemotron_h" else plain_activation(name, *first.chunk(2))
            second = down[expert] @ activated + (biases["down_bias"][expert].double() if biases else 0)
            out[token] += score * second
    return out


def fp64(shape: MoEShape, batch: Batch, weights: tuple[Tensor, Tensor], weight_format: str, wire: str) -> Tensor:
    gate_up, down = weights
    biases = make_biases(shape)
    return moe_fp64(
        shape,
        batch.hidden,
        batch.ids,
        batch.weights,
        gate_up,
        down,
        gate_up_bias=biases.get("gate_up_bias"),
        down_bias=biases.get("down_bias"),
        weight_format=weight_format,
        dispatch_format=wire,
    )


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "name", ["swiglu", "deepseek_v4", "gpt_oss", "step3p7", "inkling2", "gemma4", "nemotron_h"], ids=str
)
def test_the_oracle_is_the_familys_own_formula(name: str, bias: bool) -> None:
    shape = shape_of(ACTIVATIONS[name], bias)
    batch, biases = make_batch(shape, 60), make_biases(shape)
    gate_up, down = (each.bfloat16().float() for each in make_weights(shape))
    expected = plain_moe(name, batch, (gate_up, down), biases)
    assert relative_error(fp64(shape, batch, (gate_up, down), "bf16", "bf16"), expected) < 4e-3
    assert relative_error(oracle(shape, batch, "bf16", "bf16"), expected) < 1e-2
    gate_up, down = (dequantize_mxfp4(quantize_mxfp4(each)).float() for each in make_weights(shape))
    expected = plain_moe(name, batch, (gate_up, down), biases)
    assert relative_error(oracle(shape, batch, "mxfp4", "mxfp8"), expected) < 6e-2


@every_shape
def test_the_oracle_is_near_exact_sums_of_the_same_operands(shape: MoEShape) -> None:
    batch = make_batch(shape, 100)
    for weights, wire in FORMATS:
        exact = fp64(shape, batch, make_weights(shape), weights, wire)
        assert relative_error(oracle(shape, batch, weights, wire), exact) < 5e-3, (weights, wire)


# ---- the layer ----


def every_variant(group: EPGroup, batch: Batch, shares: list[slice]) -> dict[tuple[str, str, str], Tensor]:
    mine = batch.part(shares[group.rank])
    out = {}
    for name, shape in SHAPES.items():
        for weights, wire in FORMATS:
            layer = make_layer(shape, group, weight_format=weights, dispatch_format=wire, waves=2)
            out[name, weights, wire] = layer(mine.hidden, mine.ids, mine.weights)
    return out


@pytest.mark.parametrize("ep_size", [1, 2], ids="ep{}".format)
def test_every_variant_has_the_oracles_bits_on_one_rank_and_on_two(ranks: LocalRanks, ep_size: int) -> None:
    batch = make_batch(SHAPES["swiglu"], 41)
    outputs = ranks.run(every_variant, batch, split(41, ep_size), size=ep_size)
    for name, shape in SHAPES.items():
        for weights, wire in FORMATS:
            got = torch.cat([output[name, weights, wire] for output in outputs])
            assert torch.equal(got, oracle(shape, batch, weights, wire)), (name, weights, wire)


@pytest.fixture
def by_torch() -> Iterator[None]:
    with using(None):
        yield


@pytest.mark.usefixtures("by_torch")
@every_shape
def test_torch_alone_gives_every_variant_the_oracles_bits(shape: MoEShape) -> None:
    batch = make_batch(shape, 70)
    for weights in ("mxfp4", "bf16"):
        got = make_layer(shape, weight_format=weights)(batch.hidden, batch.ids, batch.weights)
        assert torch.equal(got, oracle(shape, batch, weights, "mxfp8")), weights


def test_a_token_of_an_ungated_layer_with_biases_has_the_same_bits_alone() -> None:
    shape = SHAPES["nemotron_h-bias"]
    batch, layer = make_batch(shape, 257), make_layer(SHAPES["nemotron_h-bias"])
    together = layer(batch.hidden, batch.ids, batch.weights)
    alone = batch.part(slice(200, 201))
    assert torch.equal(layer(alone.hidden, alone.ids, alone.weights)[0], together[200])


def test_a_bias_weighs_as_much_as_its_row() -> None:
    """Zero weights leave the biases alone: each slot adds its weight times the expert's bias."""
    shape = MoEShape(64, 32, 4, 2, bias=True)
    layer = MegaMoE(shape)
    biases = make_biases(shape)
    layer.load_experts(torch.zeros(4, 64, 64), torch.zeros(4, 64, 32), **biases)
    hidden, weights = torch.zeros(2, 64), torch.tensor([[0.5, 2.0], [0.25, 3.0]])
    got = layer(hidden, torch.tensor([[0, 3], [2, -1]]), weights)
    down = biases["down_bias"]
    expected = torch.stack(
        ((0.5 * down[0]).bfloat16().float() + (2 * down[3]).bfloat16().float(), (0.25 * down[2]).bfloat16().float())
    )
    assert torch.equal(got, expected.bfloat16())


# ---- biases are weights like the others ----

BIASED = MoEShape(64, 32, 4, 2, bias=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up_bias": None}, "gate_up_bias of expert 0 is missing: the layer's shape has bias=True"),
        ({"down_bias": None}, "down_bias of expert 0 is missing"),
        ({"gate_up_bias": torch.zeros(4, 32)}, r"gate_up_bias of expert 0 must have shape \[64\], got \[32\]"),
        ({"down_bias": torch.zeros(3, 64)}, "down_bias holds 3 experts, expected all 4 or this rank's 4"),
        ({"down_bias": torch.zeros(64)}, r"down_bias must be \[experts, columns\], got \[64\]"),
        ({"down_bias": torch.zeros(4, 64, dtype=torch.float16)}, "must be torch.float32 or torch.bfloat16, got"),
        ({"down_bias": torch.full((4, 64), torch.nan)}, "down_bias of expert 0: 64 of 64 values are NaN or infinite"),
    ],
    ids=["no_gate_up", "no_down", "width", "experts", "one", "dtype", "nan"],
)
def test_biases_that_do_not_fit_are_refused_and_nothing_is_taken(change: dict[str, Tensor], message: str) -> None:
    layer = MegaMoE(BIASED)
    with pytest.raises(ValueError, match=message):
        layer.load_experts(*make_weights(BIASED), **{**make_biases(BIASED), **change})
    assert layer.experts.missing == [0, 1, 2, 3]


def test_a_bias_is_refused_by_a_layer_without_and_where_it_is_no_tensor() -> None:
    layer = MegaMoE(MoEShape(64, 32, 4, 2))
    gate_up, down = make_weights(BIASED)
    with pytest.raises(ValueError, match="down_bias of expert 2 was given to a layer without biases"):
        layer.load_expert(2, gate_up[2], down[2], down_bias=torch.zeros(64))
    with pytest.raises(ValueError, match="down_bias of expert 2 must be a tensor, got list"):
        MegaMoE(BIASED).load_expert(2, gate_up[2], down[2], torch.zeros(64), [0.0] * 64)  # type: ignore[arg-type]


def test_an_ungated_layer_takes_one_matrix_for_linear1() -> None:
    shape = MoEShape(64, 32, 4, 2, activation=ACTIVATIONS["nemotron_h"])
    with pytest.raises(ValueError, match=r"gate_up of expert 0 must have shape \[32, 64\], got \[64, 64\]"):
        MegaMoE(shape).load_experts(*make_weights(BIASED))
    gated, ungated = (MegaMoE(each, weight_format="bf16").memory_bytes for each in (MoEShape(64, 32, 4, 2), shape))
    assert gated - ungated == 4 * 32 * 64 * 2


def test_biases_are_in_the_state_dict_and_move_with_their_experts() -> None:
    layer = make_layer(BIASED)
    bf16 = MegaMoE(BIASED)
    rounded = {name: bias.bfloat16() for name, bias in make_biases(BIASED).items()}
    bf16.load_experts(*make_weights(BIASED), **rounded)
    batch = make_batch(BIASED, 20)
    for each, biases in ((layer, make_biases(BIASED)), (bf16, rounded)):
        state = each.state_dict()
        for name, bias in biases.items():
            assert torch.equal(state[f"experts.{name}"], bias.float())
        again = MegaMoE(BIASED)
        again.load_state_dict(state)
        expected = each(batch.hidden, batch.ids, batch.weights)
        assert torch.equal(again(batch.hidden, batch.ids, batch.weights), expected)
    without = MegaMoE(MoEShape(64, 32, 4, 2))
    assert layer.memory_bytes - without.memory_bytes == 4 * (64 + 64) * 4
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: .*"experts.gate_up_bias"'):
        without.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: .*"experts.down_bias"'):
        layer.load_state_dict(make_layer(MoEShape(64, 32, 4, 2)).state_dict())
    bad = {**layer.state_dict(), "experts.down_bias": torch.full((4, 64), torch.inf)}
    with pytest.raises(RuntimeError, match=r"experts\.down_bias: 256 of 256 values are NaN or infinite"):
        MegaMoE(BIASED).load_state_dict(bad)
    experts = layer.experts
    experts.regroup(range(1, 3))
    assert torch.equal(experts.bias("down", range(1, 3)), make_biases(BIASED)["down_bias"][1:3])
    assert torch.equal(experts.bias("gate_up", range(2, 3)), make_biases(BIASED)["gate_up_bias"][2:3])
