"""The layer gives the oracle's bits for any ranks, waves, formats and neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from megamoe.waves import Waves
from tests.cases import Batch, make_batch, make_layer, oracle, split

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
FORMATS = [(weights, wire) for weights in ("mxfp4", "bf16") for wire in ("mxfp8", "bf16")]
WAVES: list[Waves] = [1, 2, 5, "auto", (1, 3, 2)]


def sweep(group: EPGroup, shape: MoEShape, batch: Batch, shares: list[slice]) -> dict[tuple[str, str, str], Tensor]:
    mine = batch.part(shares[group.rank])
    out = {}
    for weights, wire in FORMATS:
        for waves in WAVES:
            layer = make_layer(shape, group, weight_format=weights, dispatch_format=wire, waves=waves)
            out[weights, wire, str(waves)] = layer(mine.hidden, mine.ids, mine.weights)
    return out


@pytest.mark.parametrize("empty", [None, 0, 1], ids=["all_have_tokens", "rank_0_empty", "rank_1_empty"])
@pytest.mark.parametrize("ep_size", [1, 2, 3, 4], ids="ep{}".format)
def test_output_is_the_same_for_any_ep_size(ranks: LocalRanks, ep_size: int, empty: int | None) -> None:
    batch = make_batch(SHAPE, 61)
    shares = split(61, ep_size, empty=empty)
    outputs = ranks.run(sweep, SHAPE, batch, shares, size=ep_size)
    for weights, wire in FORMATS:
        expected = oracle(SHAPE, batch, weights, wire)
        for waves in WAVES:
            got = torch.cat([output[weights, wire, str(waves)] for output in outputs])
            assert torch.equal(got, expected), (weights, wire, waves)
