"""What a user has set in torch around a layer changes no bit of it, and stands as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from megamoe.layer import MegaMoE
from megamoe.model.router import Router
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, make_weights, oracle

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2, swiglu_limit=3.0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


AROUND: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast_bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default_float64": lambda: default_dtype(torch.float64),
    "default_bfloat16": lambda: default_dtype(torch.bfloat16),
    "default_device_meta": lambda: torch.device("meta"),
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "flush_denormal": flushed,
    "nothing": nullcontext,
}


def call(layer: MegaMoE, batch: Batch) -> Tensor:
    return layer(batch.hidden, batch.ids, batch.weights)


def tiny(batch: Batch) -> Batch:
    """A batch some of whose products are subnormal."""
    hidden = batch.hidden.clone()
    hidden[::3] *= 2.0**-120
    return Batch(hidden, batch.ids, batch.weights)


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("around", AROUND)
def test_a_layer_made_loaded_and_called_within_has_the_bits_of_one_outside(around: str, weight_format: str) -> None:
    batch = tiny(make_batch(SHAPE, 50))
    expected = oracle(SHAPE, batch, weight_format, "bf16")
    weights = make_weights(SHAPE)
    outside = make_layer(SHAPE, weight_format=weight_format, dispatch_format="bf16")
    with AROUND[around]():
        within = MegaMoE(SHAPE, weight_format=weight_format, dispatch_format="bf16")
        within.load_experts(*weights)
        outs = [call(outside, batch), call(within, batch)]
    outs += [call(outside, batch), call(within, batch)]
    for out in outs:
        assert out.device.type == "cpu"
        assert torch.equal(out, expected)
        assert not out.requires_grad


@pytest.mark.parametrize("around", AROUND)
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

    with AROUND[around]():
        before = settings()
        call(layer, batch)
        assert settings() == before


@pytest.mark.parametrize("around", [name for name in AROUND if name != "default_device_meta"])
def test_a_router_chooses_the_same_experts_within(around: str) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 64, generator=rng).to(torch.bfloat16)
    weight, bias = torch.randn(16, 64, generator=rng).to(torch.bfloat16) / 8, torch.randn(16, generator=rng)
    router, nobody = Router(weight, 4, 2.5, bias=bias), torch.zeros(500, dtype=torch.int64)
    ids, weights = router(hidden, nobody)
    with AROUND[around]():
        got = router(hidden, nobody)
    assert torch.equal(got[0], ids)
    assert torch.equal(got[1], weights)


def test_a_compiled_layer_runs_as_it_is_and_the_layer_goes_on_working() -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 20)
    expected = call(layer, batch)

    def model(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return layer(hidden * 1, ids, weights) + 0

    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(batch.hidden, batch.ids, batch.weights), expected)
    assert torch.equal(call(layer, batch), expected)


@pytest.mark.parametrize("which", ["hidden", "topk_weights"])
def test_a_gradient_that_is_not_given_is_refused_whichever_input_asks_for_it(which: str) -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 5)
    hidden, weights = batch.hidden.float(), batch.weights.clone()
    (hidden if which == "hidden" else weights).requires_grad_()
    with pytest.raises(ValueError, match=f"{which} requires a gradient"):
        layer(hidden, batch.ids, weights)
    with torch.no_grad():
        assert torch.equal(layer(hidden, batch.ids, weights), call(layer, batch))
