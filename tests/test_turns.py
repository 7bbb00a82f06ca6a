"""Calls of a group take turns: threads, layers, EPGroups of one process group, and streams of a device."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel import turns
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.turns import Turns
from megamoe.parallel.workspace import Workspace
from megamoe.shape import MoEShape
from tests.cases import Batch, computing, make_batch, make_layer, make_weights

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)
CPU, DEVICE = torch.device("cpu"), torch.device("meta")


def call(layer: MegaMoE, batch: Batch) -> Tensor:
    out: Tensor = layer(batch.hidden, batch.ids, batch.weights)
    return out


@pytest.mark.parametrize("num_layers", [1, 2], ids=["one_layer", "two_layers_of_one_group"])
def test_threads_get_the_bits_that_one_thread_gets(num_layers: int) -> None:
    group = EPGroup.of(None)
    layers = [make_layer(SHAPE, group, weight_format=form) for form in ("mxfp4", "bf16")[:num_layers]]
    batches = [make_batch(SHAPE, 60 + 7 * index, seed=index) for index in range(4)]
    cases = [(layer, batch) for layer in layers for batch in batches] * 4
    expected = [call(*case) for case in cases]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda case: call(*case), cases))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def in_threads(group: EPGroup) -> bool:
    layer = make_layer(SHAPE, group)
    batches = [make_batch(SHAPE, 40 + 9 * index, seed=index + 10 * group.rank) for index in range(8)]
    expected = [call(layer, batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:  # in whatever order on each rank
        found = list(pool.map(lambda batch: call(layer, batch), batches))
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_threads_of_several_ranks_may_call_one_layer_in_any_order(ranks: LocalRanks) -> None:
    assert ranks.run(in_threads, size=2) == [True, True]


def _world() -> torch.distributed.ProcessGroup:
    world = torch.distributed.group.WORLD
    assert world is not None
    return world


@pytest.mark.parametrize("shared", [True, False], ids=["one_ep_group", "one_process_group"])
def test_layers_of_one_name_in_another_order_are_refused_on_all_ranks(ranks: LocalRanks, shared: bool) -> None:
    for said in ranks.run(crossed_order, shared, size=2):
        assert "layer is moe on rank 0, moe (number 2 of that name) on rank 1" in said
        assert "in the same order" in said


def crossed_order(group: EPGroup, shared: bool) -> str:
    groups = (group, group) if shared else (EPGroup.of(_world()), EPGroup.of(_world()))
    layers, batch = [make_layer(SHAPE, each) for each in groups], make_batch(SHAPE, 9)
    expected = call(make_layer(SHAPE), batch)
    with pytest.raises(ValueError, match="ranks disagree") as refusal:
        call(layers[group.rank], batch)
    with pytest.raises(ValueError, match="ranks disagree"):
        call(layers[1 - group.rank], batch)
    for layer in layers:
        assert torch.equal(call(layer, batch), expected), "the group works on after a refusal"
    return str(refusal.value)


def over_one_process_group(group: EPGroup) -> str:
    first, second = (make_layer(SHAPE, EPGroup.of(_world(), deadline_s=1.5), name=name) for name in ("a", "b"))
    assert first.group.turns is second.group.turns is group.turns
    batch = make_batch(SHAPE, 9)
    call(first, batch)
    with computing(first, int.bit_length) if group.rank else nullcontext(), pytest.raises((TypeError, PeerError)):
        call(first, batch)
    with pytest.raises(RuntimeError, match="cannot be used any more") as refusal:
        call(second, batch)
    return str(refusal.value)


def test_ep_groups_of_one_process_group_share_turns_and_what_broke_it(ranks: LocalRanks) -> None:
    said = ranks.run(over_one_process_group, size=2)
    assert "PeerError" in said[0]
    assert "TypeError" in said[1]


def test_a_call_from_inside_of_a_call_is_refused_by_name() -> None:
    group, batch = EPGroup.of(None), make_batch(SHAPE, 5)
    outer, inner = make_layer(SHAPE, group, name="outer"), make_layer(SHAPE, group, name="inner")
    expected = call(outer, batch)
    inside = pytest.raises(RuntimeError, match="layer 'inner' was called from inside of a call of layer 'outer'")
    with computing(outer, lambda *_: call(inner, batch)), inside:
        call(outer, batch)
    assert torch.equal(call(outer, batch), expected), "the turn was given back"


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError, MemoryError])
def test_the_turn_is_given_back_however_a_call_ends(end: type[BaseException]) -> None:
    taken = Turns()
    with pytest.raises(end), taken.take("a", CPU, 1.0):
        raise end
    with taken.take("b", CPU, 1.0):
        pass


def test_one_call_that_keeps_its_turn_is_named_within_the_deadline() -> None:
    taken, has, done = Turns(), threading.Event(), threading.Event()

    def keep() -> None:
        with taken.take("layer 'slow'", CPU, 1.0):
            has.set()
            assert done.wait(10)

    thread = threading.Thread(target=keep, name="server-1")
    thread.start()
    assert has.wait(10)
    begun = time.monotonic()
    named = pytest.raises(RuntimeError, match=r"layer 'b' .* waiting .* layer 'slow' in thread 'server-1'")
    with named, taken.take("layer 'b'", CPU, 0.2):
        pass
    assert 0.1 < time.monotonic() - begun < 5
    done.set()
    thread.join(10)
    with taken.take("layer 'b'", CPU, 0.2):
        pass


def test_a_process_that_is_forked_in_the_middle_of_another_threads_call_makes_calls_of_its_own() -> None:
    layer, batch, entered, done = make_layer(SHAPE), make_batch(SHAPE, 5), threading.Event(), threading.Event()
    out = call(layer, batch)

    def keep() -> None:
        with layer.group.turn("slow", CPU):
            entered.set()
            done.wait(30)

    thread = threading.Thread(target=keep)
    thread.start()
    assert entered.wait(10)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)  # which ends it, where it waits for a thread that it does not have
        os._exit(0 if torch.equal(call(layer, batch), out) else 1)
    _, ended = os.waitpid(child, 0)
    done.set()
    thread.join(10)
    assert ended == 0


def test_weights_are_loaded_between_calls_and_not_during_one() -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 30)
    outputs = []
    for seed in (0, 3):
        layer.load_experts(*make_weights(SHAPE, seed=seed))
        outputs.append(call(layer, batch))
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(layer.load_experts, *make_weights(SHAPE, seed=seed)) for seed in (0, 3) * 8]
        found = [call(layer, batch) for _ in range(20)]
        for load in loads:
            load.result(20)
    assert all(any(torch.equal(each, whole) for whole in outputs) for each in found)


def test_a_state_dict_is_taken_and_given_between_calls_and_not_during_one_or_a_load() -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 30)
    states, outputs = [], []
    for seed in (0, 3):
        layer.load_experts(*make_weights(SHAPE, seed=seed))
        outputs.append(call(layer, batch))
        states.append(layer.state_dict())
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(layer.load_state_dict, states[number % 2]) for number in range(16)]
        loads += [pool.submit(layer.load_experts, *make_weights(SHAPE, seed=seed)) for seed in (0, 3) * 8]
        found, given = [], []
        while not all(load.done() for load in loads):
            found.append(call(layer, batch))
            given.append(layer.state_dict())
        for load in loads:
            load.result(20)
    assert all(any(torch.equal(each, whole) for whole in outputs) for each in found)
    for state in given:
        assert state.keys() == states[0].keys()
        assert any(all(torch.equal(state[key], whole[key]) for key in whole) for whole in states)


def test_a_state_dict_waits_for_the_groups_turn() -> None:
    layer = make_layer(SHAPE)
    state = layer.state_dict()
    uses: list[Callable[[], Any]] = [layer.state_dict, lambda: layer.load_state_dict(state)]
    with ThreadPoolExecutor(1) as pool:
        for use in uses:
            with layer.group.turn("a", CPU):
                waiting = pool.submit(use)
                with pytest.raises(TimeoutError):
                    waiting.result(0.1)
            waiting.result(10)


def test_a_copy_of_a_layer_has_turns_of_its_own() -> None:
    layer, batch = make_layer(SHAPE), make_batch(SHAPE, 5)
    with layer.group.turn("a", CPU):
        twin = copy.deepcopy(layer)
        out = call(twin, batch)
    assert torch.equal(out, call(layer, batch))


class FakeStream:
    """A stream that notes what is queued in it"""

    def __init__(self, name: str, queued: list[tuple[str, str]]) -> None:
        self.name, self.queued = name, queued

    def wait_event(self, event: FakeEvent) -> None:
        self.queued.append((self.name, f"waits for {event.at}"))


class FakeEvent:
    at = ""

    def record(self, stream: FakeStream) -> None:
        self.at = f"{stream.name} after {len(stream.queued)}"


def test_a_call_in_another_stream_comes_after_what_the_last_call_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[tuple[str, str]] = []
    current: Any = FakeStream("first", queued)
    monkeypatch.setattr(turns, "queue_of", lambda _: current)
    monkeypatch.setattr(turns, "event_of", lambda _: FakeEvent())
    taken = Turns()
    with taken.take("a", DEVICE, 1.0):
        queued.append(("first", "computes"))
    current = FakeStream("second", queued)
    with taken.take("b", DEVICE, 1.0):
        queued.append(("second", "computes"))
    current = None  # a graph is captured: it waits for nothing outside of it
    with taken.take("c", DEVICE, 1.0):
        pass
    assert queued == [("first", "computes"), ("second", "waits for first after 1"), ("second", "computes")]


def test_a_buffer_that_grows_stays_until_the_stream_is_done_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, object]] = []
    stream, workspace, like = object(), Workspace(), torch.empty(0, device=DEVICE)
    monkeypatch.setattr("megamoe.parallel.workspace.queue_of", lambda _: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: kept.append((self.numel(), stream)))
    for rows in (4, 2, 8):
        workspace.take("rows", (rows,), like)
    assert kept == [(16, stream)]


def test_a_turn_that_was_refused_leaves_the_holders_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[torch.device] = []
    monkeypatch.setattr(Turns, "_mark", lambda _, device: marked.append(device))
    shared = Turns()
    refused = shared.take("layer 'b'", DEVICE, 5.0)
    with shared.take("layer 'a'", CPU, 5.0):
        with pytest.raises(RuntimeError, match="from inside of a call of layer 'a'"):
            refused.__enter__()
        refused.__exit__(None, None, None)  # as whoever cannot tell how far it came does
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="was kept waiting"):
            pool.submit(lambda: shared.take("layer 'c'", CPU, 0.05).__enter__()).result(20)
    assert marked == [CPU]
