"""Exchanges of all ranks: pages of any size on any hosts; ranks that exchange different things are told so, at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.model.loading.together import Checked, agree_on
from megamoe.parallel.errors import CallRefusedError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.symmetric import PLACE_BYTES, available
from megamoe.parallel.transport.all_to_all import FIRST_BYTES as ALL_TO_ALL_BYTES
from megamoe.parallel.transport.heads import FIRST_BYTES
from megamoe.parallel.transport.pairs import Label
from megamoe.shape import MoEShape
from megamoe.trace.recording import record
from megamoe.training import TrainableMoE, clip_grad_norm_, sum_gradients
from tests.cases import make_batch, make_layer, with_all_to_all
from tests.several_hosts import hosts

pytestmark = pytest.mark.skipif(not available(), reason="ranks share memory on Linux and x86-64")
SHAPE = MoEShape(hidden=128, intermediate=64, num_experts=10, topk=4)
MANY_EXPERTS = MoEShape(hidden=64, intermediate=32, num_experts=400, topk=2)  # whose pages have a second message
HOSTS = [(2,), (1, 1), (2, 1), (1, 2), (1, 1, 1), (2, 2)]
SIZES = (
    0,
    1,
    ALL_TO_ALL_BYTES,
    ALL_TO_ALL_BYTES + 1,
    FIRST_BYTES,
    FIRST_BYTES + 1,
    PLACE_BYTES,
    FIRST_BYTES + PLACE_BYTES + 1,
    3 * PLACE_BYTES,
)


def _of(group: EPGroup, sizes: tuple[int, ...], deadline_s: float = 60.0) -> EPGroup:
    """sizes: of hosts; () for ranks that exchange by collectives"""
    return EPGroup.of(dist.group.WORLD, deadline_s=deadline_s) if sizes else with_all_to_all(group)


def gathered(group: EPGroup, sizes: tuple[int, ...]) -> bool:
    with hosts(group, sizes or (2,)):
        own = _of(group, sizes)
        assert own.transport is not None
        for num_bytes in SIZES:
            pages = own.transport.gather(page(num_bytes, own.rank), Label("pages", "sum"))
            assert torch.equal(pages, torch.stack([page(num_bytes, rank) for rank in range(own.size)])), num_bytes
    return True


def page(num_bytes: int, rank: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(rank)
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("sizes", [*HOSTS, ()], ids=str)
def test_pages_of_any_size_reach_all_ranks(ranks: LocalRanks, sizes: tuple[int, ...]) -> None:
    assert all(ranks.run(gathered, sizes, size=sum(sizes) or 2))


def _calls(layer: MegaMoE) -> None:
    batch = make_batch(layer.shape, 60)
    layer(batch.hidden, batch.ids, batch.weights)


def _in_step(group: EPGroup) -> None:
    """As a step of generation agrees on whether any rank has texts left."""
    assert group.transport is not None
    with group.turn("generation", torch.device("cpu")), group.unbroken("generation", 1):
        group.transport.gather(torch.zeros(8, dtype=torch.uint8), Label("generation", "counts"))


def _traces(group: EPGroup) -> None:
    with record(group) as trace:
        pass
    trace.gather()


def _actions(group: EPGroup) -> dict[str, Callable[[], object]]:
    few, many = make_layer(SHAPE, group, name="few"), make_layer(MANY_EXPERTS, group, name="many")
    training = TrainableMoE(SHAPE, group, name="training")
    apart = EPGroup.of(dist.group.WORLD, shared_memory=False, deadline_s=group.deadline_s)
    return {
        "few": lambda: _calls(few),
        "many": lambda: _calls(many),
        "clip": lambda: clip_grad_norm_(training.parameters(), 1.0),
        "sum": lambda: sum_gradients([nn.Parameter(torch.zeros(70_000))], group),
        "trace": lambda: _traces(group),
        "step": lambda: _in_step(group),
        "load": lambda: agree_on(group, "loading", Checked("all of it")),
        "link": lambda: group.link("few", torch.device("cpu")),
        "meet": lambda: _calls(make_layer(SHAPE, apart, name="apart")),
    }


KINDS = ("few", "many", "clip", "sum", "trace", "step", "load", "link", "meet")


def differently(group: EPGroup, sizes: tuple[int, ...], pairs: list[tuple[str, str]]) -> list[str]:
    """What is said where rank 0 does one thing and the others another, one pair after another on the same group."""
    said = []
    with hosts(group, sizes or (2,)):
        own = _of(group, sizes, deadline_s=20.0)
        actions = _actions(own)
        actions["few"]()
        for first, others in pairs:
            with pytest.raises(CallRefusedError) as refusal:
                actions[others if group.rank else first]()
            said.append(str(refusal.value))
        made = make_layer(SHAPE, own, name="made anew")
        _calls(made)
    return said


@pytest.mark.parametrize("sizes", [(2,), (1, 1), (2, 1), ()], ids=str)
def test_ranks_that_exchange_different_things_are_refused_and_the_group_goes_on(
    ranks: LocalRanks, sizes: tuple[int, ...]
) -> None:
    """Between hosts the longer message would end the process of the rank that expects the shorter one."""
    pairs = [pair for pair in combinations(KINDS, 2) if sizes or "meet" not in pair]
    for rank, said in enumerate(ranks.run(differently, sizes, pairs, size=sum(sizes) or 2)):
        for pair, text in zip(pairs, said, strict=True):
            assert "called something else" in text or "ranks disagree" in text, (pair, text)
            assert "same order" in text, (pair, text)
            assert re.search(rf"ranks? {1 - min(rank, 1)}\b", text), (pair, text)
