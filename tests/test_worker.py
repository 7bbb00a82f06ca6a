"""The worker's model, and the worker under torchrun: the bits of one rank alone, and only what is missing is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from megamoe.launch.cluster import torchrun as torchrun_worker
from megamoe.launch.cluster.job import batches, digest, read_text, share, tokenise
from megamoe.launch.cluster.spawn import SpawnHandle, SpawnPool
from megamoe.launch.cluster.torchrun import Place
from megamoe.launch.cluster.worker import Load, LoadReport, Rendezvous, Worker, WorkerOptions
from megamoe.launch.process import loopback
from megamoe.model.deepseek_v4.blocks import ExpertStack
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.synthetic import SMALL, write_checkpoint
from megamoe.parallel import interfaces
from megamoe.parallel.health.status import RankStatus
from megamoe.parallel.interfaces import INTERFACE_VARIABLES, Interface

CONFIG = SMALL.model_copy(
    update={
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "n_routed_experts": 7,
        "num_experts_per_tok": 3,
        "vocab_size": 129_280,
        "num_hidden_layers": 2,
    }
)
EXPERT_BYTES = 3 * 64 * 32 // 2 + 3 * 64 * 32 // 32
TEXT = "The Queen turned crimson with fury. 专家分成几波。 Off with her head! " * 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("worker") / "small"
    write_checkpoint(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Tensor:
    """What the model makes of the text on one rank."""
    ids = torch.tensor(tokenise(TEXT))
    with Checkpoint.open(checkpoint) as opened:
        return ExpertStack.load(opened)(opened.embedding(ids), ids)


# ---- batches ----


@pytest.mark.parametrize(
    ("num_tokens", "batch_tokens", "sizes"),
    [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (5, None, [5]), (0, None, []), (0, 3, [])],
)
def test_batches_are_full_but_for_the_last(num_tokens: int, batch_tokens: int | None, sizes: list[int]) -> None:
    cut = batches(range(num_tokens), batch_tokens)
    assert [len(batch) for batch in cut] == sizes
    assert [token for batch in cut for token in batch] == list(range(num_tokens))


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 10])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_are_even_and_together_the_batch(num_tokens: int, size: int) -> None:
    shares = [share(range(num_tokens), rank, size) for rank in range(size)]
    assert [token for each in shares for token in each] == list(range(num_tokens))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        batches([1, 2], 0)


def test_a_digest_is_of_the_bits() -> None:
    hidden = torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    assert digest(hidden) == digest(torch.tensor([[0, 0, 0x80, 0x3F]], dtype=torch.uint8))
    assert digest(hidden) != digest(-hidden)
    assert digest(hidden[:0]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_packages_own_text_is_there() -> None:
    text, name = read_text(None)
    assert name.startswith("Alice")
    assert len(tokenise(text)) > 1000


# ---- which interface torchrun's ranks use ----

ETH = Interface("eth1", "10.1.0.7", False, True, 0)


@pytest.mark.parametrize(
    ("named", "environment", "local_size", "expected"),
    [
        (None, {}, 4, "lo"),
        (None, {}, 2, "eth1"),
        (None, {"GLOO_SOCKET_IFNAME": "eth2"}, 2, "eth2"),
        ("eth3", {"GLOO_SOCKET_IFNAME": "eth2"}, 2, "eth3"),
        (None, {"NCCL_SOCKET_IFNAME": "=eth2"}, 2, "eth1"),
    ],
    ids=["one_machine", "own_name_is_loopback", "told", "named", "told_another_backend"],
)
def test_ranks_of_torchrun_use_the_interface_that_leads_to_the_others(
    monkeypatch: pytest.MonkeyPatch, named: str | None, environment: dict[str, str], local_size: int, expected: str
) -> None:
    for variable in INTERFACE_VARIABLES.values():
        monkeypatch.setenv(variable, environment.get(variable, ""))
    there = [ETH, replace(ETH, name="eth2"), replace(ETH, name="eth3"), Interface("lo", "127.0.0.1", True, True, 0)]
    monkeypatch.setattr(interfaces, "list_interfaces", lambda: there)
    monkeypatch.setattr(interfaces, "interface_towards", lambda _: there[3])
    monkeypatch.setattr(interfaces, "_default_route", lambda: "eth1")
    monkeypatch.setattr(torchrun_worker, "_address", lambda _: "127.0.1.1")
    options = torchrun_worker.torchrun_options("cpu", Place(0, 4, 0, local_size, "node0"), named, 9.0)
    assert options.interface == os.environ["GLOO_SOCKET_IFNAME"] == expected


# ---- a worker's model ----


@pytest.fixture(scope="module")
def handles() -> Iterator[list[SpawnHandle]]:
    with SpawnPool(3, threads=1, deadline_s=30.0) as opened:
        yield [opened.open(number, 60) for number in range(3)]


def ask(handles: Sequence[SpawnHandle], method: str, *args: object) -> list[object]:
    asked = [handle.call(method, *args) for handle in handles]
    return [answer.result(60) for answer in asked]


def meet(handles: Sequence[SpawnHandle]) -> None:
    address, port = handles[0].call("open_store").result(30)
    joined = [
        handle.call("join", Rendezvous(address, port, 1, rank, len(handles))) for rank, handle in enumerate(handles)
    ]
    for each in joined:
        each.result(60)


def forward(handles: Sequence[SpawnHandle], token_ids: Sequence[int]) -> Tensor:
    asked = [handle.call("forward", share(token_ids, rank, len(handles))) for rank, handle in enumerate(handles)]
    return torch.cat([answer.result(60)[0] for answer in asked])


def test_workers_go_from_group_to_group_read_only_what_they_lack_and_keep_the_bits(
    handles: list[SpawnHandle], checkpoint: Path, alone: Tensor
) -> None:
    token_ids = tokenise(TEXT)
    load, reports = Load(checkpoint), []
    for members in ([0, 1], [0, 1, 2], [2, 0], [1]):
        group = [handles[number] for number in members]
        meet(group)
        reports.append(ask(group, "load", load))
        assert torch.equal(forward(group, token_ids), alone), members
    common = reports[0][0].bytes_read - 8 * EXPERT_BYTES  # type: ignore[attr-defined]
    assert reports[0] == [LoadReport(0, 8, common + 8 * EXPERT_BYTES), LoadReport(0, 6, common + 6 * EXPERT_BYTES)]
    # two layers of 7 experts: 0-2, 3-4, 5-6 on three ranks; then worker 2 has 0-3, worker 0 has 4-6; then worker 1 all
    third = LoadReport(0, 4, common + 4 * EXPERT_BYTES)
    assert reports[1] == [LoadReport(6, 0, 0), LoadReport(2, 2, 2 * EXPERT_BYTES), third]
    assert reports[2] == [LoadReport(0, 8, 8 * EXPERT_BYTES), LoadReport(0, 6, 6 * EXPERT_BYTES)]
    assert reports[3] == [LoadReport(4, 10, 10 * EXPERT_BYTES)]


def test_groups_that_were_left_keep_no_connections_open(handles: list[SpawnHandle], checkpoint: Path) -> None:
    def connections() -> list[int]:
        return [len(psutil.Process(handle.pid).net_connections("tcp")) for handle in pair]

    pair, found = handles[:2], []
    for _ in range(4):
        meet(pair)
        ask(pair, "load", Load(checkpoint))
        found.append(connections())
    # each group has three connections at least, some of which may be closing still
    assert all(last <= first + 3 for first, last in zip(found[0], found[-1], strict=True)), found


def test_loading_the_same_again_reads_nothing_and_loading_otherwise_begins_anew(
    handles: list[SpawnHandle], checkpoint: Path, alone: Tensor
) -> None:
    pair = handles[:2]
    meet(pair)
    ask(pair, "load", Load(checkpoint, 2))
    assert ask(pair, "load", Load(checkpoint, 2)) == [LoadReport(8, 0, 0), LoadReport(6, 0, 0)]
    assert [report.experts_read for report in ask(pair, "load", Load(checkpoint, 3))] == [8, 6]  # type: ignore[attr-defined]
    assert torch.equal(forward(pair, tokenise(TEXT)), alone)


def test_a_batch_of_fewer_tokens_than_ranks_leaves_some_with_none(
    handles: list[SpawnHandle], checkpoint: Path, alone: Tensor
) -> None:
    meet(handles)
    ask(handles, "load", Load(checkpoint))
    assert torch.equal(forward(handles, tokenise(TEXT)[:1]), alone[:1])


def test_a_checkpoint_that_is_none_is_refused_and_the_worker_goes_on(
    handles: list[SpawnHandle], checkpoint: Path, tmp_path: Path, alone: Tensor
) -> None:
    meet(handles[:1])
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        handles[0].call("load", Load(tmp_path)).result(30)
    ask(handles[:1], "load", Load(checkpoint))
    assert torch.equal(forward(handles[:1], tokenise(TEXT)), alone)


def test_the_checkpoint_is_open_while_it_is_used_and_closed_when_the_group_is_left(checkpoint: Path) -> None:
    def held() -> set[str]:
        return {each.path for each in psutil.Process().open_files() if each.path.startswith(str(checkpoint))}

    host = loopback()
    worker = Worker(WorkerOptions("cpu", host.address, host.interface, threads=1, deadline_s=20.0))
    address, port = worker.open_store()
    worker.join(Rendezvous(address, port, 1, 0, 1))
    worker.load(Load(checkpoint))
    worker.forward(tokenise(TEXT))
    assert held()
    worker.leave()
    assert not held()
    assert worker.position() == RankStatus()


# ---- under torchrun ----


def torchrun(num_ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    with tempfile.TemporaryDirectory() as logs:  # torchrun would leave a folder of its own
        return run(*command, "--log-dir", logs, "-m", "megamoe.launch.worker", *arguments)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "80", **environment},
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "queen.txt"
    path.write_text(TEXT, "utf-8")
    return path


def test_two_ranks_write_what_one_rank_computes_and_report_it_as_json_alone(
    checkpoint: Path, text: Path, alone: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    done = torchrun(2, "--checkpoint", checkpoint, "--text", text, "--out", out, "--format", "json", "--waves", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    written = load_file(out)["hidden"]
    assert written.dtype == torch.bfloat16
    assert torch.equal(written, alone)
    assert report["output_sha256"] == digest(alone)
    assert report["launcher"] == "torchrun"
    assert (report["ranks"], report["batches"], report["tokens"], report["waves"]) == (2, 1, len(alone), 2)
    assert [rank["rank"] for rank in report["per_rank"]] == [0, 1]
    assert [rank["experts"] for rank in report["per_rank"]] == [8, 6]
    assert sum(rank["tokens"] for rank in report["per_rank"]) == len(alone)
    assert all(rank["read_mb"] > 0 for rank in report["per_rank"])
    assert report["seconds"] > 0


def test_three_ranks_come_to_the_same_in_batches_that_do_not_go_round(
    checkpoint: Path, text: Path, alone: Tensor
) -> None:
    batch = len(alone) - 1  # the second batch is of one token, which the last rank has
    done = torchrun(3, "--checkpoint", checkpoint, "--text", text, "--batch-tokens", batch, "--interface", "lo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(digest(alone)) == 1
    assert f"{len(alone)} tokens in 2 batches" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


PLACE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("place", "arguments", "said"),
    [
        (
            {},
            [],
            "lacks RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start it with torchrun",
        ),
        ({**PLACE, "RANK": ""}, [], "the environment lacks RANK: start it with torchrun --nproc-per-node N -m"),
        ({**PLACE, "WORLD_SIZE": "two"}, [], "WORLD_SIZE must be a number, got 'two'"),
        (PLACE, ["--interface", "nothing0"], "no interface called 'nothing0' has an IP address"),
        (PLACE, ["--out", "/nowhere/out.safetensors"], "/nowhere/out.safetensors is in no folder that exists"),
        (PLACE, ["--device", "abacus"], "device type 'abacus' is not one of"),
    ],
    ids=["no_environment", "no_rank", "no_number", "interface", "folder", "device"],
)
def test_a_wrong_request_exits_with_2_and_says_why(
    checkpoint: Path, place: dict[str, str], arguments: list[str], said: str
) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(torchrun_worker.worker)
    runner = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1", **dict.fromkeys(PLACE), **place})
    done = runner.invoke(app, ["--checkpoint", str(checkpoint), *arguments])
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert done.stdout == ""


def test_a_worker_that_torchrun_did_not_start_exits_with_2_and_without_a_traceback(checkpoint: Path) -> None:
    done = run(sys.executable, "-m", "megamoe.launch.worker", "--checkpoint", checkpoint)
    assert done.returncode == 2, done.stderr
    assert "the environment lacks RANK, WORLD_SIZE" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
