"""The layer gives the oracle's bits for any ranks, waves, formats and neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.execution import pipeline
from megamoe.execution.journeys import CallRecord
from megamoe.formats import quantize_mxfp4
from megamoe.kernels.cpu.library import using
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.pairs import Clock
from megamoe.parallel.workspace import Workspace
from megamoe.reference import moe_fp64, relative_error
from megamoe.routing.waves import Waves, plan_waves
from megamoe.schedule.schedule import Load, Step, schedule
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, make_weights, oracle, split

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


def forward(group: EPGroup, shape: MoEShape, batch: Batch, shares: list[slice], waves: Waves) -> Tensor:
    mine = batch.part(shares[group.rank])
    return make_layer(shape, group, waves=waves)(mine.hidden, mine.ids, mine.weights)


def run(ranks: LocalRanks, shape: MoEShape, batch: Batch, ep_size: int, waves: Waves = "auto") -> Tensor:
    shares = split(len(batch.hidden), ep_size)
    return torch.cat(ranks.run(forward, shape, batch, shares, waves, size=ep_size))


@pytest.mark.parametrize(
    "shape",
    [SHAPE, MoEShape(3072, 512, 4, 2, 10.0), MoEShape(64, 2880, 3, 3)],
    ids=["small", "hidden_3072", "intermediate_2880"],
)
@pytest.mark.parametrize("token", [0, 100, 256])
def test_a_token_alone_has_the_bits_it_has_in_a_batch_of_257(shape: MoEShape, token: int) -> None:
    batch = make_batch(shape, 257)
    layer = make_layer(shape)
    together = layer(batch.hidden, batch.ids, batch.weights)
    alone = batch.part(slice(token, token + 1))
    assert torch.equal(layer(alone.hidden, alone.ids, alone.weights)[0], together[token])


def test_a_token_alone_on_three_ranks_has_the_bits_it_has_in_a_batch(ranks: LocalRanks) -> None:
    batch = make_batch(SHAPE, 257)
    together = run(ranks, SHAPE, batch, 3, 2)
    assert torch.equal(run(ranks, SHAPE, batch.part(slice(200, 201)), 3, 2)[0], together[200])


def routed(ids: Tensor) -> Batch:
    return Batch(
        make_batch(SHAPE, len(ids)).hidden, ids, torch.rand(ids.shape, generator=torch.Generator().manual_seed(3))
    )


ROUTINGS = {
    "all_on_one_expert": torch.full((40, 4), 7),
    "all_on_the_first_rank": torch.randint(0, 3, (40, 4), generator=torch.Generator().manual_seed(4)),
    "all_masked": torch.full((40, 4), -1),
    "one_slot_each": torch.tensor([[-1, -1, 5, -1]]).repeat(40, 1),
    "same_expert_twice": torch.tensor([[9, 9, 0, 0]]).repeat(40, 1),
    "one_token": torch.tensor([[0, 3, 6, 9]]),
    "no_tokens": torch.zeros(0, 4, dtype=torch.int64),
}


@pytest.mark.parametrize("ep_size", [1, 4], ids="ep{}".format)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_extreme_routings_match_the_oracle(ranks: LocalRanks, routing: str, ep_size: int) -> None:
    batch = routed(ROUTINGS[routing])
    got = run(ranks, SHAPE, batch, ep_size, 3)
    assert torch.equal(got, oracle(SHAPE, batch, "mxfp4", "mxfp8"))
    if routing == "all_masked":
        assert not got.any()


@pytest.mark.parametrize(
    "shape",
    [MoEShape(64, 32, 2, 2), MoEShape(64, 32, 4, 3), MoEShape(32, 32, 400, 5), MoEShape(64, 32, 7, 1)],
    ids=["fewer_experts_than_ranks", "topk_above_local_experts", "more_experts_than_a_page_holds", "uneven_top1"],
)
def test_any_number_of_experts_works_on_four_ranks(ranks: LocalRanks, shape: MoEShape) -> None:
    batch = make_batch(shape, 50)
    assert torch.equal(run(ranks, shape, batch, 4, 2), oracle(shape, batch, "mxfp4", "mxfp8"))


def test_masked_slots_add_nothing_whatever_their_weight() -> None:
    batch = make_batch(SHAPE, 30)
    weights = batch.weights.masked_fill(batch.ids < 0, float("nan"))
    layer = make_layer(SHAPE)
    assert torch.equal(layer(batch.hidden, batch.ids, weights), layer(batch.hidden, batch.ids, batch.weights))


def test_float32_and_non_contiguous_input_are_rounded_to_bf16_first() -> None:
    batch = make_batch(SHAPE, 30)
    layer = make_layer(SHAPE)
    expected = layer(batch.hidden, batch.ids, batch.weights)
    wide = batch.hidden.to(torch.float32) * (1 + 2**-10)  # rounds back to the same BF16
    assert torch.equal(layer(wide, batch.ids, batch.weights), expected)
    strided = torch.stack((batch.hidden, batch.hidden), -1)[..., 0]
    ids, weights = batch.ids.T.contiguous().T, batch.weights.T.contiguous().T
    assert not strided.is_contiguous()
    assert not ids.is_contiguous()
    assert torch.equal(layer(strided, ids, weights), expected)


@pytest.mark.parametrize(("weights", "wire"), FORMATS)
def test_error_against_fp64_is_below_the_contracts_bound(weights: str, wire: str) -> None:
    shape = MoEShape(512, 256, 8, 3, 10.0)
    batch = make_batch(shape, 100)
    got = make_layer(shape, weight_format=weights, dispatch_format=wire)(batch.hidden, batch.ids, batch.weights)
    exact = moe_fp64(
        shape, batch.hidden, batch.ids, batch.weights, *make_weights(shape), weight_format=weights, dispatch_format=wire
    )
    error = relative_error(got, exact)
    print(f"{weights} weights, {wire} wire, 512 x 256: relative error {error:.5f}")  # noqa: T201
    assert error < 5e-3


def test_error_against_fp64_is_below_the_bound_at_the_size_of_v4_pro() -> None:
    shape = MoEShape(7168, 3072, 1, 1, 10.0)
    batch = make_batch(shape, 12)
    gate_up, down = make_weights(shape)
    layer = MegaMoE(shape)
    layer.load_experts(gate_up, down)
    exact = moe_fp64(shape, batch.hidden, batch.ids, batch.weights, gate_up, down)
    error = relative_error(layer(batch.hidden, batch.ids, batch.weights), exact)
    print(f"mxfp4 weights, mxfp8 wire, 7168 x 3072: relative error {error:.5f}")  # noqa: T201
    assert error < 5e-3


def all_to_all(group: EPGroup, batch: Batch, shares: list[slice]) -> Tensor:
    world = dist.group.WORLD
    assert world is not None
    transport = AllToAllTransport(world, Clock(group.deadline_s, {}, group.own_status), torch.device("cpu"))
    mine = batch.part(shares[group.rank])
    layer = make_layer(SHAPE, EPGroup(group.rank, group.size, transport, group.deadline_s), waves=3)
    return layer(mine.hidden, mine.ids, mine.weights)


def test_the_all_to_all_transport_moves_the_same_rows(ranks: LocalRanks) -> None:
    batch = make_batch(SHAPE, 61)
    outputs = ranks.run(all_to_all, batch, split(61, 3), size=3)
    assert torch.equal(torch.cat(outputs), oracle(SHAPE, batch, "mxfp4", "mxfp8"))


def plain_group(group: EPGroup, batch: Batch, shares: list[slice]) -> Tensor:
    del group
    world = dist.group.WORLD
    assert world is not None
    layer = MegaMoE(SHAPE, world, waves=2)
    layer.load_experts(*make_weights(SHAPE))
    mine = batch.part(shares[world.rank()])
    return layer(mine.hidden, mine.ids, mine.weights)


def test_a_plain_torch_process_group_is_taken_as_it_is(ranks: LocalRanks) -> None:
    batch = make_batch(SHAPE, 61)
    outputs = ranks.run(plain_group, batch, split(61, 2), size=2)
    assert torch.equal(torch.cat(outputs), oracle(SHAPE, batch, "mxfp4", "mxfp8"))


def test_the_number_of_threads_changes_no_bit() -> None:
    shape = MoEShape(1024, 96, 4, 2)
    batch = make_batch(shape, 301)
    outputs = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        outputs.append(make_layer(shape)(batch.hidden, batch.ids, batch.weights))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_weights_load_alike_from_floats_records_and_byte_pairs() -> None:
    gate_up, down = make_weights(SHAPE)
    packed = quantize_mxfp4(gate_up), quantize_mxfp4(down)
    batch = make_batch(SHAPE, 20)
    as_bytes = [
        (q.packed.view(torch.int8), q.scales.view(torch.float8_e8m0fnu))  # the spelling of DeepSeek's checkpoints
        for q in packed
    ]
    outputs = []
    for weights in ((gate_up, down), packed, as_bytes):
        layer = MegaMoE(SHAPE)
        layer.load_experts(*weights)
        outputs.append(layer(batch.hidden, batch.ids, batch.weights))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def own_weights(group: EPGroup, batch: Batch, shares: list[slice]) -> Tensor:
    layer = MegaMoE(SHAPE, group)
    gate_up, down = make_weights(SHAPE)
    own = layer.local_experts
    layer.load_experts(gate_up[own.start : own.stop], down)
    mine = batch.part(shares[group.rank])
    return layer(mine.hidden, mine.ids, mine.weights)


def test_a_rank_can_load_its_own_experts_or_all(ranks: LocalRanks) -> None:
    batch = make_batch(SHAPE, 33)
    outputs = ranks.run(own_weights, batch, split(33, 3), size=3)
    assert torch.equal(torch.cat(outputs), oracle(SHAPE, batch, "mxfp4", "mxfp8"))


def test_memory_is_stated_and_a_kept_bf16_copy_changes_no_bit() -> None:
    batch = make_batch(SHAPE, 20)
    values = 3 * SHAPE.hidden * SHAPE.intermediate * SHAPE.num_experts
    assert make_layer(SHAPE).memory_bytes == values // 2 + values // 32
    with using(None):  # a device without kernels
        packed, kept = make_layer(SHAPE), MegaMoE(SHAPE, keep_dequantized=True)
        kept.load_experts(*make_weights(SHAPE))
        assert packed.memory_bytes == values // 2 + values // 32
        assert kept.memory_bytes == packed.memory_bytes + 2 * values
        assert torch.equal(packed(batch.hidden, batch.ids, batch.weights), kept(batch.hidden, batch.ids, batch.weights))
        assert kept.experts.decode_rows < packed.experts.decode_rows


def records(group: EPGroup, batch: Batch, shares: list[slice]) -> tuple[CallRecord, Load]:
    """Of one call: its record, and what its schedule was made for."""
    mine, loads = batch.part(shares[group.rank]), list[Load]()
    layer = make_layer(SHAPE, group, waves=2)

    def noted(waves: list[range], load: Load) -> list[Step]:
        loads.append(load)
        return schedule(waves, load)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "schedule", noted)
        layer(mine.hidden, mine.ids, mine.weights)
    (load,) = loads
    return layer.last_call, load


def test_a_call_counts_every_row_and_byte(ranks: LocalRanks) -> None:
    """In its record, and in what its steps are ordered by."""
    batch = make_batch(SHAPE, 61)
    shares = split(61, 3)
    found = ranks.run(records, batch, shares, size=3)
    placement = Placement(SHAPE.num_experts, 3)
    for rank, (record, load) in enumerate(found):
        own = placement.experts(rank)
        mine = batch.ids[shares[rank]]
        local = int(((mine >= own.start) & (mine < own.stop)).sum())
        held = int(((batch.ids >= own.start) & (batch.ids < own.stop)).sum())
        assert record.tokens == len(mine)
        assert record.waves == 2
        assert record.rows_local == local
        assert record.rows_sent == int((mine >= 0).sum()) - local
        assert record.rows_received == held - local
        travelling = heads = 0
        row_bytes = 144  # 128 + 128 / 32, filled up to sixteens
        for peer in {0, 1, 2} - {rank}:
            theirs = placement.experts(peer)
            travelling += int(((mine >= theirs.start) & (mine < theirs.stop)).any(1).sum())
            for wave in range(2):
                experts = plan_waves(placement, 2).experts(peer, wave)
                heads += -(-8 * int(((mine >= experts.start) & (mine < experts.stop)).sum()) // row_bytes)
        assert record.dispatch_bytes == (travelling + heads) * row_bytes, "a token goes to a rank once"
        assert record.combine_bytes == record.rows_received * 2 * 128
        assert min(record.compute_s, record.waiting_s) > 0
        assert record.compute_s + record.waiting_s <= record.total_s
        rows = {expert: int((mine == expert).sum()) for expert in own}
        assert load.local == list(rows.values())
        ours = [plan_waves(placement, 2).experts(rank, wave) for wave in range(2)]
        assert load.arriving == [sum(int((batch.ids == each).sum()) - rows[each] for each in ids) for ids in ours]
    assert sum(record.rows_sent for record, _ in found) == sum(record.rows_received for record, _ in found)


@pytest.mark.parametrize("weights", ["mxfp4", "bf16"])
def test_state_dict_carries_the_weights(weights: str) -> None:
    batch = make_batch(SHAPE, 10)
    layer, other = make_layer(SHAPE, weight_format=weights), MegaMoE(SHAPE, weight_format=weights)
    state = layer.state_dict()
    assert state["experts.gate_up"].shape[:2] == (SHAPE.num_experts, 2 * SHAPE.intermediate)
    other.load_state_dict(state)
    assert other.memory_bytes == layer.memory_bytes
    assert torch.equal(other(batch.hidden, batch.ids, batch.weights), layer(batch.hidden, batch.ids, batch.weights))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wire", ["mxfp8", "bf16"])
def test_a_token_that_is_not_finite_spoils_no_other(wire: str, value: float) -> None:
    batch = make_batch(SHAPE, 30, mask=False)
    hidden = batch.hidden.clone()
    hidden[0, 5] = value  # row 0 is also what padding repeats
    layer = make_layer(SHAPE, dispatch_format=wire)
    out, expected = layer(hidden, batch.ids, batch.weights), layer(batch.hidden, batch.ids, batch.weights)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], expected[1:])


def test_a_result_outlives_the_next_call_though_buffers_are_used_again() -> None:
    layer = make_layer(SHAPE)
    first, second = make_batch(SHAPE, 60, seed=1), make_batch(SHAPE, 60, seed=2)
    out = layer(first.hidden, first.ids, first.weights)
    kept, held = out.clone(), layer.group.workspace.memory_bytes
    assert held > 0
    layer(second.hidden, second.ids, second.weights)
    assert torch.equal(out, kept)
    assert layer.group.workspace.memory_bytes <= held * 1.2, "a call of the same size asks for no more"
    small = first.part(slice(0, 7))
    assert torch.equal(layer(small.hidden, small.ids, small.weights), kept[:7])


def test_the_workspace_gives_the_same_memory_for_the_same_name() -> None:
    workspace, like = Workspace(), torch.empty(0, dtype=torch.bfloat16)
    large = workspace.take("rows", (4, 8), like)
    assert (large.dtype, large.shape, workspace.memory_bytes) == (torch.bfloat16, (4, 8), 64)
    small = workspace.take("rows", (3, 2), like, torch.float32)
    assert (small.dtype, small.shape, small.data_ptr()) == (torch.float32, (3, 2), large.data_ptr())
    assert workspace.take("others", (2,), like).data_ptr() != large.data_ptr()
    assert workspace.take("rows", (5, 8), like).shape == (5, 8)
    assert workspace.memory_bytes == 80 + 4
    assert workspace.take("rows", (0, 8), like).shape == (0, 8)
