"""Whole models on a cluster: the bits of one rank, and a rank that comes back reads only what it lacks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import torch

from megamoe.launch.cluster.cluster import MegaMoECluster
from megamoe.launch.cluster.recovery import RestartPolicy
from megamoe.model import load
from tests import checkpoints
from tests.checkpoints import VOCABULARY

pytest.importorskip("transformers")
PROMPTS = [[3, 14, 15], [92], [65, 35, 89, 79, 32], [38, 46], [26, 4, 33]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cluster") / "mixtral"
    return checkpoints.write(path, "mixtral")


def test_a_rank_that_comes_back_reads_only_what_it_lacks(checkpoint: Path) -> None:
    alone = load(checkpoint)
    expected = [alone.base_model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]
    policy = RestartPolicy(restarts=1)
    with MegaMoECluster(2, launcher="spawn", deadline_s=20.0, threads=1, policy=policy) as cluster:
        with pytest.raises(ValueError, match=r"load\(whole=True\) comes before"):
            cluster.hidden_states(PROMPTS)
        loads = cluster.load(checkpoint, dispatch_format="bf16", whole=True)
        assert [(each.experts_kept, each.experts_read) for each in loads] == [(0, 6), (0, 4)]
        with pytest.raises(ValueError, match=r"takes prompts"):
            cluster.forward([1, 2])
        with pytest.raises(ValueError, match=rf"token {VOCABULARY} is outside"):
            cluster.hidden_states([[1], [VOCABULARY]])
        with pytest.raises(ValueError, match=r"prompt 1 has no tokens"):
            cluster.hidden_states([[1], []])
        for found, hidden in zip(cluster.hidden_states(PROMPTS), expected, strict=True):
            assert torch.equal(found, hidden)
        killed = cluster.members[1].pid
        os.kill(killed, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(killed)] if psutil.pid_exists(killed) else [], timeout=10)
        for found, hidden in zip(cluster.hidden_states(PROMPTS), expected, strict=True):
            assert torch.equal(found, hidden)
        again = [(each.experts_kept, each.experts_read) for each in cluster.loads]
        assert again == [(6, 0), (0, 4)]
        assert cluster.loads[0].bytes_read == 0
        with pytest.raises(ValueError, match=r"holds no config\.json"):
            cluster.load(checkpoint.parent, whole=True)
