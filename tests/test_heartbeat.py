"""The heartbeat: what ranks hear of each other, whom they find lost and whom not, and what strangers are told."""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from megamoe.parallel.health import heartbeat, runs
from megamoe.parallel.health.heartbeat import HeartbeatMonitor, _Peer, ask
from megamoe.parallel.health.records import Heartbeat, Line
from megamoe.parallel.health.status import LEFT, OUTSIDE, RAISED, WAITING, OwnStatus, RankStatus


@contextmanager
def monitors(size: int) -> Iterator[list[HeartbeatMonitor]]:
    """As many ranks as threads of this process"""
    store = HashStore()

    def light(rank: int) -> HeartbeatMonitor:
        return HeartbeatMonitor(rank, size, store, OwnStatus(), address="127.0.0.1", host=f"h{rank}", deadline_s=10.0)

    with ThreadPoolExecutor(size) as pool:
        lit = list(pool.map(light, range(size)))
    try:
        yield lit
    finally:
        for each in lit:
            each.leave()


def holds(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether it comes true in time"""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        threading.Event().wait(0.01)
    return True


def test_no_rank_goes_on_before_all_have_met() -> None:
    """One that left at once would leave the others without an answer."""
    store, reached, let_go = HashStore(), threading.Event(), threading.Event()

    class Late:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def add(self, *counted: Any) -> int:
            reached.set()
            let_go.wait(5.0)
            return store.add(*counted)

    def light(rank: int) -> HeartbeatMonitor:
        own: Any = Late() if rank else store
        return HeartbeatMonitor(rank, 2, own, OwnStatus(), address="127.0.0.1", host="h", deadline_s=10.0)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(light, rank) for rank in range(2))
        assert reached.wait(5.0)
        assert not wait([first], 0.1).done
        let_go.set()
        for each in (first, second):
            each.result().leave()


def position_of(seer: HeartbeatMonitor, rank: int) -> RankStatus:
    return seer.statuses()[rank].position or RankStatus()


def test_every_rank_hears_where_the_others_are() -> None:
    with monitors(3) as lit:
        where = lit[1].own_status
        where.enter("layers.4", 7)
        where.wait("combine", 2, 0)
        for other in (lit[0], lit[2]):
            assert holds(lambda other=other: position_of(other, 1).state == WAITING)  # type: ignore[misc]
            seen = position_of(other, 1)
            assert (seen.layer, seen.call, seen.phase, seen.wave, seen.peer) == ("layers.4", 7, "combine", 2, 0)
            assert str(seen).startswith("waits for rank 0, for ")
            assert other.lost() is None
        assert [status.host for status in lit[2].statuses()] == ["h0", "h1", "h2"]
        assert holds(lambda: {rank for rank, _ in lit[0].statuses()[1].answers} == {0, 2}), "how long answers take, too"


def test_one_answer_that_is_late_is_no_slow_link_until_a_beat_has_passed() -> None:
    peer = _Peer(1, "h1", "127.0.0.1", 1, answered_s=deque([0.001] * 8), asked=100.0)
    assert peer.answers_in_s(100.2, beat_s=0.25) == 0.001
    assert peer.answers_in_s(100.4, beat_s=0.25) == pytest.approx(0.4)
    peer.asked, peer.answered_s = 0.0, deque([0.001] * 3 + [0.05] * 5)
    assert peer.answers_in_s(100.4, beat_s=0.25) == 0.05


def test_every_rank_hears_which_ranks_share_memory() -> None:
    with monitors(3) as lit:
        lit[2].near = lambda: [1]
        assert holds(lambda: lit[0].statuses()[2].near == (1,))
        assert ask(lit[0].address, lit[0].port, lit[0].token)[2].near == (1,)
        assert lit[2].statuses()[2].near == (1,)


def test_whether_a_silent_rank_has_a_process_is_found_out_by_its_port() -> None:
    with monitors(3) as lit:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            free = taken.getsockname()[1]
        lit[0]._peers[2].port = free
        assert lit[0]._probe([1, 2]) == {1: "accepted", 2: "refused"}


def test_a_rank_that_ends_before_it_has_said_anything_is_lost() -> None:
    with monitors(2) as lit:
        peer = lit[0]._peers[1]
        peer.position = None
        lit[0]._take_in(peer, [], closed=True)
        assert lit[0].lost() == 1


def test_a_rank_that_raises_is_heard_before_the_next_beat_and_ends_the_waits_of_those_in_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 3600.0)
    with monitors(3) as lit:
        troubled = threading.Event()
        lit[0].trouble = troubled.set
        lit[0].own_status.enter("moe", 1)
        lit[1].own_status.enter("moe", 1)
        lit[1].own_status.end(RAISED, None, "KeyError: 'x'")
        lit[1].say()
        assert troubled.wait(5.0)
        assert lit[0].lost() == 1
        verdict, statuses = lit[0].judge(2)
        assert (verdict.rank, verdict.condition) == (1, "raised")
        assert "KeyError: 'x'" in str(statuses[1])


@pytest.mark.parametrize("collective", [False, True])
def test_of_ranks_that_give_up_on_others_one_ends_no_wait_for_another_and_all_end_every_wait(collective: bool) -> None:
    with monitors(3) as lit:
        ended = threading.Event()
        lit[0].trouble, lit[0].collective = ended.set, collective
        for each in lit:
            each.own_status.enter("moe", 1)
        lit[1].own_status.end(RAISED, 2, "stalled")
        lit[1].say()
        assert holds(lambda: set(lit[0].gave_up) == {1})
        assert holds(ended.is_set) if collective else not ended.is_set()
        lit[2].own_status.end(RAISED, 0, "stalled")
        lit[2].say()
        assert holds(ended.is_set), "while it computes, too"
        assert holds(lambda: len(lit[0].gave_up) == 2)
        assert lit[0].gave_up[1] < lit[0].gave_up[2] <= time.monotonic()
        verdict, _ = lit[0].judge(1)
        assert (verdict.rank, verdict.condition) == (2, "stalled")


def test_whom_a_rank_waits_for_is_known_of_all_its_threads() -> None:
    own = OwnStatus()
    own.enter("moe", 1)
    assert not own.awaits(1)
    own.wait("combine", 0, 1)
    assert (own.awaits(1), own.awaits(2)) == (True, False)
    watcher = threading.Thread(target=own.wait, args=("dispatch", 1, 2))
    watcher.start()
    watcher.join()
    assert (own.awaits(1), own.awaits(2), own.awaits(3)) == (True, True, False)
    own.wait("dispatch", 1, None)  # for what the watcher waits for
    assert (own.awaits(1), own.awaits(2)) == (False, True)
    own.wait("counts", None, None)  # for others whom it does not know
    assert own.awaits(1)
    own.arrived("counts", None, 0.1)
    assert (own.awaits(1), own.awaits(2)) == (False, True)


def test_a_rank_that_raises_between_calls_ends_no_call_that_it_has_done_its_part_of() -> None:
    with monitors(2) as lit:
        troubled = threading.Event()
        lit[0].trouble = troubled.set
        for each in lit:
            each.own_status.enter("moe", 1)
        lit[1].own_status.leave()
        lit[1].own_status.end(RAISED, None, "KeyError: 'x'")
        lit[1].say()
        assert holds(lambda: position_of(lit[0], 1).state == RAISED)
        assert lit[0].lost() is None
        assert not troubled.is_set()
        lit[0].own_status.leave()
        lit[0].own_status.enter("moe", 2)
        assert lit[0].lost() == 1


def test_a_rank_that_leaves_is_not_lost_and_one_whose_connection_ends_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "megamoe")
    with monitors(3) as lit:
        lit[1].leave()
        assert holds(lambda: lit[0].statuses()[1].closed)
        assert position_of(lit[0], 1).state == LEFT
        assert lit[0].lost() is None
        line = lit[2]._peers[0].line
        assert line is not None
        line.channel.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that is killed
        assert holds(lambda: lit[0].lost() == 2)
        assert holds(lambda: "rank 2 on h2 is lost, no further call can be made" in caplog.messages)
        assert not [message for message in caplog.messages if "rank 1" in message]
        assert {record.name for record in caplog.records} == {"megamoe.parallel.health.heartbeat"}
        verdict, _ = lit[0].judge(2)
        assert (verdict.rank, verdict.condition) == (2, "dead")


def test_a_rank_that_leaves_at_once_tells_those_too_that_it_has_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have connected; without its last word it would be lost to them."""
    run, held = HeartbeatMonitor._run, threading.Event()

    def late(self: HeartbeatMonitor) -> None:
        if self.rank == 1:
            held.wait(5.0)
        run(self)

    monkeypatch.setattr(HeartbeatMonitor, "_run", late)
    with monitors(3) as lit, ThreadPoolExecutor(1) as pool:
        left = pool.submit(lit[1].leave)
        assert holds(lambda: lit[1]._stopping)
        held.set()
        left.result()
        assert holds(lambda: lit[2].statuses()[1].closed)
        assert position_of(lit[2], 1).state == LEFT
        assert lit[2].lost() is None


def test_a_rank_that_has_said_its_last_word_keeps_it() -> None:
    where = OwnStatus()
    where.enter("moe", 3)
    where.work("linear-1", 2)
    where.end(RAISED, 4, "stopped")
    where.end(LEFT)
    found = where.position()
    assert (found.state, found.peer, found.complaint, found.phase, found.wave) == (RAISED, 4, "stopped", "linear-1", 2)


def test_notes_of_other_threads_are_not_taken() -> None:
    where = OwnStatus()
    where.enter("moe", 1)
    where.work("linear-2", 1)
    watcher = threading.Thread(target=where.wait, args=("dispatch", 3, 1))
    watcher.start()
    watcher.join()
    assert where.position().phase == "linear-2"
    where.leave()
    assert where.position().state == OUTSIDE


def test_a_rank_that_did_not_run_finds_no_other_silent_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    with monitors(3) as lit:
        resume, held = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            resume.wait(10.0)

        lit[2].pulse = hold  # its thread stands still, as that of a stopped process does
        assert held.wait(5.0)
        assert holds(lambda: lit[0].statuses()[2].silent and lit[1].statuses()[2].silent)
        assert not [status for status in lit[2].statuses() if status.silent]
        lit[0].own_status.enter("moe", 1)
        lit[0].own_status.end(RAISED, 2, "stopped")
        lit[2].pulse = lambda: None
        resume.set()
        assert holds(lambda: position_of(lit[2], 0).state == RAISED)  # of rank 1 nothing may have been read yet
        assert not [status for status in lit[2].statuses() if status.silent]
        assert lit[2].judge(None)[0].rank == 2
        lit[1].leave()
        assert holds(lambda: not lit[0].statuses()[2].silent)


def test_a_rank_that_runs_finds_one_silent_that_says_nothing_though_it_slept_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    with monitors(2) as lit:
        resume = [threading.Event(), threading.Event()]
        held = [threading.Event(), threading.Event()]

        def hold(rank: int) -> Callable[[], None]:
            def pulse() -> None:
                held[rank].set()
                resume[rank].wait(10.0)

            return pulse

        try:
            for rank in (0, 1):
                lit[rank].pulse = hold(rank)
                assert held[rank].wait(5.0)
            threading.Event().wait(10 * lit[0]._beat_s)  # that long no thread listens
            lit[0].pulse = lambda: None
            resume[0].set()
            assert holds(lambda: lit[0].statuses()[1].silent)
        finally:
            resume[1].set()


def test_a_wait_outside_of_a_call_is_told_from_one_within() -> None:
    where = OwnStatus()
    where.enter("moe", 1)
    where.wait("counts", None, 1)
    assert not where.position().between
    where.leave()
    where.wait("counts", None, 1)
    found = where.position()
    assert found.between
    assert RankStatus.of(asdict(found), 2) == found


def test_who_has_the_token_gets_the_picture_and_nobody_else_anything() -> None:
    with monitors(2) as lit:
        lit[1].own_status.enter("moe", 5)
        assert holds(lambda: position_of(lit[0], 1).call == 5)
        picture = ask("127.0.0.1", lit[0].port, lit[0].token)
        assert [status.rank for status in picture] == [0, 1]
        assert picture[1].position is not None
        assert picture[1].position.call == 5
        with pytest.raises(EOFError):
            ask("127.0.0.1", lit[0].port, "a wrong token")


@pytest.mark.parametrize(
    "said", [b"\xff" * 64, b"\0\0\0\2[]", b"\0\0\0\4null", b"\0\0\0\5hello", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_nonsense_from_strangers_is_sent_away_and_harms_nothing(said: bytes) -> None:
    with monitors(2) as lit:
        with socket.create_connection(("127.0.0.1", lit[0].port), timeout=5) as stranger:
            stranger.sendall(said)
            assert stranger.recv(10) == b""
        lit[1].own_status.enter("moe", 9)
        assert holds(lambda: position_of(lit[0], 1).call == 9)


def test_an_ended_beacon_leaves_no_thread() -> None:
    with monitors(4):
        assert sum(thread.name == "megamoe heartbeat" for thread in threading.enumerate()) == 4
    assert holds(lambda: all(thread.name != "megamoe heartbeat" for thread in threading.enumerate()))


# ---- what peers of another version, or with a fault, may say ----

BEAT: dict[str, Any] = {
    "at": 1.0,
    "position": asdict(RankStatus(WAITING, "moe", 4, 1, "combine", 0)),
    "unheard": [],
    "answers": [],
}


def without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    """The record without a key, which may lie deeper."""
    head, *rest = path
    return {
        key: without(value, *rest) if key == head else value for key, value in record.items() if rest or key != head
    }


STRANGE: dict[str, Any] = {
    "no_position": without(BEAT, "position"),
    "no_time": without(BEAT, "at"),
    "position_of_another_type": {**BEAT, "position": "waiting"},
    "a_call_of_another_type": {**BEAT, "position": {**BEAT["position"], "call": "4"}},
    "waits_for_a_rank_that_there_is_not": {**BEAT, "position": {**BEAT["position"], "peer": 17}},
    "unheard_of_another_type": {**BEAT, "unheard": 3},
    "an_answer_of_another_type": {"answer": "soon"},
    "nothing": {},
    "a_list": [1, 2],
    "none": None,
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_record_that_cannot_be_read_is_passed_over_and_its_rank_lives(name: str) -> None:
    with monitors(2) as lit:
        assert holds(lambda: lit[0]._peers[1].line is not None)
        line = lit[1]._peers[0].line
        assert line is not None
        lit[1].pulse = lambda: line.put(STRANGE[name])  # before every heartbeat
        lit[1].say()
        lit[1].own_status.enter("moe", 9)
        lit[1].say()
        assert holds(lambda: position_of(lit[0], 1).call == 9)
        assert lit[0].lost() is None
        assert not lit[0].statuses()[1].closed


@pytest.mark.parametrize("key", ["sequence", "calls", "age_s", "complaint", "wave"])
def test_what_is_missing_or_new_in_a_heartbeat_does_not_hide_the_rest(key: str) -> None:
    record = without({**BEAT, "mood": "good"}, "position", key)
    record["position"]["mood"] = "good"
    beat = Heartbeat.of({**without(record, "answers"), "unheard": [1, 5, "x"]}, 2)
    assert beat is not None
    assert (beat.position.layer, beat.position.peer, beat.unheard, beat.answers) == ("moe", 0, (1,), ())


@pytest.mark.parametrize("body", [b"[" * 200_000, b"\xff\xfe", b"{", b"17"], ids=["deep", "binary", "cut", "number"])
def test_a_body_that_is_no_record_does_not_end_the_thread_that_hears_it(body: bytes) -> None:
    with monitors(2) as lit:
        said = struct.pack(">I", len(body)) + body
        with socket.create_connection(("127.0.0.1", lit[0].port), timeout=5) as stranger:
            stranger.sendall(said)
            assert stranger.recv(10) == b""
        line = lit[1]._peers[0].line
        assert line is not None
        lit[1].pulse = lambda: line._leaving.extend(said)
        lit[1].say()
        lit[1].own_status.enter("moe", 9)
        lit[1].say()
        assert holds(lambda: position_of(lit[0], 1).call == 9)


def test_a_rank_that_raised_before_its_connection_was_taken_ends_waits_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 3600.0)
    with monitors(2) as lit:
        troubled = threading.Event()
        lit[0].trouble = troubled.set
        lit[0].own_status.enter("moe", 1)
        here, there = socket.socketpair()
        with here, there:
            peer = lit[0]._peers[1]
            assert holds(lambda: peer.position is not None)
            assert peer.line is not None
            lit[0]._selector.unregister(peer.line.channel)
            peer.line = None
            there.setblocking(False)
            stranger, caller = Line(there), Line(here)
            raised = asdict(RankStatus(RAISED, "moe", 1, None, "counts", None, 9, 0.0, "KeyError", 1))
            caller.put({"token": lit[0].token, "rank": 1})
            caller.put({**BEAT, "position": raised})
            caller.flush()
            lit[0]._selector.register(there, selectors.EVENT_READ, stranger)
            lit[0]._wake()
            assert troubled.wait(5.0)
            lit[0]._selector.unregister(there)


def test_a_list_of_runs_outlives_files_that_are_cut_short_or_of_another_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "folder", lambda: tmp_path)
    gone = tmp_path / "old" / "rank-0.json"
    gone.parent.mkdir()
    gone.write_text(json.dumps(asdict(runs.ListedRank(0, os.getpid(), 0.0, "127.0.0.1", 6, "token"))))
    with runs.list_rank("mine", 0, "127.0.0.1", 7, "token"):
        assert not gone.parent.exists(), "left by a process that was killed"
        file = tmp_path / "mine" / "rank-0.json"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({**known, "mood": "good"}))
        for number, text in enumerate(("", "{", "[]", json.dumps({"rank": 3})), 1):
            (tmp_path / "mine" / f"rank-{number}.json").write_text(text)
        assert [rank.port for rank in runs.listed()["mine"]] == [7]
        assert [each.name for each in (tmp_path / "mine").iterdir()] == ["rank-0.json"]
