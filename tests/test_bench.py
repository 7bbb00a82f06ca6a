"""The benchmark: its numbers belong together, its bits are the oracle's, and its links are said to be what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamoe.launch.bench.bench import BenchRequest, _may_be_small, preset, sweep_waves
from megamoe.launch.lab.namespaces import burst_bytes
from megamoe.shape import MoEShape
from megamoe.trace.timeline import Timeline
from tests.commands import invoked, refused
from tests.test_demo import command
from tests.test_lab import needs_lab

SMALL = [
    "--tokens-per-rank",
    "24",
    "--hidden",
    "64",
    "--intermediate",
    "32",
    "--num-experts",
    "6",
    "--topk",
    "2",
    "--repeats",
    "7",
    "--machine",
    "cpu",
]
KEYS = [
    "ranks",
    "link_gb_s",
    "tokens_per_rank",
    "hidden",
    "intermediate",
    "num_experts",
    "topk",
    "waves",
    "threads_per_rank",
    "serial_ms",
    "overlapped_ms",
    "compute_ms",
    "communication_ms",
    "limit_ms",
    "exposed_ms",
    "speedup",
    "efficiency",
    "predicted_ms",
    "bytes_sent_per_rank",
    "flops_per_rank",
    "identical",
    "repeats",
]


def check(report: dict[str, Any]) -> None:
    assert set(report) >= set(KEYS)
    assert report["identical"] is True
    assert report["repeats"] == 7
    serial = [] if report["small"] else ["serial"]
    for name in ("overlapped", "compute", "communication", *serial):
        assert 0 < report[f"{name}_ms_min"] <= report[f"{name}_ms"] <= report[f"{name}_ms_max"]
    assert report["limit_ms"] == max(report["compute_ms"], report["communication_ms"])
    if report["small"]:
        assert (report["serial_ms"], report["serial_ms_max"], report["speedup"]) == (None, None, None)
        assert "overlaps nothing" in report["without_serial"]
    else:
        assert report["speedup"] == pytest.approx(report["serial_ms"] / report["overlapped_ms"])
        assert report["without_serial"] is None
    assert report["efficiency"] == pytest.approx(report["limit_ms"] / report["overlapped_ms"])
    assert report["exposed_ms"] == pytest.approx(report["overlapped_ms"] - report["compute_ms"])


@pytest.mark.parametrize("weights", ["mxfp4", "bf16"])
def test_bench_on_loopback_says_that_links_are_not_shaped(weights: str) -> None:
    done = invoked("bench", *SMALL, "--ranks", 2, "--waves", "2", "--weight-format", weights, "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    check(report)
    assert report["link_gb_s"] is None
    assert report["waves"] == 2
    assert "links are not shaped" in done.stderr
    # 2 of 6 experts a token: what every rank sends out and home lies between nothing and all of its rows
    assert 0 < report["bytes_sent_per_rank"] < 24 * 2 * 2 * (64 + 2 + 4 + 128)
    assert report["flops_per_rank"] % (6 * 64 * 32) == 0


@pytest.mark.parametrize("place", ["--shared-memory", "--no-shared-memory"])
def test_what_is_alone_in_a_call_without_waves_is_of_such_a_call(place: str) -> None:
    few = invoked("bench", *SMALL, "--ranks", 2, place, "--trace", "/dev/null", "--format", "json")
    report = json.loads(few.stdout)
    check(report)
    assert (report["small"], report["waves"], report["shared_memory"]) == (True, 1, place == "--shared-memory")
    assert report["compute_ms_min"] < report["overlapped_ms_max"]
    assert report["predicted_ms"] is None
    assert "cpu does not say what calls without waves take" in report["unpredicted"]
    assert 0 < report["traced_ms_min"] <= report["traced_ms_max"]


def test_a_table_says_what_a_call_without_waves_has_none_of() -> None:
    said = " ".join(invoked("bench", *SMALL, "--ranks", 2, "--no-shared-memory").stdout.split())
    assert "loopback without shared memory" in said
    assert "in one exchange and no waves" in said
    assert "serial - - -" in said
    assert "serial: none, since" in said
    assert "no speedup" in said
    assert "not predicted: cpu does not say" in said
    waves = json.loads(invoked("bench", *SMALL, "--ranks", 2, "--waves", 1, "--format", "json").stdout)
    check(waves)
    assert (waves["small"], waves["predicted_ms"] is None, waves["unpredicted"]) == (False, False, None)


@pytest.mark.parametrize(
    ("asked", "whether"),
    [({}, True), ({"tokens_per_rank": 300}, False), ({"waves": 1}, False), ({"backward": True}, False),
     ({"combine_format": "mxfp8"}, False)],
)  # fmt: skip
def test_which_requests_may_go_without_waves(asked: dict[str, Any], whether: bool) -> None:
    assert _may_be_small(BenchRequest(**{"tokens_per_rank": 8, **asked})) == whether


@needs_lab
def test_on_a_slow_link_communication_takes_what_the_link_allows() -> None:
    done = invoked(
        "bench", *SMALL, "--ranks", 2, "--link", "20mbit", "--tokens-per-rank", 300, "--hidden", 512, "--format", "json"
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    check(report)
    assert report["link_gb_s"] == 0.0025
    num_bytes, at_once = report["bytes_sent_per_rank"], burst_bytes(20e6)
    assert 0.95 * (num_bytes - at_once) / 2500 < report["communication_ms"] < 1.3 * num_bytes / 2500
    assert report["overlapped_ms"] > 0.95 * (num_bytes - at_once) / 2500, "no schedule is faster than the link"


@needs_lab
def test_a_trace_shows_a_serial_call_and_an_overlapped_one_that_hides_more(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    done = invoked(
        *("bench", *SMALL, "--ranks", 2, "--link", "100mbit", "--tokens-per-rank", 600, "--hidden", 512, "--waves", 3),
        *("--intermediate", 512, "--trace", trace, "--format", "json"),
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    check(report)
    assert 0 < report["traced_ms_min"] <= report["traced_ms"] <= report["traced_ms_max"]
    serial, overlapped = Timeline.load(trace).runs()
    assert (serial.layer, overlapped.layer) == ("serial", "overlapped")
    hidden, in_vain = overlapped.share().hidden_percent, serial.share().hidden_percent
    assert hidden is not None
    assert in_vain is not None
    assert hidden == pytest.approx(report["hidden_percent"], abs=0.1)
    assert hidden > in_vain
    assert "wrote" in done.stderr


def test_a_trace_needs_a_place_and_one_workload(tmp_path: Path) -> None:
    for arguments in (["--trace", tmp_path / "no" / "out.json"], ["--trace", tmp_path / "a", "--waves", "sweep"]):
        assert "trace" in refused("bench", *SMALL, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_one_rank_has_nothing_to_communicate() -> None:
    done = command("bench", *SMALL, "--ranks", 1, "--format", "json")  # in a process of its own
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_sent_per_rank"] == 0


def test_a_sweep_prints_a_row_for_every_number_of_waves() -> None:
    arguments = ["bench", *SMALL, "--ranks", 2, "--num-experts", 4, "--waves", "sweep", "--no-check"]
    done = invoked(*arguments, "--format", "json")
    assert done.exit_code == 0, done.output
    assert [report["waves"] for report in json.loads(done.stdout)] == [1, 2]


def test_a_preset_gives_the_sizes_and_what_is_given_too_wins() -> None:
    done = invoked(
        *("bench", "--preset", "deepseek-v4-flash/32", "--num-experts", 6, "--tokens-per-rank", 9, "--repeats", 7),
        *("--format", "json"),
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    check(report)
    assert [report[key] for key in ("hidden", "intermediate", "num_experts", "topk")] == [128, 64, 6, 6]


def test_a_preset_is_the_published_shape_divided() -> None:
    assert preset("deepseek-v4-pro") == MoEShape(7168, 3072, 384, 6, 10.0)
    assert preset("deepseek-v4-flash/16") == MoEShape(256, 128, 16, 6, 10.0)
    assert preset("qwen3-30b-a3b") == MoEShape(2048, 768, 128, 8)
    assert preset("kimi-k3").hidden == 3584, "the width that the experts see"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nemotron-3-super", "the experts of nemotron-3-super have no gate"),
        ("deepseek-v4-flush", "no model is called 'deepseek-v4-flush'; the nearest are deepseek-v4-flash"),
        ("deepseek-v4-pro/5", "5 does not divide hidden 7168, intermediate 3072, num_experts 384"),
        ("deepseek-v4-pro/0", "'0' is not a positive whole number"),
        ("deepseek-v4-flash/64", "leaves 4 experts, fewer than its top-6"),
    ],
)
def test_other_presets_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        preset(text)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [((16, 2), [1, 2, 4, 8]), ((10, 2), [1, 2, 4, 5]), ((6, 2), [1, 2, 3]), ((4, 4), [1]), ((7, 2), [1, 2, 4])],
)
def test_a_sweep_ends_at_one_expert_a_wave(numbers: tuple[int, int], expected: list[int]) -> None:
    num_experts, ranks = numbers
    request = BenchRequest(num_experts=num_experts, ranks=ranks)
    assert [each.waves for each in sweep_waves(request)] == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "ranks must be at least 1, got 0"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--tokens-per-rank", "0"], "tokens_per_rank must be at least 1, got 0"),
        (["--threads-per-rank", "100000"], "threads_per_rank are at most 1024, got 100000"),
        (["--link", "fast"], "link 'fast' is not a rate"),
        (["--link", "1GB/s"], "link '1GB/s' is not a rate such as 1gbit"),
        (["--link", "0gbit"], "link '0gbit' is not a rate such as 1gbit"),
        (["--link", "99999gbit"], "at most 1000gbit"),
        (["--latency-ms", "5"], "latency_ms 5.0 needs a link to delay"),
        (["--latency-ms", "nan", "--link", "1gbit"], "latency_ms must be between 0 and 60000, got nan"),
        (["--latency-ms", "1e9", "--link", "1gbit"], "latency_ms must be between 0 and 60000, got 1e+09"),
        (["--ranks", "3", "--no-check", "rule"], "options of bench rule come after rule"),
        (["--ranks-per-host", "2"], "ranks_per_host 2 needs a link between hosts"),
        (["--ranks-per-host", "0"], "ranks_per_host must be at least 1, got 0"),
        (["--hidden", "100"], "hidden 100 is not a multiple of 32"),
        (["--topk", "17"], "topk 17 is larger than num_experts 16"),
        (["--preset", "mixtral"], "no model is called 'mixtral'; the nearest are mixtral-8x7b"),
        (["--weight-format", "int4"], "weight_format must be one of mxfp4, bf16, got 'int4'"),
    ],
)
def test_a_wrong_request_exits_with_2(arguments: list[str], said: str) -> None:
    assert said in refused("bench", *arguments)
