"""The cluster on Ray: it starts, comes back and resizes as with spawn, and outlives one of two nodes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megamoe.launch.cluster.cluster import Event, MegaMoECluster
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.model.deepseek_v4.synthetic import write_checkpoint
from tests.cluster_cases import batches_and_outputs, break_next_forward
from tests.test_model import CONFIG

pytest.importorskip("ray")

from tests.ray_nodes import Nodes, is_gone, two_nodes

CAN_HOLD_A_LAB = sys.platform.startswith("linux") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cluster-ray") / "small"
    write_checkpoint(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def cluster(checkpoint: Path) -> Iterator[MegaMoECluster]:
    policy = RestartPolicy(restarts=20, backoff_s=0.01)
    with MegaMoECluster(2, launcher="ray", address="local", deadline_s=60.0, threads=1, policy=policy) as cluster:
        cluster.load(checkpoint)
        yield cluster


def right(cluster: MegaMoECluster, checkpoint: Path) -> bool:
    return all(torch.equal(cluster.forward(ids), out) for ids, out in batches_and_outputs(checkpoint, 3, 61))


def test_a_killed_rank_is_replaced_and_the_other_stays(cluster: MegaMoECluster, checkpoint: Path) -> None:
    assert right(cluster, checkpoint)
    before, since = [handle.pid for handle in cluster.members], len(cluster.events)
    os.kill(before[1], signal.SIGKILL)
    assert right(cluster, checkpoint)
    assert [event.kind for event in cluster.events[since:]] == ["failed", "replaced", "formed"]
    assert cluster.members[0].pid == before[0]
    assert cluster.loads[0].experts_read == 0 < cluster.loads[1].experts_read
    assert all(each.alive and "of layer 'layers.2.ffn'" in each.position for each in cluster.health(10.0))


def test_its_own_error_replaces_a_rank_and_a_wrong_token_none(cluster: MegaMoECluster, checkpoint: Path) -> None:
    since = len(cluster.events)
    cluster.run(break_next_forward, 1, "raises")
    assert right(cluster, checkpoint)
    assert cluster.events[since].what == "rank 1 raised RuntimeError: the fan has stopped"
    before = [handle.pid for handle in cluster.members]
    with pytest.raises(ValueError, match="token 500 is outside"):
        cluster.forward([1, 2, 500])
    assert right(cluster, checkpoint)
    assert [handle.pid for handle in cluster.members] == before


def test_resizing_keeps_the_bits(cluster: MegaMoECluster, checkpoint: Path) -> None:
    for ranks in (1, 2):
        cluster.resize(ranks)
        assert right(cluster, checkpoint)
        assert cluster.ranks == ranks


def test_stopping_leaves_no_process(cluster: MegaMoECluster) -> None:
    pids = [handle.pid for handle in cluster.members]
    cluster.stop()
    assert all(map(is_gone, pids))


# ---- two nodes ----


def raylets(address: str) -> list[psutil.Process]:
    wanted = f"--node_ip_address={address}"
    return [each for each in psutil.process_iter() if each.name() == "raylet" and wanted in each.cmdline()]


def outlive_a_node(address: str, other: str, checkpoint: str, signals: str) -> dict[str, Any]:
    """What a driver beside the head sees: the other node goes, and comes again when the file `signals` says so."""
    begun = time.monotonic()
    seen: dict[str, Any] = {"batches": 0, "wrong": 0}
    cases = batches_and_outputs(Path(checkpoint), 3, 61)

    def tell(event: Event) -> None:
        sys.stderr.write(f"{time.monotonic() - begun:.1f} s {event.kind}: {event.what}\n")
        sys.stderr.flush()

    def run(cluster: MegaMoECluster) -> None:
        ids, expected = cases[seen["batches"] % 3]
        seen["wrong"] += not torch.equal(cluster.forward(ids), expected)
        seen["batches"] += 1

    policy = RestartPolicy(restarts=9, backoff_s=0.1, elastic=(2, 3), retry_s=0.5)
    with MegaMoECluster(3, address=address, deadline_s=6.0, threads=1, policy=policy, on_event=tell) as cluster:
        cluster.load(checkpoint)
        run(cluster)
        before = [handle.pid for handle in cluster.members]
        killed = time.monotonic()
        for raylet in raylets(other):
            raylet.kill()
        for pid in before[2:]:
            os.kill(pid, signal.SIGKILL)
        run(cluster)
        seen |= {"shrunk_s": time.monotonic() - killed, "shrunk": cluster.ranks}
        seen["stayed"] = [handle.pid for handle in cluster.members] == before[:2]
        run(cluster)
        Path(signals).touch()
        until = time.monotonic() + 120.0
        asked = time.monotonic()
        while cluster.ranks < 3 and time.monotonic() < until:
            run(cluster)
            time.sleep(0.1)  # what joins needs the cores as well
        seen |= {"grown_s": time.monotonic() - asked, "grown": cluster.ranks}
        run(cluster)
        seen["kinds"] = [event.kind for event in cluster.events]
    return seen


def drive(nodes: Nodes, checkpoint: Path, place: Path) -> dict[str, Any]:
    """The driver beside the head; meanwhile a node joins when the driver wants it."""
    signals = place / "again"
    line = [sys.executable, "-m", "tests.test_cluster_ray", nodes.address, nodes.hosts[1].address]
    command = nodes.command(nodes.hosts[0], *line, str(checkpoint), str(signals))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=nodes.environment, text=True, **pipes) as driver:  # type: ignore[call-overload]
        until = time.monotonic() + 200.0
        while not signals.exists() and driver.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        if signals.exists():
            nodes.join()
        out, err = driver.communicate(timeout=200.0)
    assert driver.returncode == 0, err
    sys.stderr.write(err)
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.skipif(not CAN_HOLD_A_LAB, reason="two networks on one machine need Linux, root, ip and tc")
def test_an_elastic_group_outlives_a_node_and_grows_when_one_joins(checkpoint: Path, tmp_path: Path) -> None:
    with two_nodes((2, 1)) as nodes:
        seen = drive(nodes, checkpoint, tmp_path)
    assert (seen["wrong"], seen["shrunk"], seen["grown"], seen["stayed"]) == (0, 2, 3, True)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(outlive_a_node(*sys.argv[1:])))
