"""What a user has set in torch stands as it was after a call; tokens whose products are subnormal; routers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.layer import MegaMoE
from megamoe.model.router import Router
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from tests.cases import Batch, make_batch, make_layer, make_weights, oracle
from tests.test_surroundings import AMBIENT

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2, swiglu_limit=3.0)


def call(layer: MegaMoE, batch: Batch) -> Tensor:
    return layer(batch.hidden, batch.ids, batch.weights)


def tiny(batch: Batch) -> Batch:
    """A batch some of whose products are subnormal."""
    hidden = batch.hidden.clone()
    hidden[::3] *= 2.0**-120
    return Batch(hidden, batch.ids, batch.weights)


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("around", AMBIENT)
def test_a_layer_made_loaded_and_called_within_has_the_bits_of_one_outside(around: str, weight_format: str) -> None:
    batch = tiny(make_batch(SHAPE, 50))
    expected = oracle(SHAPE, batch, weight_format, "bf16")
    weights = make_weights(SHAPE)
    outside = make_layer(SHAPE, weight_format=weight_format, dispatch_format="bf16")
    with AMBIENT[around]():
        within = MegaMoE(SHAPE, weight_format=weight_format, dispatch_format="bf16")
        within.load_experts(*weights)
        outs = [call(outside, batch), call(within, batch)]
    outs += [call(outside, batch), call(within, batch)]
    for out in outs:
        assert out.device.type == "cpu"
        assert torch.equal(out, expected)
        assert not out.requires_grad


def negated(tensor: Tensor) -> Tensor:
    """As the imaginary part of a conjugate has it: the memory of one value, read as another."""
    found = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.parametrize("num_tokens", [5, 600], ids=["few tokens", "by waves"])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_negation_that_torch_has_put_off_counts(weight_format: str, num_tokens: int) -> None:
    batch, layer = make_batch(SHAPE, num_tokens), make_layer(SHAPE, weight_format=weight_format, dispatch_format="bf16")
    hidden = torch._neg_view(-batch.hidden)
    assert torch.equal(layer(hidden, batch.ids, negated(batch.weights)), call(layer, batch))


def test_a_negation_that_torch_has_put_off_counts_in_a_backward() -> None:
    batch, layer = make_batch(SHAPE, 9), TrainableMoE(SHAPE, saved="dispatch-again")
    found = []
    for hidden, weights, again in (
        (batch.hidden.float(), batch.weights, lambda gradient: gradient),
        (negated(batch.hidden.float()), negated(batch.weights), lambda gradient: torch._neg_view(-gradient)),
    ):
        asked, gradient = hidden.detach().requires_grad_(), torch.ones(9, SHAPE.hidden, dtype=torch.bfloat16)
        layer.zero_grad()
        layer(asked, batch.ids, weights).backward(again(gradient))
        found.append([asked.grad, *(each.grad for each in layer.parameters())])
    for plain, put_off in zip(*found, strict=True):
        assert torch.equal(plain, put_off)


@pytest.mark.parametrize("around", AMBIENT)
def test_what_was_set_stands_as_it_was(around: str) -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 5)

    def settings() -> tuple[object, ...]:
        least = torch.tensor([1], dtype=torch.int32, device="cpu").view(torch.float32)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.empty(0).device.type,
            bool((least * 1.0).view(torch.int32).item()),
        )

    with AMBIENT[around]():
        before = settings()
        call(layer, batch)
        assert settings() == before


@pytest.mark.parametrize("around", [name for name in AMBIENT if name not in ("device_block", "default_device")])
def test_a_router_chooses_the_same_experts_within(around: str) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 64, generator=rng).to(torch.bfloat16)
    weight, bias = torch.randn(16, 64, generator=rng).to(torch.bfloat16) / 8, torch.randn(16, generator=rng)
    router, nobody = Router(weight, 4, 2.5, bias=bias), torch.zeros(500, dtype=torch.int64)
    ids, weights = router(hidden, nobody)
    with AMBIENT[around]():
        got = router(hidden, nobody)
    assert torch.equal(got[0], ids)
    assert torch.equal(got[1], weights)
