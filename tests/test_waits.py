"""A wait ends as soon as the ranks that it waits for, or all others, have said that they gave up; and not before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health import heartbeat
from megamoe.parallel.health.heartbeat import HeartbeatMonitor
from megamoe.parallel.health.status import RAISED, WAITING, WORKING, OwnStatus
from megamoe.parallel.recorder import CallNotes, Recorder, Recording
from megamoe.parallel.symmetric import available
from megamoe.parallel.transport.all_to_all import AllToAllTransport
from megamoe.parallel.transport.heads import write_head
from megamoe.parallel.transport.host import Host, HostTransport
from megamoe.parallel.transport.landings import Landings
from megamoe.parallel.transport.pairs import Clock, Label, PairTransport, Transport
from megamoe.parallel.transport.watch import WatchedTransport
from megamoe.shape import MoEShape
from megamoe.training import TrainableMoE
from tests.cases import make_batch, make_weights
from tests.test_heartbeat import holds, monitors

DEADLINE_S = 60.0  # of every wait, and far beyond what a test may take
SOON_S = 20.0
COUNTS, NOW = Label("moe", "counts"), Label("moe", "dispatch", 0)
LARGE = 1 << 20
shares = pytest.mark.skipif(not available(), reason="ranks share memory on Linux and x86-64")


@dataclass
class Rank:
    """A rank as a thread of this process, in a call that it has begun."""

    monitor: HeartbeatMonitor
    clock: Clock
    transport: Any

    def give_up_on(self, peer: int) -> None:
        """Says so to all others, and returns when it has."""
        self.monitor.own_status.end(RAISED, peer, "stalled")
        self.monitor.say()


def on_all(size: int, do: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(do, range(size)))


@contextmanager
def together(size: int, make: Callable[[dist.ProcessGroup, Clock], Transport]) -> Iterator[list[Rank]]:
    """Ranks with connections and heartbeats, whose beats nobody hears unless a rank speaks up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heartbeat, "BEAT_S", 3600.0)
        store = dist.HashStore()

        def connect(rank: int) -> dist.ProcessGroup:
            return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=DEADLINE_S))  # type: ignore[return-value]

        groups = on_all(size, connect)
        with monitors(size) as lit:
            made = []
            for group, monitor in zip(groups, lit, strict=True):
                clock = Clock(DEADLINE_S, {}, monitor.own_status)
                clock.monitors.append(monitor)
                rank = Rank(monitor, clock, make(group, clock))
                monitor.trouble = rank.transport.abort
                monitor.collective = isinstance(rank.transport, AllToAllTransport)
                monitor.own_status.enter("moe", 1)
                made.append(rank)
            yield made


def over_pairs(group: dist.ProcessGroup, clock: Clock) -> PairTransport:
    return PairTransport(group, clock)


def over_memory(group: dist.ProcessGroup, clock: Clock) -> HostTransport:
    host = Host()
    return HostTransport(PairTransport(group, clock), host, host)


def over_collectives(group: dist.ProcessGroup, clock: Clock) -> AllToAllTransport:
    return AllToAllTransport(group, clock, torch.device("cpu"))


def meet(ranks: list[Rank]) -> None:
    """Ranks of one host find that out, and have made some exchanges."""
    on_all(len(ranks), lambda rank: ranks[rank].transport.nodes("moe"))
    for rank in ranks:
        rank.transport.host.exchange = 4


def rows() -> Tensor:
    return torch.zeros(8, dtype=torch.uint8)


def receive(ranks: list[Rank]) -> None:
    ranks[0].transport.expect(rows(), [0, 8, 0, 0][: len(ranks)], NOW).wait()


def receive_recorded(ranks: list[Rank]) -> None:
    """As a call that is recorded: a watcher waits for the rows, and the call for the watcher."""
    recorder = Recorder(Recording(0, "h0"))
    notes = CallNotes(recorder, "moe", 1, ranks[0].clock.own_status)
    try:
        WatchedTransport(ranks[0].transport, notes).expect(rows(), [0, 8, 0, 0][: len(ranks)], NOW).wait()
    finally:
        recorder.stop()


def await_word(ranks: list[Rank]) -> None:
    """Of rows that come through memory."""
    ranks[0].transport.await_signal("rows", 1, NOW)


def exchange(ranks: list[Rank]) -> None:
    """The exchange of pages that opens a call."""
    ranks[0].transport.gather(rows(), COUNTS)


def land(ranks: list[Rank]) -> None:
    """Tokens of another host, that come to rank 1 first."""
    Landings(ranks[0].transport, "moe").wait(0, 1, 1)


KINDS = {
    "message": (over_pairs, receive),
    "recorded message": (over_pairs, receive_recorded),
    "memory": pytest.param(over_memory, await_word, marks=shares),
    "pages in memory": pytest.param(over_memory, exchange, marks=shares),
    "landing": pytest.param(over_memory, land, marks=shares),
}
ALL_KINDS = pytest.mark.parametrize(("make", "wait"), KINDS.values(), ids=KINDS)


@contextmanager
def waiting(
    size: int, make: Callable[..., Transport], wait: Callable[[list[Rank]], None]
) -> Iterator[tuple[list[Rank], Future[None]]]:
    """Rank 0 waits for rank 1 in a thread of its own; the others have begun the call and do nothing."""
    with together(size, make) as ranks, ThreadPoolExecutor(1) as pool:
        if make is over_memory:
            meet(ranks)

        def call() -> None:
            ranks[0].clock.own_status.enter("moe", 1)
            wait(ranks)

        ended = pool.submit(call)
        try:
            own = ranks[0].clock.own_status
            assert holds(lambda: ended.done() or (own.position().state == WAITING and own.awaits(1)))
            assert not ended.done(), ended.exception()
            yield ranks, ended
        finally:
            ranks[0].transport.abort()


@ALL_KINDS
@pytest.mark.parametrize("size", [2, 3])
def test_a_wait_ends_when_the_rank_that_it_is_for_gives_up(size: int, make: Any, wait: Any) -> None:
    with waiting(size, make, wait) as (ranks, ended):
        ranks[1].give_up_on(size - 1 if size == 3 else 0)
        lost = ended.exception(SOON_S)
        assert isinstance(lost, PeerError)
        assert (lost.rank, lost.condition) == (2 if size == 3 else 0, "stalled"), "what the first said is believed"


@ALL_KINDS
def test_a_wait_ends_when_all_others_have_given_up_and_not_for_one_of_them(make: Any, wait: Any) -> None:
    with waiting(4, make, wait) as (ranks, ended):
        ranks[2].give_up_on(1)
        assert holds(lambda: set(ranks[0].monitor.gave_up) == {2})
        ranks[3].give_up_on(1)
        assert holds(lambda: set(ranks[0].monitor.gave_up) == {2, 3})
        with pytest.raises(TimeoutError):
            ended.result(0.1)
        ranks[1].give_up_on(2)  # it hears of neither: what the first said is believed all the same
        lost = ended.exception(SOON_S)
        assert isinstance(lost, PeerError)
        assert (lost.rank, lost.condition) == (1, "stalled")


def send_message(rank: Rank) -> None:
    transfer = rank.transport.expect(torch.empty(0, dtype=torch.uint8), [0, 0, 0], NOW)
    transfer.send(rows(), [8, 0, 0])
    transfer.finish()


def set_word(rank: Rank) -> None:
    rank.transport.signal("rows", [0])


def send_page(rank: Rank) -> None:
    write_head(rank.transport.place(COUNTS).view, COUNTS, len(rows()))
    memory, exchange = rank.transport.host.memory, rank.transport.host.exchange + 1
    memory.peers[0].set(memory.words.page(exchange, rank.transport.rank), exchange)


def set_landing(rank: Rank) -> None:
    memory, exchange = rank.transport.host.memory, rank.transport.host.exchange
    memory.own.words[memory.words.rows(0, 0, 1)] = exchange


COME = [send_message, send_message, set_word, send_page, set_landing]


@pytest.mark.parametrize(
    ("make", "wait", "come"),
    [
        pytest.param(*getattr(kind, "values", kind), come, marks=getattr(kind, "marks", ()), id=name)
        for (name, kind), come in zip(KINDS.items(), COME, strict=True)
    ],
)
def test_a_wait_goes_on_where_one_of_two_others_gave_up_and_ends_in_peace(make: Any, wait: Any, come: Any) -> None:
    with waiting(3, make, wait) as (ranks, ended):
        ranks[2].give_up_on(1)
        assert holds(lambda: set(ranks[0].monitor.gave_up) == {2})
        assert not ranks[0].transport.aborted
        with pytest.raises(TimeoutError):
            ended.result(0.1)
        if wait is exchange:  # of which rank 2 had done its part
            send_page(ranks[2])
        come(ranks[1])
        assert ended.exception(SOON_S) is None
        own = ranks[0].clock.own_status
        assert own.waited_s >= 0.1, "which the next wait of the call lacks"
        assert own.position().state == WORKING


@ALL_KINDS
def test_a_wait_for_a_rank_that_gave_up_before_it_began_ends_at_once(make: Any, wait: Any) -> None:
    with together(3, make) as ranks:
        if make is over_memory:
            meet(ranks)
        ranks[1].give_up_on(2)
        assert holds(lambda: set(ranks[0].monitor.gave_up) == {1})
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(wait, ranks).exception(SOON_S)
        assert isinstance(lost, PeerError)
        assert lost.rank == 2


@shares
def test_a_landing_ends_when_the_rank_that_sends_it_gave_up() -> None:
    with waiting(3, over_memory, lambda ranks: Landings(ranks[0].transport, "moe").wait(0, 2, 1)) as (ranks, ended):
        ranks[2].give_up_on(1)
        lost = ended.exception(SOON_S)
        assert isinstance(lost, PeerError)
        assert (lost.rank, lost.reason) == (1, "the wait was broken off")


@pytest.mark.parametrize("step", ["pages", "rows"])
def test_a_collective_waits_for_all_and_ends_when_one_gives_up(step: str) -> None:
    def wait(ranks: list[Rank]) -> None:
        if step == "pages":
            ranks[0].transport.gather(rows(), COUNTS)
        transfer = ranks[0].transport.expect(torch.empty(3), [1, 1, 1], NOW)
        transfer.send(torch.empty(3), [1, 1, 1])
        transfer.wait()

    room = "megamoe.parallel.transport.all_to_all."
    with (
        mock.patch("torch.distributed.all_to_all_single", return_value=Never()),
        mock.patch(f"{room}_gather", return_value=Never()),
        mock.patch(f"{room}abort_backend", side_effect=RuntimeError("Backend gloo does not support abort")),
        waiting(3, over_collectives, wait) as (ranks, ended),
    ):
        ranks[2].give_up_on(1)
        lost = ended.exception(SOON_S)
        assert isinstance(lost, PeerError)
        assert (lost.rank, lost.phase) == (1, "counts" if step == "pages" else "dispatch")
        assert "broken off" in lost.reason


class Never:
    """A work that does not end."""

    def is_completed(self) -> bool:
        return False

    def wait(self, within: timedelta) -> bool:
        raise RuntimeError(f"it took {within}")


# ---- what is on its way out ----


class Stuck:
    """A process group as gloo is after a connection has ended in the middle of a message: who sent it waits on."""

    def __init__(self) -> None:
        self.asked, self.let_go = threading.Event(), threading.Event()

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 3

    def send(self, *_: object) -> Stuck:
        return self

    def recv(self, *_: object) -> Stuck:
        raise RuntimeError("Connection closed by peer")

    def wait(self, within: timedelta) -> None:
        self.asked.set()
        if not self.let_go.wait(within.total_seconds()):
            raise RuntimeError("Timed out waiting for send operation to complete")


def stuck_transport(group: Stuck, *, heard: bool = True) -> PairTransport:
    own = OwnStatus()
    clock = Clock(DEADLINE_S, {}, own)
    transport = PairTransport(group, clock)  # type: ignore[arg-type]
    if heard:
        monitor = mock.Mock(gave_up={})
        monitor.judge.return_value = mock.Mock(rank=2, condition="slow", meaning="is slow"), [mock.Mock()] * 3
        clock.monitors.append(monitor)
    return transport


def sent(transport: PairTransport, num_bytes: int = LARGE) -> Any:
    transfer = transport.open(NOW)
    transfer.send(torch.empty(num_bytes, dtype=torch.uint8), [0, num_bytes, 0])
    return transfer


@pytest.mark.parametrize("how", ["aborted", "gave up"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_does_not_leave_is_not_waited_for_when_nobody_takes_it(how: str, when: str) -> None:
    group = Stuck()
    transport = stuck_transport(group)
    transfer = sent(transport)

    def end() -> None:
        if how == "aborted":
            transport.abort()
        else:
            transport.clock.monitors[0].gave_up[1] = time.monotonic()

    try:
        with ThreadPoolExecutor(1) as pool:
            if when == "before":
                end()
            ended = pool.submit(transfer.finish)
            assert group.asked.wait(SOON_S)
            if when == "after":
                end()
            lost = ended.exception(SOON_S)
        assert isinstance(lost, PeerError)
        assert (lost.rank, lost.phase, lost.reason) == (2, "dispatch", "the wait was broken off")
    finally:
        group.let_go.set()


def test_what_leaves_late_is_waited_for_though_another_gave_up() -> None:
    group = Stuck()
    transport = stuck_transport(group)
    transfer = sent(transport)
    transport.clock.monitors[0].gave_up[2] = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(transfer.finish)
        assert group.asked.wait(SOON_S)
        with pytest.raises(TimeoutError):
            ended.result(0.1)
        group.let_go.set()
        assert ended.exception(SOON_S) is None


@pytest.mark.parametrize("heard", [True, False])
def test_only_what_may_not_leave_at_once_is_waited_for_by_another_thread(heard: bool) -> None:
    group = Stuck()
    group.let_go.set()
    transport = stuck_transport(group, heard=heard)
    by: list[str] = []

    def note(_: timedelta) -> None:
        by.append(threading.current_thread().name)

    with mock.patch.object(group, "wait", note):
        sent(transport, 8).finish()
        sent(transport).finish()
        sent(transport, 8).finish()
        large, small = sent(transport), sent(transport, 8)
        small.finish()  # the large one may be before it
        large.finish()
        sent(transport)
        transport.expect_first(torch.empty(0, 8, dtype=torch.uint8), NOW, []).wait()
        sent(transport, 8).finish()
    me = threading.current_thread().name
    other = "megamoe waiter" if heard else me
    assert by == [me, other, other, me, other, other, me, me], "of a large message tail and body are waited for beside"


def test_the_core_is_given_up_before_large_messages_are_posted_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    group, order = Stuck(), list[str]()
    group.let_go.set()
    monkeypatch.setattr(os, "sched_yield", lambda: order.append("yield"))
    with mock.patch.object(group, "send", side_effect=lambda *_: order.append("post")):
        sent(stuck_transport(group), 8)
        assert order == ["post"]
        sent(stuck_transport(group))
    assert order == ["post", "yield", "post", "post"], "body and tail"


def test_all_that_has_been_sent_is_waited_for_at_once_and_the_time_counts() -> None:
    group = Stuck()
    transport = stuck_transport(group)
    where = transport.clock.own_status
    where.enter("moe", 1)
    transfers = [sent(transport) for _ in range(3)]
    timer = threading.Timer(0.1, group.let_go.set)
    timer.start()
    with mock.patch.object(transport._waiter, "wait", wraps=transport._waiter.wait) as waits:
        for each in transfers:
            each.finish()
            assert where.position().state == WORKING
    timer.join()
    assert waits.call_count == 1
    assert transport.clock.left_s() < DEADLINE_S - 0.05


def test_the_thread_that_waits_for_what_leaves_ends_with_its_transport() -> None:
    group = Stuck()
    group.let_go.set()
    before = set(threading.enumerate())
    transport = stuck_transport(group)
    sent(transport).finish()
    mine = [thread for thread in set(threading.enumerate()) - before if thread.name == "megamoe waiter"]
    assert len(mine) == 1
    del transport
    assert holds(lambda: not mine[0].is_alive())


# ---- deadlines ----


def test_once_a_rank_has_given_up_no_call_waits_longer_than_a_deadline_from_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    clock = Clock(DEADLINE_S, {}, OwnStatus())
    clock.monitors.append(mock.Mock(gave_up={}))
    clock.own_status.waited_s = 5.0
    assert clock.left_s() == 55.0
    clock.monitors[0].gave_up.update({2: 90.0, 1: 70.0})
    assert clock.left_s() == 30.0
    clock.own_status.waited_s = 50.0
    assert clock.left_s() == 10.0


# ---- a layer, forward and backward ----

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=3)


def gives_up(group: EPGroup, part: str, givers: tuple[int, ...]) -> tuple[str, int | None, float]:
    """Rank 0 waits in a forward or backward for ranks that give up in it: how it ended, whom it named, and how soon."""
    group.transport.gather(rows(), Label("meeting", "counts"))  # type: ignore[union-attr]
    layer = TrainableMoE(SHAPE, group, weight_format="bf16", waves=2)
    layer.load_experts(*make_weights(SHAPE))
    batch = make_batch(SHAPE, 12)
    hidden = batch.hidden.clone().requires_grad_()

    def give_up(*_: object, **__: object) -> None:
        raise PeerError(1, "h1", "combine", "moe", 0, 0.1, DEADLINE_S, "as planned", condition="stalled")

    begun = time.monotonic()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if group.rank in givers:
                blow = "pipeline.Call.compute" if part == "forward" else "training.call.BackwardCall.data"
                patch.setattr(f"megamoe.{'execution.' if part == 'forward' else ''}{blow}", give_up)
            layer(hidden, batch.ids, batch.weights).sum().backward()
    except PeerError as lost:
        return lost.condition, lost.rank, time.monotonic() - begun
    return "", None, time.monotonic() - begun


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_call_ends_when_all_others_have_given_up_on_it(part: str, size: int) -> None:
    with LocalRanks(size, threads_per_rank=1) as ranks:
        found = ranks.run(gives_up, part, tuple(range(1, size)))
    assert [each[:2] for each in found] == [("stalled", 1)] * size
    assert max(took for *_, took in found) < SOON_S
