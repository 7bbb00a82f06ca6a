"""Layers that go on in another group: the bits of a layer made anew there, and only what is missing is loaded."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.execution.journeys import CallRecord
from megamoe.kernels.cpu.library import using
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.synthetic import SMALL, write_checkpoint
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer, make_weights, split

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=10, topk=3)
SIZES = (2, 3, 1, 4)  # of the groups that a layer goes through, one after another


def subgroup(size: int) -> EPGroup | None:
    """A group of the first ranks; None on the others. All ranks must ask."""
    made = dist.new_group(list(range(size)))
    return EPGroup.of(made) if dist.get_rank() < size else None


def output(layer: MegaMoE, calls: int = 1) -> Tensor:
    """What the layer makes of this rank's part of a batch, in its latest of several calls."""
    batch = make_batch(SHAPE, 53)
    mine = batch.part(split(53, layer.group.size, empty=1)[layer.group.rank])
    return [layer(mine.hidden, mine.ids, mine.weights) for _ in range(calls)][-1]


def wanders(group: EPGroup, weight_format: str, keep_dequantized: bool) -> list[tuple[int, list[int], bool]]:
    """One layer through groups of all SIZES: what it lacked in each, and whether its bits were those of a new one."""
    with using(None) if keep_dequantized else nullcontext():
        return wandered(group, MegaMoE(SHAPE, None, weight_format=weight_format, keep_dequantized=keep_dequantized))


def wandered(group: EPGroup, layer: MegaMoE) -> list[tuple[int, list[int], bool]]:
    weight_format = layer.weight_format
    layer.load_experts(*make_weights(SHAPE))
    output(layer, calls=3)
    gate_up, down = make_weights(SHAPE)
    found = []
    for turn, size in enumerate(SIZES):
        there = subgroup(size)
        if there is not None:
            missing = layer.regroup(there)
            for expert in missing:
                layer.load_expert(expert, gate_up[expert], down[expert])
            fresh = make_layer(SHAPE, there, weight_format=weight_format)
            same = torch.equal(output(layer, calls=2), output(fresh, calls=2))
            assert list(layer.local_experts) == list(Placement(SHAPE.num_experts, size).experts(there.rank))
            found.append((turn, missing, same))
        dist.barrier()
    assert group.size == 4
    return found


# keep_dequantized is for devices without kernels: here a CPU without a compiler
FORMATS = [("mxfp4", False), ("mxfp4", True), ("bf16", False)]
FORMAT_IDS = ["mxfp4", "mxfp4-dequantized_too", "bf16"]


@pytest.mark.parametrize(("weight_format", "keep_dequantized"), FORMATS, ids=FORMAT_IDS)
def test_a_layer_that_moved_has_the_bits_of_a_new_one_and_lacked_what_it_had_not(
    ranks: LocalRanks, weight_format: str, keep_dequantized: bool
) -> None:
    found = ranks.run(wanders, weight_format, keep_dequantized)
    assert all(same for rank in found for _, _, same in rank)
    lacked = [{SIZES[turn]: missing for turn, missing, _ in rank} for rank in found]
    # from all ten experts: rank 0 goes to 0-4, 0-3, 0-9, 0-2; rank 1 to 5-9, 4-6, 3-5; rank 2 to 7-9, 6-7
    assert lacked[0] == {2: [], 3: [], 1: [4, 5, 6, 7, 8, 9], 4: []}
    assert lacked[1] == {2: [], 3: [4], 4: [3]}
    assert lacked[2] == {3: [], 4: [6]}
    assert lacked[3] == {4: []}


# ---- weights ----


def experts(weight_format: str, keep_dequantized: bool, ids: range) -> Experts:
    with using(None) if keep_dequantized else nullcontext():
        made = Experts(
            SHAPE, ids, weight_format=weight_format, device=torch.device("cpu"), keep_dequantized=keep_dequantized
        )
    gate_up, down = make_weights(SHAPE)
    for expert in ids:
        made.load(expert, gate_up[expert], down[expert])
    return made


def held(of: Experts) -> dict[str, Tensor]:
    return dict(of.state_dict())


@pytest.mark.parametrize(("weight_format", "keep_dequantized"), FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (range(5), range(3)),
        (range(5), range(3, 9)),
        (range(4, 9), range(10)),
        (range(4), range(6, 10)),
        (range(6, 10), range(4)),
        (range(3, 3), range(2, 5)),
        (range(2, 5), range(7, 7)),
    ],
)
def test_kept_experts_move_to_their_new_places(
    before: range, after: range, weight_format: str, keep_dequantized: bool
) -> None:
    moved, fresh = (experts(weight_format, keep_dequantized, ids) for ids in (before, after))
    moved.regroup(after)
    missing = [expert for expert in after if expert not in before]
    assert moved.missing == missing
    gate_up, down = make_weights(SHAPE)
    for expert in missing:
        moved.load(expert, gate_up[expert], down[expert])
    assert moved.memory_bytes == fresh.memory_bytes
    assert held(moved).keys() == held(fresh).keys()
    assert all(torch.equal(tensor, held(fresh)[name]) for name, tensor in held(moved).items())


@pytest.mark.parametrize(("weight_format", "keep_dequantized"), FORMATS, ids=FORMAT_IDS)
def test_where_the_experts_stay_nothing_is_copied(weight_format: str, keep_dequantized: bool) -> None:
    layer = experts(weight_format, keep_dequantized, range(2, 6))
    before = [stack.data_ptr() for stacks in layer._stacks.values() for stack in stacks.values()]
    layer.regroup(range(2, 6))
    assert [stack.data_ptr() for stacks in layer._stacks.values() for stack in stacks.values()] == before
    assert not layer.missing


def test_what_was_missing_before_is_missing_still() -> None:
    layer = MegaMoE(SHAPE, weight_format="bf16")
    gate_up, down = make_weights(SHAPE)
    layer.load_expert(4, gate_up[4], down[4])
    lacking = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert layer.regroup(None) == lacking
    assert layer.regroup(None) == lacking


def test_a_layer_that_moved_knows_nothing_of_its_old_group() -> None:
    layer = make_layer(SHAPE, weight_format="bf16", dispatch_format="auto")
    output(layer, calls=3)
    chosen = [layer.tuner.dispatch_format]
    layer.regroup(EPGroup(0, 1, None, 7.0))
    assert [*chosen, layer.tuner.dispatch_format] == ["bf16", None]
    assert layer.group.deadline_s == 7.0
    assert layer.last_call == CallRecord()
    layer.regroup(None)
    assert layer.group.deadline_s == 7.0


# ---- a whole model ----

CONFIG = SMALL.model_copy(
    update={
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "n_routed_experts": 7,
        "num_experts_per_tok": 3,
        "vocab_size": 500,
        "num_hidden_layers": 3,
    }
)
EXPERT_BYTES = 3 * 128 * 64 // 2 + 3 * 128 * 64 // 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("regroup") / "small"
    write_checkpoint(path, CONFIG)
    return path


def model_wanders(_: EPGroup, path: Path) -> list[tuple[int, int, int, bool]]:
    """A model through groups of all SIZES: experts kept and read, bytes read, and whether its bits are a new one's."""
    found, model = [], None
    for size in SIZES:
        there = subgroup(size)
        if there is not None:
            with Checkpoint.open(path) as opened:
                if model is None:
                    model = ExpertStack.load(opened, there)
                    kept, read, num_bytes = 0, model.num_local_experts, 0
                else:
                    kept, read = model.regroup(opened, there)
                    num_bytes = opened.bytes_read
                fresh = ExpertStack.load(opened, there)
                ids = torch.arange(7 * there.rank, 7 * there.rank + 5)
                hidden = opened.embedding(ids)
                found.append((kept, read, num_bytes, torch.equal(model(hidden, ids), fresh(hidden, ids))))
        dist.barrier()
    return found


def test_a_model_that_moved_read_only_what_it_lacked_and_has_the_bits_of_a_new_one(
    ranks: LocalRanks, checkpoint: Path
) -> None:
    found = ranks.run(model_wanders, checkpoint)
    assert all(same for rank in found for *_, same in rank)
    # three layers of 7 experts: rank 0 goes through 0-3, 0-2, 0-6, 0-1; rank 1 through 4-6, 3-4, 2-3; ...
    assert [(kept, read) for kept, read, *_ in found[0]] == [(0, 12), (9, 0), (9, 12), (6, 0)]
    assert [(kept, read) for kept, read, *_ in found[1]] == [(0, 9), (3, 3), (3, 3)]
    for kept, read, num_bytes, _ in [each for rank in found for each in rank]:
        assert num_bytes == (read * EXPERT_BYTES if kept or not read else 0)
