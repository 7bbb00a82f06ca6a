"""A thousand calls with random routings: the oracle's bits now and then, and no growth in memory or open files."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer, oracle

SHAPE = MoEShape(hidden=128, intermediate=64, num_experts=9, topk=3, swiglu_limit=4.0)


def many_calls(group: EPGroup, num_calls: int) -> tuple[list[int], list[int]]:
    """Resident bytes and open files of this rank, after warming up and at the end; every 100th call is checked."""
    layers = [make_layer(SHAPE, group, waves=waves, name=f"layers.{waves}") for waves in (1, 2, 5)]
    rng = torch.Generator().manual_seed(group.rank)
    process = psutil.Process()
    resident, files = [], []
    for call in range(num_calls):
        if call in (num_calls // 4, num_calls - 1):
            gc.collect()
            resident.append(process.memory_info().rss)
            files.append(process.num_fds())
        num_tokens = int(torch.randint(0, 60, (), generator=rng))
        batch = make_batch(SHAPE, num_tokens, seed=call * group.size + group.rank)
        out = layers[call % 3](batch.hidden, batch.ids, batch.weights)
        if call % 100 == 0:
            assert torch.equal(out, oracle(SHAPE, batch, "mxfp4", "mxfp8")), call
    return resident, files


@pytest.mark.parametrize(
    "num_calls",
    [1000, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
    ids="{}_calls".format,
)
def test_memory_and_open_files_do_not_grow(ranks: LocalRanks, num_calls: int) -> None:
    for resident, files in ranks.run(many_calls, num_calls, size=3, timeout_s=0.2 * num_calls):
        assert files[1] <= files[0]
        assert resident[1] - resident[0] < 8e6, resident
