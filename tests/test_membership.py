"""The membership waits for no worker longer than it is told to, and takes each back when it is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from megamoe.launch.cluster.cluster import MegaMoECluster
from megamoe.launch.cluster.membership import Membership
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.cluster.spawn import SpawnPool
from tests.processes import started


class FakeHandle:
    """A worker without a process: answers what it is told to answer."""

    def __init__(self, number: int, answer: Callable[[str], Any]) -> None:
        self.number, self.host, self.pid, self.alive = number, "here", 0, True
        self._answer = answer

    def call(self, method: str, *_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        answer = self._answer(method)
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future

    def kill(self) -> None:
        self.alive = False


class FakePool:
    """refusals[n] are the errors that the next tries of worker n end in; a worker that is late waits for `there`."""

    def __init__(self, answer: Callable[[str], Any] = lambda _: None) -> None:
        self.refusals: dict[int, list[Exception]] = {}
        self.late: set[int] = set()
        self.there = threading.Event()
        self.opened: list[int] = []
        self._answer = answer

    def open(self, number: int, deadline_s: float) -> FakeHandle:
        if number in self.late and not self.there.wait(deadline_s):
            raise RuntimeError("never came")
        if self.refusals.get(number):
            raise self.refusals[number].pop()
        self.opened.append(number)
        return FakeHandle(number, self._answer)

    def close(self) -> None:
        self.there.set()


@pytest.fixture
def handles() -> FakePool:
    return FakePool()


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def membership(handles: FakePool, told: list[tuple[str, str]]) -> Iterator[Membership]:
    made = Membership(handles, 3, start_s=30.0, retry_s=0.05, tell=lambda kind, what: told.append((kind, what)))
    yield made
    made.close()


def numbers(membership: Membership) -> list[int]:
    return [handle.number for handle in membership.members]


def back(membership: Membership) -> list[int]:
    """What comes back, however often that has to be asked."""
    until = time.monotonic() + 10.0
    while time.monotonic() < until:
        found = membership.take_back()
        if found:
            return found
    return []


def test_members_are_in_order_of_their_numbers(membership: Membership) -> None:
    assert membership.open([2, 0], 10.0) == {}
    assert numbers(membership) == [0, 2]
    assert membership.vacant == [1]
    assert membership.take_back() == []


def test_a_worker_that_is_refused_is_out_and_tried_again_later(
    membership: Membership, handles: FakePool, told: list[tuple[str, str]]
) -> None:
    handles.refusals[1] = [RuntimeError("nor now"), RuntimeError("not now")]
    refusals = membership.open(range(3), 10.0)
    assert {number: str(refusal) for number, refusal in refusals.items()} == {1: "not now"}
    assert told == [("out", "worker 1 cannot be had: not now")]
    assert numbers(membership) == [0, 2]
    assert membership.take_back() == []
    assert back(membership) == [1]
    assert numbers(membership) == [0, 1, 2]
    assert handles.refusals[1] == []


def test_a_worker_that_takes_long_is_out_until_it_is_there(membership: Membership, handles: FakePool) -> None:
    handles.late = {1}
    begun = time.monotonic()
    assert "has no process after 0.1 s" in str(membership.open(range(3), 0.1)[1])
    assert time.monotonic() - begun < 5.0
    assert numbers(membership) == [0, 2]
    assert membership.take_back() == []
    handles.there.set()
    assert back(membership) == [1]
    assert handles.opened.count(1) == 1


def test_what_is_no_refusal_is_raised(membership: Membership, handles: FakePool) -> None:
    handles.refusals[0] = [TypeError("a mistake")]
    with pytest.raises(TypeError, match="a mistake"):
        membership.open([0], 10.0)


def test_forgotten_workers_are_not_tried_again(membership: Membership, handles: FakePool) -> None:
    handles.refusals[0] = [RuntimeError("not now")]
    handles.late = {1}
    membership.open(range(3), 0.05)
    handles.there.set()
    membership.forget_out()
    assert numbers(membership) == [1, 2]
    threading.Event().wait(0.1)  # until a retry would have been due
    assert membership.take_back() == []
    membership.close_pool([1])
    assert membership.vacant == [0, 1]


def test_a_worker_that_is_put_out_has_no_process_and_comes_back_later(
    membership: Membership, told: list[tuple[str, str]]
) -> None:
    membership.open([0, 1], 10.0)
    member = membership.members[1]
    membership.put_out([1], "does not reach the others")
    assert not member.alive
    assert numbers(membership) == [0]
    assert told[-1] == ("out", "worker 1 does not reach the others")
    assert back(membership) == [1]
    assert numbers(membership) == [0, 1]


def test_closing_ends_a_process_that_is_still_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAMOE_TEST_GIVEN", "so that it is spawned: a fork is there in time")
    before = started()
    membership = Membership(SpawnPool(1, threads=1), 1, start_s=60.0, retry_s=1.0, tell=lambda *_: None)
    assert list(membership.open([0], 0.05)) == [0]
    membership.close()
    assert started() <= before


# ---- failures in a row ----


def test_the_wait_between_restarts_in_a_row_doubles_and_the_first_failure_is_raised() -> None:
    joins = iter(range(100))

    def answer(method: str) -> Any:
        if method == "open_store":
            return "127.0.0.1", 1
        return RuntimeError(f"failure {next(joins)}") if method == "join" else None

    policy = RestartPolicy(restarts=3, backoff_s=0.05)
    cluster = MegaMoECluster(1, launcher="spawn", policy=policy, pool=FakePool(answer))
    with pytest.raises(RuntimeError, match="failure 0") as raised:
        cluster.start()
    assert str(raised.value.__cause__) == "failure 3"
    failed = [event.at_s for event in cluster.events if event.kind == "failed"]
    replaced = [event.at_s for event in cluster.events if event.kind == "replaced"]
    waits = [after - before for before, after in zip(failed, replaced, strict=False)]
    assert [event.kind for event in cluster.events] == ["failed", "replaced"] * 3 + ["failed"]
    assert all(wait >= 0.05 * 2**number for number, wait in enumerate(waits))
