"""Every benchmark runs in its smallest form, says what it takes, and refuses what is wrong with exit code 2."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import command
from tests.commands import SIGNALS

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")

BENCHMARKS = Path(command.__file__).parent
FEW = ["--hidden", "64", "--intermediate", "32", "--num-experts", "4", "--topk", "2"]
# name -> its smallest form; {} is a folder
SMALLEST = {
    "combine": ["--tokens", "2", *FEW],
    "loopback": ["--tokens", "1", "--repeats", "1", "--most", "1000", "--format", "json"],
    # behind the soak marker
    "heartbeat": ["--pairs", "1"],
    "memory": ["--experts", "2", "--hidden", "64", "--intermediate", "64"],
    "planner": ["--repeats", "1"],
    "small_calls": ["--ranks", "2", "--tokens", "1", "--calls", "1"],
    "accuracy": ["--write", "{}/accuracy.md"],
    "layer": ["--only", "loopback", "--repeats", "1", "--write", "{}/overlap.md"],
    "drills": ["--place", "host", "--times", "1", "--faults", "kill", "--json", "{}/drills.json"],
    "peers": ["--only", "token-loopback", "--peers", "torch by hand,megamoe bf16,torchtitan", "--repeats", "1"],
    "transformers_families": ["--families", "qwen3_moe", "--write", "{}/families.md"],
    "cpu_kernels": ["--repeats", "1"],
    "fit_layer": ["--write", "{}/fit.json"],
    "fit_kernels": ["--write", "{}/kernels.json"],
    "generation": ["--only", "loopback", "--repeats", "1", "--prompts", "2", "--tokens", "4", "--layers", "1"],
    "gpu_kernels": ["--budget-s", "60", "--out", "{}/gpu", "--stages", "probe"],
    "lab_runs": ["--runs", "1", "--repeats", "1", "--folder", "{}"],
    "launch": ["--ranks", "2", "--repeats", "1"],
    "loading": ["--gb", "0.001", "--ranks", "2", "--repeats", "1", "--folder", "{}"],
    "node_limited": ["--tokens-per-rank", "1024", "--repeats", "1", "--ranks-per-host", "1"],
    "prediction": [
        "--links",
        "1gbit",
        "--tokens-per-rank",
        "8,300",
        "--weight-formats",
        "bf16",
        "--within",
        "1000",
        "--few-tokens",
        "1",
        "--few-places",
        "memory",
    ],
}
SOAK = list(SMALLEST)[list(SMALLEST).index("heartbeat") :]
QUICK = [name for name in SMALLEST if name not in SOAK]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A benchmark handles signals, and sets variables for the ranks that it starts."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with mock.patch.dict(os.environ):
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of `python -m benchmarks.name arguments`, run in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as done:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    return done.value.code


def test_every_benchmark_has_its_smallest_form() -> None:
    programs = [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("*/__main__.py")]
    names = [path.parent.name if path.stem == "__main__" else path.stem for path in programs]
    ends = ["__main__" in path.read_text() for path in programs]
    assert {name for name, runs in zip(names, ends, strict=True) if runs} == SMALLEST.keys()


@pytest.mark.parametrize("name", SMALLEST)
def test_help_says_what_a_benchmark_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(name, "--help", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert said.out.startswith("usage: ")
    assert not said.err


@pytest.mark.parametrize("name", QUICK)
def test_the_smallest_form_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_smallest(name, tmp_path)
    printed = capsys.readouterr().out
    assert printed.strip()
    if name == "loopback":
        assert [row["weights"] for row in json.loads(printed)] == ["mxfp4", "bf16"]


@pytest.mark.soak
@pytest.mark.parametrize("name", SOAK)
def test_the_smallest_form_of_what_takes_longer_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where this machine's constants are kept
    run_smallest(name, tmp_path)
    assert not list(tmp_path.glob("megamoe-*"))
    if name == "peers":  # a peer's package is named where it is not installed
        assert re.search(r"torchtitan .*(not installed: pip install|\d)", capsys.readouterr().out)


def run_smallest(name: str, folder: Path) -> None:
    program = f"{name}.page" if name == "transformers_families" else name
    program = f"{name}.run" if name == "gpu_kernels" else program
    program = f"{name}.__main__" if name in ("peers", "generation", "drills") else program
    given = [each.format(folder) for each in SMALLEST[name]]
    try:
        code = import_module(f"benchmarks.{program}").main(given)
    except SystemExit as done:
        code = done.code
    assert not code
    written = [Path(each) for each in given if each.startswith(f"{folder}/") and "." in Path(each).name]
    assert all(path.stat().st_size > 100 for path in written)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("loopback", ["--ranks", "0"], "argument --ranks: must be at least 1, got 0"),
        ("loopback", ["--tokens", "-1"], "argument --tokens: must be at least 0, got -1"),
        ("loopback", ["--tokens", "few"], "argument --tokens: invalid natural value: 'few'"),
        ("loopback", ["--most", "nan"], "argument --most: must be finite and above 0, got nan"),
        ("small_calls", ["--calls", "0"], "argument --calls: must be at least 1, got 0"),
        ("combine", ["--topk", "17"], "wrong request: topk 17 is larger than num_experts 16"),
        (
            "combine",
            ["--hidden", "100"],
            "quantize_mxfp8 needs a last dimension that is a multiple of 32",
        ),
        ("memory", ["--experts", "0"], "argument --experts: must be at least 1, got 0"),
        ("heartbeat", ["--link", "fast"], "wrong request: link 'fast' is not a rate"),
        ("node_limited", ["--link", "fast"], "wrong request: link 'fast' is not a rate"),
        ("node_limited", ["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        ("prediction", ["--tokens-per-rank", "8,-8"], "argument --tokens-per-rank: must be at least 0, got -8"),
        ("prediction", ["--few-places", "moon"], "must be of memory, sockets, 1gbit, 1gbit 1ms, got 'moon'"),
        ("prediction", ["--weight-formats", "int4"], "weight_format must be one of mxfp4, bf16, got 'int4'"),
        ("prediction", ["--links", "fast"], "wrong request: link 'fast' is not a rate"),
        ("layer", ["--only", "all"], "argument --only: invalid choice: 'all'"),
        ("layer", ["--write", "/nowhere/overlap.md"], "/nowhere/overlap.md is in no folder that exists"),
        ("accuracy", ["--write", "/"], "argument --write: / is a folder"),
        ("fit_layer", ["--write", "/nowhere/fit.json"], "/nowhere/fit.json is in no folder that exists"),
        ("lab_runs", ["--folder", "/nowhere"], "--folder: there is no folder /nowhere"),
        ("launch", ["--ranks", "-2"], "argument --ranks: must be at least 1, got -2"),
        ("loading", ["--gb", "-1"], "argument --gb: must be finite and above 0, got -1"),
        ("loading", ["--folder", "/nowhere"], "--folder: there is no folder /nowhere"),
        ("planner", ["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        ("cpu_kernels", ["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        ("drills", ["--faults", "sneeze"], "no fault is called sneeze; there are "),
        ("drills", ["--times", "0"], "argument --times: must be at least 1, got 0"),
        ("peers", ["--peers", "vllm"], "no peer is called 'vllm'; there are "),
        ("peers", ["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        ("generation", ["--contenders", "vllm"], "no contender has 'vllm' in its name; there are "),
        ("generation", ["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (
            "generation",
            ["--model", "/nowhere"],
            "/nowhere holds no config.json: there is no such folder, and no checkpoint is downloaded",
        ),
        ("transformers_families", ["--families", "bert"], "no family is called bert; there are "),
        ("gpu_kernels", ["--out", "/nowhere/at/all"], "--out: there is no folder /nowhere/at"),
    ],
)
def test_a_wrong_request_exits_with_2_and_one_line(
    name: str,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(name, *arguments, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err.splitlines()
    assert said in told[-1]
    assert not any("Traceback" in line for line in told)


def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.transformers_families.page", raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks.transformers_families.page", None)
    assert ended("transformers_families", monkeypatch=monkeypatch) == 1
    assert "benchmarks.transformers_families.page is not installed" in capsys.readouterr().err


def test_links_on_which_messages_take_a_share_of_what_is_computed() -> None:
    """60 ms of messages at 1 Gbit/s beside 60 ms of computing: 0.4 and all of it at 2.5 and 1 Gbit/s."""
    report = mock.Mock(link_gb_s=0.125, communication_ms=60.0, compute_ms=60.0)
    assert import_module("benchmarks.layer").links_of(report) == ["2500mbit", "1000mbit"]
