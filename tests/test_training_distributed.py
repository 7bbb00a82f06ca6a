"""Training across ranks as frameworks do it: clipping, parameters as DTensors, checkpoints that reshard, replicas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE, clip_grad_norm_, grad_norm, reduce_over_replicas
from megamoe.training.distributed.norms import BLOCK, Norm
from tests.cases import make_batch, split
from tests.training_cases import make_gradient, make_trainable

SHAPE = MoEShape(hidden=64, intermediate=64, num_experts=12, topk=2, swiglu_limit=3.0)
BATCH = make_batch(SHAPE, 37)

# ---- norms: the written order ----


def in_written_order(x: Tensor) -> float:
    """The 2-norm's partial of one slice, value by value."""
    width = min(BLOCK, 1 << (len(x) - 1).bit_length())
    lanes = [0.0] * width
    for index, value in enumerate(x.double().tolist()):
        lanes[index % width] += value * value
    while len(lanes) > 1:
        half = -(-len(lanes) // 2)
        upper = [*lanes[half:], 0.0]
        lanes = [lane + each for lane, each in zip(lanes, upper, strict=False)][:half]
    return lanes[0]


@pytest.mark.parametrize("num_values", [1, 2, 5, 64, 97, BLOCK, 2 * BLOCK + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_is_summed_in_the_order_that_is_written(num_values: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, num_values, generator=torch.Generator().manual_seed(1)).to(dtype) * 1e3
    assert Norm(2.0).of_slices(x).tolist() == [in_written_order(each) for each in x]


def test_many_slices_have_the_bits_of_each_alone() -> None:
    x = torch.randn(600, 120, generator=torch.Generator().manual_seed(1))  # two lots of rows
    for p in (1.0, 2.0, math.inf):
        together = Norm(p).of_slices(x)
        alone = torch.cat([Norm(p).of_slices(each[None]) for each in x])
        assert torch.equal(alone, together)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_one_rank_has_torchs_norm_and_its_scaled_gradients(norm_type: float) -> None:
    found = []
    for clip in (clip_grad_norm_, nn.utils.clip_grad_norm_):
        torch.manual_seed(0)
        layer, dense = make_trainable(SHAPE), nn.Linear(64, 5)
        dense.bias.requires_grad = False
        dense(layer(BATCH.hidden, BATCH.ids, BATCH.weights).float()).square().sum().backward()
        given = [*layer.parameters(), *dense.parameters(), nn.Parameter(torch.zeros(()))]
        given[-1].grad = torch.tensor(3.0)
        found.append([clip(given, 0.5, norm_type), *(each.grad for each in given if each.grad is not None)])
        unclipped = [each.grad.clone() for each in given if each.grad is not None]
        clip(given, 1e9, norm_type, foreach=False)
        assert all(map(torch.equal, unclipped, (each.grad for each in given if each.grad is not None)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("odd", ["bare", "parametrized"])
def test_what_another_layer_of_the_process_has_become_is_nothing_to_these(odd: str) -> None:
    layer, other = make_trainable(SHAPE), make_trainable(SHAPE)
    if odd == "bare":
        del other.experts.gate_up, other.experts.down
    else:
        nn.utils.parametrize.register_parametrization(other.experts, "down", nn.Identity())
    layer(BATCH.hidden, BATCH.ids, BATCH.weights).float().square().sum().backward()
    assert clip_grad_norm_(layer.parameters(), 1.0) > 0
    if odd == "parametrized":
        with pytest.raises(ValueError, match="parametri"):
            clip_grad_norm_(other.parameters(), 1.0)


def test_nothing_to_clip_has_norm_zero_and_what_has_no_norm_is_refused() -> None:
    assert clip_grad_norm_([], 1.0) == 0
    assert clip_grad_norm_(nn.Parameter(torch.ones(3)), 1.0) == 0
    with pytest.raises(ValueError, match="norm_type must be above 0"):
        clip_grad_norm_([], 1.0, 0.0)
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="only dense ones"):
        clip_grad_norm_(embedding.parameters(), 1.0)


# ---- clipping over ranks ----


class Model(nn.Module):
    """Two expert layers and what is not expert-parallel."""

    def __init__(self, group: EPGroup | None, **options: Any) -> None:
        super().__init__()
        self.first = make_trainable(SHAPE, group, name="first", **options)
        self.second = make_trainable(MoEShape(64, 32, 5, 2), group, name="second", **options)
        self.head = nn.Linear(64, 7)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 7 * 64).view(7, 64))
            self.head.bias.zero_()

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = hidden + self.first(hidden, ids, weights)
        hidden = hidden + self.second(hidden, ids % 5, weights)
        out: Tensor = self.head(hidden.float())
        return out


def fill_gradients(model: Model, group: EPGroup) -> None:
    """Experts' gradients of this rank's tokens; the head's are the same on all ranks, as an all-reduce leaves them."""
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch = BATCH.part(mine)
    model(batch.hidden, batch.ids, batch.weights).square().sum().backward()
    for each in model.head.parameters():
        each.grad = torch.full_like(each, 0.37)


def clip_a_model(group: EPGroup, norm_type: float, distribute: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = Model(group, waves=2)
    if distribute:
        model.first.distribute(init_device_mesh("cpu", (group.size,)))
    fill_gradients(model, group)
    if group.size == 3:
        model.second.experts.down.grad = None
    total = clip_grad_norm_(model.parameters(), 2.0, norm_type)
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return total, {name: each.to_local() if isinstance(each, DTensor) else each for name, each in found.items()}


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf], ids="norm_{}".format)
def test_norm_and_clipped_gradients_have_the_bits_of_one_rank(ranks: LocalRanks, norm_type: float) -> None:
    (expected,) = ranks.run(clip_a_model, norm_type, False, size=1)
    assert expected[0] > 2
    for size, distribute in ((2, False), (4, False), (2, True), (4, True)):
        found = ranks.run(clip_a_model, norm_type, distribute, size=size)
        assert all(torch.equal(total, expected[0]) for total, _ in found)
        for name, whole in expected[1].items():
            parts = [gradients[name] for _, gradients in found]
            joined = torch.cat(parts) if "experts" in name else parts[0]
            assert torch.equal(joined, whole), name


def test_parameters_without_a_gradient_count_as_zero_over_uneven_ranks(ranks: LocalRanks) -> None:
    """12 and 5 experts on 3 ranks; the last stack has no gradient."""
    (expected,) = ranks.run(clip_a_model, 2.0, False, size=1)
    totals = {float(total) for total, _ in ranks.run(clip_a_model, 2.0, False, size=3)}
    assert len(totals) == 1
    assert 0 < totals.pop() < float(expected[0])


def not_finite(group: EPGroup) -> tuple[str, float, bool]:
    model = Model(group)
    fill_gradients(model, group)
    if group.rank == 1:
        assert model.first.experts.down.grad is not None
        model.first.experts.down.grad[0, 3, 5] = math.inf
    before = model.head.weight.grad.clone()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="of the gradients is inf, so they cannot be clipped") as refused:
        clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    assert torch.equal(before, model.head.weight.grad)  # type: ignore[arg-type]
    total = clip_grad_norm_(model.parameters(), 1.0)
    return str(refused.value), float(total), bool((model.head.weight.grad == 0).all())  # type: ignore[union-attr]


def test_a_norm_that_is_not_finite_is_known_to_all_ranks(ranks: LocalRanks) -> None:
    for _, total, zeroed in ranks.run(not_finite, size=2):
        assert total == math.inf
        assert zeroed  # as torch has it


def out_of_step(group: EPGroup) -> list[str]:
    """What each of two mistakes is answered with; the group can be used again."""
    model, said = Model(group), []
    fill_gradients(model, group)
    with pytest.raises(CallRefusedError) as refused:
        clip_grad_norm_(model.parameters() if group.rank else model.first.parameters(), 1.0)
    said.append(str(refused.value))
    clip = partial(clip_grad_norm_, model.parameters(), 1.0)
    forward = partial(model.first, BATCH.hidden, BATCH.ids, BATCH.weights)
    with pytest.raises(CallRefusedError) as refused:
        (clip if group.rank else forward)()
    said.append(str(refused.value))
    clip_grad_norm_(model.parameters(), 1.0)
    return said


def test_ranks_that_do_not_clip_alike_are_refused_together(ranks: LocalRanks) -> None:
    for first, second in ranks.run(out_of_step, size=2):
        assert "layer is clip_grad_norm_ of first 128x64, first 64x64 on rank 0" in first
        assert "second" in first
        assert "layer is first on rank 0, clip_grad_norm_" in second


def clip_dense(group: EPGroup) -> list[Tensor]:
    """Norms of gradients that are DTensors: whole, and sharded along either dimension, evenly or not."""
    mesh = init_device_mesh("cpu", (group.size,))
    whole = torch.randn(10, 33, generator=torch.Generator().manual_seed(4))
    found = []
    for placement in (Replicate(), Shard(0), Shard(1)):
        parameter = nn.Parameter(distribute_tensor(torch.zeros(10, 33), mesh, [placement]))
        plain = nn.Parameter(torch.zeros(3))
        parameter.grad, plain.grad = distribute_tensor(whole.clone(), mesh, [placement]), torch.ones(3)
        found.append(clip_grad_norm_([parameter, plain], 1.0))
        torch.testing.assert_close(grad_norm([parameter, plain]), torch.tensor(1.0))
    return found


def test_dtensors_count_once_however_they_are_sharded(ranks: LocalRanks) -> None:
    expected = ranks.run(clip_dense, size=1)[0][0]
    for size in (1, 3, 4):
        for whole, rows, columns in ranks.run(clip_dense, size=size):
            assert torch.equal(whole, expected)
            assert torch.equal(rows, expected)
            torch.testing.assert_close(columns, expected)


# ---- parameters as DTensors ----

KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda given: torch.optim.AdamW(given, lr=1e-2, foreach=True),
    "fused": lambda given: torch.optim.AdamW(given, lr=1e-2, fused=True),
    "plain": lambda given: torch.optim.SGD(given, lr=1e-2, momentum=0.9, foreach=False),
}


def train(
    group: EPGroup, layer: TrainableMoE, optimizer: torch.optim.Optimizer, steps: range, wrap: bool = False
) -> None:
    """Two micro-batches a step; every step is another batch."""
    for step in steps:
        optimizer.zero_grad()
        for part in range(2):
            batch = make_batch(SHAPE, 20, seed=2 * step + part)
            mine = split(20, group.size)[group.rank]
            given = batch.hidden[mine].clone().requires_grad_(), batch.ids[mine], batch.weights[mine]
            out = checkpoint(layer, *given, use_reentrant=False) if wrap else layer(*given)
            out.backward(make_gradient(batch)[mine])
        clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()


def whole_of(layer: TrainableMoE) -> dict[str, Tensor]:
    return {
        name: each.full_tensor() if isinstance(each, DTensor) else each.detach().clone()
        for name, each in layer.named_parameters()
    }


def trained(group: EPGroup, kind: str, distribute: bool, wrap: bool) -> dict[str, Tensor]:
    """Parameters after three steps with accumulation."""
    layer = make_trainable(SHAPE, group, waves=2)
    if distribute:
        assert layer.distribute(init_device_mesh("cpu", (group.size,))) is layer
        assert all(isinstance(each, DTensor) and each.placements == (Shard(0),) for each in layer.parameters())
    train(group, layer, KINDS[kind](layer.parameters()), range(3), wrap)
    assert not distribute or all(isinstance(each.grad, DTensor) for each in layer.parameters())
    return whole_of(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_dtensors_train_to_the_bits_of_plain_parameters(ranks: LocalRanks, kind: str) -> None:
    """With gradient accumulation and, on three ranks, with activation checkpoints."""
    (expected,) = ranks.run(trained, kind, False, False, size=1)
    for size, wrap in ((1, False), (3, True), (4, False)):
        for found in ranks.run(trained, kind, True, wrap, size=size):
            assert all(torch.equal(found[name], whole) for name, whole in expected.items())


def refusals(group: EPGroup) -> list[str]:
    mesh, said = init_device_mesh("cpu", (group.size,)), []
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "ep"))
    for shape, given in (
        (MoEShape(64, 32, 10, 2), mesh),
        (SHAPE, grid),
        (SHAPE, grid["ep"]),
        (SHAPE, DeviceMesh("cpu", [3, 2, 1, 0])),
        (SHAPE, object()),
    ):
        layer = TrainableMoE(shape, group)
        with pytest.raises(ValueError, match=r"mesh|experts") as refused:
            layer.distribute(given)  # type: ignore[arg-type]
        said.append(str(refused.value))
        assert not any(isinstance(each, DTensor) for each in layer.parameters())
    layer = TrainableMoE(MoEShape(64, 32, 7, 2), group).distribute(mesh)  # 2, 2, 2, 1 both ways
    out = layer(BATCH.hidden, BATCH.ids % 7, BATCH.weights)
    with torch.no_grad():
        layer.experts.down.add_(1)
    with pytest.raises(CallRefusedError, match="layer 'moe' were modified between a forward and its backward"):
        out.sum().backward()
    return said


def test_what_dtensor_cannot_express_is_refused_with_the_numbers(ranks: LocalRanks) -> None:
    for said in ranks.run(refusals, size=4):
        assert "10 experts on 4 ranks are 3, 3, 2, 2 here, and 3, 3, 3, 1 as DTensor's Shard(0) lays them" in said[0]
        assert (
            "mesh has 2 dimensions (replica, ep), expected the one of the layer's ranks: give that dimension" in said[1]
        )
        assert "and the layer's group of ranks 0, 1, 2, 3" in said[2]
        assert "mesh is of ranks 3, 2, 1, 0" in said[3]
        assert "mesh must be a DeviceMesh, got object" in said[4]


# ---- checkpoints that reshard ----


def make_layer_and_optimizer(group: EPGroup) -> tuple[TrainableMoE, torch.optim.Optimizer]:
    layer = TrainableMoE(SHAPE, group, seed=7, rounding="stochastic")
    layer.distribute(init_device_mesh("cpu", (group.size,)))
    return layer, torch.optim.AdamW(layer.parameters(), lr=1e-2)


def save_sharded(group: EPGroup, path: Path) -> dict[str, Tensor]:
    """Two steps, a checkpoint, two more steps."""
    layer, optimizer = make_layer_and_optimizer(group)
    train(group, layer, optimizer, range(2))
    model, state = get_state_dict(layer, optimizer)
    assert sorted(model) == ["experts.down", "experts.gate_up", "experts.rounding_step"]
    save_checkpoint({"model": model, "optimizer": state}, checkpoint_id=path)
    train(group, layer, optimizer, range(2, 4))
    return whole_of(layer)


def go_on(group: EPGroup, path: Path) -> dict[str, Tensor]:
    """The checkpoint in another number of ranks, and the two steps after it."""
    layer, optimizer = make_layer_and_optimizer(group)
    layer.reset_parameters(seed=8)
    model, state = get_state_dict(layer, optimizer)
    load_checkpoint({"model": model, "optimizer": state}, checkpoint_id=path)
    set_state_dict(layer, optimizer, model_state_dict=model, optim_state_dict=state)
    train(group, layer, optimizer, range(2, 4))
    return whole_of(layer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_four_ranks_goes_on_in_two_and_in_one(ranks: LocalRanks, tmp_path: Path) -> None:
    expected = ranks.run(save_sharded, tmp_path)[0]
    for size in (2, 1, 4):
        for found in ranks.run(go_on, tmp_path, size=size):
            assert all(torch.equal(found[name], whole) for name, whole in expected.items()), size
    # and without any group, into tensors of all experts
    state = {
        f"model.experts.{name}": torch.empty(12, *size) for name, size in (("gate_up", (128, 64)), ("down", (64, 64)))
    }
    load_checkpoint(state, checkpoint_id=tmp_path, no_dist=True)
    alone = TrainableMoE(SHAPE)
    alone.load_experts(state["model.experts.gate_up"], state["model.experts.down"])
    assert torch.equal(alone.experts.down, state["model.experts.down"])
    assert not torch.equal(alone.experts.down, expected["experts.down"])  # before the last two steps


def load_plain(group: EPGroup, state: dict[str, Tensor]) -> dict[str, Tensor]:
    layer = TrainableMoE(SHAPE, group).distribute(init_device_mesh("cpu", (group.size,)))
    layer.load_state_dict(state)
    return whole_of(layer)


def test_a_plain_state_dict_of_all_experts_is_taken_by_each_rank_in_part(ranks: LocalRanks) -> None:
    state = {name: each.detach() for name, each in make_trainable(SHAPE).named_parameters()}
    for found in ranks.run(load_plain, state, size=3):
        assert all(torch.equal(found[name], whole) for name, whole in state.items())


# ---- replicas ----


def two_replicas(group: EPGroup, average: bool) -> tuple[int, list[Tensor]]:
    """2 x EP 2 on four ranks: gradients of this rank's experts, after they are reduced."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "ep"))
    layer = make_trainable(SHAPE, EPGroup.of(grid["ep"].get_group()))
    mine = split(len(BATCH.hidden), 4)[group.rank]
    batch = BATCH.part(mine)
    layer(batch.hidden, batch.ids, batch.weights).backward(make_gradient(BATCH)[mine])
    reduce_over_replicas(layer.parameters(), grid["replica"], average=average)
    norm = clip_grad_norm_(layer.parameters(), 1e9)
    return grid["ep"].get_local_rank(), [norm, *(each.grad for each in layer.parameters() if each.grad is not None)]


def halves() -> list[list[Tensor]]:
    """Gradients of all experts by the tokens of each replica, on one rank."""
    parts = split(len(BATCH.hidden), 4)
    found = []
    for begin, end in ((parts[0].start, parts[1].stop), (parts[2].start, parts[3].stop)):
        layer, mine = make_trainable(SHAPE), slice(begin, end)
        batch = BATCH.part(mine)
        layer(batch.hidden, batch.ids, batch.weights).backward(make_gradient(BATCH)[mine])
        found.append([each.grad for each in layer.parameters() if each.grad is not None])
    return found


@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_two_replicas_of_two_ranks_have_the_gradients_of_one(ranks: LocalRanks, average: bool) -> None:
    first, second = halves()
    expected = [(a + b) / 2 if average else a + b for a, b in zip(first, second, strict=True)]
    found = ranks.run(two_replicas, average)
    for ep_rank, (norm, *gradients) in found:
        own = slice(6 * ep_rank, 6 * ep_rank + 6)
        assert all(torch.equal(each, whole[own]) for each, whole in zip(gradients, expected, strict=True))
        assert torch.equal(norm, found[0][1][0])
    layer = make_trainable(SHAPE)
    layer(BATCH.hidden, BATCH.ids, BATCH.weights).backward(make_gradient(BATCH))
    for each, whole in zip(layer.parameters(), expected, strict=True):  # sums in another order: close, not the same
        assert each.grad is not None
        torch.testing.assert_close(each.grad / 2 if average else each.grad, whole, rtol=1e-4, atol=1e-4)


def replicas_that_differ(group: EPGroup) -> str:
    given = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))][: 1 + group.rank]
    world = dist.group.WORLD
    assert world is not None
    with pytest.raises(CallRefusedError) as refused:
        reduce_over_replicas(given, world)
    large = nn.Parameter(torch.zeros((1 << 23) + 5))
    mixed = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    large.grad = torch.full_like(large, group.rank + 1.0)
    if group.rank == 1:
        mixed.grad = torch.full_like(mixed, 4.0)
    reduce_over_replicas([large, mixed], world)
    assert (large.grad == 1.5).all()
    assert mixed.grad is not None
    assert (mixed.grad == 2).all()
    return str(refused.value)


def test_replicas_that_differ_are_refused_and_buckets_have_any_size(ranks: LocalRanks) -> None:
    for said in ranks.run(replicas_that_differ, size=2):
        assert "replica 1 has other parameters than replica 0" in said


def replica_that_stays_away(group: EPGroup) -> str:
    world = dist.group.WORLD
    assert world is not None
    if group.rank:
        return ""
    with pytest.raises(RuntimeError) as lost:
        reduce_over_replicas(nn.Parameter(torch.ones(3)), world, deadline_s=0.5)
    return f"{type(lost.value).__name__}: {lost.value}"


def test_a_replica_that_does_not_call_ends_the_wait(ranks: LocalRanks) -> None:
    said = ranks.run(replica_that_stays_away, size=2)[0]
    assert said.startswith("PeerError: rank 1")
    assert "gradients of replicas" in said


# ---- beside DDP and FSDP ----


def wrapped_gradients(group: EPGroup, wrap: str) -> dict[str, Tensor]:
    """Gradients of a model whose dense part a wrapper of torch's takes care of."""
    model = Model(group)
    experts = {name: each for name, each in model.named_parameters() if ".experts." in name}
    wrapped: nn.Module = model
    if wrap == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(experts))  # type: ignore[no-untyped-call]
        wrapped = DistributedDataParallel(model)
    elif wrap == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (group.size,)), ignored_params=set(experts.values()))
    mine = split(len(BATCH.hidden), group.size)[group.rank]
    batch = BATCH.part(mine)
    wrapped(batch.hidden, batch.ids, batch.weights).square().sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    norm = {"norm": grad_norm(model.parameters())} if wrap != "none" else {}
    whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}
    return whole | norm


def sharded(group: EPGroup) -> list[str]:
    """What FSDP is told around a model, and around its layer."""
    mesh, said = init_device_mesh("cpu", (group.size,)), []
    for layer_alone in (False, True):
        model = Model(group)
        with pytest.raises(ValueError, match="cannot be sharded by FSDP") as refusal:
            fully_shard(model.first if layer_alone else model, mesh=mesh)
        said.append(str(refusal.value))
    return said


def test_fsdp_that_does_not_ignore_the_layer_is_refused(ranks: LocalRanks) -> None:
    for said in ranks.run(sharded, size=2):
        assert all("leave them out with fully_shard(model, ignored_params=" in each for each in said)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_wrappers_that_ignore_the_layer_reduce_the_rest(ranks: LocalRanks, wrap: str) -> None:
    (alone,) = ranks.run(wrapped_gradients, "none", size=1)
    plain, wrapped = ranks.run(wrapped_gradients, "none", size=2), ranks.run(wrapped_gradients, wrap, size=2)
    for mine, theirs in zip(plain, wrapped, strict=True):
        assert all(torch.equal(theirs[name], each) for name, each in mine.items() if ".experts." in name)
        assert torch.equal(theirs["norm"], wrapped[0]["norm"])
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(2 * wrapped[1][name], alone[name], rtol=1e-3, atol=1e3)
