"""Weights that are of one rank: no wrapper touches them, and a state dict says whose they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from megamoe.execution import products
from megamoe.execution.experts import Experts
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.reference import moe
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_biases, make_layer, make_weights

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)


def output(layer: MegaMoE) -> Tensor:
    batch = make_batch(SHAPE, 20)
    return layer(batch.hidden, batch.ids, batch.weights)


def expected(weight_format: str = "mxfp4") -> Tensor:
    batch = make_batch(SHAPE, 20)
    return moe(SHAPE, batch.hidden, batch.ids, batch.weights, *make_weights(SHAPE), weight_format=weight_format)


# ---- weights that do not lie here as plain values ----


def distributed(weight: Tensor) -> Tensor:
    return distribute_tensor(weight, DeviceMesh("cpu", [0]), [Replicate()])


ELSEWHERE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "distributed": (distributed, r"DTensor.*full_tensor\(\) or to_local\(\)"),
    "sparse": (Tensor.to_sparse, "layout torch.sparse_coo"),
    "meta": (lambda weight: weight.to("meta"), "meta, which holds no values"),
}


def weights_elsewhere(group: EPGroup, weight_format: str) -> None:
    layer = make_layer(SHAPE, group, weight_format=weight_format)
    gate_up, down = make_weights(SHAPE, seed=9)
    state = MegaMoE(SHAPE, group, weight_format=weight_format)
    state.load_experts(gate_up, down)
    for elsewhere, message in ELSEWHERE.values():
        with pytest.raises(ValueError, match=f"down must be .*{message}"):
            layer.load_experts(gate_up, elsewhere(down))
        with pytest.raises(ValueError, match=f"gate_up of expert 1 must be .*{message}"):
            layer.load_expert(1, elsewhere(gate_up[1]), down[1])
        changed = {**state.state_dict()}
        changed["experts.down"] = elsewhere(changed["experts.down"])
        with pytest.raises(RuntimeError, match=f"experts.down must be .*{message}"):
            layer.load_state_dict(changed)
        assert torch.equal(output(layer), expected(weight_format))
    gathered = [all_gather_tensor(each.clone(), 0, group=[group.rank]) for each in make_weights(SHAPE)]
    layer.load_experts(gate_up, down)
    layer.load_experts(*gathered)  # which torch waits for when they are first used
    assert torch.equal(output(layer), expected(weight_format))


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_weights_that_do_not_lie_here_are_refused_before_any_is_taken(ranks: LocalRanks, weight_format: str) -> None:
    ranks.run(weights_elsewhere, weight_format, size=1)


# ---- another rank's weights ----


def loads_what_rank_0_saved(group: EPGroup, weight_format: str) -> str:
    layer = make_layer(SHAPE, group, weight_format=weight_format)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    objects = [saved.getvalue()]
    dist.broadcast_object_list(objects, 0)
    state = torch.load(io.BytesIO(objects[0]), weights_only=True)
    fresh = MegaMoE(SHAPE, group, weight_format=weight_format)
    try:
        fresh.load_state_dict(state)
    except RuntimeError as refusal:
        assert fresh.experts.missing == list(fresh.local_experts)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(output(fresh), expected(weight_format))
        return str(refusal)
    assert torch.equal(output(fresh), expected(weight_format))
    return ""


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_the_state_of_another_rank_is_refused_by_name(ranks: LocalRanks, weight_format: str) -> None:
    said = ranks.run(loads_what_rank_0_saved, weight_format, size=2)
    assert said[0] == ""
    assert "the state dict has experts 0 to 2 of 6, this rank holds experts 3 to 5 of 6" in said[1]


def through_distributed_checkpoint(group: EPGroup, folder: str) -> str:
    layer = make_layer(SHAPE, group)
    state = layer.state_dict()
    save_distributed(state, checkpoint_id=folder)
    load_distributed(state, checkpoint_id=folder)
    fresh = MegaMoE(SHAPE, group)
    try:
        fresh.load_state_dict(state)
    except RuntimeError as refusal:
        return str(refusal)
    return ""


def test_a_checkpoint_that_keeps_one_rank_s_copy_is_refused_on_the_others(ranks: LocalRanks, tmp_path: Path) -> None:
    said = ranks.run(through_distributed_checkpoint, str(tmp_path), size=2)
    assert sum("this rank holds" in each for each in said) == 1, "one rank's copy was kept for both"


class Block(nn.Module):
    """A layer that trains beside experts that do not."""

    def __init__(self, layer: MegaMoE) -> None:
        super().__init__()
        self.dense = nn.Linear(SHAPE.hidden, SHAPE.hidden, dtype=torch.bfloat16)
        self.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
        self.layer = layer

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            routed = self.layer(hidden, ids, weights)
        out: Tensor = self.dense(hidden) * self.scale + routed
        return out


def wrapped(group: EPGroup) -> bool:
    layer = make_layer(SHAPE, group)
    model = DistributedDataParallel(Block(layer))
    batch = make_batch(SHAPE, 20)
    model(batch.hidden, batch.ids, batch.weights).float().sum().backward()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    return torch.equal(output(layer), expected())


def test_what_broadcasts_parameters_and_buffers_leaves_the_experts_alone(ranks: LocalRanks) -> None:
    assert ranks.run(wrapped, size=2) == [True, True]


# ---- casts and moves ----

CASTS: dict[str, Callable[[MegaMoE], object]] = {
    "to_bfloat16": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "float": lambda layer: layer.float(),
    "to_cpu": lambda layer: layer.to("cpu"),
    "to_empty": lambda layer: layer.to_empty(device="cpu"),
    "requires_grad": lambda layer: layer.requires_grad_(True),
    "zero_buffers": lambda layer: [buffer.zero_() for buffer in layer.buffers()],
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_cast_of_the_module_changes_no_bit(cast: str, weight_format: str) -> None:
    layer = make_layer(SHAPE, weight_format=weight_format)
    CASTS[cast](layer)
    assert torch.equal(output(layer), expected(weight_format))
    fresh = MegaMoE(SHAPE, weight_format=weight_format)
    CASTS[cast](fresh)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(output(fresh), expected(weight_format))


def test_a_move_to_another_device_is_refused() -> None:
    layer = make_layer(SHAPE)
    with pytest.raises(ValueError, match="experts 0 to 5 are on cpu, not to be moved to meta"):
        layer.to("meta")
    with pytest.raises(ValueError, match="experts 0 to 5 are on cpu, not to be moved to meta"):
        layer.to_empty(device="meta")
    assert torch.equal(output(layer), expected())


# ---- a state dict that is wrong ----


def lacks(state: dict[str, Tensor]) -> None:
    del state["experts.down_scales"]


def other_shape(state: dict[str, Tensor]) -> None:
    state["experts.down"] = state["experts.down"][:, :16]


def other_dtype(state: dict[str, Tensor]) -> None:
    state["experts.gate_up"] = state["experts.gate_up"].float()


def unknown(state: dict[str, Tensor]) -> None:
    state["experts.bias"] = torch.zeros(1)


def nan_scale(state: dict[str, Tensor]) -> None:
    state["experts.gate_up_scales"][4, 3, 1] = 255


def of_nobody(state: dict[str, Tensor]) -> None:
    del state["experts.held"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks, "Missing key.*experts.down_scales"),
        (other_shape, r"experts.down must be torch.uint8 \[6, 64, 16\], got torch.uint8 \[6, 16, 16\]"),
        (other_dtype, r"experts.gate_up must be torch.uint8 \[6, 64, 32\], got torch.float32"),
        (unknown, "Unexpected key.*experts.bias"),
        (nan_scale, "experts.gate_up_scales has a scale byte of 255"),
        (of_nobody, "Missing key.*experts.held"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_state_dict_that_is_refused_leaves_the_layer_as_it_was(
    change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    loaded, fresh = make_layer(SHAPE), MegaMoE(SHAPE)
    other = MegaMoE(SHAPE)
    other.load_experts(*make_weights(SHAPE, seed=9))
    state = other.state_dict()
    change(state)
    for layer in (loaded, fresh):
        with pytest.raises((RuntimeError, ValueError), match=message):
            layer.load_state_dict(state)
    if change is not unknown:  # torch tells of keys too many after it has loaded
        assert torch.equal(output(loaded), expected())
        assert fresh.experts.missing == list(range(6))
        with pytest.raises(ValueError, match="no weights for experts 0, 1, 2, 3"):
            output(fresh)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_state_dict_keeps_its_values_when_others_are_loaded(
    weight_format: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(products, "chosen", lambda: None)
    shape = replace(SHAPE, bias=True)
    layer, batch = make_layer(shape, weight_format=weight_format), make_batch(shape, 20)
    out = layer(batch.hidden, batch.ids, batch.weights)
    state = layer.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    layer.load_experts(*make_weights(shape, seed=9), **make_biases(shape, seed=8))
    assert all(torch.equal(state[key], value) for key, value in before.items())
    layer.load_state_dict(state)
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), out)


@pytest.mark.parametrize("around", [lambda: torch.autocast("cpu", torch.float16), torch.inference_mode])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_state_dict_is_taken_whatever_is_set_around_it(
    weight_format: str, around: Callable[[], AbstractContextManager[None]]
) -> None:
    layer = MegaMoE(SHAPE, weight_format=weight_format)
    with around():
        layer.load_state_dict(make_layer(SHAPE, weight_format=weight_format).state_dict())
    assert torch.equal(output(layer), expected(weight_format))


def test_a_negation_that_torch_has_put_off_counts_in_a_state_dict() -> None:
    layer = make_layer(SHAPE, weight_format="bf16")
    state = layer.state_dict()
    layer.load_experts(*make_weights(SHAPE, seed=9))
    layer.load_state_dict(
        {key: torch._neg_view(-value) if key != "experts.held" else value for key, value in state.items()}
    )
    assert torch.equal(output(layer), expected("bf16"))


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_state_dict_whose_taking_was_interrupted_leaves_no_mixture(
    weight_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, other = make_layer(SHAPE, weight_format=weight_format), MegaMoE(SHAPE, weight_format=weight_format)
    other.load_experts(*make_weights(SHAPE, seed=9))
    put = Experts._put

    def interrupted(self: Experts, expert: int, *rest: object) -> None:
        if expert == 2:
            raise KeyboardInterrupt
        put(self, expert, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Experts, "_put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.load_state_dict(other.state_dict())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no weights for experts 2, 3, 4, 5"):
        output(layer)


def test_a_layer_without_all_its_weights_has_no_weights_in_its_state() -> None:
    layer = MegaMoE(SHAPE)
    assert list(layer.state_dict()) == ["experts.held"]
    gate_up, down = make_weights(SHAPE)
    layer.load_expert(0, gate_up[0], down[0])
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up"):
        MegaMoE(SHAPE).load_state_dict(layer.state_dict())


def copied_on_ranks(group: EPGroup) -> str:
    layer = make_layer(SHAPE, group)
    output(layer)
    other = copy.deepcopy(layer)
    assert other.group is group
    assert torch.equal(output(other), output(layer))
    other.load_experts(*make_weights(SHAPE, seed=9))
    assert not torch.equal(output(other), output(layer))
    with pytest.raises(TypeError) as refused:
        pickle.dumps(layer)
    return str(refused.value)


def test_a_copy_of_a_layer_on_several_ranks_shares_their_connection(ranks: LocalRanks) -> None:
    for said in ranks.run(copied_on_ranks, size=2):
        assert said == "a group of several ranks cannot be pickled, nor a layer with it: save layer.state_dict()"


def pickled(layer: MegaMoE) -> MegaMoE:
    copied: MegaMoE = pickle.loads(pickle.dumps(layer))
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_copy_of_a_layer_has_weights_of_its_own(copied: Callable[[MegaMoE], MegaMoE], weight_format: str) -> None:
    layer = make_layer(SHAPE, weight_format=weight_format)
    output(layer)
    other = copied(layer)
    assert torch.equal(output(other), expected(weight_format))
    other.load_experts(*make_weights(SHAPE, seed=9))
    assert not torch.equal(output(other), expected(weight_format))
    assert torch.equal(output(layer), expected(weight_format))
