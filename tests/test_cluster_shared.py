"""A cluster that threads share, and one whose user presses Ctrl-C: all ranks are asked the same in the same order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megamoe.launch.cluster.cluster import MegaMoECluster
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.cluster.worker_handle import WorkerHandle
from megamoe.model.deepseek_v4.synthetic import write_checkpoint
from megamoe.parallel.group import EPGroup
from tests.cluster_cases import WatchedPool, batches_and_outputs
from tests.test_cluster import Cases, kinds, pids, right, watched
from tests.test_model import CONFIG


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cluster") / "small"
    write_checkpoint(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def cases(checkpoint: Path) -> Cases:
    return batches_and_outputs(checkpoint, num_batches=10, num_tokens=61)


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[tuple[WatchedPool, MegaMoECluster]]:
    handles, cluster = watched(2, RestartPolicy(restarts=100, backoff_s=0.01))
    with cluster:
        cluster.load(checkpoint)
        yield handles, cluster


def squared(group: EPGroup, number: int) -> tuple[int, int]:
    return group.rank, number**2


def test_threads_take_turns_also_when_a_rank_is_lost(pair: tuple[WatchedPool, MegaMoECluster], cases: Cases) -> None:
    _, cluster = pair

    def ask(number: int) -> bool:
        if number % 3 == 0:
            return cluster.run(squared, number) == [(0, number**2), (1, number**2)]
        return right(cluster, [cases[number % 10]])

    since = len(cluster.events)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, number) for number in range(60)]
        os.kill(pids(cluster)[1], signal.SIGKILL)
        assert all(each.result(60) for each in asked)
    assert kinds(cluster, since) == ["failed", "replaced", "formed"]


def test_what_one_thread_asks_of_all_ranks_comes_before_what_the_next_asks(
    pair: tuple[WatchedPool, MegaMoECluster], cases: Cases
) -> None:
    handles, cluster = pair
    asked: list[tuple[int, str]] = []

    def note(handle: WorkerHandle, method: str) -> None:
        asked.append((handle.number, method))
        if handle.number == 0:
            threading.Event().wait(0.005)  # in which another thread could ask

    handles.before = note
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(right, cluster, cases[:1]) for _ in range(4)]
        work += [pool.submit(lambda: len(cluster.run(squared, 1)) == 2) for _ in range(4)]
        for each in work:
            assert each.result(60)
    handles.before = lambda *_: None
    assert [number for number, _ in asked] == [0, 1] * 8
    assert all(first[1] == second[1] for first, second in zip(asked[::2], asked[1::2], strict=True))


def test_ctrl_c_between_two_ranks_leaves_none_with_a_request_of_its_own(
    pair: tuple[WatchedPool, MegaMoECluster], cases: Cases
) -> None:
    handles, cluster = pair
    assert right(cluster, cases[:1])
    since, before = len(cluster.events), pids(cluster)

    def interrupt(handle: WorkerHandle, method: str) -> None:
        if (handle.number, method) == (1, "forward"):
            handles.before = lambda *_: None
            raise KeyboardInterrupt

    handles.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        cluster.forward(cases[0][0])
    assert right(cluster, cases[:3])
    assert (kinds(cluster, since), pids(cluster)) == (["formed"], before)


def waits(group: EPGroup, seconds: float) -> int:
    threading.Event().wait(seconds)
    return group.rank


def test_a_cluster_that_is_stopped_ends_what_threads_ask_and_says_so(
    pair: tuple[WatchedPool, MegaMoECluster], cases: Cases
) -> None:
    handles, cluster = pair
    asked, since = threading.Event(), len(cluster.events)
    handles.before = lambda handle, method: asked.set() if (handle.number, method) == (1, "run") else None
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(cluster.run, waits, 60.0) for _ in range(3)]
        assert asked.wait(20)
        cluster.stop()
        for each in asking:
            with pytest.raises(RuntimeError, match="the cluster was stopped"):
                each.result(20)
    with pytest.raises(RuntimeError, match="the cluster was stopped"):
        cluster.forward(cases[0][0])
    assert kinds(cluster, since) == []
