"""Ranks whose groups or layers were made differently: all of them are told what differs, and on which rank, at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamoe.catalog import load_machine
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.symmetric import available
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from tests.cases import make_batch, make_layer, make_weights
from tests.several_hosts import hosts

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=12, topk=3)
DIFFERENT = 1  # the rank that is made otherwise
AT_ONCE_S = 10.0  # far below the deadline


def _own(**given: Any) -> EPGroup:
    return EPGroup.of(dist.group.WORLD, **given)


def _of_group(**given: Any) -> Callable[[bool], MegaMoE]:
    """A layer in an EPGroup that one rank makes otherwise."""
    return lambda differs: make_layer(SHAPE, _own(**(given if differs else {})), name="one")


def _of_layer(**given: Any) -> Callable[[bool], MegaMoE]:
    def make(differs: bool) -> MegaMoE:
        own = {"name": "one", "weight_format": "bf16", **(given if differs else {})}
        layer = MegaMoE(own.pop("shape", SHAPE), _own(), **own)
        layer.load_experts(*make_weights(layer.shape))
        return layer

    return make


def _of_training(**given: Any) -> Callable[[bool], MegaMoE]:
    return lambda differs: TrainableMoE(SHAPE, _own(), name="one", **(given if differs else {}))


def _trained(differs: bool) -> MegaMoE:
    return TrainableMoE(SHAPE, _own(), name="one") if differs else make_layer(SHAPE, _own(), name="one")


# what one rank makes otherwise -> what all ranks say of it; sizes and formats: test_bad_input.py
REFUSED: dict[str, tuple[Callable[[bool], MegaMoE], str]] = {
    "shared_memory": (
        _of_group(shared_memory=False),
        "shared_memory(=| is )True.*False.*rank 1|rank 1.*shared_memory=False",
    ),
    "node_limited": (_of_group(node_limited=False), "node_limited is True on ranks? [0, 2]+, False on rank 1"),
    "intermediate": (_of_layer(shape=replace(SHAPE, intermediate=64)), "intermediate is 32 on .*, 64 on rank 1"),
    "more experts than a page holds": (
        _of_layer(shape=replace(SHAPE, num_experts=600)),
        "num_experts is 12 on .*, 600",
    ),
    "dispatch_format auto": (_of_layer(dispatch_format="auto"), "dispatch_format is mxfp8 on .*, auto on rank 1"),
    "combine_format": (_of_layer(combine_format="mxfp8"), "combine_format is bf16 on .*, mxfp8 on rank 1"),
    "overlap": (_of_layer(overlap=False), "waves is auto on .*, 1 on rank 1"),
    "machine": (_of_layer(machine=load_machine("cpu")), "waves is auto on .*, auto at .* us on rank 1"),
    "gradient_format": (_of_training(gradient_format="mxfp8"), "training is bf16 gradients on .*, mxfp8 gradients on"),
    "saved": (_of_training(saved="dispatch-again"), "training is bf16 gradients on .*, bf16 gradients, dispatch-again"),
    "trainable": (_trained, "training is no on .*, bf16 gradients on rank 1"),
}
ALIKE: dict[str, Callable[[bool], MegaMoE]] = {
    "deadline": _of_group(deadline_s=20.0),
    "saved activations": _of_training(saved="activations"),
    "rounding": _of_training(rounding="stochastic"),
    "master_dtype": _of_training(master_dtype=torch.bfloat16),
    "seed": _of_training(seed=3),
}


def made_otherwise(group: EPGroup, sizes: tuple[int, ...], which: str, tokens: int, met: bool) -> tuple[float, str]:
    """One rank makes a layer otherwise -> how long the call took, and what it was refused with; then a call that holds

    met   whether all ranks have called with shared memory before
    """
    make = REFUSED[which][0] if which in REFUSED else ALIKE[which]
    with hosts(group, sizes):
        if met:
            _call(make_layer(SHAPE, group, name="before"), tokens)
        layer = make(group.rank == DIFFERENT)
        begun, said = time.monotonic(), ""
        try:
            _call(layer, tokens)
        except CallRefusedError as refusal:
            said = str(refusal)
        took = time.monotonic() - begun
        _call(make_layer(SHAPE, group, name="after"), tokens)
    return took, said


def _call(layer: MegaMoE, tokens: int) -> None:
    batch = make_batch(layer.shape, tokens)
    out = layer(batch.hidden.requires_grad_(isinstance(layer, TrainableMoE)), batch.ids, batch.weights)
    if out.requires_grad:
        out.float().sum().backward()


@pytest.mark.skipif(not available(), reason="ranks share memory on Linux and x86-64")
@pytest.mark.parametrize("sizes", [(3,), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("which", REFUSED)
def test_all_ranks_are_told_at_once_what_one_has_otherwise(
    ranks: LocalRanks, which: str, sizes: tuple[int, ...]
) -> None:
    for tokens, met in ((5, True), (400, False)):
        for took, said in ranks.run(made_otherwise, sizes, which, tokens, met, size=sum(sizes)):
            assert re.search(REFUSED[which][1], said), said
            assert took < AT_ONCE_S


@pytest.mark.parametrize("which", ALIKE)
def test_what_is_a_ranks_own_may_differ(ranks: LocalRanks, which: str) -> None:
    assert {said for _, said in ranks.run(made_otherwise, (2,), which, 40, False, size=2)} == {""}
