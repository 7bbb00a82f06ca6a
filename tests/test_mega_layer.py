"""transport="fused": the layer as one kernel on every rank, interpreted; what it refuses, and who is named."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup, init_group
from megamoe.parallel.transport.buffers import Exchange
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_weights
from tests.interpreter import interpreted
from tests.mega_ranks import on_ranks

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=3, topk=2, swiglu_limit=3.0)


def fused(group: EPGroup | None, tokens: int = 6, *, load: bool = True, name: str = "moe") -> MegaMoE:
    layer = MegaMoE(SHAPE, group, transport="fused", max_tokens_per_rank=tokens, name=name)
    if load:
        layer.load_experts(*make_weights(SHAPE))
    return layer


def alone(batch: Batch) -> Tensor:
    """What the staged kernels give, in Triton, on one rank."""
    with (
        mock.patch("megamoe.execution.experts.has_kernels", return_value=True),
        mock.patch("megamoe.execution.ops.has_kernels", return_value=True),
    ):
        layer = MegaMoE(SHAPE)
        layer.load_experts(*make_weights(SHAPE))
        return layer(batch.hidden, batch.ids, batch.weights)


def said_by(layer: MegaMoE, batch: Batch) -> str:
    try:
        layer(batch.hidden, batch.ids, batch.weights)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def serve(rank: int, exchange: Exchange, folder: str) -> tuple[list[Tensor], list[str]]:
    """Two ranks: refused first calls, calls that are right, a wrong one of rank 1 alone, and rank 1 ends."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    outputs, said = [], []
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    with init_group("cpu", rank=rank, size=2, store=store, deadline_s=60.0) as group:
        batch = make_batch(SHAPE, 5 - rank, rank)
        unloaded = fused(group, load=False) if rank else fused(group)
        said.append(said_by(unloaded, batch))
        by_waves = MegaMoE(SHAPE, group, name="mixed")
        by_waves.load_experts(*make_weights(SHAPE))
        said.append(said_by(fused(group, name="mixed") if rank else by_waves, batch))
        said.append(said_by(fused(group, 6 + rank), batch))
        layer = fused(group)
        outputs.append(layer(batch.hidden, batch.ids, batch.weights))
        assert layer.last_call.tokens == 5 - rank
        many = make_batch(SHAPE, 7 if rank else 2, 5)
        said.append(said_by(layer, many))
        again = fused(group)  # in the same memory
        outputs.append(again(batch.hidden, batch.ids, batch.weights))
        exchange(b"rank 1 ends")
        if rank == 0:
            group.monitors.clear()
            short = next(iter(group.workspace.kernels.values()))
            short._deadline_ms = 1000  # type: ignore[attr-defined]
            said += [said_by(layer, batch), said_by(layer, batch)]
    exchange(b"done")
    return outputs, said


@interpreted
def test_a_fused_layer_has_the_staged_bits_and_names_who_complains_and_who_is_gone() -> None:
    with tempfile.TemporaryDirectory() as folder:
        here, there = on_ranks(2, serve, folder)
    for rank, (outputs, _) in enumerate((here, there)):
        expected = alone(make_batch(SHAPE, 5 - rank, rank))
        assert all(torch.equal(out, expected) for out in outputs)
    refused, mixed, bounds, others, lost, broken = here[1]
    assert "CallRefusedError: rank 1 on " in refused
    assert "was called wrongly, so no rank computed: layer 'moe' has no weights for experts" in refused
    assert there[1][0].startswith("CallRefusedError: layer 'moe' has no weights for experts")
    assert "transport is auto on rank 0, fused, 6 tokens on rank 1" in mixed
    assert "transport is fused, 6 tokens on rank 0, fused, 7 tokens on rank 1" in bounds
    assert all(each.startswith("CallRefusedError: ranks disagree, so no rank computed: ") for each in (mixed, bounds))
    assert [mixed, bounds] == there[1][1:3]
    assert others == "", "a rank that brings too many tokens keeps nobody waiting"
    assert "max_tokens_per_rank 6, got 7 tokens" in there[1][3]
    assert lost.startswith("PeerError: rank 1 on ")
    assert "phase dispatch" in lost
    assert "rank 0 waited in the kernel for the counts of rank 1" in lost
    assert broken.startswith("RuntimeError: the group cannot be used any more")


@interpreted
def test_a_rank_alone_runs_the_kernel_too_and_reports_wrong_values_once() -> None:
    layer, batch = fused(None), make_batch(SHAPE, 3)
    expected = alone(batch)
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), expected)
    ids = batch.ids.clone()
    ids[1, 0] = 3
    assert "a call of layer 'moe' had topk_ids outside of [0, 3)" in said_by(
        layer, Batch(batch.hidden, ids, batch.weights)
    )
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), expected)
    nothing = Batch(batch.hidden[:0], batch.ids[:0], batch.weights[:0])
    assert layer(nothing.hidden, nothing.ids, nothing.weights).shape == (0, 64)


def test_a_cpu_without_the_interpreter_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="runs on a CPU in Triton's interpreter alone: set TRITON_INTERPRET=1"):
        MegaMoE(SHAPE, transport="fused", max_tokens_per_rank=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transport": "mega"}, "transport must be one of auto, fused, got 'mega'"),
        ({"transport": "fused"}, "max_tokens_per_rank must be a positive integer, got None"),
        ({"transport": "fused", "max_tokens_per_rank": 0}, "max_tokens_per_rank must be a positive integer, got 0"),
        ({"max_tokens_per_rank": 4}, "of use with transport='fused' alone"),
    ],
    ids=["unknown", "no-bound", "no-room", "bound-of-nothing"],
)
def test_options_that_say_nothing_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MegaMoE(SHAPE, **options)  # type: ignore[arg-type]
