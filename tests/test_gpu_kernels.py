"""The benchmark of the kernels on a GPU, proven without one: what it runs, finds wrong, counts and writes."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interpreter import interpreted

pytest.importorskip("triton")

from benchmarks.gpu_kernels import checks, clock, operands, products, run, session, tune
from benchmarks.gpu_kernels import layer as layers
from benchmarks.gpu_kernels.checks import Exact, check_codes, check_products, check_rounding
from benchmarks.gpu_kernels.clock import Ceilings, EventClock, HostClock, Times
from benchmarks.gpu_kernels.layer import layer_work
from benchmarks.gpu_kernels.operands import Products, Rows, Shape, Weights, kind_of
from benchmarks.gpu_kernels.page import COLUMNS, NOT_RUN, page
from benchmarks.gpu_kernels.products import Bench, Case
from benchmarks.gpu_kernels.results import PARTS, Check, Results, Row, Work, compared, goals
from benchmarks.gpu_kernels.session import Asked, Session
from megamoe.kernels.grouped_linear2 import grouped_linear2
from megamoe.kernels.quantize import quantize
from megamoe.shape import MoEShape

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Shape("tiny", MoEShape(hidden=64, intermediate=32, num_experts=3, topk=2, swiglu_limit=10.0))


@contextmanager
def patched(**names: Any) -> Iterator[None]:
    """module__name=value, for a test that is in the interpreter's process and has no fixtures"""
    modules = {each.__name__.split(".")[-1]: each for each in (checks, operands, products, run, session, tune)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            module, _, attribute = name.partition("__")
            patch.setattr(modules[module], attribute, value)
        yield


def command(page_file: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    """Runs the command on the CPU for the tiny shape -> exit code, what it printed, the JSON that it wrote."""
    printed = io.StringIO()
    with patched(run__SHAPES=(TINY,), run__found_device=lambda: CPU), redirect_stdout(printed):
        code = run.main(["--write", str(page_file), *arguments])
    return code, printed.getvalue(), json.loads((page_file.parent / "data" / f"{page_file.stem}.json").read_text())


# ---- the whole path, in the interpreter ----


@interpreted
def test_everything_is_checked_and_measured(tmp_path: Path) -> None:
    code, printed, written = command(tmp_path / "page.md", "--rows", "17")
    assert code == 0, printed
    assert (written["device"], written["chip"], written["tiles"]) == ("cpu", "cpu", "of its chip")
    assert [check["passed"] for check in written["checks"]] == [True] * 9
    rows = {(row["part"], row["rows_per_expert"], row["what"]): row for row in written["rows"]}
    assert set(rows) == {(part, 17, what) for part in PARTS for what in PARTS[part]}
    for (part, _, what), row in rows.items():
        assert set(row) == set(Row.__slots__)
        assert row["problem"] is None
        if what.endswith("graph"):
            assert row["us"] is None, "there are none on a CPU"
            continue
        numbers = [row[name] for name in ("us", "us_min", "us_max", "tflop_s", "gb_s", "share")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert (row["error"] is not None) == (part != "layer" and what != "unfused")
        assert (row["over_grouped_mm"] is not None) == what.startswith("mxfp4")
        assert (row["over_unfused"] is not None) == ((part, what) == ("linear1", "mxfp4"))
        assert f"tiny {row['rows_per_expert']:>4} {part} {what}: {row['us']:.1f} us" in printed
    assert "## tiny: Linear-1, then Linear-2" in (tmp_path / "page.md").read_text()


def spoiled(operation: Callable[..., None], spoil: Callable[[torch.Tensor, int], None]) -> Callable[..., None]:
    """grouped_linear2 and then spoil(out, how often it was called before)"""
    calls = iter(range(1_000_000))

    def wrong(product: Any, index: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        operation(product, index, out, **options)
        spoil(out, next(calls))

    return wrong


def one_more(out: torch.Tensor, _: int) -> None:
    out[0] += 1


def one_more_at_times(out: torch.Tensor, calls: int) -> None:
    out[0, 0] += calls


def unwritten(out: torch.Tensor, _: int) -> None:
    out.view(torch.uint8)[-1, :2] = 0xFF


@interpreted
def test_a_wrong_product_is_not_timed_and_fails_the_run(tmp_path: Path) -> None:
    with patched(operands__grouped_linear2=spoiled(grouped_linear2, one_more)):
        code, printed, written = command(tmp_path / "page.md", "--rows", "1", "--only", "linear2")
    assert code == 1
    found = {row["what"]: row for row in written["rows"]}
    for what in ("mxfp4", "bf16"):
        assert found[what]["us"] is None
        assert found[what]["problem"].startswith("FAILED: error")
    assert found["grouped_mm"]["us"] > 0
    assert printed.count("FAILED: error") == 2
    assert "FAILED: error" in (tmp_path / "page.md").read_text()


FAULTS: dict[str, tuple[str, Callable[[torch.Tensor, int], None], str]] = {
    "wrong": ("operands__grouped_linear2", one_more, "not below 0.005"),
    "not_written": ("operands__grouped_linear2", unwritten, "error nan against FP64"),
    "unsteady": ("operands__grouped_linear2", one_more_at_times, "other bits in another run"),
    "alone": ("checks__grouped_linear2", one_more, "other bits alone"),
}


@pytest.mark.parametrize("fault", FAULTS)
@interpreted
def test_a_fault_is_called_what_it_is(fault: str) -> None:
    name, spoil, said = FAULTS[fault]
    rows, weights = Rows.made(TINY, 2, CPU), Weights.made(TINY, "bf16", HostClock(CPU))
    with patched(**{name: spoiled(grouped_linear2, spoil)}):
        found = check_products(Products.made(rows, weights, 10.0, "bf16"), Exact(weights), rows)
    assert found["linear1"].problem is None
    assert said in str(found["linear2"].problem)


@interpreted
def test_chips_that_multiply_mxfp8_are_measured_with_it() -> None:
    with patched(products__kind_of=lambda weight_format, _: weight_format):
        case = Case.made(Bench.made(TINY, HostClock(CPU), Ceilings(1, 1)), 2)
    assert [case.products[name].kind for name in ("mxfp4", "bf16")] == ["mxfp4", "bf16"]
    found = case.check()
    assert [outcome.problem for outcome in found.values()] == [None] * 6
    assert {row.what for row in case.measure("linear1", found) if row.us} == set(PARTS["linear1"])


def test_what_is_measured_is_what_the_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (kind_of("mxfp4", CPU), kind_of("bf16", CPU)) == ("wide", "bf16")
    monkeypatch.setattr(operands, "reads_wide", lambda _: False)
    assert (kind_of("mxfp4", CPU), kind_of("bf16", CPU)) == ("mxfp4", "bf16")


@pytest.mark.parametrize("kind", ["mxfp4", "wide"])
@interpreted
def test_a_wrong_code_and_a_wrong_rounding_are_found(kind: str) -> None:
    def flip(tokens: torch.Tensor, filling: Any, out: Any) -> None:
        quantize(tokens, filling, out)
        out.values.view(torch.uint8)[64, 7] ^= 0x80

    assert check_codes(kind, CPU).passed
    assert check_rounding(kind, CPU).passed
    with patched(checks__grouped_linear2=spoiled(grouped_linear2, one_more), operands__quantize=flip):
        codes, rounding = check_codes(kind, CPU), check_rounding(kind, CPU)
    assert (codes.passed, codes.said) == (False, "32 of 40960 products differ")
    assert (rounding.passed, rounding.said) == (False, "1 values differ")


# ---- numbers, by hand ----


@interpreted
def test_work_is_counted_as_by_hand() -> None:
    """Two rows of each of 3 experts, which are 3 tokens: H 64, I 32"""
    case = Case.made(Bench.made(TINY, HostClock(CPU), Ceilings(1, 1)), 2)
    first, second = 2 * 6 * 64 * 64, 2 * 6 * 64 * 32
    x, hidden, out = 3 * 64 * 2, 6 * 32 * 2, 6 * 64 * 2
    assert case.work("linear1", "mxfp4") == Work(first, 3 * 64 * (32 + 2) + x + hidden)
    assert case.work("linear1", "unfused") == case.work("linear1", "mxfp4")
    assert case.work("linear1", "bf16") == Work(first, 3 * 64 * 64 * 2 + x + hidden)
    assert case.work("linear1", "grouped_mm") == Work(first, 3 * 64 * 64 * 2 + 6 * 64 * 2 + 6 * 64 * 2)
    assert case.work("linear2", "mxfp4") == Work(second, 3 * 64 * (16 + 1) + hidden + out)
    assert case.work("linear2", "grouped_mm") == Work(second, 3 * 64 * 32 * 2 + hidden + out)
    one, two = case.work("linear1", "mxfp4"), case.work("linear2", "mxfp4")
    assert case.work("both", "mxfp4") == Work(one.flops + two.flops, one.num_bytes + two.num_bytes)
    with patched(products__kind_of=lambda weight_format, _: weight_format):
        case = Case.made(case.bench, 2)
    assert case.work("linear1", "mxfp4") == Work(first, 3 * 64 * (32 + 2) + 3 * (64 + 2) + 6 * (32 + 1))


def test_the_work_of_a_layer_is_counted_as_by_hand() -> None:
    tokens = 2 * 3 * 64 * 2  # in and out
    values = 3 * 64 * 32
    assert layer_work(TINY.sizes, 3, "mxfp4") == Work(2 * 6 * values, 3 * (values // 2 + values // 32) + tokens)
    assert layer_work(TINY.sizes, 3, "bf16") == Work(2 * 6 * values, 3 * 2 * values + tokens)
    assert layer_work(TINY.sizes, 1, "bf16") == Work(2 * 2 * values, 2 * 2 * values + tokens // 3)


def row(part: str, rows: int, what: str, us: float | None = None, **more: Any) -> Row:
    return Row(part, "tiny", rows, what, 3, 3 * rows, us, us, us, **more)


def test_shares_are_of_the_ceiling_that_takes_longer() -> None:
    ceilings, times = Ceilings(tflop_s=1.0, gb_s=1.0), Times(6.0, 5.0, 7.0)  # 1e6 operations or 1000 bytes a us
    memory = Work(2_000_000, 3000).of(row("linear1", 1, "mxfp4"), times, ceilings)
    assert (memory.us, memory.us_min, memory.us_max) == (6, 5, 7)
    assert (memory.bound, memory.share, memory.gb_s) == ("memory", 0.5, 0.5)
    assert memory.tflop_s == pytest.approx(1 / 3)
    matmul = Work(4_500_000, 3000).of(row("linear1", 1, "mxfp4"), times, ceilings)
    assert matmul.bound == "matmul"
    assert matmul.share == pytest.approx(0.75)


def test_ratios_are_of_the_same_way_of_running() -> None:
    products = [row("linear1", 1, what, us) for what, us in (("mxfp4", 2), ("bf16", 3), ("grouped_mm", 8))]
    products.append(row("linear1", 1, "unfused"))
    ours, twin, *_ = (compared(each, products) for each in products)
    assert (ours.over_bf16, ours.over_grouped_mm, ours.over_unfused) == (1.5, 4.0, None)
    assert twin == products[1]
    layers = [row("layer", 1, f"{what} {how}", us) for what, how, us in (
        ("mxfp4", "eager", 10), ("mxfp4", "graph", 5), ("grouped_mm", "eager", 40), ("grouped_mm", "graph", 10),
    )]  # fmt: skip
    assert [compared(each, layers).over_grouped_mm for each in layers] == [4.0, 2.0, None, None]


def test_what_is_asked_is_asked_of_the_worst() -> None:
    rows = [
        row("linear1", 1, "mxfp4", 1.0, gb_s=80.0, error=0.001, over_grouped_mm=3.0, over_unfused=1.3),
        row("linear2", 8, "mxfp4", 1.0, gb_s=60.0, error=0.004, over_grouped_mm=2.6),
        row("linear2", 2048, "mxfp4", 1.0, gb_s=1.0, over_grouped_mm=1.1),
        row("linear2", 2048, "grouped_mm", 1.0, error=0.1),
        row("layer", 1, "mxfp4 eager", 1.0, gb_s=1.0, over_grouped_mm=0.1),
    ]
    found = {goal.name.split(",")[0]: goal for goal in goals(rows[:1], Ceilings(1, 100))}
    assert [goal.reached for goal in found.values()] == [True, True, None, True]
    error, memory, decode, prefill, fused = goals(rows, Ceilings(1, 100))
    assert (error.worst, error.reached) == (0.004, True)
    assert (memory.worst, memory.reached, memory.where) == (0.6, False, "tiny, 8 rows, linear2 mxfp4")
    assert (decode.worst, decode.reached, prefill.worst, prefill.reached) == (2.6, True, 1.1, True)
    assert (fused.worst, fused.reached) == (1.3, True)
    assert goals([replace(rows[0], error=5e-3)], None)[0].reached is False


def test_a_shape_has_as_many_experts_as_its_rows_leave_room_for() -> None:
    assert {shape.name: shape.sizes.num_experts for shape in run.SHAPES} == {
        "V4-Flash": 32,
        "V4-Pro": 24,
        "Qwen3-235B": 16,
    }
    pro = run.SHAPES[1]
    assert pro.fitting(2048, 70 << 30) == pro
    each = 2048 * pro.row_bytes()
    assert pro.fitting(2048, int(each * 10.5 / 0.8)).sizes.num_experts == 10
    assert pro.fitting(2048, each).sizes.num_experts == 6, "top-6 needs six"


# ---- the clock, on a device that is made up ----


class MadeUp:
    """A device on which time passes as it is told. log: what was launched, "sleep" among it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.us, self.log = 0.0, list[str]()
        patch.setattr(clock, "_event", lambda: MadeUpEvent(self))
        patch.setattr(clock, "_sleep", self._sleep)
        patch.setattr(torch.cuda, "synchronize", lambda _: None)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))

    def _sleep(self, cycles: int) -> None:
        self.launch("sleep", cycles / 2000)

    def launch(self, name: str, us: float) -> None:
        self.us += us
        self.log.append(name)


class MadeUpEvent:
    def __init__(self, device: MadeUp) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.us

    def synchronize(self) -> None:
        """Has happened."""

    def elapsed_time(self, later: MadeUpEvent) -> float:
        return (later.at - self.at) / 1000


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_compared_takes_turns_in_batches_that_events_resolve(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = MadeUp(monkeypatch)
    turns: list[int] = []

    def fast(turn: int) -> None:
        turns.append(turn)
        device.launch("fast", 10.0)

    def broken(_: int) -> None:
        raise RuntimeError("no such instruction\nmore")

    events = EventClock(torch.device("cuda", 0), 7)
    device.log.clear()
    found = events.compare(
        {"fast": fast, "broken": broken, "slow": lambda _: device.launch("slow", 150.0)}, ahead=ahead
    )
    assert found["broken"] == "RuntimeError: no such instruction"
    for name, us in (("fast", 10.0), ("slow", 150.0)):
        times = found[name]
        assert isinstance(times, Times)
        assert [times.us, times.us_min, times.us_max] == pytest.approx([us] * 3)
    sleep = ["sleep"] if ahead else []
    repeat = [*sleep, *["fast"] * 40, *sleep, *["slow"] * 3]
    assert device.log[-7 * len(repeat) :] == repeat * 7
    assert turns == list(range(len(turns))), "every launch has the next copy"


def test_times_are_the_median_the_least_and_the_most() -> None:
    assert Times.of([3.0, 1.0, 9.0, 2.0, 8.0]) == Times(3.0, 1.0, 9.0)


def test_copies_are_more_than_caches_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch)
    events = EventClock(torch.device("cuda", 0), 7)
    assert events.cold_bytes == 1 << 30, "what AMD's dies share is larger than the L2"
    assert [events.copies(size) for size in (2 << 30, 1 << 30, 300 << 20)] == [1, 1, 4]


# ---- what only a GPU has, made up ----


def made_up_graphs(patch: pytest.MonkeyPatch) -> list[str]:
    """Graphs that replay nothing, as if what was captured had run -> what was done"""
    done: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda _: None)
    patch.setattr(torch.cuda, "Stream", lambda: stream)
    patch.setattr(torch.cuda, "current_stream", lambda: stream)
    patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    patch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replay")))
    return done


def test_a_layer_that_cannot_be_captured_or_replayed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    done, given = made_up_graphs(monkeypatch), layers.inputs(TINY.sizes, 3, CPU)
    unsteady = iter(range(100))

    def waits(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    calls: dict[str, list[layers.Call]] = {
        "mxfp4": layers.copies_of("mxfp4", 2, TINY.sizes, CPU),
        "bf16": [waits],
        "grouped_mm": [lambda *_: torch.tensor([float(next(unsteady))])],
    }
    graphs, wrong = layers.captured(calls, given)
    assert wrong["bf16 graph"] == "RuntimeError: operation not permitted when stream is capturing"
    assert wrong["grouped_mm graph"].startswith("RuntimeError: FAILED: a replay's output differs")
    assert set(graphs) == {"mxfp4 graph"}
    done.clear()
    graphs["mxfp4 graph"](0)
    assert done == ["replay"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_call_that_waits_is_found(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]

    def call(hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if waits and modes[-1] == "error":
            raise RuntimeError("called a synchronizing operation")
        return hidden

    monkeypatch.setattr(layers, "layer", lambda *_: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert layers.check_waits("mxfp4", CPU).passed is not waits
    assert modes == ["default", "error", "default"], "it is put back"


@pytest.mark.parametrize("first_that_grows", [0, 3, 22, 1000])
def test_a_call_that_asks_for_memory_is_found(first_that_grows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls that warm up, then twenty"""
    calls: list[int] = []
    asked = {"num_device_alloc": 5, "segment.all.current": 2}

    def call(*_: torch.Tensor) -> None:
        asked["num_device_alloc"] += len(calls) == first_that_grows
        calls.append(0)

    monkeypatch.setattr(layers, "layer", lambda *_: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: dict(asked))
    assert layers.check_memory("mxfp4", CPU).passed is (first_that_grows in (0, 1000))
    assert len(calls) == 23


# ---- a run that does not go well ----


def quiet_session(patch: pytest.MonkeyPatch, page_file: Path, until: float) -> Session:
    """Of Linear-2 with 1 and 8 rows, and with no kernels in it."""
    patch.setattr(session, "device_checks", lambda _: ())
    asked = Asked((TINY, replace(TINY, name="other")), (1, 8), ("linear2",), 7, until, page_file)
    return Session(asked, HostClock(CPU), Results("command", "today", {row.key: row for row in asked.planned()}))


def test_a_case_that_raises_is_a_row_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def products_of(shape: Shape, *_: Any) -> Callable[[int], list[Row]]:
        def measure(rows: int) -> list[Row]:
            if rows == 1:
                raise ValueError("first line | of two\nsecond")
            return [Row("linear2", shape.name, rows, "mxfp4", 3, 24, 2.0, 1.0, 3.0, 1.0, 1.0, "memory", 0.5)]

        return measure

    monkeypatch.setattr(session, "products_of", products_of)
    here = quiet_session(monkeypatch, tmp_path / "page.md", time.monotonic() + 60)
    assert here.run() == 1
    for name in ("tiny", "other"):
        assert here.results.rows["linear2", name, 1, "bf16"].problem == "ValueError: first line | of two"
        assert here.results.rows["linear2", name, 8, "mxfp4"].us == 2.0
    lines = (tmp_path / "page.md").read_text().splitlines()
    wrong = [line for line in lines if "ValueError: first line / of two" in line]
    assert len(wrong) == 6
    heading = next(line for line in lines if "x BF16" in line)
    assert {line.count("|") for line in wrong} == {heading.count("|")}


def test_what_fails_outside_a_case_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = quiet_session(monkeypatch, tmp_path / "page.md", time.monotonic() + 60)

    def fails() -> Check:
        raise RuntimeError("no memory")

    monkeypatch.setattr(session, "device_checks", lambda _: [("a check", fails)])
    monkeypatch.setattr(session, "measure_ceilings", lambda _: fails())
    assert here.run() == 1
    assert here.results.checks == [
        Check("a check", False, "RuntimeError: no memory"),
        Check("the run", False, "RuntimeError: no memory"),
    ]
    assert "| the run | FAILED | RuntimeError: no memory |" in (tmp_path / "page.md").read_text()


def test_nothing_is_begun_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = quiet_session(monkeypatch, tmp_path / "page.md", time.monotonic() - 1)
    assert here.run() == 0
    assert all(row.us is None and row.problem is None for row in here.results.rows.values())
    assert "no time left for other, 8 rows, linear2" in capsys.readouterr().out


# ---- without a GPU ----


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The page of the documented command where there is no GPU."""
    monkeypatch.setattr(run, "found_device", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    assert run.main(["--write", "docs/gpu_kernels.md"]) == 0
    assert "nothing was run" in capsys.readouterr().err
    return tmp_path / "docs"


def test_without_a_gpu_every_cell_says_not_run(written: Path) -> None:
    lines = (written / "gpu_kernels.md").read_text().splitlines()
    rows = [line.split(" | ")[3:] for line in lines if line.partition(" | ")[0].lstrip("| ").isdigit()]
    assert len(rows) == len(run.SHAPES) * len(run.ROWS) * sum(map(len, PARTS.values()))
    assert all(cell.strip("| ") == NOT_RUN for row in rows for cell in row)
    assert {len(row) for row in rows} == {len(COLUMNS) - 3 + 3, len(COLUMNS) - 3 + 4}
    found = json.loads((written / "data" / "gpu_kernels.json").read_text())
    assert [found[name] for name in ("device", "chip", "torch", "triton", "ceilings", "checks")] == [None] * 5 + [[]]
    assert all(row["us"] is None and row["problem"] is None for row in found["rows"])
    assert all(goal["reached"] is None for goal in found["goals"])


def test_the_page_in_the_docs_is_the_one_that_the_command_writes(written: Path) -> None:
    """But for its date, and where a run was committed it is of the device that its JSON names."""
    ours, committed = (
        json.loads((docs / "data" / "gpu_kernels.json").read_text()) for docs in (written, ROOT / "docs")
    )
    page_here, page_there = ((docs / "gpu_kernels.md").read_text() for docs in (written, ROOT / "docs"))
    if committed["device"] is None:
        assert {**ours, "date": committed["date"]} == committed
        assert page_here.replace(ours["date"], committed["date"]) == page_there
    assert f"{committed['date']}, device {committed['device'] or 'none'}" in page_there


@pytest.mark.parametrize("arguments", [[], ["--tune"], ["--tune", "--write", "page.md"]], ids=" ".join)
def test_without_a_gpu_and_a_page_there_is_nothing_to_do(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "found_device", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert run.main(arguments) == 2
    assert "needs an NVIDIA or AMD GPU that torch sees" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "V4-Flush"], "no shape is called 'V4-Flush'; there are V4-Flash, V4-Pro, Qwen3-235B"),
        (["--only", "linear3"], "no part is called 'linear3'; there are linear1, linear2, both, layer"),
        (["--rows", "8,0"], "--rows must be at least 1, got 0"),
        (["--rows", "8,many"], "--rows must be numbers, separated by commas, got '8,many'"),
        (["--write", "/no/such/folder/page.md"], "--write: there is no folder /no/such/folder"),
        (["--repeats", "3"], "--repeats must be at least 7, got 3"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
    ],
)
def test_a_wrong_request_exits_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert said in capsys.readouterr().err


def test_only_what_is_asked_for_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "found_device", lambda: None)
    page_file = tmp_path / "page.md"
    chosen = ["--shapes", "Qwen3-235B,V4-Pro", "--rows", "8", "--only", "layer"]
    assert run.main([*chosen, "--write", str(page_file)]) == 0
    rows = json.loads((tmp_path / "data" / "page.json").read_text())["rows"]
    assert {(row["shape"], row["rows_per_expert"], row["part"]) for row in rows} == {
        ("V4-Pro", 8, "layer"),
        ("Qwen3-235B", 8, "layer"),
    }
    assert "--only layer --write" in page_file.read_text()


def test_a_page_has_what_was_found() -> None:
    done = row("linear1", 8, "mxfp4", 12.34, error=0.0012, over_unfused=1.5, tflop_s=3.0, gb_s=2000.0)
    done = replace(done, bound="memory", share=0.71)
    results = Results("command", "2026-01-02", {done.key: done}, "GPU", "cuda:90", "2", "3", "of its chip")
    text = page(results, 9)
    assert "`command`, 2026-01-02, device GPU (cuda:90), torch 2, Triton 3, tiles of its chip." in text
    assert "| 8 | 3 | mxfp4 | 12.3 (12.3-12.3) | 3.0 | 2000 | 71% of memory | 0.0012 | - | - | 1.50 | - |" in text
