"""The cluster comes back: whatever befalls a rank, every batch has the bits that an undisturbed run has."""

from __future__ import annotations

import importlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from megamoe.launch.cluster import recovery
from megamoe.launch.cluster.cluster import MegaMoECluster
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.launch.cluster.spawn import SpawnPool
from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.launch.lab import faults
from megamoe.launch.lab.namespaces import lab
from megamoe.model.deepseek_v4.synthetic import write_checkpoint
from megamoe.parallel.errors import PeerError
from megamoe.parallel.group import EPGroup
from tests.cluster_cases import WatchedPool, batches_and_outputs, break_next_forward
from tests.processes import started
from tests.test_lab import needs_lab
from tests.test_model import CONFIG

DEADLINE_S = 3.0
Cases = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cluster") / "small"
    write_checkpoint(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def cases(checkpoint: Path) -> Cases:
    return batches_and_outputs(checkpoint, num_batches=10, num_tokens=61)


def watched(ranks: int, policy: RestartPolicy) -> tuple[WatchedPool, MegaMoECluster]:
    handles = WatchedPool(SpawnPool(ranks, threads=1, deadline_s=DEADLINE_S))
    return handles, MegaMoECluster(ranks, launcher="spawn", deadline_s=DEADLINE_S, policy=policy, pool=handles)


@dataclass(frozen=True)
class Pair:
    """Two ranks that come back as often as is needed; the processes and threads that were there before them."""

    handles: WatchedPool
    cluster: MegaMoECluster
    processes: frozenset[psutil.Process]
    threads: frozenset[threading.Thread]


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[Pair]:
    processes, threads = frozenset(started()), frozenset(threading.enumerate())
    handles, cluster = watched(2, RestartPolicy(restarts=100, backoff_s=0.01, retry_s=0.1))
    with cluster:
        cluster.load(checkpoint)
        yield Pair(handles, cluster, processes, threads)


@pytest.fixture
def handles(pair: Pair) -> WatchedPool:
    return pair.handles


@pytest.fixture
def cluster(pair: Pair) -> MegaMoECluster:
    return pair.cluster


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that others have named has little time to say something, so that the tests take less of it."""
    monkeypatch.setattr(recovery, "NAMED_S", 1.0)


def pids(cluster: MegaMoECluster) -> list[int]:
    return [handle.pid for handle in cluster.members]


def kinds(cluster: MegaMoECluster, since: int = 0) -> list[str]:
    return [event.kind for event in cluster.events[since:]]


def right(cluster: MegaMoECluster, cases: Cases) -> bool:
    return all(torch.equal(cluster.forward(ids), expected) for ids, expected in cases)


# ---- a rank is lost ----


@pytest.mark.parametrize("num_batches", [60, pytest.param(400, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_every_batch_is_right_though_every_twentieth_loses_a_rank(
    checkpoint: Path, cases: Cases, num_batches: int
) -> None:
    drawn, policy = random.Random(7), RestartPolicy(restarts=num_batches, backoff_s=0.01)
    with MegaMoECluster(3, launcher="spawn", threads=1, policy=policy) as cluster:
        reports = cluster.load(checkpoint)
        for number in range(num_batches):
            before = pids(cluster)
            victim = drawn.randrange(3) if number % 20 == 10 else None
            if victim is not None:
                threading.Timer(0.04 * drawn.random(), os.kill, (before[victim], signal.SIGKILL)).start()
                since = len(cluster.events)
                while "formed" not in kinds(cluster, since):  # it may die when the batch is done
                    assert right(cluster, cases[:1])
                assert kinds(cluster, since) == ["failed", "replaced", "formed"]
                assert [before[rank] == pid for rank, pid in enumerate(pids(cluster))].count(False) == 1
                # those that stayed read nothing, the new one its own experts
                read = [reports[rank].experts_read if rank == victim else 0 for rank in range(3)]
                assert [report.experts_read for report in cluster.loads] == read
            assert right(cluster, [cases[number % 10]]), number
        assert kinds(cluster).count("replaced") == num_batches // 20


@pytest.mark.parametrize(
    ("number", "method", "is_new"),
    [(0, "open_store", False), (0, "join", False), (1, "join", True), (0, "load", False), (1, "load", False)],
)
def test_a_rank_that_dies_while_the_group_is_formed_is_replaced(
    handles: WatchedPool, cluster: MegaMoECluster, cases: Cases, number: int, method: str, is_new: bool
) -> None:
    assert right(cluster, cases[:1])
    before, since = pids(cluster), len(cluster.events)
    if is_new:  # it has come in place of one that died
        os.kill(before[number], signal.SIGKILL)
    else:
        with pytest.raises(ValueError, match="of no use"):
            cluster.run(refuses)
    handles.strike(number, method)
    assert right(cluster, cases[:2])
    assert kinds(cluster, since) == ["failed", *["replaced"] * is_new, "failed", "replaced", "formed"]
    assert [pid == then for pid, then in zip(pids(cluster), before, strict=True)] == [number == 1, number == 0]
    assert cluster.loads[1 - number].experts_read == 0


def test_a_rank_that_is_stopped_is_replaced(cluster: MegaMoECluster, cases: Cases) -> None:
    before, since = pids(cluster), len(cluster.events)
    os.kill(before[1], signal.SIGSTOP)
    assert right(cluster, cases[:2])
    assert "rank 1" in cluster.events[since].what
    assert "does not run" in cluster.events[since].what
    assert not psutil.pid_exists(before[1])
    assert pids(cluster)[0] == before[0]
    assert cluster.loads[0].experts_read == 0


def test_a_rank_that_loops_for_ever_is_replaced(cluster: MegaMoECluster, cases: Cases) -> None:
    before, since = pids(cluster), len(cluster.events)
    cluster.run(break_next_forward, 1, "loops")
    assert right(cluster, cases[:2])
    assert "rank 1" in cluster.events[since].what
    assert not psutil.pid_exists(before[1])
    assert pids(cluster)[0] == before[0]


def test_a_rank_that_raises_its_own_error_is_replaced_at_once_until_restarts_are_used_up(
    cluster: MegaMoECluster, cases: Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert right(cluster, cases[:1])
    monkeypatch.setattr(cluster, "policy", replace(cluster.policy, restarts=cluster._restarts + 1))
    before, since = pids(cluster), len(cluster.events)
    cluster.run(break_next_forward, 1, "raises")
    begun = time.monotonic()
    cluster.forward(cases[0][0])
    failed = cluster.events[since]
    assert failed.what == "rank 1 raised RuntimeError: the fan has stopped"
    assert failed.at_s + cluster._begun - begun < DEADLINE_S / 2  # the other need not wait for its deadline
    assert right(cluster, cases[:2])
    assert [pid == then for pid, then in zip(pids(cluster), before, strict=True)] == [True, False]

    cluster.run(break_next_forward, 1, "raises")
    with pytest.raises(RuntimeError, match="the fan has stopped") as raised:
        cluster.forward(cases[0][0])
    assert "raised on worker 1" in getattr(raised.value, "__notes__", [""])[0]
    assert right(cluster, cases[:1])  # all are there still, and meet again
    cluster.run(break_next_forward, 1, "raises")
    os.kill(pids(cluster)[1], signal.SIGKILL)
    with pytest.raises((PeerError, WorkerLostError), match=r"(rank|worker) 1 .*(dead|died)"):
        cluster.forward(cases[0][0])
    with pytest.raises(WorkerLostError, match=r"worker 1 .* died"):
        cluster.forward(cases[0][0])


# ---- requests that are wrong ----


@pytest.mark.parametrize("token", [500, -1])
def test_a_token_outside_the_vocabulary_is_refused_at_once_and_nothing_restarts(
    cluster: MegaMoECluster, cases: Cases, token: int
) -> None:
    assert right(cluster, cases[:1])
    before, begun, since, loads = pids(cluster), time.monotonic(), len(cluster.events), cluster.loads
    with pytest.raises(ValueError, match=f"token {token} is outside of the checkpoint's vocabulary of 500"):
        cluster.forward([1, 2, 3, token])
    assert time.monotonic() - begun < DEADLINE_S / 2
    assert right(cluster, cases[:2])
    assert pids(cluster) == before
    assert cluster.loads is loads, "nothing was read"
    assert kinds(cluster, since) == []


def takes_two(group: EPGroup, number: int) -> int:
    return group.rank + number


WRONG: dict[str, tuple[Callable[[MegaMoECluster], object], str]] = {
    "a_batch_dimension": (lambda c: c.forward(torch.ones(1, 9, dtype=torch.int64)), r"must be \[T\], got \[1, 9\]"),
    "one_token": (lambda c: c.forward(torch.tensor(3)), r"token_ids must be \[T\], got \[\]"),
    "nested_lists": (lambda c: c.forward([[1, 2], [3, 4]]), "must be .* integers, got list at place 0"),  # type: ignore[list-item]
    "floats": (lambda c: c.forward([1, 2.0]), "must be .* integers, got float at place 1"),  # type: ignore[list-item]
    "float_tensor": (lambda c: c.forward(torch.ones(3)), r"token_ids must be integers, got torch\.float32"),
    "text": (lambda c: c.forward("abc"), r"must be \[T\] integers, got str"),  # type: ignore[arg-type]
    "nothing": (lambda c: c.forward(None), "got NoneType"),  # type: ignore[arg-type]
    "too_few_arguments": (lambda c: c.run(takes_two), r"takes_two\(.*\) .* cannot be called with a group and 0 arg"),
    "too_many_arguments": (lambda c: c.run(takes_two, 1, 2), "too many positional arguments"),
    "no_function": (lambda c: c.run("takes_two", 1), "work must be a function of a module, got str"),  # type: ignore[arg-type]
    "a_lambda": (lambda c: c.run(lambda _: 1), "cannot be sent to a process: .*top of a module"),
    "what_cannot_be_sent": (lambda c: c.run(takes_two, threading.Lock()), "cannot be sent to a process"),
    "what_cannot_be_imported": (lambda c: c.run(elsewhere()), "cannot read what it is asked: .*top of a module"),
    "ranks_in_words": (lambda c: c.resize("two"), "ranks must be at least 0, got 'two'"),  # type: ignore[arg-type]
    "waves": (lambda c: c.load("anywhere", waves=0), "waves must be"),
    "format": (lambda c: c.load("anywhere", dispatch_format="fp8"), "dispatch_format must be one of mxfp8, bf16, auto"),
    "no_path": (lambda c: c.load(7), "checkpoint must be a path, as str, bytes or os.PathLike, got 7"),  # type: ignore[arg-type]
}


class Elsewhere:
    """A function of a module that this process has and the ranks have not."""

    def __call__(self, group: EPGroup) -> int:
        return group.rank

    def __reduce__(self) -> str | tuple[object, ...]:
        return importlib.import_module, ("no_such_module_of_theirs",)


def elsewhere() -> Callable[[EPGroup], int]:
    return Elsewhere()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_in_the_driver_and_no_rank_is_replaced(
    cluster: MegaMoECluster, checkpoint: Path, cases: Cases, name: str
) -> None:
    assert right(cluster, cases[:1])
    before, since = pids(cluster), len(cluster.events)
    ask, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        ask(cluster)
    # only what the ranks alone can tell has them meet again
    assert kinds(cluster, since) == (["failed"] if name == "what_cannot_be_imported" else [])
    if said.startswith(("waves", "dispatch", "checkpoint")):
        cluster.load(checkpoint)
    assert right(cluster, cases[:1])
    assert pids(cluster) == before


def test_tokens_may_be_any_integers(cluster: MegaMoECluster, cases: Cases) -> None:
    ids, expected = cases[0]
    for same in (ids.to(torch.int16), ids.numpy(), list(ids.numpy()), tuple(ids.tolist()), range(0)):
        assert torch.equal(cluster.forward(same), expected[: len(same)])  # type: ignore[arg-type]


def test_no_such_checkpoint_is_refused_and_the_next_load_goes_on(
    cluster: MegaMoECluster, checkpoint: Path, cases: Cases, tmp_path: Path
) -> None:
    before = pids(cluster)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        cluster.load(tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint is loaded"):
        cluster.forward([1])
    cluster.load(checkpoint)
    assert right(cluster, cases[:2])
    assert pids(cluster) == before


# ---- the group ----


def resources(cluster: MegaMoECluster) -> list[tuple[int, int]]:
    """Open files and threads of each rank, and of this process."""
    processes = [psutil.Process(), *map(psutil.Process, pids(cluster))]
    return [(each.num_fds(), each.num_threads()) for each in processes]


def refuses(group: EPGroup) -> None:
    raise ValueError(f"rank {group.rank} is of no use")


def test_twelve_generations_leave_no_connection_and_no_thread_behind(cluster: MegaMoECluster, cases: Cases) -> None:
    found, since = [], len(cluster.events)
    for _ in range(12):
        with pytest.raises(ValueError, match="of no use"):
            cluster.run(refuses)
        assert right(cluster, cases[:1])
        found.append(resources(cluster))
    assert kinds(cluster, since) == ["failed", "formed"] * 12
    # the last group's own may be closing still
    assert all(
        then[0] + 4 >= now[0] and then[1] + 2 >= now[1] for then, now in zip(found[1], found[-1], strict=True)
    ), (found[1], found[-1])


def test_resizing_keeps_the_bits_and_growing_that_fails_leaves_those_that_were_there(
    handles: WatchedPool, cluster: MegaMoECluster, cases: Cases
) -> None:
    def goes_on_with(ranks: int) -> bool:
        return cluster.ranks == len(cluster.health()) == ranks and right(cluster, cases[:2])

    first = pids(cluster)[0]
    cluster.resize(1)
    assert goes_on_with(1)
    handles.refused = {1}
    with pytest.raises(RuntimeError, match="worker 1 has no machine"):
        cluster.resize(2)
    assert goes_on_with(1)
    handles.refused = set()
    cluster.resize(2)
    assert goes_on_with(2)
    assert pids(cluster)[0] == first
    for ranks in (0, 3):
        with pytest.raises(ValueError, match=rf"ranks must be in \[1, 2\], got {ranks}"):
            cluster.resize(ranks)


def test_health_says_who_does_not_answer_or_is_gone_and_the_next_batch_replaces_whom_it_lacks(
    cluster: MegaMoECluster, cases: Cases
) -> None:
    assert right(cluster, cases[:1])
    since = len(cluster.events)
    assert all(each.alive and "of layer 'layers.2.ffn'" in each.position for each in cluster.health(10.0))
    stopped, killed = pids(cluster)
    os.kill(stopped, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    health = cluster.health(timeout_s=0.5)
    os.kill(stopped, signal.SIGCONT)
    assert [(each.rank, each.worker, each.pid, each.alive) for each in health] == [
        (0, 0, stopped, True),
        (1, 1, killed, False),
    ]
    assert health[0].position == "does not answer"
    assert "died: killed by SIGKILL" in health[1].position
    assert cluster.health()[1].position == "its process is gone"
    assert right(cluster, cases[:2])
    assert kinds(cluster, since) == ["failed", "replaced", "formed"]
    assert pids(cluster)[0] == stopped


def squared(group: EPGroup, number: int) -> tuple[int, int]:
    return group.rank, number**2


def test_work_of_ones_own_runs_on_every_rank(cluster: MegaMoECluster) -> None:
    assert cluster.run(squared, 7) == [(0, 49), (1, 49)]


def test_without_a_worker_a_group_that_is_not_elastic_waits_for_it(
    handles: WatchedPool, cluster: MegaMoECluster, cases: Cases
) -> None:
    handles.refused = {1}
    os.kill(pids(cluster)[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="worker 1 has no machine") as refused:
        cluster.forward(cases[0][0])
    assert isinstance(refused.value.__cause__, PeerError | WorkerLostError)
    with pytest.raises(RuntimeError, match="1 of at least 2 ranks left"):
        cluster.forward(cases[0][0])
    handles.refused = set()
    until = time.monotonic() + 60.0
    while cluster.ranks < 2 and time.monotonic() < until:
        with suppress(RuntimeError):  # it lacks a rank still
            cluster.forward(cases[0][0])
    assert right(cluster, cases)


# ---- where it ends ----


def test_a_cluster_that_was_stopped_leaves_no_process_and_no_thread(pair: Pair, cases: Cases) -> None:
    assert right(pair.cluster, cases[:1])
    ranks = {psutil.Process(pid) for pid in pids(pair.cluster)}
    pair.cluster.stop()
    left = started() - pair.processes  # compilers that run beside the tests among them, which are spawned
    assert not left & ranks
    assert not [each for each in left if "forkserver" in " ".join(each.cmdline())]
    for each in set(threading.enumerate()) - pair.threads:
        each.join(10.0)
        assert not each.is_alive(), each


def grown_to(cluster: MegaMoECluster, ranks: int, cases: Cases) -> bool:
    """Runs batches until there are so many ranks."""
    until = time.monotonic() + 60.0
    while cluster.ranks != ranks and time.monotonic() < until:
        assert right(cluster, cases[:1])
    return cluster.ranks == ranks


def test_without_a_worker_an_elastic_group_goes_on_and_takes_it_back(checkpoint: Path, cases: Cases) -> None:
    handles, cluster = watched(4, RestartPolicy(restarts=9, backoff_s=0.01, elastic=(2, 4), retry_s=0.1))
    with cluster:
        cluster.load(checkpoint)
        before, since = pids(cluster), len(cluster.events)
        handles.refused = {2}
        os.kill(before[2], signal.SIGKILL)
        assert right(cluster, cases[:3])
        assert pids(cluster) == [before[0], before[1], before[3]]
        assert kinds(cluster, since)[:3] == ["failed", "out", "formed"]
        handles.refused = set()
        assert grown_to(cluster, 4, cases)
        assert [pid == then for pid, then in zip(pids(cluster), before, strict=True)] == [True, True, False, True]
        assert right(cluster, cases)
        assert kinds(cluster, since)[-2:] == ["back", "formed"]
        handles.refused = {1, 2, 3}
        for pid in pids(cluster)[1:]:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker \d has no machine"):
            right(cluster, cases)


@needs_lab
def test_a_rank_whose_link_is_cut_is_left_out_until_it_is_healed(checkpoint: Path, cases: Cases) -> None:
    policy = RestartPolicy(restarts=9, backoff_s=0.01, elastic=(2, 3), retry_s=0.5)
    with (
        lab(3, "1gbit") as hosts,
        MegaMoECluster(3, launcher="spawn", hosts=hosts, threads=1, deadline_s=3.0, policy=policy) as cluster,
    ):
        cluster.load(checkpoint)
        assert right(cluster, cases[:2])
        before, since = pids(cluster), len(cluster.events)
        faults.cut(str(hosts[0].lab), 2)
        assert right(cluster, cases[:4])
        assert pids(cluster) == before[:2]
        # the new process may take longer to start than the deadline, and is out then before it has been a member
        went = kinds(cluster, since)
        assert went[:3] in (["failed", "replaced", "out"], ["failed", "out", "formed"]), went
        # it may be tried again meanwhile, and be out once more
        assert [kind for kind in went if kind != "out"][-1] == "formed"
        assert went.count("failed") == 1
        faults.heal(str(hosts[0].lab), 2)
        assert grown_to(cluster, 3, cases)
        assert pids(cluster)[:2] == before[:2]
        assert right(cluster, cases)


@pytest.mark.parametrize(
    ("ranks", "arguments", "said"),
    [
        (0, {}, "ranks must be positive, got 0"),
        ("2", {}, "ranks must be positive, got '2'"),
        (2, {"deadline_s": float("nan")}, "deadline_s must be positive and finite, got nan"),
        (2, {"batch_deadline_s": 0}, "batch_deadline_s must be positive and finite, got 0"),
        (2, {"launcher": "spawn", "address": "local"}, "address means nothing to launcher 'spawn'"),
        (2, {"launcher": "ray", "interface": "lo"}, "interface means nothing to launcher 'ray'"),
        (2, {"launcher": "spawn", "threads": 0}, "threads must be positive, got 0"),
        (2, {"launcher": "spawn", "run": "my run"}, "run 'my run' is not of letters"),
        (2, {"launcher": "spawn", "device": "npu"}, "2 ranks on this machine need as many npu devices, it has 0"),
        (2, {"launcher": "spawn", "log_dir": Path(__file__)}, "cannot be a folder: File exists"),
        (2, {"launcher": "smoke"}, "launcher must be one of ray, spawn, got 'smoke'"),
        (5, {"policy": RestartPolicy(elastic=(2, 4))}, "ranks 5 is outside of elastic 2:4"),
    ],
)
def test_a_wrong_request_is_refused(ranks: int, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MegaMoECluster(ranks, **arguments)  # type: ignore[arg-type]
