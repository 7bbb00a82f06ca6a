"""The beacon: what ranks hear of each other, whom they find lost and whom not, and what strangers are told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from torch.distributed import HashStore

from megamoe.parallel import beacon
from megamoe.parallel.beacon import Beacon, ask
from megamoe.parallel.position import LEFT, OUTSIDE, RAISED, WAITING, Position, Whereabouts


@contextmanager
def beacons(size: int) -> Iterator[list[Beacon]]:
    """As many ranks as threads of this process"""
    store = HashStore()

    def light(rank: int) -> Beacon:
        return Beacon(rank, size, store, Whereabouts(), address="127.0.0.1", host=f"h{rank}", deadline_s=10.0)

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


def position_of(seer: Beacon, rank: int) -> Position:
    return seer.sights()[rank].position or Position()


def test_every_rank_hears_where_the_others_are() -> None:
    with beacons(3) as lit:
        where = lit[1].whereabouts
        where.enter("layers.4", 7)
        where.wait("combine", 2, 0)
        for other in (lit[0], lit[2]):
            assert holds(lambda other=other: position_of(other, 1).state == WAITING)  # type: ignore[misc]
            seen = position_of(other, 1)
            assert (seen.layer, seen.call, seen.phase, seen.wave, seen.peer) == ("layers.4", 7, "combine", 2, 0)
            assert str(seen).startswith("waits for rank 0, for ")
            assert other.lost() is None
        assert [sight.host for sight in lit[2].sights()] == ["h0", "h1", "h2"]


def test_a_rank_that_raises_is_heard_before_the_next_beat_and_ends_the_waits_of_those_in_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(beacon, "BEAT_S", 3600.0)
    with beacons(3) as lit:
        troubled = threading.Event()
        lit[0].trouble = troubled.set
        lit[0].whereabouts.enter("moe", 1)
        lit[1].whereabouts.enter("moe", 1)
        lit[1].whereabouts.end(RAISED, None, "KeyError: 'x'")
        lit[1].say()
        assert troubled.wait(5.0)
        assert lit[0].lost() == 1
        verdict, sights = lit[0].judge(2)
        assert (verdict.rank, verdict.condition) == (1, "raised")
        assert "KeyError: 'x'" in str(sights[1])


def test_a_rank_that_raises_between_calls_ends_no_call_that_it_has_done_its_part_of() -> None:
    with beacons(2) as lit:
        troubled = threading.Event()
        lit[0].trouble = troubled.set
        for each in lit:
            each.whereabouts.enter("moe", 1)
        lit[1].whereabouts.leave()
        lit[1].whereabouts.end(RAISED, None, "KeyError: 'x'")
        lit[1].say()
        assert holds(lambda: position_of(lit[0], 1).state == RAISED)
        assert lit[0].lost() is None
        assert not troubled.is_set()
        lit[0].whereabouts.leave()
        lit[0].whereabouts.enter("moe", 2)
        assert lit[0].lost() == 1


def test_a_rank_that_leaves_is_not_lost_and_one_whose_connection_ends_is() -> None:
    with beacons(3) as lit:
        lit[1].leave()
        assert holds(lambda: lit[0].sights()[1].closed)
        assert position_of(lit[0], 1).state == LEFT
        assert lit[0].lost() is None
        line = lit[2]._peers[0].line
        assert line is not None
        line.channel.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that is killed
        assert holds(lambda: lit[0].lost() == 2)
        verdict, _ = lit[0].judge(2)
        assert (verdict.rank, verdict.condition) == (2, "dead")


def test_a_rank_that_has_said_its_last_word_keeps_it() -> None:
    where = Whereabouts()
    where.enter("moe", 3)
    where.work("linear-1", 2)
    where.end(RAISED, 4, "stopped")
    where.end(LEFT)
    found = where.position()
    assert (found.state, found.peer, found.complaint, found.phase, found.wave) == (RAISED, 4, "stopped", "linear-1", 2)


def test_notes_of_other_threads_are_not_taken() -> None:
    where = Whereabouts()
    where.enter("moe", 1)
    where.work("linear-2", 1)
    watcher = threading.Thread(target=where.wait, args=("dispatch", 3, 1))
    watcher.start()
    watcher.join()
    assert where.position().phase == "linear-2"
    where.leave()
    assert where.position().state == OUTSIDE


def test_who_has_the_token_gets_the_picture_and_nobody_else_anything() -> None:
    with beacons(2) as lit:
        lit[1].whereabouts.enter("moe", 5)
        assert holds(lambda: position_of(lit[0], 1).call == 5)
        picture = ask("127.0.0.1", lit[0].port, lit[0].token)
        assert [sight.rank for sight in picture] == [0, 1]
        assert picture[1].position is not None
        assert picture[1].position.call == 5
        with pytest.raises(EOFError):
            ask("127.0.0.1", lit[0].port, "a wrong token")


@pytest.mark.parametrize(
    "said", [b"\xff" * 64, b"\0\0\0\2[]", b"\0\0\0\4null", b"\0\0\0\5hello", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_nonsense_from_strangers_is_sent_away_and_harms_nothing(said: bytes) -> None:
    with beacons(2) as lit:
        with socket.create_connection(("127.0.0.1", lit[0].port), timeout=5) as stranger:
            stranger.sendall(said)
            assert stranger.recv(10) == b""
        lit[1].whereabouts.enter("moe", 9)
        assert holds(lambda: position_of(lit[0], 1).call == 9)


def test_an_ended_beacon_leaves_no_thread() -> None:
    with beacons(4):
        assert sum(thread.name == "megamoe beacon" for thread in threading.enumerate()) == 4
    assert holds(lambda: all(thread.name != "megamoe beacon" for thread in threading.enumerate()))
