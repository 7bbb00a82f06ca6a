"""The layer as devices with Triton kernels run it: the oracle's bits through the kernels' twins, and through Triton.

On ranks that are CPUs the twins stand in for the kernels, whose order of rows, places and messages is the same. A few
cases go through the kernels themselves, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megamoe.execution.experts import Experts
from megamoe.execution.ops import has_kernels
from megamoe.kernels import load
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.streams import Streams
from megamoe.reference import relative_error
from megamoe.routing.waves import Waves, plan_waves
from megamoe.shape import MoEShape
from tests.cases import ACTIVATIONS, Batch, make_batch, make_layer, make_weights, oracle, split, with_all_to_all
from tests.interpreter import interpret, interpreted

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
FORMATS = [(weights, wire) for weights in ("mxfp4", "bf16") for wire in ("mxfp8", "bf16")]
WAVES: list[Waves] = [1, 3, "auto", (1, 3, 2)]
CPU = torch.device("cpu")
# nothing here imports Triton, which looks once in a process whether it interprets
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def as_with_kernels() -> AbstractContextManager[object]:
    """Layers made in the block are those of a device with kernels."""
    return mock.patch("megamoe.execution.experts.has_kernels", return_value=True)


def in_triton() -> AbstractContextManager[object]:
    """Operations in the block are the kernels and not their twins."""
    return mock.patch("megamoe.execution.ops.has_kernels", return_value=True)


def layer_of(shape: MoEShape, group: EPGroup | None = None, **options: Any) -> MegaMoE:
    with as_with_kernels():
        return make_layer(shape, group, **options)


def close(got: Tensor, expected: Tensor) -> bool:
    """As the contract has it across kernel paths; far closer than that, as the twins sum in FP64."""
    return relative_error(got, expected) < 3e-4 if expected.any() else torch.equal(got, expected)


CHIPS: dict[str, tuple[str | None, dict[str, Any], bool]] = {
    "sm90": (None, {"major": 9, "minor": 0}, True),
    "sm103": (None, {"major": 10, "minor": 3}, True),
    "sm80": (None, {"major": 8, "minor": 0}, False),
    "gfx950": ("7.0", {"gcnArchName": "gfx950:sramecc+:xnack-"}, True),
    "gfx90a": ("7.0", {"gcnArchName": "gfx90a"}, False),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_which_devices_have_kernels(chip: str) -> None:
    hip, properties, expected = CHIPS[chip]
    device, asked = torch.device("cuda:0"), has_kernels.__wrapped__
    found = mock.patch("torch.cuda.get_device_properties", return_value=mock.Mock(**properties))
    with found, mock.patch("torch.version.hip", hip):
        assert asked(device) == expected
        with mock.patch("megamoe.execution.ops.find_spec", return_value=None):
            assert not asked(device), "without Triton"
    assert not asked(CPU)


# ---- the oracle's results, whatever ranks, waves and formats ----


def sweep(group: EPGroup, batch: Batch, shares: list[slice], all_to_all: bool) -> dict[tuple[str, str, str], Tensor]:
    if all_to_all:
        group = with_all_to_all(group)
    mine, out = batch.part(shares[group.rank]), {}
    copied = mock.patch("megamoe.routing.segments.on_host", return_value=not all_to_all)  # as a GPU is told, and tells
    with copied, mock.patch("torch.cuda.current_stream"):
        for weights, wire in FORMATS:
            for waves in WAVES:
                layer = layer_of(SHAPE, group, weight_format=weights, dispatch_format=wire, waves=waves)
                for _ in range(2):  # the second time in buffers that hold the first
                    out[weights, wire, str(waves)] = layer(mine.hidden, mine.ids, mine.weights)
            home = layer_of(SHAPE, group, weight_format=weights, dispatch_format=wire, combine_format="mxfp8", waves=2)
            out[weights, wire, "mxfp8"] = home(mine.hidden, mine.ids, mine.weights)
    return out


@pytest.mark.parametrize(
    ("ep_size", "empty", "all_to_all"),
    [(1, None, False), (2, None, False), (3, 1, False), (4, 0, False), (4, None, True)],
    ids=["ep1", "ep2", "ep3-empty_rank", "ep4-empty_rank", "ep4-all_to_all"],
)
def test_output_is_the_oracles_for_any_ep_size(
    ranks: LocalRanks, ep_size: int, empty: int | None, all_to_all: bool
) -> None:
    batch = make_batch(SHAPE, 61)
    outputs = ranks.run(sweep, batch, split(61, ep_size, empty=empty), all_to_all, size=ep_size)
    for weights, wire in FORMATS:
        expected = oracle(SHAPE, batch, weights, wire)
        for waves in WAVES:
            assert close(torch.cat([output[weights, wire, str(waves)] for output in outputs]), expected)
        rounded = torch.cat([output[weights, wire, "mxfp8"] for output in outputs])
        # a sum beside a tie of E4M3 may go either way
        assert relative_error(rounded, oracle(SHAPE, batch, weights, wire, "mxfp8")) < 3e-3


ROUTINGS = {
    "all_on_one_expert": torch.full((40, 4), 7),
    "all_masked": torch.full((40, 4), -1),
    "one_slot_each": torch.tensor([[-1, -1, 5, -1]]).repeat(40, 1),
    "same_expert_twice": torch.tensor([[9, 9, 0, 0]]).repeat(40, 1),
    "one_token": torch.tensor([[0, 3, 6, 9]]),
    "no_tokens": torch.zeros(0, 4, dtype=torch.int64),
}
SHAPES = {
    **{name: MoEShape(64, 32, 5, 2, activation=each, bias=True) for name, each in ACTIVATIONS.items()},
    "ungated_without_biases": MoEShape(64, 32, 5, 2, activation=ACTIVATIONS["nemotron_h"]),
    "fewer_experts_than_ranks": MoEShape(64, 32, 2, 2),
    "more_experts_than_a_page_holds": MoEShape(32, 32, 400, 5),
    "uneven_top1": MoEShape(64, 32, 7, 1),
}


def several(group: EPGroup, batches: list[tuple[MoEShape, Batch]]) -> list[Tensor]:
    outputs = []
    for shape, batch in batches:
        mine = batch.part(split(len(batch.hidden), group.size)[group.rank])
        outputs.append(layer_of(shape, group, waves=3)(mine.hidden, mine.ids, mine.weights))
    return outputs


@pytest.mark.parametrize("ep_size", [1, 4], ids="ep{}".format)
def test_extreme_routings_and_shapes_match_the_oracle(ranks: LocalRanks, ep_size: int) -> None:
    rng = torch.Generator().manual_seed(3)
    batches = [
        (SHAPE, Batch(make_batch(SHAPE, len(ids)).hidden, ids, torch.rand(ids.shape, generator=rng)))
        for ids in ROUTINGS.values()
    ]
    batches += [(shape, make_batch(shape, 50)) for shape in SHAPES.values()]
    outputs = ranks.run(several, batches, size=ep_size)
    for number, ((shape, batch), name) in enumerate(zip(batches, [*ROUTINGS, *SHAPES], strict=True)):
        got = torch.cat([output[number] for output in outputs])
        assert close(got, oracle(shape, batch, "mxfp4", "mxfp8")), name


def test_sizes_that_fill_no_word_are_taken_with_bf16(ranks: LocalRanks) -> None:
    shape = MoEShape(33, 7, 4, 2)
    batch = make_batch(shape, 20)
    outputs = ranks.run(odd, shape, batch, size=2)
    assert close(torch.cat(outputs), oracle(shape, batch, "bf16", "bf16"))


def odd(group: EPGroup, shape: MoEShape, batch: Batch) -> Tensor:
    mine = batch.part(split(len(batch.hidden), group.size)[group.rank])
    layer = layer_of(shape, group, weight_format="bf16", dispatch_format="bf16", waves=2)
    return layer(mine.hidden, mine.ids, mine.weights)


def counted(group: EPGroup, batch: Batch) -> list[int]:
    """What both ways of computing note of a call, and bytes that the second call asks for beyond the first."""
    found = []
    for layer in (make_layer(SHAPE, group, waves=2), layer_of(SHAPE, group, waves=2)):
        layer(batch.hidden, batch.ids, batch.weights)
        held = group.workspace.memory_bytes
        layer(batch.hidden, batch.ids, batch.weights)
        call = layer.last_call
        found.append((call.tokens, call.waves, call.rows_local, call.rows_sent, call.rows_received, call.bytes_sent))
        assert group.workspace.memory_bytes == held
        layer(batch.hidden, batch.ids, batch.weights)
        assert call.compute_s > 0, "known once the next call has begun"
    assert found[0] == found[1]
    return [int(each) for each in found[0]]


def test_a_call_counts_the_same_rows_and_bytes_and_asks_for_no_more_buffers_the_second_time(ranks: LocalRanks) -> None:
    assert all(found[3] and found[5] for found in ranks.run(counted, make_batch(SHAPE, 30), size=3))


# ---- through Triton ----


@interpreted
def test_a_token_alone_has_the_bits_it_has_in_a_batch_of_67_and_they_are_the_oracles() -> None:
    shape = MoEShape(64, 64, 3, 2, 3.0)
    batch = make_batch(shape, 67)  # from 64 on tokens are cut by other tiles
    for weights, wire in (("mxfp4", "mxfp8"), ("bf16", "bf16")):
        layer = layer_of(shape, weight_format=weights, dispatch_format=wire)
        with in_triton():
            together = layer(batch.hidden, batch.ids, batch.weights)
            for token in (0, 40, 66):
                alone = batch.part(slice(token, token + 1))
                assert torch.equal(layer(alone.hidden, alone.ids, alone.weights)[0], together[token])
        assert relative_error(together, oracle(shape, batch, weights, wire)) < 5e-3


BIASED = {name: MoEShape(128, 96, 10, 4, activation=ACTIVATIONS[name], bias=True) for name in ("gpt_oss", "nemotron_h")}
SMALL = MoEShape(128, 96, 5, 2, swiglu_limit=3.0)
INTERPRETED = [
    *((SMALL, *formats, "bf16", waves) for formats, waves in zip(FORMATS, (1, 2, 3, 2), strict=True)),
    (replace(BIASED["gpt_oss"], num_experts=5, topk=2), "mxfp4", "mxfp8", "bf16", 2),
    (replace(BIASED["nemotron_h"], num_experts=5, topk=2), "bf16", "bf16", "mxfp8", 2),
]


def interpreted_ranks(group: EPGroup, batch: Batch, shares: list[slice]) -> list[Tensor]:
    interpret()
    mine, out = batch.part(shares[group.rank]), []
    for shape, weights, wire, home, waves in INTERPRETED:
        formats = {"weight_format": weights, "dispatch_format": wire, "combine_format": home}
        layer = layer_of(shape, group, **formats, waves=waves)
        with in_triton():
            out.append(layer(mine.hidden, mine.ids, mine.weights))
    return out


@interpreted
def alone_in_triton(shape: MoEShape, batch: Batch, formats: tuple[str, str, str], expected: Tensor) -> None:
    weights, wire, home = formats
    layer = layer_of(shape, weight_format=weights, dispatch_format=wire, combine_format=home)
    with in_triton():
        assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), expected)


def test_through_triton_the_bits_are_the_same_on_one_rank_and_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TEST_GIVEN", "so that ranks are spawned: a fork may have triton already")
    batch = make_batch(SMALL, 23)
    with LocalRanks(2, threads_per_rank=1) as ranks:  # Triton looks once in a process whether it interprets
        outputs = ranks.run(interpreted_ranks, batch, split(23, 2))
    for number, (shape, *formats, _) in enumerate(INTERPRETED):
        got = torch.cat([output[number] for output in outputs])
        assert relative_error(got, oracle(shape, batch, *formats)) < 5e-3
        alone_in_triton(shape, batch, (formats[0], formats[1], formats[2]), got)


# ---- what the host waits for ----

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal", "is_nonzero")


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations for which a GPU's host has to wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.__name__.partition(".")[0].lstrip("_")
        boolean = name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1])
        if name in {each.lstrip("_") for each in WAITS} or boolean:
            self.found.append(name)
        if name == "repeat_interleave" and "output_size" not in (kwargs or {}):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def no_kernels() -> AbstractContextManager[object]:
    """Kernels are launched and not waited for: whatever else an operation does is that of its twin."""

    def body(name: str, _: torch.device) -> Any:
        return load(name).route_slots_torch if name == "route_slots" else lambda *_: None  # type: ignore[attr-defined]

    return mock.patch("megamoe.execution.ops._body", body)


def test_a_rank_alone_waits_for_nothing() -> None:
    batch, layer = make_batch(SHAPE, 9), layer_of(SHAPE)
    with no_kernels(), Waits() as waits:
        layer(batch.hidden, batch.ids, batch.weights)
    assert waits.found == ["local_scalar_dense"], "the host's look at what was found before, in its own memory"
    with Waits() as waits:
        bool(batch.hidden.any())
        batch.hidden[batch.ids[:, 0] > 0]
    assert waits.found == ["local_scalar_dense", "index"], "these would be noticed"


def waited_for(group: EPGroup, batch: Batch) -> list[str]:
    layer, waits = layer_of(SHAPE, group, waves=2), Waits()

    def known(*args: Any) -> Any:
        waits.found = ["counts"]  # what was waited for before was for these, or the host's own
        return plan_waves(*args)

    copied = mock.patch("megamoe.routing.segments.on_host", return_value=False)
    after = mock.patch("megamoe.layer.plan_waves", known)
    with copied, mock.patch("torch.cuda.current_stream"), no_kernels(), after, waits:
        layer(batch.hidden, batch.ids, batch.weights)
    return waits.found


@pytest.mark.parametrize("mask", [True, False])
def test_ranks_wait_for_counts_and_after_them_for_nothing(ranks: LocalRanks, mask: bool) -> None:
    for found in ranks.run(waited_for, make_batch(SHAPE, 30, mask=mask), size=2):
        assert found == ["counts"]


# ---- what is queued where ----


class Queues(Streams):
    """Notes in which order messages are handed over and queued."""

    def __init__(self, log: list[str]) -> None:
        super().__init__(CPU)
        self._log, self.inside = log, False

    def hand_over(self) -> None:
        self._log.append("hand over")

    @contextmanager
    def messages(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False


class Logged:
    """A transfer that says when it is sent and waited for, and in which queue."""

    def __init__(self, transfer: Any, name: str, log: list[str], queues: Queues) -> None:
        self._transfer, self._name, self._log, self._queues = transfer, name, log, queues

    def send(self, rows: Tensor, counts: list[int], starts: list[int]) -> None:
        self._log.append(f"send {self._name} {'beside' if self._queues.inside else 'in'} compute")
        self._transfer.send(rows, counts, starts)

    def wait(self) -> None:
        self._log.append(f"wait {self._name} {'beside' if self._queues.inside else 'in'} compute")
        self._transfer.wait()

    def finish(self) -> None:
        self._transfer.finish()


def queued(group: EPGroup, batch: Batch) -> list[str]:
    log: list[str] = []
    layer, queues = layer_of(SHAPE, group, waves=3), Queues(log)
    transport = group.transport
    assert transport is not None
    expect = transport.expect

    def logged(receive: Tensor, counts: list[int], label: Any) -> Any:
        transfer = expect(receive, counts, label)
        return Logged(transfer, f"{label.phase} {label.wave}", log, queues) if label.wave is not None else transfer

    group.streams[CPU] = queues
    try:
        with (
            mock.patch.object(transport, "expect", logged),
            mock.patch("megamoe.execution.backends.triton_backend.linear1", computes(log)),
        ):
            layer(batch.hidden, batch.ids, batch.weights)
    finally:
        group.streams.clear()
    return log


def computes(log: list[str]) -> Any:
    from megamoe.execution.backends.triton_experts import linear1

    def run(*args: Any) -> Any:
        assert args[-1] > 1, "oversubscription: without it messages would wait until a kernel has ended"
        log.append("compute")
        return linear1(*args)

    return run


def test_messages_are_queued_beside_compute_and_results_leave_once_they_are_computed(ranks: LocalRanks) -> None:
    for log in ranks.run(queued, make_batch(SHAPE, 40, mask=False), size=2):
        assert log[:3] == ["hand over", "send dispatch 0 beside compute", "send dispatch 1 beside compute"]
        for wave in range(3):
            computed = log.index(f"wait dispatch {wave} in compute") + 1
            assert log[computed] == "compute"
            left = log.index(f"send combine {wave} beside compute")
            assert computed < left
            assert log[left - 1] == "hand over"
        assert log.index("send dispatch 2 beside compute") < log.index("wait dispatch 0 in compute")
        assert log[-3:] == [f"wait combine {wave} in compute" for wave in range(3)]


# ---- weights ----


@pytest.mark.parametrize("shape", [SHAPE, *BIASED.values()], ids=["plain", *BIASED])
@pytest.mark.parametrize("weight_format", ["mxfp4", "bf16"])
def test_a_state_dict_is_the_same_with_and_without_kernels(weight_format: str, shape: MoEShape) -> None:
    plain, turned = (make(shape, weight_format=weight_format) for make in (make_layer, layer_of))
    before, after = plain.state_dict(), turned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    batch = make_batch(SHAPE, 20)
    with as_with_kernels():
        loaded = MegaMoE(shape, weight_format=weight_format)
    loaded.load_state_dict(before)
    outputs = [layer(batch.hidden, batch.ids, batch.weights) for layer in (turned, loaded)]
    assert torch.equal(*outputs)


def test_regrouped_experts_keep_their_rows_in_turns() -> None:
    gate_up, down = make_weights(SHAPE)
    with as_with_kernels():
        experts = Experts(SHAPE, range(2, 7), weight_format="mxfp4", device=CPU)
        whole = Experts(SHAPE, range(10), weight_format="mxfp4", device=CPU)
    for each in (experts, whole):
        for expert in each.ids:
            each.load(expert, gate_up[expert], down[expert])
    experts.regroup(range(4, 10))
    assert experts.missing == [7, 8, 9]
    for name in ("gate_up", "down"):
        kept, expected = (each.stack(name, range(4, 7)) for each in (experts, whole))
        assert torch.equal(kept.words, expected.words)  # type: ignore[union-attr]
        assert torch.equal(kept.scales, expected.scales)  # type: ignore[union-attr]


def test_a_dequantized_copy_is_refused_where_kernels_decode() -> None:
    with as_with_kernels(), pytest.raises(ValueError, match="keep_dequantized is of no use on cpu, whose kernels"):
        MegaMoE(SHAPE, keep_dequantized=True)


# ---- what is wrong with values ----


def test_a_rank_alone_is_told_of_wrong_values_by_the_next_call_and_goes_on() -> None:
    layer, batch = layer_of(SHAPE), make_batch(SHAPE, 12)
    expected = layer(batch.hidden, batch.ids, batch.weights)
    ids = batch.ids.clone()
    ids[5, 1], ids[7, 0] = 10, -2
    out = layer(batch.hidden, ids, batch.weights)
    wrong = torch.tensor([token in (5, 7) for token in range(12)])
    assert out[wrong].isnan().all()
    assert torch.equal(out[~wrong], expected[~wrong])
    with pytest.raises(ValueError, match=r"an earlier call of layer 'moe' had topk_ids outside of \[0, 10\)"):
        layer(batch.hidden, batch.ids, batch.weights)
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), expected)
    layer(batch.hidden, batch.ids, torch.full_like(batch.weights, torch.inf))
    with pytest.raises(ValueError, match="or topk_weights that were not finite"):
        layer(batch.hidden, batch.ids, batch.weights)
    masked = batch.weights.masked_fill(batch.ids < 0, torch.nan)
    assert torch.equal(layer(batch.hidden, batch.ids, masked), expected)
    assert torch.equal(layer(batch.hidden, batch.ids, batch.weights), expected), "a masked slot may have any weight"


def test_what_was_found_is_told_once_though_a_copy_of_it_was_still_queued() -> None:
    """A GPU's copies to the host arrive in their order, and some after the host has looked."""
    findings = load_findings()(CPU)
    queued: list[Callable[[], object]] = []
    here, arrive = findings._here, findings._here.copy_

    def later(there: Tensor, non_blocking: bool = False) -> None:
        queued.append(partial(arrive, there.clone()))
        if not non_blocking:  # what the host waits for, all that was queued before it included
            while queued:
                queued.pop(0)()

    findings._here = mock.Mock(item=here.item, copy_=later, zero_=here.zero_)
    findings.note(torch.tensor([1]))
    findings.note(torch.tensor([0]))
    assert not findings.take(), "nothing has arrived"
    queued.pop(0)()
    assert findings.take()
    assert not queued
    assert not findings.take()
    findings.note(torch.tensor([0]))
    queued.pop(0)()
    assert not findings.take()


def load_findings() -> Any:
    from megamoe.execution.backends.triton_alone import Findings

    return Findings


def one_wrong(group: EPGroup, batch: Batch) -> str:
    layer, ids = layer_of(SHAPE, group), batch.ids.clone()
    if group.rank == 1:
        ids[3, 2] = 11
    with pytest.raises(ValueError, match="topk_ids") as refused:
        layer(batch.hidden, ids, batch.weights)
    layer(batch.hidden, batch.ids, batch.weights)
    return str(refused.value)


def test_wrong_values_are_told_to_all_ranks_before_rows_move(ranks: LocalRanks) -> None:
    here, there, other = ranks.run(one_wrong, make_batch(SHAPE, 12), size=3)
    assert there.startswith("topk_ids[3, 2] is 11, expected -1 or an expert in [0, 10)")
    assert here == other
    assert here.startswith("rank 1 on ")
