"""Devices without kernels of ours, where torch multiplies: the layer and its backward stay on them, with the CPU's bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megamoe.kernels.cpu.library import using
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE, clip_grad_norm_
from tests.cases import ACTIVATIONS, Batch, make_batch, make_biases, make_weights, split
from tests.pretended import DEVICE, Elsewhere, group_there, pretended
from tests.training_cases import joined, make_gradient

SHAPE = MoEShape(64, 32, 6, 2, bias=True)
FORMATS = {"bf16": "bf16", "mxfp4": "mxfp8"}
BATCH = make_batch(SHAPE, 23)


@contextmanager
def by_torch() -> Iterator[None]:
    """torch multiplies on the CPU too, and in the dtype that it does elsewhere."""
    with using(None), mock.patch("megamoe.execution.products.multiply_dtype", lambda _: torch.bfloat16):
        yield


def there(batch: Batch) -> Batch:
    return Batch(batch.hidden.to(DEVICE), batch.ids.to(DEVICE), batch.weights.to(DEVICE))


def here(each: Tensor) -> Tensor:
    """On the CPU; it was on the device."""
    assert isinstance(each, Elsewhere)
    return each.inner


def called(device: torch.device | str, group: EPGroup | None, batch: Batch, **options: Any) -> Tensor:
    layer = MegaMoE(SHAPE, group, device=device, **options)
    layer.load_experts(*make_weights(SHAPE), **make_biases(SHAPE))
    return layer(batch.hidden, batch.ids, batch.weights)


def trained(device: torch.device | str, group: EPGroup | None, batch: Batch, rows: slice, **options: Any) -> Any:
    """Gradients of a call, by name, and the weights after a clipped step."""
    layer = TrainableMoE(SHAPE, group, device=device, **options)
    layer.load_experts(*make_weights(SHAPE), **make_biases(SHAPE))
    hidden, weights = batch.hidden.clone().requires_grad_(), batch.weights.clone().requires_grad_()
    layer(hidden, batch.ids, weights).backward(make_gradient(BATCH)[rows].to(device))
    found = {"hidden": hidden.grad, "topk_weights": weights.grad}
    found |= {name: each.grad.clone() for name, each in layer.experts.named_parameters()}
    clip_grad_norm_(layer.parameters(), 0.1)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    return found | {f"{name}, stepped": each.detach() for name, each in layer.experts.named_parameters()}


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "no-streams"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_layer_on_another_device_has_the_bits_of_torch_on_the_cpu(weight_format: str, streams: bool) -> None:
    options = {"weight_format": weight_format, "dispatch_format": FORMATS[weight_format]}
    with by_torch():
        expected = called("cpu", None, BATCH, **options)
        with pretended(streams=streams):
            found = called(DEVICE, None, there(BATCH), **options)
            assert torch.equal(here(found), expected)
            assert here(called(DEVICE, None, there(BATCH.part(slice(0))), **options)).shape == (0, 64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_stays_on_its_device(activation: str) -> None:
    shape = MoEShape(64, 32, 6, 2, activation=ACTIVATIONS[activation])
    results = []
    with by_torch(), pretended():
        for device in ("cpu", DEVICE):
            layer = TrainableMoE(shape, device=device)
            out = layer(*(each.to(device) for each in (BATCH.hidden, BATCH.ids, BATCH.weights)))
            out.backward(make_gradient(BATCH).to(device))
            results.append([out, *(each.grad for each in layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, here(other))


@pytest.mark.parametrize("streams", [True, False], ids=["streams", "no-streams"])
@pytest.mark.parametrize("saved", ["tokens", "activations", "dispatch-again"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_training_on_another_device_has_the_bits_of_torch_on_the_cpu(
    weight_format: str, saved: str, streams: bool
) -> None:
    options = {"weight_format": weight_format, "dispatch_format": FORMATS[weight_format], "saved": saved}
    if saved == "activations":
        options |= {"rounding": "stochastic", "gradient_format": "mxfp8"}
    with by_torch():
        expected = trained("cpu", None, BATCH, slice(None), **options)
        with pretended(streams=streams):
            found = trained(DEVICE, None, there(BATCH), slice(None), **options)
    assert [name for name, each in found.items() if not torch.equal(here(each), expected[name])] == []


def on_ranks(group: EPGroup, sweep: list[dict[str, Any]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """This rank's part of the batch on its device, forward and trained, for each of the options."""
    rows, found = split(len(BATCH.hidden), group.size)[group.rank], []
    with by_torch(), pretended():
        ranks, mine = group_there(group), there(BATCH.part(rows))
        for options in sweep:
            out = here(called(DEVICE, ranks, mine, **options))
            of_rank = trained(DEVICE, ranks, mine, rows, **options)
            found.append((out, {name: here(each) for name, each in of_rank.items()}))
    return found


def test_ranks_on_other_devices_have_the_bits_of_one_on_the_cpu(ranks: LocalRanks) -> None:
    sweep = [
        {"weight_format": weight_format, "dispatch_format": wire, "waves": waves}
        for (weight_format, wire), waves in zip(FORMATS.items(), (3, "auto"), strict=True)
    ]
    parts = ranks.run(on_ranks, sweep, size=3)
    with by_torch():
        for number, options in enumerate(sweep):
            assert torch.equal(torch.cat([part[number][0] for part in parts]), called("cpu", None, BATCH, **options))
            expected, found = trained("cpu", None, BATCH, slice(None), **options), joined([p[number][1] for p in parts])
            assert [name for name, each in found.items() if not torch.equal(each, expected[name])] == []
