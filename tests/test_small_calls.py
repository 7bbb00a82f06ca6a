"""Calls of few tokens: the oracle's bits on the short way, which ranks take together or not at all."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.execution import small_call
from megamoe.execution.journeys import CallRecord
from megamoe.kernels.cpu.library import chosen, using
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.symmetric import PLACE_BYTES, available
from megamoe.parallel.transport.heads import MESSAGE_BYTES
from megamoe.shape import MoEShape
from megamoe.trace.recording import record
from megamoe.trace.timeline import CALL, LANES, Timeline
from tests.cases import ACTIVATIONS, Batch, computing, make_batch, make_layer, make_weights, oracle, split
from tests.several_hosts import hosts

pytestmark = [
    pytest.mark.skipif(not available(), reason="ranks share memory on Linux and x86-64"),
    pytest.mark.skipif(chosen() is None, reason="no kernels for this CPU"),
]
SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
FORMATS = [(weights, wire) for weights in ("mxfp4", "bf16") for wire in ("mxfp8", "bf16")]
MANY = small_call.MAX_TOKENS + 40
ROW_BYTES = {"mxfp8": 144, "bf16": 256}  # 128 + 128 / 32, filled up to sixteens


def one_expert(num_tokens: int) -> Batch:
    return replace(make_batch(SHAPE, num_tokens), ids=torch.full((num_tokens, SHAPE.topk), 7))


def masked(num_tokens: int) -> Batch:
    return replace(make_batch(SHAPE, num_tokens), ids=torch.full((num_tokens, SHAPE.topk), -1))


# in a row on the same buffers: the batch of all ranks, the rank without tokens, whether every rank has few
SEQUENCE: list[tuple[Batch, int | None]] = [
    (make_batch(SHAPE, 5, seed=2), None),
    (make_batch(SHAPE, 1, seed=3), None),
    (one_expert(9), None),
    (make_batch(SHAPE, 4 * MANY, seed=4), None),
    (make_batch(SHAPE, 61, seed=5), 0),
    (masked(7), None),
    (make_batch(SHAPE, 0), None),
    (make_batch(SHAPE, 4 * MANY, seed=6), 1),
    (make_batch(SHAPE, 30, seed=7), 1),
]


def call(layer: MegaMoE, batch: Batch) -> Tensor:
    out: Tensor = layer(batch.hidden, batch.ids, batch.weights)
    return out


Outputs = dict[tuple[str, str], list[tuple[Tensor, bool]]]


def in_a_row(group: EPGroup, sizes: tuple[int, ...]) -> Outputs:
    """Of each call by formats: the output, and whether it was small."""
    outputs: Outputs = {}
    with hosts(group, sizes):
        for weights, wire in FORMATS:
            layer = make_layer(SHAPE, group, weight_format=weights, dispatch_format=wire)
            for batch, empty in SEQUENCE:
                part = split(len(batch.hidden), group.size, empty=empty)[group.rank]
                out = call(layer, batch.part(part))
                outputs.setdefault((weights, wire), []).append((out, layer.last_call.small))
    return outputs


def most_tokens(wire: str, sizes: tuple[int, ...]) -> int:
    """Of a rank in a small call: a row of the wire and its slots, behind a page."""
    room = PLACE_BYTES if len(sizes) == 1 else MESSAGE_BYTES
    return min(small_call.MAX_TOKENS, (room - small_call._BEHIND - 64) // (ROW_BYTES[wire] + 8 * SHAPE.topk))


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (4,), (1, 1), (2, 1), (2, 2), (1, 1, 1, 1)], ids=str)
def test_calls_of_few_and_of_many_tokens_in_a_row_have_the_oracles_bits(
    ranks: LocalRanks, sizes: tuple[int, ...]
) -> None:
    found = ranks.run(in_a_row, sizes, size=sum(sizes))
    for weights, wire in FORMATS:
        most, few = most_tokens(wire, sizes), []
        for number, (batch, empty) in enumerate(SEQUENCE):
            parts = split(len(batch.hidden), sum(sizes), empty=empty)
            few.append(all(part.stop - part.start <= most for part in parts))
            got = torch.cat([outputs[weights, wire][number][0] for outputs in found])
            assert torch.equal(got, oracle(SHAPE, batch, weights, wire)), (weights, wire, number)
        assert {True, False} == set(few)
        for outputs in found:
            assert [small for _, small in outputs[weights, wire]] == few, "ranks went different ways, or the wrong one"


def activations(group: EPGroup, name: str, bias: bool) -> list[Tensor]:
    shape = MoEShape(64, 32, 6, 3, activation=ACTIVATIONS[name], bias=bias)
    batch = make_batch(shape, 11)
    mine = batch.part(split(11, group.size)[group.rank])
    layers = [make_layer(shape, group, weight_format=weights, name=weights) for weights in ("mxfp4", "bf16")]
    outputs = [call(layer, mine) for layer in layers]
    assert all(layer.last_call.small for layer in layers)
    return outputs


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_with_and_without_biases(ranks: LocalRanks, name: str, bias: bool) -> None:
    shape = MoEShape(64, 32, 6, 3, activation=ACTIVATIONS[name], bias=bias)
    found = ranks.run(activations, name, bias, size=2)
    for weights, got in zip(("mxfp4", "bf16"), zip(*found, strict=True), strict=True):
        assert torch.equal(torch.cat(got), oracle(shape, make_batch(shape, 11), weights, "mxfp8"))


def strided(batch: Batch) -> Batch:
    """The same values in memory of other strides, hidden as FP32."""
    hidden = batch.hidden.to(torch.float32).t().contiguous().t()
    return Batch(hidden, batch.ids.repeat_interleave(2, 1)[:, ::2], batch.weights.t().contiguous().t())


def test_inputs_need_not_be_contiguous() -> None:
    batch, layer = make_batch(SHAPE, 6), make_layer(SHAPE)
    assert torch.equal(call(layer, strided(batch)), oracle(SHAPE, batch, "mxfp4", "mxfp8"))
    assert layer.last_call.small


# ---- which calls are small ----


def brings(group: EPGroup, counts: list[int], hidden: int = SHAPE.hidden) -> bool:
    shape = MoEShape(hidden, 32, 6, 2)
    layer = make_layer(shape, group, dispatch_format="bf16")
    call(layer, make_batch(shape, counts[group.rank]))
    return layer.last_call.small


@pytest.mark.parametrize(
    ("counts", "small"),
    [
        ([small_call.MAX_TOKENS, 0], True),
        ([small_call.MAX_TOKENS + 1, 0], False),
        ([1, 4000], False),
        ([small_call.MAX_TOKENS] * 2, True),
    ],
    ids=str,
)
def test_one_rank_with_many_tokens_has_all_go_by_waves(ranks: LocalRanks, counts: list[int], small: bool) -> None:
    assert ranks.run(brings, counts, size=2) == [small, small]


def uneven(group: EPGroup, counts: list[int]) -> Tensor:
    parts = torch.tensor([0, *counts]).cumsum(0).tolist()
    with hosts(group, (2, 2)):
        layer = make_layer(SHAPE, group)
        return call(layer, make_batch(SHAPE, sum(counts)).part(slice(*parts[group.rank : group.rank + 2])))


def test_ranks_with_few_tokens_beside_one_with_many_count_what_lands_on_other_hosts(ranks: LocalRanks) -> None:
    """Whether tokens go to a host once is found out from pages of either kind."""
    found = ranks.run(uneven, [7, MANY, 3, 20])
    assert torch.equal(torch.cat(found), oracle(SHAPE, make_batch(SHAPE, MANY + 30), "mxfp4", "mxfp8"))


def test_tokens_are_few_where_they_fit_behind_a_page(ranks: LocalRanks) -> None:
    width = 8192
    most = (PLACE_BYTES - small_call._BEHIND - 64) // (2 * width + 16)
    assert 1 < most < small_call.MAX_TOKENS
    assert ranks.run(brings, [most, 1], width, size=2) == [True, True]
    assert ranks.run(brings, [1, most + 1], width, size=2) == [False, False]


def ways(group: EPGroup) -> list[bool]:
    batch, sockets = make_batch(SHAPE, 3), EPGroup.of(dist.group.WORLD, shared_memory=False)
    layers = [
        make_layer(SHAPE, own, waves=waves)
        for own, waves in ((group, "auto"), (group, 1), (group, (1, 2)), (sockets, "auto"))
    ]
    layers.append(MegaMoE(SHAPE, group, overlap=False))
    layers[-1].load_experts(*make_weights(SHAPE))
    with using(None):
        layers.append(make_layer(SHAPE, group))
    for layer in layers:
        call(layer, batch)
    return [layer.last_call.small for layer in layers]


def test_what_asks_for_waves_gets_them(ranks: LocalRanks) -> None:
    """A number of waves, no overlap, and torch's products; sockets do not ask for them."""
    assert ranks.run(ways, size=2) == [[True, False, False, True, False, False]] * 2


def begins_without_tokens(group: EPGroup, sizes: tuple[int, ...], num_experts: int) -> list[bool]:
    """Layers whose first call has no token on any rank, or no slot that is not masked, on a group of its own."""
    shape, found = replace(SHAPE, num_experts=num_experts, topk=1), []
    with hosts(group, sizes):
        own = EPGroup.of(dist.group.WORLD)
        for num_tokens in (0, 3):
            batch = make_batch(shape, num_tokens)
            out = make_layer(shape, own)(batch.hidden, torch.full_like(batch.ids, -1), batch.weights)
            found.append(out.shape == batch.hidden.shape and not out.any())
        after = make_batch(shape, 5)
        found.append(torch.equal(call(make_layer(shape, own), after), oracle(shape, after, "mxfp4", "mxfp8")))
    return found


@pytest.mark.parametrize("num_experts", [2, 10], ids="{}_experts".format)
@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 1), (2, 1)], ids=str)
def test_the_first_call_may_have_no_tokens(ranks: LocalRanks, sizes: tuple[int, ...], num_experts: int) -> None:
    """Nothing has a buffer yet; with two experts on three ranks one has none."""
    assert ranks.run(begins_without_tokens, sizes, num_experts, size=sum(sizes)) == [[True] * 3] * sum(sizes)


def chooses(group: EPGroup) -> list[bool]:
    batch, found = make_batch(SHAPE, 3), []
    layer = make_layer(SHAPE, group, weight_format="bf16", dispatch_format="auto")
    for _ in range(3):
        call(layer, batch)
        found.append(layer.last_call.small)
    assert layer.tuner.dispatch_format in ("bf16", "mxfp8")
    return found


def test_a_format_that_is_measured_is_known_from_the_second_call_on(ranks: LocalRanks) -> None:
    assert ranks.run(chooses, size=2) == [[False, True, True]] * 2


# ---- refusals and losses ----


def refuses(group: EPGroup) -> tuple[list[str], Tensor]:
    said: list[str] = []
    batch, layer = make_batch(SHAPE, 5), make_layer(SHAPE, group, name="layers.3")
    wrong: list[Callable[[Batch], Batch]] = [
        lambda b: replace(b, ids=b.ids.clone().fill_(10)),
        lambda b: replace(b, ids=b.ids.clone().fill_(-2)),
        lambda b: replace(b, ids=b.ids.abs(), weights=b.weights * float("nan")),
        lambda b: replace(b, weights=b.weights.double()),
    ]
    for change in wrong:
        given = change(batch) if group.rank == 1 else make_batch(SHAPE, MANY if len(said) % 2 else 2)
        with pytest.raises(ValueError, match=r".") as refusal:
            call(layer, given)
        said.append(str(refusal.value))
    other = make_layer(replace(SHAPE, swiglu_limit=None), group, name="other") if group.rank else layer
    with pytest.raises(ValueError, match=r".") as refusal:
        call(other, batch)
    said.append(str(refusal.value))
    layer = make_layer(SHAPE, group, name="last")
    return said, call(layer, batch)


def test_refusals_are_those_of_any_call_and_break_nothing(ranks: LocalRanks) -> None:
    (heard, first), (said, second) = ranks.run(refuses, size=2)
    texts = ("topk_ids[0, 0] is 10", "topk_ids[0, 0] is -2", "is nan, expected", "must be torch.float32")
    for text, of_rank_0, of_rank_1 in zip(texts, heard, said, strict=False):
        assert text in of_rank_1
        assert text in of_rank_0
        assert "rank 1" in of_rank_0
    assert heard[-1] == said[-1]
    assert "layer is layers.3 on rank 0, other on rank 1" in heard[-1]
    expected = oracle(SHAPE, make_batch(SHAPE, 5), "mxfp4", "mxfp8")
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_weights_of_masked_slots_may_be_anything() -> None:
    batch, layer = make_batch(SHAPE, 40), make_layer(SHAPE)
    assert (batch.ids < 0).any()
    batch.weights[batch.ids < 0] = float("nan")
    assert torch.equal(call(layer, batch), oracle(SHAPE, batch, "mxfp4", "mxfp8"))


def loses_one(group: EPGroup) -> str:
    own = EPGroup.of(dist.group.WORLD, deadline_s=20.0)
    layer, batch = make_layer(SHAPE, own, name="layers.5"), make_batch(SHAPE, 5)
    call(layer, batch)

    def dies() -> None:
        os._exit(9)

    with computing(layer, dies) if group.rank == 1 else nullcontext(), pytest.raises(PeerError) as lost:
        call(layer, batch)
    return str(lost.value)


def test_a_rank_that_dies_while_it_computes_is_named() -> None:
    with LocalRanks(2, threads_per_rank=1) as two, pytest.raises(RuntimeError, match="rank 1"):
        two.run(loses_one, size=2)


def stands_still(group: EPGroup) -> str:
    """What rank 0 says of rank 1, and where rank 1 says that it is meanwhile."""
    own = EPGroup.of(dist.group.WORLD, deadline_s=0.6 if group.rank == 0 else 20.0)
    layer, batch = make_layer(SHAPE, own, name="layers.5"), make_batch(SHAPE, 5)
    call(layer, batch)
    come = threading.Event()

    def late() -> None:
        at = own.own_status.position()
        come.wait(3.0)
        raise RuntimeError(str(at))

    with computing(layer, late) if group.rank == 1 else nullcontext(), pytest.raises(RuntimeError) as lost:
        call(layer, batch)
    return str(lost.value)


def test_a_rank_that_stalls_is_named_with_layer_wave_and_phase() -> None:
    with LocalRanks(2, threads_per_rank=1) as two:
        said, meanwhile = two.run(stands_still, size=2)
    assert "rank 1" in said
    assert "layer 'layers.5', wave 0, phase combine" in said
    assert "linear-1" in meanwhile


# ---- what is noted, what is kept ----


def recorded(group: EPGroup) -> tuple[list[CallRecord], Timeline, list[Tensor]]:
    layer, mine = make_layer(SHAPE, group), make_batch(SHAPE, 13).part(split(13, group.size, empty=1)[group.rank])
    outputs, records = [call(layer, mine)], [layer.last_call]
    with record(group) as trace:
        outputs.append(call(layer, mine))
        records.append(layer.last_call)
    return records, trace.gather(), outputs


def test_a_recording_has_the_lanes_and_the_record_of_a_call_by_waves(ranks: LocalRanks) -> None:
    found = ranks.run(recorded, size=3)
    by_waves = ranks.run(by_waves_of, size=3)
    (run,) = found[0][1].runs()
    for rank, (records, _, _) in enumerate(found):
        events, noted, other = run.of(rank), records[1], by_waves[rank]
        assert noted.small
        names = ("tokens", "waves", "rows_local", "rows_sent", "rows_received", "combine_bytes")
        assert all(getattr(noted, name) == getattr(other, name) for name in names)
        (whole,) = (event for event in events if event.lane == CALL)
        assert {event.lane for event in events} <= {CALL, *LANES}
        assert all(whole.begin_us <= e.begin_us <= e.end_us <= whole.end_us for e in events if e.lane != "dispatch")
        rows = {lane: sum(event.rows for event in events if event.lane == lane) for lane in LANES}
        assert rows["combine"] == noted.rows_sent
        assert rows["linear-1"] == rows["activation"] == rows["linear-2"] == noted.rows_received + noted.rows_local
        assert min(noted.compute_s, noted.waiting_s) > 0
        assert noted.compute_s + noted.waiting_s <= noted.total_s
    arrived = sum(event.bytes for event in run.events if event.lane == "dispatch")
    assert arrived == sum(records[1].dispatch_bytes for records, _, _ in found) > 0
    expected = oracle(SHAPE, make_batch(SHAPE, 13), "mxfp4", "mxfp8")
    assert all(torch.equal(torch.cat([outputs[n] for _, _, outputs in found]), expected) for n in range(2))


def on_two_hosts(group: EPGroup) -> CallRecord:
    with hosts(group, (2, 1)):
        layer, mine = make_layer(SHAPE, group), make_batch(SHAPE, 13).part(split(13, group.size)[group.rank])
        call(layer, mine)
        return layer.last_call


def test_what_leaves_a_host_is_tokens_for_each_far_rank_and_results_of_their_slots(ranks: LocalRanks) -> None:
    batch, parts, placement = make_batch(SHAPE, 13), split(13, 3), Placement(SHAPE.num_experts, 3)
    token_bytes = ROW_BYTES["mxfp8"] + 8 * SHAPE.topk
    for rank, (noted, far) in enumerate(zip(ranks.run(on_two_hosts, size=3), ([2], [2], [0, 1]), strict=True)):
        own, num_tokens = placement.experts(rank), parts[rank].stop - parts[rank].start
        ids = torch.cat([batch.ids[parts[peer]] for peer in far])
        results = int(((ids >= own.start) & (ids < own.stop)).sum())
        assert noted.small
        assert noted.dispatch_bytes == 2 * num_tokens * token_bytes
        assert noted.far_bytes == len(far) * num_tokens * token_bytes + results * 2 * SHAPE.hidden


def by_waves_of(group: EPGroup) -> CallRecord:
    layer, mine = make_layer(SHAPE, group, waves=1), make_batch(SHAPE, 13).part(split(13, 3, empty=1)[group.rank])
    call(layer, mine)
    return layer.last_call


def test_a_copy_of_a_layer_computes_with_its_own_weights() -> None:
    batch, layer = make_batch(SHAPE, 3), make_layer(SHAPE)
    expected = call(layer, batch)
    other = copy.deepcopy(layer)
    other.load_experts(*make_weights(SHAPE, seed=5))
    assert not torch.equal(call(other, batch), expected)
    assert torch.equal(call(layer, batch), expected)


def test_experts_of_another_layer_are_those_that_a_call_computes_with() -> None:
    """A layer's experts can be replaced by another's, as the benchmark does: few tokens once went through the old."""
    layer, other = make_layer(SHAPE, None), MegaMoE(SHAPE)
    batch = make_batch(SHAPE, 3)
    other.experts = layer.experts
    out = other(batch.hidden, batch.ids, batch.weights)
    assert other.last_call.small
    assert torch.equal(out, oracle(SHAPE, batch, "mxfp4", "mxfp8"))


def from_threads(group: EPGroup) -> bool:
    layer, outputs = make_layer(SHAPE, group), {}
    batches = [make_batch(SHAPE, tokens, seed=tokens) for tokens in (1, 2, 9)]

    def work(number: int) -> None:
        for turn in range(20):
            outputs[number, turn] = call(layer, batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [oracle(SHAPE, batch, "mxfp4", "mxfp8") for batch in batches]
    return len(outputs) == 60 and all(torch.equal(out, expected[number]) for (number, _), out in outputs.items())


def test_threads_of_several_ranks_take_turns(ranks: LocalRanks) -> None:
    assert ranks.run(from_threads, size=2) == [True, True]


# ---- many ----


def many(group: EPGroup, calls: int) -> list[dict[str, int]]:
    """What this rank has in use after a tenth of the calls and after all; sampled calls are held against the oracle."""
    layer, process, sizes = make_layer(SHAPE, group), psutil.Process(), []
    batches = [make_batch(SHAPE, 1, seed=seed) for seed in range(32)]
    expected = [oracle(SHAPE, batch, "mxfp4", "mxfp8") for batch in batches]
    for number in range(calls + 1):
        if number in (calls // 10, calls):
            gc.collect()
            sizes.append(
                {
                    "resident": process.memory_info().rss,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                    "workspace": group.workspace.memory_bytes,
                }
            )
        drawn = (number * 7 + group.rank * 3) % len(batches)
        out = call(layer, batches[drawn])
        assert layer.last_call.small
        if number % 16 == 0:
            assert torch.equal(out, expected[drawn]), number
    return sizes


@pytest.mark.parametrize(
    "calls",
    [2_000, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
    ids="{}_calls".format,
)
def test_calls_of_one_token_leave_nothing_behind(calls: int) -> None:
    """On ranks of its own: on shared ones what an earlier test left may end meanwhile."""
    with LocalRanks(2, threads_per_rank=1) as two:
        rows = two.run(many, calls, timeout_s=60 + 0.03 * calls)
    for first, last in rows:
        assert last["resident"] - first["resident"] < 4e6, (first, last)
        assert {**last, "resident": 0} == {**first, "resident": 0}
