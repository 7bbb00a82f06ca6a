"""megamoe launch and doctor --run: one text under three launchers, bad requests, a live run looked at, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megamoe.launch.cluster.job import digest, read_text, tokenise
from megamoe.launch.cluster.recovery import parse_elastic
from megamoe.launch.cluster.torchrun_work import run_under_torchrun
from megamoe.launch.doctor.run import look
from megamoe.launch.launch import LaunchRequest
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.synthetic import write_checkpoint
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.runs import check_name, folder, listed
from tests.commands import invoked, refused
from tests.test_demo import COMMAND
from tests.test_model import CONFIG


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("launch") / "checkpoint"
    write_checkpoint(path, CONFIG.model_copy(update={"vocab_size": 129_280, "hidden_size": 32}))
    return path


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> str:
    """Digest of what the model makes of the package's text on one rank"""
    ids = torch.tensor(tokenise(read_text(None)[0]))
    with Checkpoint.open(checkpoint) as opened:
        return digest(ExpertStack.load(opened)(opened.embedding(ids), ids))


def launched(checkpoint: Path, *arguments: object) -> dict[str, object]:
    done = invoked("launch", "--checkpoint", checkpoint, "--format", "json", *arguments)
    assert done.exit_code == 0, done.output
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("launcher", [(), ("--ray", "local")], ids=["spawn", "ray"])
def test_the_same_text_has_the_same_bits_under_every_launcher(
    checkpoint: Path, alone: str, launcher: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine := tmp_path / "mine").mkdir()
    (mine / "torch.py").write_text("raise SystemExit('a script of the user')")
    monkeypatch.chdir(mine)
    out = tmp_path / "out.safetensors"
    report = launched(
        checkpoint, "--ranks", 3, "--batch-tokens", 300, "--out", out, "--log-dir", tmp_path / "logs", *launcher
    )
    assert report["output_sha256"] == alone == digest(load_file(out)["hidden"])
    assert report["launcher"] == ("ray" if launcher else "spawn")
    assert report["batches"] == 4
    assert len(report["per_rank"]) == report["ranks"] == 3  # type: ignore[arg-type]
    assert list((tmp_path / "logs").iterdir())


def fails(group: EPGroup) -> None:
    if group.rank == 1:
        raise ValueError("rank 1 was asked for too much")
    group.own_status.leave()


def test_what_a_rank_raised_under_torchrun_is_raised_whatever_surrounds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # as in a notebook
    if sys.version_info >= (3, 11):  # before, Python looks for any module in the user's folder first
        (tmp_path / "random.py").write_text("raise SystemExit('a script of the user')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="rank 1 was asked for too much"):
        run_under_torchrun(2, fails)


BAD = {
    "no checkpoint": (["--checkpoint", "/nowhere"], "there is no checkpoint /nowhere: leave it out for a small one"),
    "too many ranks": (["--ranks", "257"], "a machine holds at most 256 ranks, got 257"),
    "backoff": (["--restarts", "1", "--backoff-s", "nan"], "backoff_s must be 0 or more and finite, got nan"),
    "deadline that is none": (["--deadline-s", "nan"], "deadline_s must be positive and finite, got nan"),
    "no ranks": (["--ranks", "0"], "ranks must be at least 1, got 0"),
    "elastic": (["--elastic", "four"], "elastic must be MIN:MAX, such as 2:4, got 'four'"),
    "elastic order": (["--elastic", "4:2"], r"elastic must be (least, most) with 1 <= least <= most, got (4, 2)"),
    "ranks outside of elastic": (["--ranks", "5", "--elastic", "2:4"], "ranks 5 is outside of elastic 2:4"),
    "run": (["--run", "../x"], "run '../x' is not of letters, digits"),
    "waves": (["--waves", "none"], "waves must be"),
    "text": (["--text", "/nowhere.txt"], "text /nowhere.txt cannot be read"),
    "out": (["--out", "/no/such/folder/out.safetensors"], "out.safetensors is in no folder that exists"),
    "interface": (["--interface", "nosuch0"], "nosuch0"),
    "restarts": (["--restarts", "-1"], "restarts must be an integer of 0 or more, got -1"),
    "device": (["--device", "tpu"], "tpu"),
    "deadline": (["--deadline-s", "0"], "deadline_s must be positive and finite, got 0"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_wrong_requests_are_refused_before_anything_is_started(
    arguments: list[str], said: str, checkpoint: Path
) -> None:
    assert said in refused("launch", "--checkpoint", checkpoint, *arguments)


def test_elastic_is_read_as_least_and_most() -> None:
    assert parse_elastic("2:4") == (2, 4)
    with pytest.raises(ValueError, match="interface is for ranks of this machine"):
        LaunchRequest(2, ray="auto", interface="eth0")


def holds(condition: Callable[[], object], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        threading.Event().wait(0.05)
    return True


def test_a_run_can_be_looked_at_while_it_goes_on_and_leaves_nothing_after_ctrl_c(checkpoint: Path) -> None:
    run = f"test-{os.getpid()}"
    line = [*COMMAND, "launch", "--ranks", "2", "--checkpoint", str(checkpoint), "--run", run]
    line += ["--batch-tokens", "10", "--repeat", "500"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holds(lambda: len(listed().get(run, [])) == 2, 60)
        assert holds(lambda: all(status.position and status.position.call > 2 for status in look(run).statuses), 60)
        picture = invoked("doctor", "--run", run, "--format", "json")
        assert picture.exit_code == 0, picture.output
        ranks = json.loads(picture.stdout)["ranks"]
        assert [rank["rank"] for rank in ranks] == [0, 1]
        assert all(rank["position"]["layer"].startswith("layers.") for rank in ranks)
        table = invoked("doctor", "--run", run)
        assert f"run {run}, as rank 0 sees it" in table.stdout
        assert max(map(len, table.stdout.splitlines())) <= 80
        assert run in refused("doctor", "--run", run + "x")
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert not psutil.wait_procs(children, timeout=10)[1]
        assert not (folder() / run).exists()
    finally:
        process.kill()
        process.communicate()


def test_files_of_ranks_that_were_killed_are_removed_by_the_next_look() -> None:
    run = f"gone-{os.getpid()}"
    place = folder() / run
    place.mkdir(parents=True, mode=0o700)
    (place / "rank-0.json").write_text(
        json.dumps({"rank": 0, "pid": os.getpid(), "started": 1.0, "address": "127.0.0.1", "port": 1, "token": "x"})
    )
    assert run not in listed()
    assert not place.exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 65, "a b"])
def test_names_of_runs_that_make_no_file_name_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not of letters"):
        check_name(name)
