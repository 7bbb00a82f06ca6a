"""The layers that benchmarks/peers compares compute one function, and what its table says follows from the times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.peers import __main__ as run
from benchmarks.peers.measure import RankOutcome, Workload, measure_rank
from benchmarks.peers.peer import PEERS, Layer, Peer, choose
from benchmarks.peers.report import Comparison, compare, document
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape
from tests.conftest import Pool

TINY = Workload("tiny", (40, 7, 0), shape=MoEShape(hidden=128, intermediate=64, num_experts=6, topk=2))
HERE = "tests.test_peers"
SHORT = Peer("short", f"{HERE}:short")
RAISES = Peer("raises", f"{HERE}:raises")
UNBUILT = Peer("unbuilt", f"{HERE}:unbuilt")
ABSENT = Peer("absent", "nowhere:Nothing", package="no_such_package", install="pip install no-such-package")


def short(*_: object) -> Layer:
    """Forgets the last token."""
    return lambda hidden, ids, weights: hidden[:-1]  # noqa: ARG005


def raises(group: EPGroup, *_: object) -> Layer:
    """Is built everywhere and raises on one rank."""

    def layer(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        del ids, weights
        if group.rank == 1:
            raise RuntimeError("no kernel\nfor this device")
        return hidden

    return layer


def unbuilt(group: EPGroup, *_: object) -> Layer:
    """Is refused on one rank."""
    if group.rank == 2:
        raise ImportError("no module named anything")
    return lambda hidden, ids, weights: hidden  # noqa: ARG005


@pytest.fixture(scope="module")
def measured(pool: Pool) -> Comparison:
    """All layers that are installed, and four that do not work, on three ranks: uneven tokens, none on the last."""
    peers = [*PEERS, SHORT, RAISES, UNBUILT, ABSENT]
    present = [peer for peer in peers if peer.missing is None]
    return compare(TINY, peers, 2, pool.get().run(measure_rank, TINY, present, 2, False, size=len(TINY.tokens)))


@pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])
def test_every_layer_computes_what_fp32_does(measured: Comparison, peer: Peer) -> None:
    (row,) = [row for row in measured.rows if row.name == peer.name]
    if peer.missing:
        assert row.problem == peer.missing
        pytest.skip(peer.missing)
    assert row.problem is None
    assert row.error is not None
    assert 0 < row.error < peer.bound
    assert row.ms is not None
    assert row.ms > 0


def test_the_layers_of_the_development_install_are_there(measured: Comparison) -> None:
    timed = {row.name for row in measured.rows if row.ms is not None}
    assert timed >= {peer.name for peer in PEERS if peer.package in (None, "transformers")}


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (SHORT, "cannot run: ValueError: returned [39, 128], expected [40, 128] (rank 0)"),
        (RAISES, "cannot run: RuntimeError: no kernel for this device (rank 1)"),
        (UNBUILT, "cannot be built: ImportError: no module named anything (rank 2)"),
        (ABSENT, "not installed: pip install no-such-package"),
    ],
    ids=["short", "raises", "unbuilt", "absent"],
)
def test_a_layer_that_does_not_run_is_named_with_its_reason(measured: Comparison, peer: Peer, said: str) -> None:
    (row,) = [row for row in measured.rows if row.name == peer.name]
    assert row.problem == said
    assert row.ms is row.speed is row.error is None
    assert not row.failed, "a peer that does not run is reported, and is no failure of ours"
    assert said in measured.table()


# ---- what the table says ----

SLOW, FAST, OURS = Peer("slow", "x:y"), Peer("fast", "x:y"), Peer("ours", "x:y", ours=True)


def outcome(*times_ms: float, error: float = 0.001) -> RankOutcome:
    return RankOutcome(list(times_ms), difference_squared=error**2 * 50, norm_squared=50.0)


def test_a_repeat_takes_as_long_as_its_slowest_rank_and_ratios_are_those_of_medians() -> None:
    ranks = [
        {"slow": outcome(10, 30, 20), "fast": outcome(9, 9, 9), "ours": outcome(4, 5, 1)},
        {"slow": outcome(11, 10, 40), "fast": outcome(8, 12, 8), "ours": outcome(6, 2, 1)},
    ]
    found = compare(TINY, [SLOW, FAST, OURS], 3, ranks)
    slow, fast, ours = found.rows
    assert (slow.ms_min, slow.ms, slow.ms_max) == (11, 30, 40)
    assert (fast.ms_min, fast.ms, fast.ms_max) == (9, 9, 12)
    assert (ours.ms_min, ours.ms, ours.ms_max) == (1, 5, 6)
    assert found.fastest_peer == "fast"
    assert (slow.speed, fast.speed, ours.speed) == (9 / 30, 1.0, 9 / 5)
    assert slow.error == pytest.approx(0.001)
    assert found.verdicts() == ["ours: 1.80 x faster than the fastest peer, fast  "]
    assert not found.failed


def test_a_wrong_layer_is_marked_fails_the_command_and_is_no_yardstick() -> None:
    ranks = [{"slow": outcome(30), "fast": outcome(1, error=0.03), "ours": outcome(60)}]
    found = compare(TINY, [SLOW, FAST, OURS], 1, ranks)
    assert found.fastest_peer == "slow"
    assert found.rows[1].problem == "WRONG: the error is not below 0.02"
    assert found.rows[1].speed is None
    assert found.failed
    assert found.verdicts() == ["ours: 2.00 x slower than the fastest peer, slow  "]
    assert "WRONG" in document("command", [found])


def test_a_layer_of_ours_that_does_not_run_fails_the_command() -> None:
    found = compare(TINY, [SLOW, OURS], 1, [{"slow": outcome(1), "ours": RankOutcome(problem="cannot run")}])
    assert found.failed


def test_without_a_peer_there_is_no_ratio() -> None:
    found = compare(TINY, [ABSENT, OURS], 1, [{"ours": outcome(1)}])
    assert found.fastest_peer is None
    assert found.rows[1].speed is None
    assert found.verdicts() == []


def test_an_output_that_is_not_a_number_is_wrong() -> None:
    found = compare(TINY, [OURS], 1, [{"ours": outcome(1, error=float("nan"))}])
    assert found.failed


def test_peers_are_chosen_by_the_beginning_of_their_names() -> None:
    assert [peer.name for peer in choose("megamoe mxfp4, deepspeed")] == [
        "deepspeed.moe",
        "deepspeed AutoEP",
        "megamoe mxfp4",
    ]
    assert choose(None) == list(PEERS)
    with pytest.raises(ValueError, match="no peer is called 'vllm'; there are torch by hand, "):
        choose("torch,vllm")


def test_the_command_prints_json_alone_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "peers.md"
    monkeypatch.setattr(run, "WORKLOADS", (replace(TINY, name="other"), replace(TINY, tokens=(5, 5), repeats=4)))
    chosen = ["--only", "tiny", "--peers", "torch by,megamoe bf16", "--repeats", "2", "--format", "json"]
    with pytest.raises(SystemExit) as done:
        run.main([*chosen, "--write", str(page)])
    assert done.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    (result,) = printed["results"]
    assert [row["name"] for row in result["rows"]] == [peer.name for peer in choose("torch by,megamoe bf16")]
    assert result["fastest_peer"] in ("torch by hand", "torch by hand fp32")
    assert result["repeats"] == 4
    text = page.read_text()
    assert "## tiny: 2 x 5 tokens, loopback" in text
    assert f"torch {torch.__version__}" in text
    assert "`python -m benchmarks.peers --only tiny --peers 'torch by,megamoe bf16' --repeats 2 --format json" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "vllm"], "no peer is called 'vllm'"),
        (["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        (["--only", "decode"], "invalid choice: 'decode'"),
    ],
)
def test_a_wrong_request_exits_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run.main(arguments)
    assert done.value.code == 2
    assert said in capsys.readouterr().err
