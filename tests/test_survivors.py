"""What a rank that is left learns when another is lost in the middle of a large message, or raises, or leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.worker import Rendezvous
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label

ROWS = 1 << 28  # bytes: too many to be sent before a process can end


@pytest.fixture(scope="module")
def opened() -> Iterator[SpawnPool]:
    """Two workers whose ranks have a deadline far beyond what the tests allow"""
    with SpawnPool(2, deadline_s=60.0, threads=1) as handles:
        yield handles


@pytest.fixture(scope="module")
def first(opened: SpawnPool) -> list[SpawnHandle]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda number: opened.open(number, 60.0), range(2)))


@pytest.fixture
def pair(opened: SpawnPool, first: list[SpawnHandle]) -> list[SpawnHandle]:
    """Two ranks in a group of their own, whatever became of the group before"""
    for number, handle in enumerate(first):
        if not handle.alive:
            first[number] = opened.open(number, 60.0)
    address, port = first[0].call("open_store").result(60)
    joined = [handle.call("join", Rendezvous(address, port, 1, rank, 2)) for rank, handle in enumerate(first)]
    for each in joined:
        each.result(60)
    return first


def receive(group: EPGroup) -> tuple[float, PeerError]:
    """Waits for a large message in a call; after how long it knew better, and what it was told"""
    assert group.transport is not None
    begun = time.monotonic()
    rows = torch.empty(ROWS, 1, dtype=torch.uint8)
    transport, label = group.transport, Label("moe", "dispatch", 3)
    with pytest.raises(PeerError) as lost, group.unbroken("moe", 1):
        transport.expect(rows, [0, ROWS], label).wait()
    return time.monotonic() - begun, lost.value


def send_and(group: EPGroup, end: str) -> None:
    """Begins to send it, and ends"""
    assert group.transport is not None
    with group.unbroken("moe", 1):
        transfer = group.transport.expect(torch.empty(0, 1, dtype=torch.uint8), [0, 0], Label("moe", "dispatch", 3))
        if end == "exit":
            transfer.send(torch.zeros(ROWS, 1, dtype=torch.uint8), [ROWS, 0])
            os._exit(9)
        raise KeyError(end)


def deliver(group: EPGroup) -> tuple[float, PeerError]:
    """Sends a large message in a call; after how long it knew that it would not leave, and what it was told"""
    assert group.transport is not None
    transfer = group.transport.expect(torch.empty(0, 1, dtype=torch.uint8), [0, 0], Label("moe", "dispatch", 3))
    transfer.send(torch.zeros(ROWS, 1, dtype=torch.uint8), [0, ROWS])
    begun = time.monotonic()
    with pytest.raises(PeerError) as lost, group.unbroken("moe", 1):
        transfer.finish()
    return time.monotonic() - begun, lost.value


def receive_and(group: EPGroup, end: str) -> None:
    """Begins to receive it, and ends"""
    transport = group.transport
    assert isinstance(transport, HostTransport)
    rows, until = torch.ones(ROWS, 1, dtype=torch.uint8), time.monotonic() + 30
    with group.unbroken("moe", 1):
        transfer = transport.expect(rows, [ROWS, 0], Label("moe", "dispatch", 3))
        while rows[0]:
            assert time.monotonic() < until, transfer
        if end == "exit":
            os._exit(9)
        transport.pairs.abort()  # as gloo does by itself at the end of its own deadline
        raise PeerError(0, "h0", "dispatch", "moe", 3, 1.5, 1.5, "as planned", condition="slow")


@pytest.mark.parametrize(("end", "named"), [("exit", (1, "dead")), ("gave up", (1, "slow"))])
def test_a_large_message_that_nobody_takes_any_more_is_not_waited_for(
    pair: list[SpawnHandle], end: str, named: tuple[int, str]
) -> None:
    sending, taking = pair[0].call("run", deliver), pair[1].call("run", receive_and, end)
    took, lost = sending.result(50)
    assert isinstance(taking.exception(10), WorkerLostError if end == "exit" else PeerError)
    assert took < 5
    assert (lost.rank, lost.condition) == named


def outcomes(pair: list[SpawnHandle], end: str) -> tuple[float, PeerError, Any]:
    waiting, ending = pair[0].call("run", receive), pair[1].call("run", send_and, end)
    took, lost = waiting.result(50)
    return took, lost, ending.exception(10)


def test_what_a_rank_raised_is_in_the_error_of_the_others(pair: list[SpawnHandle]) -> None:
    took, lost, ending = outcomes(pair, "the experts are out")
    assert isinstance(ending, KeyError)
    assert took < 5
    assert (lost.rank, lost.condition) == (1, "raised")
    assert "KeyError: 'the experts are out'" in lost.picture[1]


def make_call(group: EPGroup) -> str:
    """Begins another call of a layer in a group that has lost a rank"""
    with pytest.raises((PeerError, RuntimeError)) as refusal, group.unbroken("moe", 2):
        raise AssertionError("the call was begun")
    return str(refusal.value)


def test_the_next_call_is_refused_at_once(pair: list[SpawnHandle]) -> None:
    outcomes(pair, "the experts are out")
    assert "cannot be used any more" in pair[0].call("run", make_call).result(10)


def test_a_rank_lost_in_the_middle_of_a_large_message_is_noticed_at_once(pair: list[SpawnHandle]) -> None:
    took, lost, ending = outcomes(pair, "exit")
    assert isinstance(ending, WorkerLostError)
    assert took < 5
    assert (lost.rank, lost.condition, lost.phase, lost.wave) == (1, "dead", "dispatch", 3)
    assert "rank 1 on" in str(lost)
    assert any("last seen" in line or "dead" in line for line in lost.picture)
