"""The staged command: whatever becomes of a stage or of the runner, what was found is there and no process is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_kernels import run
from benchmarks.gpu_kernels.findings import Ceilings, Check, Fact, Finding, Row, Table, as_line, from_line
from benchmarks.gpu_kernels.plan import PLAN, Task, select
from benchmarks.gpu_kernels.process import StageProcess
from benchmarks.gpu_kernels.store import GPU, REHEARSAL, RESULTS, Record, Store
from benchmarks.gpu_kernels.summary import COLUMNS, LINES, summary
from tests.gpu_stages import PLANS, row, stage

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for processes")


def begin(plan: str, *arguments: str) -> subprocess.Popen[str]:
    """The command with a plan of tests/gpu_stages.py."""
    command = [sys.executable, "-m", "tests.gpu_stages", plan, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_plan(plan: str, out: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, the stages' records."""
    process = begin(plan, "--out", str(out), *arguments)
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed, records(out) if (out / RESULTS).exists() else {}


def records(out: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((out / RESULTS).read_text())["stages"]
    return stages


def is_running(pid: int) -> bool:
    """Zombies, which nobody has waited for, have ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(holds: Any, within_s: float = 10.0) -> bool:
    until = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


# ---- a stage goes wrong ----


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("faults")
    return (*run_plan("faults", out, "--budget-s", "30"), out)


OUTCOMES = {
    "first": ("passed", ""),
    "fails_a_check": ("failed", "a check"),
    "raises": ("failed", "ValueError: first line"),
    "exits": ("crashed", "exit code 0, before its end"),
    "segfaults": ("crashed", "ended by SIGSEGV"),
    "hangs": ("timed out", "did not end within 1 s"),
    "writes_garbage": ("failed", "5 lines of its results could not be read"),
    "floods": ("passed", ""),
    "cannot": ("cannot", "no such thing on a CPU"),
    "needs-check": ("skipped", "needs what did not pass: fails_a_check failed"),
    "needs-skipped": ("skipped", "needs what did not pass: needs-check skipped"),
    "needs-cannot": ("passed", ""),
    "makes_a_table": ("passed", ""),
    "last": ("passed", ""),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_stage_that_goes_wrong_ends_alone(name: str, faults: tuple[int, str, dict[str, Any], Path]) -> None:
    code, printed, found, _ = faults
    assert code == 1
    state, said = OUTCOMES[name]
    assert (found[name]["state"], found[name]["said"]) == (state, said)
    assert f"{name}: {state}" in printed


def test_what_was_found_before_a_fault_is_kept(faults: tuple[int, str, dict[str, Any], Path]) -> None:
    _, _, found, out = faults
    for name in ("raises", "exits", "segfaults", "hangs"):
        assert [each["us"] for each in found[name]["rows"]] == [3.0], name
    assert [each["us"] for each in found["writes_garbage"]["rows"]] == [3.0, 4.0]
    assert [each["us"] for each in found["last"]["rows"]] == [2.0]
    assert found["last"]["facts"]["earlier"]["hangs"] == "timed out", "a stage knows what earlier ones found"
    assert set(found) == {each.name for each in PLANS["faults"]}
    assert not [name for name in found if found[name]["state"] == "running"]
    logs = {file.stem: file.read_text() for file in (out / "logs").iterdir()}
    assert "Segmentation fault" in logs["segfaults"]
    assert "in segfaults" in logs["segfaults"], "where it was"
    assert "in hangs" in logs["hangs"]
    assert "ValueError: first line" in logs["raises"]
    assert len(logs["floods"]) < 100_000


def test_tables_stay_in_the_folder(faults: tuple[int, str, dict[str, Any], Path]) -> None:
    out = faults[3]
    assert (out / "tables" / "GPU.json").read_text() == "second"
    assert (out / "tables" / "outside.json").read_text() == "first"
    assert {each.name for each in out.iterdir()} == {RESULTS, "logs", "tables"}, "nothing half written is left"


def test_a_summary_fits_one_screen(faults: tuple[int, str, dict[str, Any], Path]) -> None:
    _, printed, _, out = faults
    lines = printed[printed.index("REHEARSAL") :].splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert str(out) in lines[-1]
    everything = {each.name: Record("timed out", "why " * 30, 60.0) for each in PLAN}
    lines = summary(Store(out, GPU, everything), "command").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    for each in PLAN:
        assert any(f"{each.name} " in line for line in lines)


@pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])
def test_a_stage_is_forked_or_begins_in_a_new_interpreter(fresh: bool, tmp_path: Path) -> None:
    task = Task("cpu", True, time.monotonic() + 20, earlier={"a": {"state": "passed"}})
    process = StageProcess(stage("sound"), task, tmp_path / "log.txt", fresh=fresh)
    found: list[Finding] = []
    while process.running:
        found += process.read(0.1)
    found += process.close()
    assert (process.code, process.end, process.broken) == (0, {}, 0)
    assert found == [row(2.0), Fact("earlier", {"a": "passed"})]


PRELOAD = """
import sys, torch
def refuse(*_): raise AssertionError("touches the device")
for name in ("is_available", "device_count", "_lazy_init", "current_device", "init"):
    setattr(torch.cuda, name, refuse)
from benchmarks.gpu_kernels.run import PRELOADED
for name in PRELOADED:
    __import__(name)
"""


def test_what_is_preloaded_does_not_touch_the_device() -> None:
    """A process that is forked of one that did has no device."""
    done = subprocess.run(
        [sys.executable, "-c", PRELOAD], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- budgets, commands, what is there already ----


def test_nothing_takes_longer_than_the_budget(tmp_path: Path) -> None:
    begun = time.monotonic()
    code, _, found = run_plan("slow", tmp_path, "--budget-s", "2.5")
    assert time.monotonic() - begun < 6, "the stage's own limit is a minute"
    assert code == 1
    assert found["hangs"]["state"] == "timed out"
    assert (found["last"]["state"], found["last"]["said"]) == ("no time", "the budget was over")


def test_a_second_command_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    code, _, found = run_plan("again", tmp_path, "--stages", "first,second")
    assert (code, set(found)) == (1, {"first", "second"})
    kept = found["first"]
    code, printed, found = run_plan("again", tmp_path, "--stages", "second,third")
    assert code == 1
    assert found["first"] == kept
    assert found["first"]["command"].endswith("--stages first,second")
    assert found["second"]["command"].endswith("--stages second,third")
    assert [each["us"] for each in found["second"]["rows"]] == [3.0], "replaced, not added to"
    assert found["third"]["state"] == "skipped"
    assert "earlier" in next(line for line in printed.splitlines() if line.startswith("first  "))
    assert run_plan("again", tmp_path, "--stages", "first")[0] == 0


# ---- the runner is ended ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda each: each.name)
def test_a_runner_that_is_ended_leaves_its_results_and_no_process(
    number: signal.Signals, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = begin("killed", "--out", str(tmp_path))
    log = tmp_path / "logs" / "goes_on.txt"
    assert wait_until(lambda: log.exists() and "processes" in log.read_text() and len(rows(tmp_path, "goes_on")) > 2)
    pids = [int(each) for each in log.read_text().splitlines()[0].split()[1:]]
    assert all(map(is_running, pids))
    process.send_signal(number)
    assert process.wait(10) == (-9 if number == signal.SIGKILL else 1)
    assert wait_until(lambda: not is_running(pids[0])), "the stage"
    found = records(tmp_path)
    assert [each["us"] for each in found["first"]["rows"]] == [2.0]
    assert len(found["goes_on"]["rows"]) == 1, "rows of one key replace each other"
    assert found["goes_on"]["rows"][0]["us"] > 2
    assert wait_until(lambda: not is_running(pids[1])), "what the stage started"
    assert wait_until(lambda: not list(temporary.iterdir())), "the cache"
    if number == signal.SIGKILL:
        assert (found["goes_on"]["state"], "last" in found) == ("running", False)
    else:
        assert (found["goes_on"]["state"], found["goes_on"]["said"]) == ("interrupted", number.name)
        assert (found["last"]["state"], found["last"]["said"]) == ("interrupted", number.name)
    process.communicate()


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    process = begin("again", "--out", str(tmp_path), "--stages", "first")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == 0
    assert records(tmp_path)["first"]["state"] == "passed"


def rows(out: Path, name: str) -> list[float]:
    """Microseconds so far, each once: a reader sees whole files only."""
    found = records(out).get(name, {"rows": []})["rows"]
    return list(range(int(found[0]["us"]))) if found else []


# ---- requests ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out or --page is needed"),
        (["--out", "/no/such/folder/out"], "--out: there is no folder /no/such/folder"),
        (["--out", __file__], "is no folder"),
        (["--out", "OUT", "--budget-s", "0"], "--budget-s must be positive, got 0"),
        (["--out", "OUT", "--stages", "decode,linear3"], "no stage is called 'linear3'; there are probe, compile, "),
        (["--out", "OUT", "--stages", ","], "--stages names none"),
        (["--page", "OUT"], f"OUT has no {RESULTS}"),
    ],
    ids=" ".join,
)
def test_a_wrong_request_exits_with_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", '{"kind": "gpu"}', '{"kind": "gpu", "stages": {"a": {"rows": [{}]}}}', "{"])
def test_a_folder_of_something_else_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run.main(["--out", str(tmp_path)], find_device=lambda: "cuda:0")
    assert "is not what this command writes" in capsys.readouterr().err
    assert (tmp_path / RESULTS).read_text() == text


def test_a_rehearsal_and_a_run_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Store(tmp_path, REHEARSAL, {}).write()
    with pytest.raises(SystemExit, match="2"):
        run.main(["--out", str(tmp_path)], find_device=lambda: "cuda:0")
    assert "is of a rehearsal run, and this is a gpu run" in capsys.readouterr().err


def test_a_gpu_that_torch_does_not_see_is_no_reason_for_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = tmp_path / "nvidiactl"
    node.touch()
    monkeypatch.setattr(run, "_NODES", (str(node),))
    monkeypatch.setattr(run, "_LOOK", "import sys; print('driver too old', file=sys.stderr); print(-1)")
    assert run.main(["--out", str(tmp_path / "out")]) == 1
    assert f"there is {node}, and torch sees no GPU: driver too old" in capsys.readouterr().err
    monkeypatch.setattr(run, "_LOOK", "raise ImportError('libcuda')")
    assert run.main(["--out", str(tmp_path / "out")]) == 1
    assert "torch does not import" in capsys.readouterr().err
    monkeypatch.setattr(run, "_LOOK", "print(3)")
    assert run.found_device() == "cuda:3"


def test_help_lists_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {stage.name:<18} {stage.purpose}" in printed for stage in PLAN)


def test_stages_are_chosen_by_name_or_by_its_beginning_in_the_plans_order() -> None:
    chosen = [stage.name for stage in select("tiles, decode,prefill-V4-Pro", PLAN)]
    assert chosen == ["decode-V4-Pro", "decode-V4-Flash", "decode-Qwen3-235B", "prefill-V4-Pro", "tiles"]
    names = [each.name for each in PLAN]
    assert len(set(names)) == len(names)
    for each in PLAN:
        assert all(names.index(needed) < names.index(each.name) for needed in each.needs)


# ---- findings ----


@pytest.mark.parametrize(
    "finding",
    [row(2.5), Check("a", True), Ceilings("before", 700.0, 4300.0), Fact("a", {"b": [1, None]}), Table("a.json", "{}")],
    ids=lambda each: type(each).__name__,
)
def test_a_finding_comes_back_as_it_was_sent(finding: Any) -> None:
    assert from_line(as_line(finding)) == finding


BROKEN = {
    "not finite": as_line(row(2.5)).replace("2.5", "NaN", 1),
    "infinite": as_line(row(2.5)).replace("2.5", "1e999", 1),
    "other type": as_line(Check("a", True)).replace("true", '"yes"'),
    "number for a truth": as_line(Check("a", True)).replace("true", "1"),
    "truth for a number": as_line(row(2.5)).replace("2.5", "true", 1),
    "lacking": '{"check": {"name": "a"}}',
    "more": '{"check": {"name": "a", "passed": true, "said": "", "more": 1}}',
    "unknown": '{"noise": {}}',
    "two": '{"check": {}, "row": {}}',
    "no object": "[1]",
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_finding_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_line(BROKEN[case])


def test_shares_are_of_the_mean_of_the_ceilings_before_and_after() -> None:
    record = Record()
    record.put(Ceilings("before", 1.0, 1.0))  # 1e6 operations or 1000 bytes a us
    record.put(Row("linear2", "tiny", 8, "mxfp4", 3, 24, 6.0, 6.0, 6.0, 2_000_000, 3000))
    assert (record.rows[0].bound, record.rows[0].share) == ("memory", 0.5)
    record.put(Ceilings("after", 1.0, 2.0))
    assert record.rows[0].share == pytest.approx(3000 / 1500 / 6)
    record.put(Row("linear2", "tiny", 8, "bf16", 3, 24, 6.0, 6.0, 6.0, 4_500_000, 3000))
    assert record.rows[1].bound == "matmul"
    assert record.rows[1].share == pytest.approx(0.75)
    assert record.rows[1].tflop_s == pytest.approx(0.75)
    assert record.rows[1].gb_s == 0.5
