"""What the GPU benchmark measures and checks, proven without one: what it runs, finds wrong, counts and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.interpreter import interpreted

pytest.importorskip("triton")

from benchmarks.gpu_kernels.findings import PARTS, Check, Row, Work, compared
from benchmarks.gpu_kernels.goals import goals
from benchmarks.gpu_kernels.measure import checks, layer, layer_checks, layer_times, operands, products
from benchmarks.gpu_kernels.measure.checks import Exact, check_codes, check_products, check_rounding
from benchmarks.gpu_kernels.measure.clock import HostClock, Times
from benchmarks.gpu_kernels.measure.layer_times import layer_work
from benchmarks.gpu_kernels.measure.operands import Products, Rows, Weights, grouped_mm_note, kind_of
from benchmarks.gpu_kernels.measure.products import Bench, Case, timed
from benchmarks.gpu_kernels.measure.shapes import SHAPES, SOURCES, Shape
from benchmarks.gpu_kernels.page import page, write_page
from benchmarks.gpu_kernels.plan import SHAPES as PLANNED
from benchmarks.gpu_kernels.stages.times import measured
from benchmarks.gpu_kernels.stages.verify import run_all
from benchmarks.gpu_kernels.store import GPU, REHEARSAL, Record, Store
from megamoe.catalog import load_model
from megamoe.kernels.grouped_linear2 import grouped_linear2
from megamoe.kernels.quantize import quantize
from megamoe.shape import MoEShape

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Shape("tiny", MoEShape(hidden=64, intermediate=32, num_experts=3, topk=2, swiglu_limit=10.0))


@contextmanager
def patched(**names: Any) -> Iterator[None]:
    """module__name=value, for a test that is in the interpreter's process and has no fixtures"""
    modules = {each.__name__.split(".")[-1]: each for each in (checks, operands, products)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            module, _, attribute = name.partition("__")
            patch.setattr(modules[module], attribute, value)
        yield


# ---- what is checked, in the interpreter ----


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
def test_a_wrong_product_is_not_timed() -> None:
    with patched(operands__grouped_linear2=spoiled(grouped_linear2, one_more)):
        case = Case.made(Bench.made(TINY, HostClock(CPU)), 1)
        found = {row.what: row for row in case.measure("linear2", case.check())}
    for what in ("mxfp4", "bf16"):
        assert found[what].us is None
        assert str(found[what].problem).startswith("FAILED: error")
    assert (found["grouped_mm"].us or 0) > 0


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
        case = Case.made(Bench.made(TINY, HostClock(CPU)), 2)
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

    if kind != "wide":  # which a rehearsal checks on a CPU
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
    case = Case.made(Bench.made(TINY, HostClock(CPU)), 2)
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
        case = Case.made(Bench.made(TINY, HostClock(CPU)), 2)
    assert case.work("linear1", "mxfp4") == Work(first, 3 * 64 * (32 + 2) + 3 * (64 + 2) + 6 * (32 + 1))


def test_the_work_of_a_layer_is_counted_as_by_hand() -> None:
    tokens = 2 * 3 * 64 * 2  # in and out
    values = 3 * 64 * 32
    assert layer_work(TINY.sizes, 3, "mxfp4") == Work(2 * 6 * values, 3 * (values // 2 + values // 32) + tokens)
    assert layer_work(TINY.sizes, 3, "bf16") == Work(2 * 6 * values, 3 * 2 * values + tokens)
    assert layer_work(TINY.sizes, 1, "bf16") == Work(2 * 2 * values, 2 * 2 * values + tokens // 3)


def row(part: str, rows: int, what: str, us: float | None = None, *, shape: str = "tiny", **more: Any) -> Row:
    return Row(part, shape, rows, what, 3, 3 * rows, us, us, us, **more)


def test_a_time_that_may_be_the_hosts_says_so() -> None:
    found = timed(row("linear1", 1, "mxfp4"), Times(6.0, 5.0, 7.0), Work(2_000_000, 3000))
    assert (found.us, found.us_min, found.us_max, found.flops, found.num_bytes, found.note) == (
        *(6.0, 5.0, 7.0),
        *(2_000_000, 3000),
        None,
    )
    slow = timed(row("linear1", 1, "grouped_mm", note="a fallback"), Times(6.0, 5.0, 7.0, by_host=True), Work(1, 1))
    assert slow.note == "a fallback; bound by the host"
    assert timed(row("linear1", 1, "mxfp4"), "no memory", Work(1, 1)).problem == "no memory"


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
    large: dict[str, Any] = {"num_bytes": 300_000_000}
    memory: dict[str, Any] = {"bound": "memory"}
    rows = [
        row("linear1", 1, "mxfp4", 1.0, shape="V4-Pro", share=0.8, error=0.001, over_grouped_mm=3.0, **large, **memory),
        row("linear2", 8, "mxfp4", 1.0, shape="V4-Pro", share=0.6, error=0.004, over_grouped_mm=2.6, **large, **memory),
        row("linear2", 8, "mxfp4", 1.0, share=0.1, over_grouped_mm=0.5, num_bytes=190_000_000, **memory),
        row("linear1", 512, "mxfp4", 1.0, over_grouped_mm=1.2, over_unfused=1.3),
        row("linear2", 2048, "mxfp4", 1.0, over_grouped_mm=0.9),
        row("linear2", 2048, "mxfp4", None, over_grouped_mm=0.1, problem="FAILED", error=0.1),
        row("linear2", 2048, "grouped_mm", 1.0, error=0.1),
        row("layer", 1, "mxfp4 eager", 1.0, share=0.01, over_grouped_mm=0.1, **large),
    ]
    found = {goal.name.split(":")[0]: goal for goal in goals(rows[:1])}
    assert [goal.reached for goal in found.values()] == [True, True, True, None, None]
    error, share, decode, prefill, fused = goals(rows)
    assert (error.worst, error.reached) == (0.1, False)
    assert (share.worst, share.reached, share.where) == (0.6, False, "V4-Pro, 8 rows, linear2 mxfp4")
    assert (decode.worst, decode.reached) == (2.6, True), "a product that reads little is not asked"
    assert (prefill.worst, prefill.reached, prefill.where) == (0.9, False, "tiny, 2048 rows, linear2 mxfp4")
    assert (fused.worst, fused.reached) == (1.3, True)
    assert goals([replace(rows[0], error=5e-3)])[0].reached is False


def test_shapes_are_the_catalogs() -> None:
    assert set(SHAPES) == set(SOURCES) == set(PLANNED)
    for name, (model, ep_size) in SOURCES.items():
        found, sizes = load_model(model), SHAPES[name].sizes
        assert (sizes.hidden, sizes.intermediate) == (found.expert_hidden, found.intermediate)
        assert (sizes.num_experts, sizes.topk) == (found.num_experts // ep_size, found.topk)
        assert sizes.swiglu_limit == found.swiglu_limit


def test_a_shape_has_as_many_experts_as_its_rows_leave_room_for() -> None:
    pro = SHAPES["V4-Pro"]
    assert pro.fitting(2048, 70 << 30) == pro
    each = 2048 * pro.row_bytes()
    assert pro.fitting(2048, int(each * 10.5 / 0.8)).sizes.num_experts == 10
    assert pro.fitting(2048, each).sizes.num_experts == 6, "top-6 needs six"


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
    done, given = made_up_graphs(monkeypatch), layer.inputs(TINY.sizes, 3, CPU)
    unsteady = iter(range(100))

    def waits(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    calls: dict[str, list[layer.Call]] = {
        "mxfp4": layer_times.copies_of("mxfp4", 2, TINY.sizes, CPU),
        "bf16": [waits],
        "grouped_mm": [lambda *_: torch.tensor([float(next(unsteady))])],
    }
    graphs, wrong = layer_times.captured(calls, given)
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

    monkeypatch.setattr(layer_checks, "layer", lambda *_: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert layer_checks.check_waits("mxfp4", CPU).passed is not waits
    assert modes == ["default", "error", "default"], "it is put back"


@pytest.mark.parametrize("first_that_grows", [0, 3, 22, 1000])
def test_a_call_that_asks_for_memory_is_found(first_that_grows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls that warm up, then twenty"""
    calls: list[int] = []
    asked = {"num_device_alloc": 5, "segment.all.current": 2}

    def call(*_: torch.Tensor) -> None:
        asked["num_device_alloc"] += len(calls) == first_that_grows
        calls.append(0)

    monkeypatch.setattr(layer_checks, "layer", lambda *_: call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: dict(asked))
    assert layer_checks.check_memory("mxfp4", CPU).passed is (first_that_grows in (0, 1000))
    assert len(calls) == 23


@pytest.mark.parametrize("falls_back", [False, True])
def test_a_fallback_of_grouped_mm_is_found_out(falls_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]

    def grouped_mm(*_: torch.Tensor) -> None:
        if falls_back and modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    here = torch.zeros(4)
    for name in ("zeros", "tensor"):
        monkeypatch.setattr(torch, name, lambda *_, **__: here)
    monkeypatch.setattr(operands, "grouped_mm", grouped_mm)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert (grouped_mm_note(torch.device("cuda", 0)) is None) is not falls_back
    assert modes == ["default", "error", "default"], "it is put back"
    assert grouped_mm_note(CPU) is None


# ---- a case that does not go well ----


def test_a_case_that_raises_has_rows_that_say_so() -> None:
    def measure(rows: int) -> Iterator[Row]:
        yield row("linear1", rows, "mxfp4", 2.0)
        raise ValueError("first line\nsecond")

    found = list(measured(measure, ("linear1", "linear2"), "tiny", 8))
    wanted = {(part, "tiny", 8, what) for part in ("linear1", "linear2") for what in PARTS[part]}
    assert {each.key for each in found} == wanted
    assert [each.problem for each in found] == [None, *["ValueError: first line"] * 6]


def test_a_check_that_raises_has_failed_and_the_others_are_made() -> None:
    def fails() -> Check:
        raise RuntimeError("no memory")

    found = list(run_all([("a", fails), ("b", lambda: Check("b", True))]))
    assert found == [Check("a", False, "RuntimeError: no memory"), Check("b", True)]


# ---- the page ----


def found_on_a_gpu(folder: Path, kind: str = GPU) -> Store:
    done = row("linear1", 8, "mxfp4", 12.34, error=0.0012, over_unfused=1.5, flops=37_000_000, num_bytes=24_680_000)
    rows = [replace(done, bound="memory", share=0.71), row("linear1", 8, "bf16", problem="ValueError: a | b")]
    record = Record("failed", "tiny", 12.0, "command", "2026-01-02", rows, [Check("all codes", True)])
    record.facts = {"device": "GPU", "torch": "2"}
    return Store(folder, kind, {"decode-tiny": record})


def test_a_page_has_what_was_found(tmp_path: Path) -> None:
    text = page(found_on_a_gpu(tmp_path))
    assert "device GPU; torch 2." in text
    assert "| 8 | 3 | mxfp4 | 12.3 (12.3-12.3) | 3.0 | 2000 | 71% of memory | 0.0012 | - | - | 1.50 | - |" in text
    assert "| decode-tiny | failed: tiny | 12 | 2026-01-02 | command |" in text
    lines = text.splitlines()
    wrong = next(line for line in lines if "ValueError: a / b" in line)
    assert wrong.count("|") == next(line for line in lines if "x unfused |" in line).count("|")


def test_a_page_is_made_of_a_gpus_results_alone(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    with pytest.raises(ValueError, match="is of a rehearsal run: a page is made from a GPU's results alone"):
        write_page(found_on_a_gpu(tmp_path, REHEARSAL), docs)
    with pytest.raises(ValueError, match="has no row that was measured"):
        write_page(Store(tmp_path, GPU, {}), docs)
    assert list(docs.iterdir()) == []
    store = found_on_a_gpu(tmp_path)
    assert write_page(store, docs).read_text() == page(store)
    assert json.loads((docs / "data" / "gpu_kernels.json").read_text()) == store.as_dict()


def test_a_page_is_made_of_several_commands_folders(tmp_path: Path) -> None:
    first = found_on_a_gpu(tmp_path / "first")
    first.records["tiles"] = Record("no time")
    first.write()
    second = Store(
        tmp_path / "second",
        GPU,
        {"tiles": Record("passed"), "decode-tiny": Record("skipped"), "layer": Record("no time")},
    )
    second.write()
    merged = Store.merged([first.folder, second.folder])
    states = {name: each.state for name, each in merged.records.items()}
    assert states == {"decode-tiny": "failed", "tiles": "passed", "layer": "no time"}
    assert len(list(merged.rows())) == 2
    Store(second.folder, REHEARSAL, {}).write()
    with pytest.raises(ValueError, match=r"second is of a rehearsal run, and .*first of a gpu run"):
        Store.merged([first.folder, second.folder])


def test_the_page_in_the_docs_is_of_a_gpu() -> None:
    """Where there is one, it is the one that its results make."""
    committed = ROOT / "docs" / "data" / "gpu_kernels.json"
    assert committed.exists() == (ROOT / "docs" / "gpu_kernels.md").exists()
    if committed.exists():
        data = json.loads(committed.read_text())
        store = Store(ROOT, data["kind"], {name: Record.of(each) for name, each in data["stages"].items()})
        assert data["kind"] == GPU
        assert page(store) == (ROOT / "docs" / "gpu_kernels.md").read_text()
