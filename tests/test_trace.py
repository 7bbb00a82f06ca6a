"""The recorder: every wave of every call is noted where it happened, the bits stay, and nothing is noted outside."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.execution.journeys import CallRecord
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.diagnosis import PeerStatus, diagnose
from megamoe.parallel.health.status import WAITING, WORKING, OwnStatus, RankStatus
from megamoe.parallel.recorder import Notes, Recorder, Recording
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.pairs import Clock, Label
from megamoe.parallel.transport.watch import WatchedTransport
from megamoe.shape import MoEShape
from megamoe.trace.recording import record
from megamoe.trace.timeline import CALL, COMMUNICATION, LANES, Timeline
from tests.cases import Batch, make_batch, make_layer, oracle, split
from tests.several_hosts import hosts
from tests.test_ranks import monkey

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)


def watchers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.endswith("watcher")]


def recorded(
    group: EPGroup, batch: Batch, shares: list[slice], *, pairs: bool
) -> tuple[list[Tensor], list[CallRecord], Timeline, Timeline]:
    """Three calls, of which the second and the third are recorded."""
    if not pairs:
        world = dist.group.WORLD
        assert world is not None
        group = replace(
            group,
            transport=AllToAllTransport(world, Clock(group.deadline_s, {}, group.own_status), torch.device("cpu")),
        )
    mine, layer = batch.part(shares[group.rank]), make_layer(SHAPE, group, waves=3, name="layers.7")
    outputs, records = [layer(mine.hidden, mine.ids, mine.weights)], [layer.last_call]
    with record(layer.group) as trace:
        for _ in range(2):
            outputs.append(layer(mine.hidden, mine.ids, mine.weights))
            records.append(layer.last_call)
        during = trace.gather()
    outputs.append(layer(mine.hidden, mine.ids, mine.weights))
    return outputs, records, during, trace.gather()


def calls_another(group: EPGroup, sizes: tuple[int, ...]) -> str:
    """Rank 0 gathers a trace while the other calls the layer."""
    batch = make_batch(SHAPE, 2)
    with hosts(group, sizes):
        layer = make_layer(SHAPE, group)
        layer(batch.hidden, batch.ids, batch.weights)
        with record(layer.group) as trace, pytest.raises((CallRefusedError, PeerError)) as refusal:
            trace.gather() if group.rank == 0 else layer(batch.hidden, batch.ids, batch.weights)
    return str(refusal.value)


@pytest.mark.parametrize("sizes", [(2,), (1, 1)], ids=["shared memory", "sockets"])
def test_a_rank_that_gathers_while_others_call_is_told(sizes: tuple[int, ...]) -> None:
    with LocalRanks(2, threads_per_rank=1, deadline_s=2.0) as ranks:
        gathers, calls = ranks.run(calls_another, sizes, timeout_s=30)
    assert "called something else" in gathers
    assert "rank 1" in gathers
    assert "rank 0" in calls


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "all_to_all"])
def test_every_wave_is_noted_on_every_rank_and_the_bits_stay(ranks: LocalRanks, pairs: bool) -> None:
    batch, shares = make_batch(SHAPE, 61), split(61, 3, empty=1)
    found = ranks.run(recorded_of, batch, shares, pairs, size=3)
    timeline = found[0][2]
    expected = oracle(SHAPE, batch, "mxfp4", "mxfp8")
    for number in range(4):
        assert torch.equal(torch.cat([outputs[number] for outputs, *_ in found]), expected)
    assert all(after == during == timeline for _, _, during, after in found), "a picture that ranks disagree on"
    assert [(run.layer, run.call) for run in timeline.runs()] == [("layers.7", 2), ("layers.7", 3)]
    for run, number in zip(timeline.runs(), (1, 2), strict=True):
        for rank, (_, records, *_) in enumerate(found):
            events, noted = run.of(rank), records[number]
            (call,) = (event for event in events if event.lane == CALL)
            assert {event.lane for event in events} <= {CALL, *LANES}
            assert all(call.begin_us <= e.begin_us <= e.end_us <= call.end_us for e in events if e.rows)
            rows = {lane: sum(event.rows for event in events if event.lane == lane) for lane in LANES}
            assert rows["combine"] == noted.rows_sent
            assert rows["linear-1"] == rows["activation"] == rows["linear-2"] == noted.rows_received + noted.rows_local
            combined = sum(event.bytes for event in events if event.lane == "combine")
            assert combined == noted.rows_sent * 2 * SHAPE.hidden
            for lane in COMMUNICATION:
                waves = [event.wave for event in events if event.lane == lane]
                assert len(waves) == len(set(waves)), "one event a wave"
            share = run.share(rank).hidden_percent
            assert share is None or 0 <= share <= 100
        arrived = sum(event.bytes for event in run.events if event.lane == "dispatch")
        assert arrived == sum(records[number].dispatch_bytes for _, records, *_ in found)


def recorded_of(
    group: EPGroup, batch: Batch, shares: list[slice], pairs: bool
) -> tuple[list[Tensor], list[CallRecord], Timeline, Timeline]:
    return recorded(group, batch, shares, pairs=pairs)


def what_is_left(group: EPGroup) -> tuple[list[str], list[str], bool]:
    """Threads of a recorder while it works and after it, and whether a group that is not recorded notes anything."""
    batch = make_batch(SHAPE, 20)
    layer = make_layer(SHAPE, group, waves=2)
    with record(group):
        layer(batch.hidden, batch.ids, batch.weights)
        with pytest.raises(RuntimeError, match="recorded already"), record(group):
            pass
        during = watchers()
    for thread in [thread for thread in threading.enumerate() if thread.name in during]:
        thread.join(10)
    return sorted(during), watchers(), type(group.notes("moe", 1)) is Notes


def test_a_recorder_leaves_no_thread_and_no_note_behind(ranks: LocalRanks) -> None:
    for during, after, nothing in ranks.run(what_is_left, size=2):
        assert during == ["megamoe combine watcher", "megamoe dispatch watcher"]
        assert (after, nothing) == ([], True)


def stalls(group: EPGroup) -> str:
    batch, layer = make_batch(SHAPE, 50), make_layer(SHAPE, EPGroup.of(dist.group.WORLD, deadline_s=1.5))
    if group.rank == 1:
        layer = make_layer(SHAPE, EPGroup.of(dist.group.WORLD, deadline_s=30))
        with monkey(layer, lambda: time.sleep(3)), pytest.raises(RuntimeError):
            layer(batch.hidden, batch.ids, batch.weights)
        return ""
    with record(layer.group), pytest.raises(PeerError) as lost:
        layer(batch.hidden, batch.ids, batch.weights)
    return str(lost.value)


def test_a_lost_rank_is_named_while_recorded_too(ranks: LocalRanks) -> None:
    assert "rank 1" in ranks.run(stalls, size=2)[0]


def test_one_rank_alone_notes_its_work() -> None:
    batch, layer = make_batch(SHAPE, 9), make_layer(SHAPE, name="alone")
    with record(layer.group) as trace:
        layer(batch.hidden, batch.ids, batch.weights)
    (run,) = trace.gather().runs()
    assert {event.lane for event in run.events} == {CALL, "linear-1", "activation", "linear-2", "reduce"}
    assert run.share().hidden_percent is None
    assert run.share().compute_us > 0


def test_a_device_whose_work_host_time_does_not_measure_refuses_to_be_recorded() -> None:
    layer = make_layer(SHAPE)
    layer.device = torch.device("cuda")
    with layer.group.record(Recording(0, "here")):
        complaint = layer._complaint(*(torch.zeros(0),) * 3)
    assert "host time, which says nothing of work on cuda" in str(complaint)


def computes_for_longer_than_the_deadline(group: EPGroup) -> Tensor:
    """Rank 0 has a deadline of half a second; both compute for longer, rank 0 the longest, so it never waits."""
    batch = make_batch(SHAPE, 50)
    own = EPGroup.of(dist.group.WORLD, deadline_s=30.0 if group.rank else 0.5)
    layer = make_layer(SHAPE, own, waves=1)
    layer(batch.hidden, batch.ids, batch.weights)
    whole = layer.experts.linear1

    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.7 if group.rank else 1.1)
        return whole(*arguments)

    layer.experts.linear1 = slow  # type: ignore[assignment,method-assign]
    with record(layer.group):
        return layer(batch.hidden, batch.ids, batch.weights)


def test_a_recorded_rank_that_computes_past_the_deadline_blames_nobody(ranks: LocalRanks) -> None:
    first, second = ranks.run(computes_for_longer_than_the_deadline, size=2)
    assert torch.equal(first, second)


class Held:
    """A transport whose one transfer comes from rank 2, when it is let go."""

    early = True

    def __init__(self, where: OwnStatus) -> None:
        self.where, self.go, self.watched = where, threading.Event(), threading.Event()

    def expect(self, *_: object) -> Held:
        return self

    def wait(self) -> None:
        self.where.wait("dispatch", 1, 2)
        self.watched.set()
        assert self.go.wait(10)
        self.where.arrived("dispatch", 1, 0.0)


def test_a_recorded_rank_that_waits_says_so_and_for_whom() -> None:
    where, seen = OwnStatus(), []
    held, recorder = Held(where), Recorder(Recording(0, "here"))

    def call() -> None:
        where.enter("moe", 1)
        watched = WatchedTransport(held, recorder.call("moe", 1, where))  # type: ignore[arg-type]
        transfer = watched.expect(torch.empty(3, 1), [0, 0, 3], Label("moe", "dispatch", 1))
        assert held.watched.wait(10)
        seen.append(where.position())  # the rows are not there, but the rank computes meanwhile
        waits.set()
        transfer.wait()
        seen.append(where.position())

    waits, calling = threading.Event(), threading.Thread(target=call)
    calling.start()
    assert waits.wait(10)
    until = time.monotonic() + 10
    while where.position().state != WAITING and time.monotonic() < until:
        threading.Event().wait(0.005)
    waiting = where.position()
    held.go.set()
    calling.join(10)
    recorder.stop()
    assert (waiting.state, waiting.phase, waiting.wave, waiting.peer) == (WAITING, "dispatch", 1, 2)
    assert [each.state for each in seen] == [WORKING, WORKING]
    stalled = RankStatus(WORKING, "moe", 1, 0, "linear-1", age_s=9.0)
    statuses = [
        PeerStatus(0, "a", RankStatus(WAITING, peer=1), 0.0),
        PeerStatus(1, "b", waiting, 0.1),
        PeerStatus(2, "c", stalled, 0.1),
    ]
    assert diagnose(0, 1, statuses).rank == 2, "the one that it waits for, and not the one that waits"
