"""Ranks on this machine: a dead one is named at once, a late one within the deadline, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.launch.ranks import LocalRanks, RankFailedError
from megamoe.layer import MegaMoE
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport import threads
from megamoe.parallel.transport.threads import calm_gloo_threads, gloo_threads
from megamoe.shape import MoEShape
from tests.cases import computing, make_batch, make_layer

SHAPE = MoEShape(hidden=64, intermediate=32, num_experts=6, topk=2)


def where(group: EPGroup, factor: int) -> tuple[int, int, int]:
    return group.rank * factor, group.size, torch.get_num_threads()


def name_of_a_lock(_: EPGroup) -> str | None:
    """Of one such as tqdm makes: what has a name stays when this process is killed."""
    name: str | None = multiprocessing.RLock()._semlock.name  # type: ignore[attr-defined]
    return name


def test_a_lock_that_a_rank_makes_has_no_name_that_would_stay(ranks: LocalRanks) -> None:
    assert ranks.run(name_of_a_lock, size=1) == [None]


def fails(group: EPGroup) -> int:
    if group.rank == 1:
        raise KeyError("no such thing")
    return group.rank


def test_an_exception_keeps_its_type_and_says_the_rank(ranks: LocalRanks) -> None:
    with pytest.raises(KeyError, match="no such thing") as raised:
        ranks.run(fails, size=2)
    assert any("raised on rank 1" in note for note in getattr(raised.value, "__notes__", ()))
    assert ranks.outcomes(fails, size=2)[0] == 0


def dies(group: EPGroup) -> None:
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def test_results_come_in_order_of_rank_and_a_killed_rank_is_named_within_three_seconds() -> None:
    with LocalRanks(3, threads_per_rank=1) as ranks:
        pids = ranks.pids
        assert ranks.run(where, 10) == [(0, 3, 1), (10, 3, 1), (20, 3, 1)]
        assert ranks.run(where, 5, size=2) == [(0, 2, 1), (5, 2, 1)]
        assert ranks.pids == pids
        begun = time.monotonic()
        with pytest.raises(RankFailedError, match=r"rank 1 \(process \d+\) died: killed by SIGKILL") as failed:
            ranks.run(dies)
        assert time.monotonic() - begun < 10  # of 30 that it sleeps
        assert failed.value.rank == 1
    assert not any(psutil.pid_exists(pid) for pid in pids)


def sleeps(group: EPGroup) -> None:
    if group.rank == 0:
        time.sleep(30)


def test_work_that_ends_at_once_breaks_no_rank_off_that_is_still_connecting(ranks: LocalRanks) -> None:
    for number in range(25):
        assert len(ranks.run(where, number)) == 4


def test_a_late_rank_is_named_at_the_deadline() -> None:
    with LocalRanks(2, threads_per_rank=1) as ranks:
        ranks.run(where, 1)
        begun = time.monotonic()
        with pytest.raises(RankFailedError, match="rank 0 did not finish within the deadline"):
            ranks.run(sleeps, timeout_s=1)
        assert time.monotonic() - begun < 10  # of 30 that it sleeps


def monkey(layer: MegaMoE, instead: Callable[[], None]) -> AbstractContextManager[None]:
    """What this rank does in the block when it should compute."""

    def fails(*_: object) -> Tensor:
        instead()
        raise RuntimeError("the results never came")

    return computing(layer, fails)


def stalls_in_mid_call(group: EPGroup) -> tuple[str, float]:
    """Rank 2 answers the counts, sends its rows and then computes for longer than the others will wait."""
    batch = make_batch(SHAPE, 50)
    patient = 30.0 if group.rank == 2 else 1.5
    layer = make_layer(SHAPE, EPGroup.of(dist.group.WORLD, deadline_s=patient), waves=2, name="layers.0")
    if group.rank == 2:
        with monkey(layer, lambda: time.sleep(4)), pytest.raises(RuntimeError, match=r"."):
            layer(batch.hidden, batch.ids, batch.weights)
        return "", 0.0
    begun = time.monotonic()
    with pytest.raises(PeerError) as lost:
        layer(batch.hidden, batch.ids, batch.weights)
    assert lost.value.rank == 2
    return str(lost.value), time.monotonic() - begun


def test_a_rank_that_stalls_in_mid_call_is_named_with_layer_wave_and_phase(ranks: LocalRanks) -> None:
    for said, waited in ranks.run(stalls_in_mid_call, size=3)[:2]:
        assert re.search(r"rank 2 on \S+ did not deliver: layer 'layers.0', wave \d, phase combine", said), said
        assert "deadline 1.5 s" in said
        assert waited < 3.5


def interrupted(group: EPGroup) -> list[str]:
    """Every rank is interrupted in mid-call; what both layers of the group say from then on."""
    batch = make_batch(SHAPE, 50)
    first, second = (make_layer(SHAPE, group, name=name) for name in ("layers.0", "layers.1"))
    with monkey(first, lambda: None), pytest.raises(RuntimeError, match="the results never came"):
        first(batch.hidden, batch.ids, batch.weights)
    said = []
    for layer in (first, second):
        with pytest.raises(RuntimeError) as refusal:
            layer(batch.hidden, batch.ids, batch.weights)
        said.append(str(refusal.value))
    return said


def test_rows_of_an_interrupted_call_cannot_reach_the_next_one(ranks: LocalRanks) -> None:
    for said in ranks.run(interrupted, size=2):
        assert len(said) == 2
        for refusal in said:
            assert "cannot be used any more" in refusal
            assert "RuntimeError: the results never came" in refusal


def dies_in_mid_call(group: EPGroup) -> None:
    batch = make_batch(SHAPE, 50)
    layer = make_layer(SHAPE, group)
    with monkey(layer, lambda: os._exit(7)) if group.rank == 2 else nullcontext():
        layer(batch.hidden, batch.ids, batch.weights)


def test_a_rank_that_dies_in_mid_call_is_named_by_the_launcher() -> None:
    with LocalRanks(3, threads_per_rank=1) as ranks, pytest.raises(RankFailedError, match=r"rank 2 .* exit code 7"):
        ranks.run(dies_in_mid_call)


@pytest.mark.parametrize("arguments", [(0,), (-1,)])
def test_nonsense_numbers_of_ranks_are_refused(arguments: tuple[int]) -> None:
    with pytest.raises(ValueError, match="num_ranks must be positive"):
        LocalRanks(*arguments)


def test_more_ranks_than_there_are_is_refused(ranks: LocalRanks) -> None:
    with pytest.raises(ValueError, match=r"size must be in \[1, 4\], got 5"):
        ranks.run(where, 1, size=5)


ORPHANS = """
import sys, time
from megamoe.launch.ranks import LocalRanks
if __name__ == "__main__":
    with LocalRanks(2, threads_per_rank=1) as ranks:
        print(*ranks.pids, flush=True)
        time.sleep(60)
"""


def test_ranks_go_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    ranks = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(ranks) == 2
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive, alive
    assert len(gone) == 2


def policies() -> dict[int, int]:
    """Scheduling policy of each of gloo's threads of this process."""
    found = {}
    for thread in gloo_threads():
        with suppress(ProcessLookupError):  # one of an earlier test's group that ends only now
            found[thread] = os.sched_getscheduler(thread)
    return found


def threads_left(group: EPGroup) -> set[int]:
    """Threads of groups of earlier tests, which torch keeps while a device mesh of them is known."""
    del group
    return {thread for thread, policy in policies().items() if policy == os.SCHED_OTHER}


def scheduling(group: EPGroup, left: list[set[int]]) -> tuple[list[int], list[int], int]:
    """Policies of gloo's threads as a group leaves them, and after that is undone; and that of the main thread."""
    assert group.transport is not None
    others = left[group.rank]
    calmed = {thread: policy for thread, policy in policies().items() if thread not in others}
    told = calm_gloo_threads(calm=False, others=others)
    undone = {thread: policy for thread, policy in policies().items() if thread not in others}
    assert undone.keys() <= calmed.keys()
    assert len(undone) <= told <= len(calmed)
    return [calmed[thread] for thread in undone], list(undone.values()), os.sched_getscheduler(0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scheduling policies are Linux's")
def test_threads_that_have_no_name_yet_are_waited_for_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter(({7}, {7, 8}, {7, 8, 9}))
    monkeypatch.setattr(threads, "gloo_threads", lambda _: next(seen))
    threads.await_gloo_threads({7})
    assert next(seen, None) is None
    monkeypatch.setattr(threads, "gloo_threads", lambda _: {7, 8})
    monkeypatch.setattr(threads, "_NAMED_WITHIN_S", 0.0)
    threads.await_gloo_threads({7})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="scheduling policies are Linux's")
def test_threads_of_gloo_wait_for_their_turn_and_the_users_own_are_left_alone(ranks: LocalRanks) -> None:
    left = ranks.run(threads_left, size=2)
    for calmed, undone, own in ranks.run(scheduling, left, size=2):
        assert calmed
        assert set(calmed) == {os.SCHED_BATCH}
        assert set(undone) == {os.SCHED_OTHER}
        assert own == os.SCHED_OTHER
