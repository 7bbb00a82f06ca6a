"""Training programs that do what is easily done wrong: refused by name, before a weight or a gradient is wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE, clip_grad_norm_, reduce_over_replicas, sum_gradients
from megamoe.training.distributed.norms import Norm
from tests.cases import make_batch, split
from tests.training_cases import backward, make_gradient, make_trainable

SHAPE = MoEShape(hidden=64, intermediate=64, num_experts=6, topk=2)
BATCH = make_batch(SHAPE, 21)
GIVEN = BATCH.hidden, BATCH.ids, BATCH.weights


def world() -> dist.ProcessGroup:
    found = dist.group.WORLD
    assert found is not None
    return found


class Model(nn.Module):
    """A dense module beside a layer that trains."""

    def __init__(self, group: EPGroup | dist.ProcessGroup) -> None:
        super().__init__()
        self.dense = nn.Linear(SHAPE.hidden, SHAPE.hidden)
        self.moe = make_trainable(SHAPE, EPGroup.of(group))

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.dense(hidden.float()) + self.moe(hidden, ids, weights)
        return out


def gradients_of(module: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in module.parameters() if each.grad is not None]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


# ---- master weights ----


@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("cast", ["double", "half"])
def test_a_cast_to_a_dtype_of_no_master_is_refused_until_it_is_taken_back(cast: str, weight_format: str) -> None:
    layer = make_trainable(SHAPE, weight_format=weight_format)
    getattr(layer, cast)()
    with pytest.raises(
        ValueError, match=r"torch.float32 or torch.bfloat16 to be trained, got torch.float(64|16): cast"
    ):
        layer(*GIVEN)
    with torch.no_grad(), pytest.raises(ValueError, match="to be trained"):
        layer(*GIVEN)
    layer.bfloat16()
    assert all(each.isfinite().all() for each in backward(layer, BATCH, make_gradient(BATCH)).values())
    assert layer.experts.down.grad is not None
    assert layer.experts.down.grad.dtype == torch.bfloat16


def add_by_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[...] += 1


def copy_from_a_master(weight: nn.Parameter) -> None:
    weight.data.copy_(weight.detach().double() + 0.5)


def change_one_expert(weight: nn.Parameter) -> None:
    weight.data[3] *= 2


@pytest.mark.parametrize("change", [add_by_numpy, copy_from_a_master, change_one_expert])
@pytest.mark.parametrize("name", ["gate_up", "down", "gate_up_bias"])
def test_changes_that_torch_does_not_count_are_seen(name: str, change: Callable[[nn.Parameter], None]) -> None:
    shape = MoEShape(64, 64, 6, 2, bias=True)
    layer = make_trainable(shape)
    with torch.no_grad():
        layer(*GIVEN)
        change(getattr(layer.experts, name))
        found = layer(*GIVEN)
        layer.quantize()
        assert torch.equal(found, layer(*GIVEN))


def test_weights_that_stay_are_quantized_once() -> None:
    layer = make_trainable(SHAPE)
    for _ in range(3):
        backward(layer, BATCH, make_gradient(BATCH))
    assert layer.experts.rounding_step == 1


# ---- transforms ----

INSIDE: dict[str, Callable[[TrainableMoE], object]] = {
    "grad": lambda layer: torch.func.grad(lambda x: layer(x, BATCH.ids, BATCH.weights).sum())(BATCH.hidden),
    "vmap": lambda layer: torch.func.vmap(lambda x: layer(x, BATCH.ids, BATCH.weights))(BATCH.hidden[None]),
    "export": lambda layer: torch.export.export(layer, GIVEN),
}


def called_inside(group: EPGroup, inside: str) -> None:
    layer = make_trainable(SHAPE, group)
    with pytest.raises(ValueError, match=r"the layer was called inside of a (transform of torch.func|FakeTensorMode)"):
        INSIDE[inside](layer)
    backward(layer, BATCH, make_gradient(BATCH))


@pytest.mark.parametrize("inside", INSIDE)
def test_a_layer_that_trains_says_what_it_was_called_inside_of(ranks: LocalRanks, inside: str) -> None:
    ranks.run(called_inside, inside, size=2)


def gradients_in_a_batch(group: EPGroup) -> str:
    layer = make_trainable(SHAPE, group, name="layers.3")
    hidden = BATCH.hidden.clone().requires_grad_()
    out = layer(hidden, BATCH.ids, BATCH.weights)
    with pytest.raises(RuntimeError) as refused:
        torch.autograd.grad(out, hidden, out.new_ones(2, *out.shape), is_grads_batched=True)
    backward(layer, BATCH, make_gradient(BATCH))
    return str(refused.value)


def test_a_batch_of_gradients_is_refused_and_breaks_no_group(ranks: LocalRanks) -> None:
    for said in ranks.run(gradients_in_a_batch, size=2):
        assert said.startswith("layer 'layers.3' takes one gradient in a backward")


# ---- ranks that were out of step, once ----


def skips_a_backward(group: EPGroup) -> None:
    """Rank 1 leaves a batch out after its forward, as where a loss could not be computed."""
    layer = make_trainable(SHAPE, group)
    expected = backward(layer, BATCH, make_gradient(BATCH))
    layer.zero_grad()
    out = layer(*GIVEN)
    with pytest.raises(CallRefusedError, match=r"layer is moe \(backward\) on rank 0, moe on rank 1"):
        layer(*GIVEN) if group.rank else out.sum().backward()
    found = backward(layer, BATCH, make_gradient(BATCH))
    assert same(list(found.values()), list(expected.values()))


def leaves_a_layer_out(group: EPGroup) -> None:
    layers = [make_trainable(SHAPE, group, name=f"layers.{index}") for index in range(2)]
    with torch.no_grad(), pytest.raises(CallRefusedError, match=r"layer is layers.1 on rank 0, layers.0 on rank 1"):
        layers[1 - group.rank](*GIVEN)
    with torch.no_grad():
        for layer in layers:
            layer(*GIVEN)


@pytest.mark.parametrize("program", [skips_a_backward, leaves_a_layer_out])
def test_ranks_that_were_refused_together_go_on_together(ranks: LocalRanks, program: Callable[[EPGroup], None]) -> None:
    ranks.run(program, size=2)


def layer_that_lingers(group: EPGroup) -> str:
    """On rank 1 a layer that is gone is still in a cycle of references."""
    gone = make_trainable(SHAPE, group)
    gone(*GIVEN)
    gc.disable()
    if group.rank == 1:
        vars(gone)["itself"] = [gone]
    del gone
    layer = make_trainable(SHAPE, group)
    with pytest.raises(CallRefusedError) as refused:
        layer(*GIVEN)
    gc.enable()
    gc.collect()
    layer(*GIVEN)
    return str(refused.value)


def test_a_layer_that_is_gone_on_some_ranks_alone_is_told_of(ranks: LocalRanks) -> None:
    for said in ranks.run(layer_that_lingers, size=2):
        assert "gc.collect()" in said


# ---- what takes experts for copies of each other ----


def wrapped_in_ddp(group: EPGroup) -> str:
    model = Model(group)
    before = [each.detach().clone() for each in model.moe.parameters()]
    with pytest.raises(ValueError, match="DistributedDataParallel would overwrite") as refused:
        DistributedDataParallel(model)
    assert same([each.detach() for each in model.moe.parameters()], before)
    DistributedDataParallel(nn.Linear(2, 2))
    return str(refused.value)


def names_of_two_layers(group: EPGroup) -> str:
    model = nn.ModuleList(make_trainable(SHAPE, group, name=f"layers.{index}") for index in range(2))
    with pytest.raises(ValueError, match="DistributedDataParallel would overwrite") as refused:
        DistributedDataParallel(model)
    return str(refused.value)


def test_ddp_is_told_of_all_layers_at_once(ranks: LocalRanks) -> None:
    for said in ranks.run(names_of_two_layers, size=2):
        assert "0.experts.gate_up, 0.experts.down, 1.experts.gate_up, 1.experts.down, with" in said


def test_ddp_is_refused_before_it_overwrites_experts(ranks: LocalRanks) -> None:
    for rank, said in enumerate(ranks.run(wrapped_in_ddp, size=2)):
        assert f"layer 'moe', of which each rank has others (experts {3 * rank} to {3 * rank + 2} here)" in said
        assert "leave out moe.experts.gate_up, moe.experts.down, with" in said


def ddp_of_replicas(group: EPGroup) -> tuple[int, list[Tensor]]:
    """DDP over the ranks that hold the same experts, 2 x EP 2 on four ranks, is what reduce_over_replicas() does."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "ep"))
    found = []
    mine = split(len(BATCH.hidden), 4)[group.rank]
    batch, gradient = BATCH.part(mine), make_gradient(BATCH)[mine]
    for by_ddp in (True, False):
        layer = make_trainable(SHAPE, EPGroup.of(grid["ep"].get_group()))
        wrapped = DistributedDataParallel(layer, process_group=grid["replica"].get_group()) if by_ddp else layer
        wrapped(batch.hidden, batch.ids, batch.weights).backward(gradient)
        if not by_ddp:
            reduce_over_replicas(layer.parameters(), grid["replica"])
        found.append(gradients_of(layer))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return grid["ep"].get_local_rank(), found[0]


def test_ddp_over_replicas_of_the_same_experts_averages_them(ranks: LocalRanks) -> None:
    found = ranks.run(ddp_of_replicas)
    assert same(found[0][1], found[2][1])
    assert same(found[1][1], found[3][1])


def stepped_by_zero(group: EPGroup) -> str:
    model = Model(group)
    model(*GIVEN).sum().backward()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    before = [each.detach().clone() for each in model.parameters()]
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer would overwrite") as refused:
        optimizer.step()
    assert same([each.detach() for each in model.parameters()], before)
    ZeroRedundancyOptimizer(model.dense.parameters(), torch.optim.SGD, lr=0.1).step()
    return str(refused.value)


def test_a_step_that_broadcasts_experts_is_refused(ranks: LocalRanks) -> None:
    for said in ranks.run(stepped_by_zero, size=2):
        assert "give it the other parameters" in said


def sums(group: EPGroup) -> list[str]:
    model, said = Model(group), []
    model(*GIVEN).sum().backward()
    before = gradients_of(model)
    sharded, sparse = nn.Linear(8, 8), nn.Embedding(4, 4, sparse=True)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (group.size,)))
    sharded(torch.ones(2, 8)).sum().backward()
    sparse(torch.tensor([1])).sum().backward()
    wrong: list[Callable[[], Any]] = [
        lambda: sum_gradients(model.parameters(), group),
        lambda: reduce_over_replicas(model.moe.parameters(), world()),
        lambda: sum_gradients(sharded.parameters(), group),
        lambda: sum_gradients(sparse.parameters(), group),
    ]
    for each in wrong:
        with pytest.raises(ValueError, match=r"experts of layer|a gradient is") as refused:
            each()
        said.append(str(refused.value))
    assert same(gradients_of(model), before)
    sum_gradients(model.dense.parameters(), group)
    return said


def test_gradients_that_ranks_do_not_have_in_common_are_not_summed(ranks: LocalRanks) -> None:
    for experts, replicas, sharded, sparse in ranks.run(sums, size=2):
        assert "experts of layer 'moe', of which each rank has others" in experts
        assert "the replicas share the experts of layer 'moe'" in replicas
        assert "a gradient is a DTensor" in sharded
        assert "a gradient is torch.sparse_coo" in sparse


def never_summed(group: EPGroup) -> str:
    """Each rank has the gradients of its own tokens, and would scale its copy of the dense weights otherwise."""
    model = Model(group)
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch = BATCH.part(mine)
    model(batch.hidden, batch.ids, batch.weights).square().sum().backward()
    before = gradients_of(model)
    with pytest.raises(CallRefusedError) as refused:
        clip_grad_norm_(model.parameters(), 1e-3)
    assert same(gradients_of(model), before)
    sum_gradients(model.dense.parameters(), group)
    clip_grad_norm_(model.parameters(), 1e-3)
    model.dense.weight.grad.fill_(float("nan"))  # type: ignore[union-attr]
    assert clip_grad_norm_(model.parameters(), 1.0).isnan()
    return str(refused.value)


def test_dense_gradients_that_were_not_summed_are_not_clipped(ranks: LocalRanks) -> None:
    for said in ranks.run(never_summed, size=2):
        assert "gradients of parameters that are no layer's differ: their norm is" in said
        assert "sum them over ranks first" in said


def sparse_on_rank_1_alone(group: EPGroup, what: str) -> str:
    """Rank 0 had no token for the table, and so has no gradient that could show that they are sparse."""
    model, table = Model(group), nn.Embedding(4, 4, sparse=True)
    model(*GIVEN).sum().backward()
    if group.rank == 1:
        table(torch.tensor([1])).sum().backward()
    asked: dict[str, Callable[[], object]] = {
        "sum": lambda: sum_gradients([*table.parameters(), *model.dense.parameters()], group),
        "clip": lambda: clip_grad_norm_([*table.parameters(), *model.parameters()], 1.0),
    }
    with pytest.raises(CallRefusedError) as refused:
        asked[what]()
    sum_gradients(model.dense.parameters(), group)
    clip_grad_norm_(model.parameters(), 1.0)
    return str(refused.value)


@pytest.mark.parametrize("what", ["sum", "clip"])
def test_what_one_rank_alone_cannot_sum_is_refused_on_all(ranks: LocalRanks, what: str) -> None:
    first, second = ranks.run(sparse_on_rank_1_alone, what, size=2)
    assert "rank 1" in first
    assert second.startswith("a gradient is torch.sparse_coo")


def test_a_norm_looks_at_each_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, of_slices = list[int](), Norm.of_slices

    def noted(norm: Norm, x: Tensor) -> Tensor:
        looked.append(x.data_ptr())
        return of_slices(norm, x)

    monkeypatch.setattr(Norm, "of_slices", noted)
    layer, dense = make_trainable(SHAPE), nn.Linear(4, 4)
    backward(layer, BATCH, make_gradient(BATCH))
    dense(torch.ones(2, 4)).sum().backward()
    given = [*layer.parameters(), *dense.parameters()]
    clip_grad_norm_(given, 1.0)
    assert sorted(looked) == sorted(each.grad.data_ptr() for each in given if each.grad is not None)


def in_another_order(group: EPGroup) -> None:
    given = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2, 3))][:: 1 - 2 * group.rank]
    with pytest.raises(CallRefusedError, match="rank 1 sums 12 values in 2 tensors, rank 0 12 in 2, in other shapes"):
        sum_gradients(given, group)


def test_parameters_in_another_order_are_not_summed(ranks: LocalRanks) -> None:
    ranks.run(in_another_order, size=2)


def unused(group: EPGroup, by_replicas: bool) -> None:
    """What no rank used has no gradient afterwards, so that no optimiser decays it; as on one rank."""
    used, half, never = (nn.Parameter(torch.ones(3)) for _ in range(3))
    used.grad = torch.ones(3)
    if group.rank == 0:
        half.grad = torch.ones(3)
    given = [never, used, half]
    reduce_over_replicas(given, world(), average=False) if by_replicas else sum_gradients(given, group)
    assert never.grad is None
    assert used.grad.tolist() == [2.0] * 3
    assert half.grad is not None
    assert half.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("by_replicas", [False, True], ids=["sum_gradients", "reduce_over_replicas"])
def test_what_no_rank_used_has_no_gradient_afterwards(ranks: LocalRanks, by_replicas: bool) -> None:
    ranks.run(unused, by_replicas, size=2)


def exchanges_of(group: EPGroup, by_replicas: bool) -> list[int]:
    """How many there are for one bucket of gradients: where a replica lacks one of two, and where none does."""
    found = []
    module = dist if by_replicas else group.transport
    name = "all_gather_into_tensor" if by_replicas else "gather"
    for lacking in (True, False):
        given = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        for each in given[lacking and group.rank :]:
            each.grad = torch.ones(3)
        with mock.patch.object(module, name, side_effect=getattr(module, name)) as gather:
            reduce_over_replicas(given, world()) if by_replicas else sum_gradients(given, group)
        found.append(gather.call_count)
    return found


@pytest.mark.parametrize("by_replicas", [False, True], ids=["sum_gradients", "reduce_over_replicas"])
def test_which_gradients_there_are_is_asked_where_one_is_lacking(ranks: LocalRanks, by_replicas: bool) -> None:
    for lacking, whole in ranks.run(exchanges_of, by_replicas, size=2):
        assert lacking == whole + 1


# ---- a rank without experts ----


def fewer_experts_than_ranks(group: EPGroup, kind: str) -> tuple[float, Tensor]:
    shape = MoEShape(64, 64, 2, 1)
    batch = make_batch(shape, 9)
    mine = split(9, group.size)[group.rank]
    layer = make_trainable(shape, group)
    part = batch.part(mine)
    layer(part.hidden, part.ids, part.weights).backward(make_gradient(batch)[mine])
    norm = clip_grad_norm_(layer.parameters(), 1.0)
    torch.optim.AdamW(layer.parameters(), lr=0.1, foreach=kind == "foreach", fused=kind == "fused").step()
    return float(norm), layer.experts.down.detach()


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_a_rank_without_experts_trains_with_the_others(ranks: LocalRanks, kind: str) -> None:
    ((norm, expected),) = ranks.run(fewer_experts_than_ranks, kind, size=1)
    found = ranks.run(fewer_experts_than_ranks, kind, size=3)
    assert [each for each, _ in found] == [norm] * 3
    assert torch.equal(torch.cat([down for _, down in found]), expected)
