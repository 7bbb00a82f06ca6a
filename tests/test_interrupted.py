"""What ends a call breaks a group only where rows may be on their way, and what is refused changes nothing."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import Tensor

from megamoe.catalog import load_machine
from megamoe.execution.experts import Experts
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from megamoe.routing.agreement import fit_text
from megamoe.shape import MoEShape
from tests.cases import Batch, computing, make_batch, make_layer, make_weights

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)
OLD, NEW = make_weights(SHAPE), make_weights(SHAPE, seed=7)
FORMATS = ["mxfp4", "bf16"]


def call(layer: MegaMoE, batch: Batch) -> Tensor:
    out: Tensor = layer(batch.hidden, batch.ids, batch.weights)
    return out


@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError, ValueError, torch.OutOfMemoryError])
def test_a_rank_alone_goes_on_whatever_ended_a_call(end: type[BaseException]) -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 9)
    expected = call(layer, batch)

    def fail(*_: object) -> Tensor:
        raise end("in the middle")

    with computing(layer, fail), pytest.raises(end):
        call(layer, batch)
    assert layer.group.broken == []
    assert torch.equal(call(layer, batch), expected)


def fails_in_the_middle(group: EPGroup, end: type[BaseException]) -> tuple[str, str]:
    layer, batch = make_layer(SHAPE, group), make_batch(SHAPE, 9)
    call(layer, batch)

    def fail(*_: object) -> Tensor:
        raise end("a table of the kernel")

    with computing(layer, fail) if group.rank == 1 else nullcontext(), pytest.raises((end, PeerError)) as ended:
        call(layer, batch)
    with pytest.raises(RuntimeError, match="cannot be used any more") as refusal:
        call(layer, batch)
    assert not isinstance(ended.value, CallRefusedError)
    return type(ended.value).__name__, str(refusal.value)


@pytest.mark.parametrize("end", [ValueError, KeyboardInterrupt, MemoryError])
def test_whatever_ends_a_call_on_several_ranks_breaks_their_group(ranks: LocalRanks, end: type[BaseException]) -> None:
    (waited, heard), (raised, said) = ranks.run(fails_in_the_middle, end, size=2)
    assert (waited, raised) == ("PeerError", end.__name__)
    assert f"{end.__name__}: a table of the kernel" in said
    assert "PeerError" in heard


def forks(group: EPGroup) -> str:
    """What a process says that rank 1 has forked, in which a program by mistake calls the layer."""
    layer, batch = make_layer(SHAPE, group), make_batch(SHAPE, 9)
    expected = call(layer, batch)
    reads, writes = os.pipe()
    child = os.fork() if group.rank == 1 else None
    if child == 0:
        try:
            call(layer, batch)
            os.write(writes, b"has called it")
        except RuntimeError as refusal:
            os.write(writes, str(refusal).encode())
        finally:
            os._exit(0)
    if child is not None:
        os.waitpid(child, 0)
    os.close(writes)
    with open(reads) as said:
        heard = said.read()
    assert torch.equal(call(layer, batch), expected)
    return heard


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_process_that_a_rank_forks_has_no_part_in_its_calls(ranks: LocalRanks) -> None:
    """It would read and write what the other ranks send to its parent."""
    nothing, refusal = ranks.run(forks, size=2)
    assert nothing == ""
    assert refusal == "the group cannot be used any more, this process was forked from that of rank 1, which goes on"


LEAVES = """
import os, sys
import torch
import torch.distributed as dist
from megamoe import init_group
from megamoe.parallel.health.runs import folder

place, run = sys.argv[1:]
other = os.fork()
rank = 0 if other else 1
store = dist.FileStore(place, 2)
with init_group("cpu", rank=rank, size=2, store=store, deadline_s=20, run=run) as group:
    dist.barrier()
    child = os.fork() if rank == 1 else 1
    if child == 0:
        sys.exit(7)
    if rank == 1:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert (folder() / run / "rank-1.json").exists(), "the child has taken its parent off the list"
    dist.barrier()
if rank == 0:
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_process_that_a_rank_forks_ends_like_any_other_and_ends_nothing_of_the_rank(tmp_path: Path) -> None:
    """It would wait for gloo's threads, which its parent alone has."""
    line = [sys.executable, "-c", LEAVES, str(tmp_path / "store"), f"fork-{uuid4().hex}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


LEAVES_OTHERS = """
import os, sys, time
import torch.distributed as dist
from megamoe import EPGroup

other = os.fork()
rank = 0 if other else 1
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
group = EPGroup.of(dist.new_group([0, 1]))
dist.barrier()
child = os.fork() if rank == 1 else 1
if child == 0:
    sys.exit(7)
if rank == 1:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
dist.barrier()
if rank == 0:
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
dist.destroy_process_group()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows does not fork")
def test_a_process_that_a_rank_forks_waits_for_no_other_group_of_the_program(tmp_path: Path) -> None:
    line = [sys.executable, "-c", LEAVES_OTHERS, str(tmp_path / "store")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def refused_together(group: EPGroup) -> None:
    layer, batch = make_layer(SHAPE, group), make_batch(SHAPE, 9)
    expected = call(layer, batch)
    wrong = dataclasses.replace(batch, ids=batch.ids + 100 * group.rank)
    with pytest.raises(CallRefusedError):
        call(layer, wrong)
    asks = dataclasses.replace(batch, weights=batch.weights.clone().requires_grad_(group.rank == 1))
    with pytest.raises(CallRefusedError, match="topk_weights requires a gradient"):
        call(layer, asks)
    assert group.broken == []
    assert torch.equal(call(layer, batch), expected)


def test_only_what_ranks_refuse_together_leaves_their_group_usable(ranks: LocalRanks) -> None:
    ranks.run(refused_together, size=2)


# ---- weights ----


def with_nan(weights: Tensor, expert: int) -> Tensor:
    weights = weights.clone()
    weights[expert, 3, 3] = float("nan")
    return weights


BAD = {
    "down_too_narrow": (NEW[0], NEW[1][..., :16]),
    "down_of_integers": (NEW[0], NEW[1].to(torch.int32)),
    "down_of_the_last_is_nan": (NEW[0], with_nan(NEW[1], 5)),
    "gate_up_too_large": (NEW[0] * 1e39, NEW[1]),
    "down_has_too_few_experts": (NEW[0], NEW[1][:4]),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_refused_reload_keeps_all_of_the_old_weights(bad: str) -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 9)
    expected = call(layer, batch)
    with pytest.raises(ValueError, match=r"gate_up|down"):
        layer.load_experts(*BAD[bad])
    assert torch.equal(call(layer, batch), expected)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_refused_expert_keeps_both_of_its_old_matrices(weight_format: str) -> None:
    layer, batch = make_layer(SHAPE, weight_format=weight_format, dispatch_format="bf16"), make_batch(SHAPE, 9)
    expected = call(layer, batch)
    with pytest.raises(ValueError, match="down of expert 2"):
        layer.load_expert(2, NEW[0][2], NEW[1][2][:, :16])
    assert torch.equal(call(layer, batch), expected)
    fresh = MegaMoE(SHAPE, weight_format=weight_format)
    with pytest.raises(ValueError, match="down of expert 2"):
        fresh.load_expert(2, NEW[0][2], NEW[1][2][:, :16])
    assert 2 in fresh.experts.missing


@pytest.mark.parametrize("weight_format", FORMATS)
def test_an_interrupted_reload_says_what_is_missing(weight_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, store = make_layer(SHAPE, weight_format=weight_format), Experts._store

    def interrupted(self: Experts, name: str, index: int, *rest: object) -> None:
        if (name, index) == ("down", 2):
            raise KeyboardInterrupt
        store(self, name, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Experts, "_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.load_experts(*NEW)
    monkeypatch.undo()
    batch = make_batch(SHAPE, 9)
    with pytest.raises(ValueError, match="no weights for experts 2, 3, 4, 5"):
        call(layer, batch)
    layer.load_experts(*OLD)
    assert torch.equal(call(layer, batch), call(make_layer(SHAPE, weight_format=weight_format), batch))


# ---- what ranks compare ----


def test_texts_that_do_not_fit_keep_apart() -> None:
    assert fit_text("layers.0.experts", 16) == b"layers.0.experts"
    texts = ["a" * 100, "a" * 99 + "b", "b" + "a" * 99, "a" * 50 + "b" + "a" * 49, "a" * 101, "é" * 60, "a", "a\0"]
    found = {fit_text(text, 64) for text in texts}
    assert len(found) == len(texts)
    assert max(map(len, found)) <= 64
    said = fit_text("model.layers.0." + "x" * 90 + ".experts", 64).decode()
    assert said.startswith("model.layers.0.")
    assert ".experts #" in said


LONG = "model.decoder.transformer.backbone.layers.of.the.second.stage.number.{}.mlp.experts"
DIFFERENT: dict[str, tuple[list[dict[str, object]], str]] = {
    "names": ([{"name": LONG.format(rank)} for rank in range(2)], "layer is model.decoder"),
    "a_zero_at_the_end": ([{"name": "moe"}, {"name": "moe\0"}], "layer is moe"),
    "waves": ([{"waves": (1,) * 40 + (1 + rank,)} for rank in range(2)], "waves is "),
}


def different(group: EPGroup, options: list[dict[str, object]]) -> None:
    layer = MegaMoE(SHAPE, group, **options[group.rank])  # type: ignore[arg-type]
    layer.load_experts(*OLD)
    call(layer, make_batch(SHAPE, 5))


@pytest.mark.parametrize("case", DIFFERENT)
def test_terms_that_differ_behind_what_a_page_holds_are_found_out(ranks: LocalRanks, case: str) -> None:
    options, message = DIFFERENT[case]
    for outcome in ranks.outcomes(different, options, size=2):
        assert isinstance(outcome, CallRefusedError), outcome
        assert message in str(outcome)


def test_machines_that_differ_by_little_differ(ranks: LocalRanks) -> None:
    machine = load_machine("cpu")
    wave_us = machine.wave_us.model_copy(update={"value": machine.wave_us.value * (1 + 1e-9)})
    machines = [machine, machine.model_copy(update={"wave_us": wave_us})]
    for outcome in ranks.outcomes(different, [{"machine": each} for each in machines], size=2):
        assert "waves is auto at" in str(outcome)


@pytest.mark.parametrize("name", [7, None, "\ud800"])
def test_a_name_that_ranks_cannot_tell_each_other_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="name must be"):
        MegaMoE(SHAPE, name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", ["10", True, 10**400])
def test_a_limit_that_is_no_number_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="swiglu_limit must be a positive finite number"):
        MoEShape(64, 32, 4, 2, limit)
    with pytest.raises(ValueError, match="at most 10000"):
        MegaMoE(SHAPE, waves=60_000)
