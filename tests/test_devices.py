"""Devices where torch multiplies: the layer and its backward stay on them, and have the bits of torch on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megamoe.kernels.cpu.library import KernelWarning, using
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.model import load
from megamoe.model.making.tiny import write_tiny
from megamoe.parallel.group import EPGroup
from megamoe.reference import relative_error
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE, clip_grad_norm_, sum_gradients
from tests.cases import ACTIVATIONS, Batch, make_batch, make_biases, make_weights, split
from tests.pretended import DEVICE, Elsewhere, group_there, pretended
from tests.training_cases import joined, make_gradient

SHAPE = MoEShape(64, 32, 6, 2, bias=True)
FORMATS = {"bf16": "bf16", "mxfp4": "mxfp8"}
BATCH = make_batch(SHAPE, 23)


@contextmanager
def by_torch() -> Iterator[None]:
    """torch multiplies on the CPU too, and in the dtype that it does elsewhere."""
    with using(None), mock.patch("megamoe.execution.products.multiply_dtype", return_value=torch.bfloat16):
        yield


def there(batch: Batch) -> Batch:
    return Batch(batch.hidden.to(DEVICE), batch.ids.to(DEVICE), batch.weights.to(DEVICE))


def here(each: Tensor) -> Tensor:
    """On the CPU; it was on the device."""
    assert isinstance(each, Elsewhere)
    return each.behind


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
    leaves = {"hidden": hidden, "topk_weights": weights, **dict(layer.experts.named_parameters())}
    found = {name: each.grad.clone() for name, each in leaves.items() if each.grad is not None}
    assert len(found) == len(leaves)
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
    rows = split(len(BATCH.hidden), group.size)[group.rank]
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    with by_torch(), pretended():
        ranks, mine = group_there(group), there(BATCH.part(rows))
        for options in sweep:
            out = here(called(DEVICE, ranks, mine, **options))
            if options.get("combine_format") == "mxfp8":
                found.append((out, {}))
                continue
            of_rank = trained(DEVICE, ranks, mine, rows, **options)
            found.append((out, {name: here(each) for name, each in of_rank.items()}))
        dense = torch.nn.Parameter(torch.zeros(3, 5, device=DEVICE))
        dense.grad = torch.full_like(dense, group.rank + 1.0)
        sum_gradients([dense], ranks)
        assert (here(dense.grad) == sum(range(1, group.size + 1))).all()
    return found


def test_ranks_on_other_devices_have_the_bits_of_one_on_the_cpu(ranks: LocalRanks) -> None:
    sweep = [
        {"weight_format": weight_format, "dispatch_format": wire, "waves": waves}
        for (weight_format, wire), waves in zip(FORMATS.items(), (3, "auto"), strict=True)
    ]
    sweep.append({"weight_format": "mxfp4", "combine_format": "mxfp8"})
    parts = ranks.run(on_ranks, sweep, size=3)
    with by_torch():
        for number, options in enumerate(sweep):
            assert torch.equal(torch.cat([part[number][0] for part in parts]), called("cpu", None, BATCH, **options))
            if "combine_format" in options:
                continue
            expected, found = trained("cpu", None, BATCH, slice(None), **options), joined([p[number][1] for p in parts])
            assert [name for name, each in found.items() if not torch.equal(each, expected[name])] == []


def test_what_a_layer_holds_goes_from_one_device_to_another() -> None:
    with by_torch():
        layer = MegaMoE(SHAPE)
        layer.load_experts(*make_weights(SHAPE), **make_biases(SHAPE))
        expected = layer(BATCH.hidden, BATCH.ids, BATCH.weights)
        with pretended():
            moved, back = MegaMoE(SHAPE, device=DEVICE, keep_dequantized=True), MegaMoE(SHAPE)
            moved.load_state_dict(layer.state_dict())
            batch = there(BATCH)
            assert torch.equal(here(moved(batch.hidden, batch.ids, batch.weights)), expected)
            back.load_state_dict({name: each.cpu() for name, each in moved.state_dict().items()})
        assert torch.equal(back(BATCH.hidden, BATCH.ids, BATCH.weights), expected)


@pytest.mark.parametrize("family", ["deepseek-v4-flash", "gpt-oss"])
def test_a_whole_model_computes_on_its_device(tmp_path: Path, family: str) -> None:
    write_tiny(tmp_path / family, family, num_experts=8, topk=2)
    ids = torch.arange(3, 12)[None]
    with by_torch(), torch.no_grad():
        expected = load(tmp_path / family)(input_ids=ids).logits
        with pretended():
            with pytest.warns(KernelWarning, match="dense products on lazy:0 are torch's"):
                model = load(tmp_path / family, device=DEVICE)
            found = here(model(input_ids=ids.to(DEVICE)).logits)
            text = here(model.generate(ids.to(DEVICE), max_new_tokens=3, do_sample=False))
    assert relative_error(found, expected) < 3e-2  # dense products of the CPU are in blocks of rows
    assert text[:, :9].equal(ids)
    assert text.shape[1] > 9


def test_a_stock_model_trains_on_the_device_that_it_was_moved_to(tmp_path: Path) -> None:
    write_tiny(tmp_path / "mixtral", "mixtral", num_experts=8, topk=2)
    ids, results = torch.arange(3, 12)[None], []
    with by_torch(), pretended():
        for device in ("cpu", DEVICE):
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", experts_implementation="megamoe")
            model = model.train().to(device)
            model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
            results.append({name: each.grad for name, each in model.named_parameters()})
    for name, each in results[0].items():
        assert relative_error(here(results[1][name]), each) < 3e-2, (
            name
        )  # attention's own products differ in a last bit


def test_an_operation_on_two_devices_is_refused_there_as_on_a_real_one() -> None:
    with pretended():
        on_it = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="was given tensors on lazy:0 and on the CPU"):
            on_it + torch.ones(3)
        assert here(on_it + 1).tolist() == [2.0, 2.0, 2.0]


def test_training_by_the_mega_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="transport='fused' has no backward pass"):
        TrainableMoE(SHAPE, transport="fused", max_tokens_per_rank=8)
