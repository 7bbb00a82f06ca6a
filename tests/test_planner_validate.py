"""The planner against what was measured: the errors that docs/accuracy.md states are the ones that are found."""

from __future__ import annotations

import csv
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from benchmarks.fit_layer import NORMAL_EXCHANGES, NORMAL_SMS, fit, samples
from megamoe.catalog import load_hardware, load_profile
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.staged import normal
from megamoe.planner.validation.ascend_guides import AUGUST, guides, median_of
from megamoe.planner.validation.attention_kernels import Timed, attention_kernels
from megamoe.planner.validation.published import RESULTS
from megamoe.planner.validation.published_layers import deepep_dispatch, deepep_low_latency, isca, pull_request_316
from megamoe.planner.validation.tables import read, read_table
from megamoe.planner.validation.validate import Compared, Errors, compare, quantile, summary

GB200 = Path(__file__).parents[1] / "docs" / "data" / "mega_moe_gb200_deepseek_v4_pro.csv"
HEADER = "hardware,model,hidden,intermediate,num_experts,topk,ep_size,tokens_per_rank,routing,latency_us\n"
ROW = "gb200,deepseek-v4-pro,7168,3072,384,6,8,512,balanced,407.9\n"


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    return compare(read_table(GB200))


def test_the_gb200_table(compared: list[Compared]) -> None:
    balanced = Errors.of(each for each in compared if each.row.routing == "balanced")
    assert balanced.rows == 64
    assert balanced.median_abs_pct_error <= 5
    assert balanced.p95_abs_pct_error <= 15
    everything = Errors.of(compared)
    assert everything.rows == 256
    assert everything.median_abs_pct_error <= 12


def test_no_side_is_favoured(compared: list[Compared]) -> None:
    """Balanced rows are as often planned too long as too short: within a few percent at the median."""
    assert abs(median(each.error_pct for each in compared if each.row.routing == "balanced")) <= 3


def test_the_fused_kernels_rows() -> None:
    rows = pull_request_316()
    assert len(rows) == 8
    assert all(abs(each.error_pct) <= 15 for each in rows if each.row.tokens_per_rank >= 512)


def test_the_dispatch_column() -> None:
    assert all(abs(figure.error_pct) <= 8 for figure in deepep_dispatch())


def test_the_isca_figures_to_the_digit() -> None:
    assert [round(figure.ours, 2) for figure in isca()] == [120.96, 14.76, 6.72, 0.82]


def test_a_summary_has_its_keys(compared: list[Compared]) -> None:
    found = summary(compared)
    keys = {"rows", "median_abs_pct_error", "p95_abs_pct_error", "max_abs_pct_error"}
    assert set(found) == keys | {"by_ep_size", "by_routing", "by_stack"}
    assert found["rows"] == 256
    assert list(found["by_ep_size"]) == ["4", "8", "16", "32"]  # type: ignore[call-overload]
    for part in ("by_ep_size", "by_routing"):
        assert all(set(errors) == keys and errors["rows"] == 64 for errors in found[part].values())  # type: ignore[attr-defined]


def test_quantiles() -> None:
    assert quantile([0, 10], 0.95) == 9.5
    assert quantile([3], 0.95) == 3
    assert quantile([1, 2, 3], 0.5) == 2


def test_other_columns_are_ignored_and_formats_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(HEADER.strip() + ",phase,weight_format\n" + ROW.strip() + ",context,bf16\n")
    (row,) = read_table(path)
    assert row.expert.weight_format == "bf16"
    assert row.expert.hidden == 7168
    path.write_text("﻿" + HEADER + ROW.replace("deepseek-v4-pro", "somebody's"))
    assert read_table(path)[0].expert.weight_format == "mxfp4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace("latency_us", "ms") + ROW, "has no column latency_us"),
        (HEADER, "has no rows"),
        ("", "has no column hardware"),
        (HEADER + ROW.replace("407.9", "fast"), "line 2: latency_us 'fast' is no positive number"),
        (HEADER + ROW.replace("407.9", "nan"), "line 2: latency_us 'nan' is no positive number"),
        (HEADER + ROW + ROW.replace(",8,512", ",0,512"), "line 3: ep_size '0' is no positive whole number"),
        (HEADER + ROW.replace("gb200", "gb20"), "line 2: no hardware is called 'gb20'"),
        (HEADER + "gb200,deepseek-v4-pro\n", "line 2: ep_size '' is no positive whole number"),
        (
            HEADER + "gb200,mine,7168\n",
            "line 2: no intermediate, and the catalog has no model 'mine' that would say it",
        ),
        (
            HEADER + ROW.replace("407.9", "1,407.9"),
            "line 2: 11 cells in 10 columns: write numbers with a decimal point",
        ),
        ((HEADER + ROW).replace(",", ";").replace("407.9", "407,9"), "'407,9' is no positive number: write numbers"),
        (HEADER + ROW.replace("7168", '"7,168"'), "hidden '7,168' is no positive whole number: write numbers"),
        (HEADER.replace("topk", "latency_us") + ROW, "more than one column latency_us"),
        (HEADER.replace("\n", ",Latency_us\n") + ROW.replace("\n", ",1\n"), "more than one column latency_us"),
        (HEADER + ROW.replace("balanced", "b" * 140_000), "line 2: field larger than field limit"),
        (HEADER + ROW.replace("7168", "7" * 5000), "hidden '7{37}...' is no positive whole number$"),
        ("\n# a note\n" + HEADER + "\n" + ROW.replace("gb200", "gb20"), "line 5: no hardware is called 'gb20'"),
    ],
    ids=[
        "column",
        "no-rows",
        "empty",
        "latency",
        "nan",
        "ep",
        "hardware",
        "short",
        "no-such-model",
        "thousands",
        "decimal-comma",
        "quoted-thousands",
        "column-renamed",
        "column-twice",
        "long-cell",
        "long-number",
        "lines-left-out",
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        compare(read_table(path))


@pytest.mark.parametrize(
    "text",
    [
        (HEADER + ROW).replace(",", ";"),
        (HEADER + ROW).replace(",", "\t"),
        (HEADER + ROW).replace(",", ", "),
        "\ufeff" + (HEADER + ROW).replace("\n", "\r\n"),
        (HEADER + ROW).replace("\n", "\r"),
        HEADER.upper() + ROW,
        f"# measured on Monday\n\n{HEADER}\n{ROW}\n,,,,,,,,,\n",
        HEADER + ROW.replace("7168", "7168.0").replace("384", '"384"'),
        HEADER + ROW.replace("\n", ",,\n"),
    ],
    ids=[
        "semicolons",
        "tabs",
        "blanks",
        "windows",
        "old-mac",
        "capitals",
        "lines-left-out",
        "as-floats",
        "empty-cells",
    ],
)
def test_a_table_is_the_same_however_a_program_writes_it(tmp_path: Path, text: str) -> None:
    plain, written = tmp_path / "plain.csv", tmp_path / "written.csv"
    plain.write_text(HEADER + ROW)
    written.write_bytes(text.encode())
    assert [replace(each, line=2) for each in read_table(written)] == read_table(plain)


def test_sizes_and_routing_that_a_table_has_not_are_the_catalogs(tmp_path: Path) -> None:
    whole, short = tmp_path / "whole.csv", tmp_path / "short.csv"
    whole.write_text(HEADER + ROW)
    short.write_text(
        "hardware,model,ep_size,tokens_per_rank,stack,latency_us\nGB200,DeepSeek_V4_Pro,8,512,kernel,407.9\n"
    )
    found = read(short)
    assert found.rows[0].expert == read_table(whole)[0].expert
    assert {said.split(":")[0] for said in found.assumed} >= {"sizes that the file does not say"}
    assert "balanced routing, where none is said" in found.assumed


def test_a_table_comes_through_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_text, args=(HEADER + ROW,), daemon=True)
    writer.start()
    assert len(read_table(pipe)) == 1
    writer.join()
    with pytest.raises(ValueError, match="is a folder"):
        read_table(tmp_path)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_table(tmp_path / "table.csv")


# ---- tables as they are ----

DATA = GB200.parent
BARS = {  # median and 95th percentile, in percent
    "mega_moe_gb200_deepseek_v4_pro": (5, 25),
    "flashinfer_fused_gb200_ep4": (8, 20),
    "deepgemm_pr383_h200_fp8_flash": (10, 20),
    "deepep_ll_h100_1node": (8, 20),
    "deepep_ll_gb200_1node": (8, 25),
    "deepep_ll_h100_nodes": (8, 20),
    "sglang_grouped_gemm_h100_fp8_decode": (6, 15),
    "sglang_grouped_gemm_h100_fp8_prefill": (8, 20),
    "sglang_grouped_gemm_gb200_fp8_decode": (6, 19),
    "sglang_grouped_gemm_gb200_fp8_prefill": (7, 20),
    "holdouts": (10, 30),
    "mega_moe_gb300_deepseek_v4_pro": (5, 16),
    "mega_moe_b200_kimi_k3": (14, 26),
    "sglang_grouped_gemm_h200_fp8_decode": (6, 24),
    "sglang_grouped_gemm_h200_fp8_prefill": (8, 20),
    "sglang_grouped_gemm_b200_fp8_decode": (7, 30),
    "sglang_grouped_gemm_b200_fp8_prefill": (7, 18),
    "sglang_grouped_gemm_b300_fp8_decode": (8, 20),
    "sglang_grouped_gemm_b300_fp8_prefill": (7, 20),
    "sglang_grouped_gemm_gb300_fp8_decode": (6, 20),
    "sglang_grouped_gemm_gb300_fp8_prefill": (11, 36),
    "deepep_ll_h200_1node": (12, 25),
    "deepep_ll_h200_nodes": (5, 17),
    "deepep_ll_b200_1node": (6, 17),
    "deepep_ll_b300_1node": (6, 16),
    "deepep_ll_gb300_1node": (5, 19),
    "deepep_normal_gb200_1node": (7, 26),
    "deepep_normal_h200_1node": (13, 30),
    "deepep_normal_b200_1node": (14, 33),
    "deepep_normal_b300_1node": (14, 32),
    "deepep_normal_gb300_1node": (8, 27),
    "deepep_normal_h100_1node": (12, 31),
}


@pytest.mark.parametrize("name", BARS)
def test_every_table_is_read_as_it_is_and_met(name: str) -> None:
    table = read(DATA / f"{name}.csv")
    found = Errors.of(compare(table.rows))
    most_median, most_p95 = BARS[name]
    assert found.median_abs_pct_error <= most_median
    assert found.p95_abs_pct_error <= most_p95
    assert table.assumed or name == "holdouts"  # which states everything


def test_rows_are_drawn_as_their_collector_drew_them() -> None:
    """Products of a power law: means over five draws. Shares of power_law_sampled: up to 1024 after GB200's runs."""
    products = read_table(DATA / "sglang_grouped_gemm_h200_fp8_decode.csv")
    assert {row.draws for row in products if row.routing.startswith("power_law")} == {5}
    assert {row.draws for row in products if row.routing == "uniform"} == {0}
    later = read(DATA / "mega_moe_gb300_deepseek_v4_pro.csv")
    assert {row.drawn for row in later.rows} == {None, "power_law_sampled_1.9_1024"}
    assert any("up to 1024" in said for said in later.assumed)
    assert {row.drawn for row in read_table(GB200)} == {None}


def test_all_tables_are_held_to_a_bar() -> None:
    assert {path.stem for path in DATA.glob("*.csv")} == {*BARS, "mla_decode_kernels"}


@pytest.fixture(scope="module")
def attention() -> list[Timed]:
    return attention_kernels(DATA / "mla_decode_kernels.csv")


@pytest.mark.parametrize("hardware", ["gb200", "b200", "h100", "h200"])
@pytest.mark.parametrize(("part", "most_median", "most"), [("core", 11, 43), ("attention", 9, 27)])
def test_decode_attention_is_met(
    attention: list[Timed], hardware: str, part: str, most_median: float, most: float
) -> None:
    """By cache format: the core, to which memory's share was fitted, and all of attention, to which nothing was."""
    for kv_format in ("bf16", "fp8"):
        errors = [
            abs(row.error_pct)
            for row in attention
            if (row.hardware, row.part, row.kv_format) == (hardware, part, kv_format)
        ]
        assert len(errors) >= 32
        assert median(errors) <= most_median
        assert max(errors) <= most


def test_products_of_kernels_that_the_planner_has_not_are_refused_by_name(tmp_path: Path) -> None:
    """A framework's other tables have the columns of these; what they timed is not DeepGEMM's."""
    lines = (DATA / "sglang_grouped_gemm_h100_fp8_prefill.csv").read_text().splitlines()[:2]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines).replace("moe_context", "wideep_moe"))
    with pytest.raises(ValueError, match="line 2: op_name 'wideep_moe' is of products that the planner has not"):
        read_table(path)


NORMAL = "device,node_num,hidden_size,num_token,num_topk,num_experts,dispatch_transmit_us,combine_transmit_us"
NORMAL_ROW = "NVIDIA GB200,1,7168,4096,8,256,407.5,701.2"


def test_a_line_of_normal_kernels_is_a_dispatch_and_a_combine_of_eight_ranks(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"{NORMAL}\n{NORMAL_ROW}\n")
    found = read(path)
    assert [(row.stack, row.latency_us) for row in found.rows] == [
        ("normal dispatch", 407.5),
        ("normal combine", 701.2),
    ]
    assert {(row.hardware, row.ep_size, row.nodes, row.tokens_per_rank) for row in found.rows} == {
        ("gb200", 8, 1, 4096)
    }
    expert = found.rows[0].expert
    assert (expert.hidden, expert.topk, expert.dispatch_format, expert.combine_format) == (7168, 8, "mxfp8", "bf16")
    said = ("20 SMs, where none are said", "hide behind the host's launches", "8 ranks a node, FP8 there and BF16 back")
    assert all(any(each in assumed for assumed in found.assumed) for each in said)
    device = Device.of(load_hardware("gb200"), load_profile("blackwell"), "fp8")
    sent = normal(expert, device, load_profile("blackwell"), ep=8, tokens=4096, rows=4096 * 8)
    assert [each.planned_us for each in compare(found.rows)] == [sent.dispatch_us, sent.combine_us]
    path.write_text(f"op_name,dispatch_sms,combine_sms,{NORMAL}\nnormal,20,20,{NORMAL_ROW}\n")
    assert [replace(row, line=2) for row in found.rows] == read_table(path)
    assert not any("20 SMs" in assumed for assumed in read(path).assumed)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("normal,24,20", "line 2: dispatch_sms 24: the planner knows DeepEP's normal kernels with 20 SMs alone"),
        ("normal,20,4", "line 2: combine_sms 4: the planner knows DeepEP's normal kernels with 20 SMs alone"),
        ("normal,20,many", "line 2: combine_sms 'many' is no positive whole number"),
        ("ll,20,20", "line 2: op_name 'll' is not known; there is normal, DeepEP's normal kernels"),
    ],
)
def test_normal_kernels_that_the_planner_has_not_are_refused(tmp_path: Path, cells: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"op_name,dispatch_sms,combine_sms,{NORMAL}\n{cells},{NORMAL_ROW}\n")
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_a_table_of_attention_names_the_column_that_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("hardware,framework,part,kv_format,batch,context\n")
    with pytest.raises(ValueError, match="has no column latency_us"):
        attention_kernels(path)


@pytest.mark.parametrize(
    ("hardware", "source", "rows", "most_median", "most"),
    [
        ("h20", "deepgemm 383", 22, 8, 20),
        ("b200", "moe_ep_benchmark, deepgemm", 35, 8, 30),
        ("gb200", "flashinfer tuning page, deepgemm", 15, 8, 20),
        ("h20", "sgl deepgemm 48, deepep", 15, 16, 30),
        ("h20", "sgl deepgemm 36, deepep", 20, 14, 24),
    ],
)
def test_what_was_held_out_is_met(hardware: str, source: str, rows: int, most_median: float, most: float) -> None:
    """Devices and models that nothing was fitted to, by the kernels that the planner knows."""
    path = DATA / "holdouts.csv"
    with path.open(newline="") as file:
        sources = [line["source"] for line in csv.DictReader(file)]
    pairs = zip(read_table(path), sources, strict=True)
    found = Errors.of(compare([row for row, each in pairs if (row.hardware, each) == (hardware, source)]))
    assert found.rows == rows
    assert found.median_abs_pct_error <= most_median
    assert found.max_abs_pct_error <= most


def test_deepeps_kernels_on_h800_by_h100s_constants() -> None:
    found = deepep_low_latency()
    assert len(found) == 12
    assert median(abs(figure.error_pct) for figure in found) <= 12
    assert all(abs(figure.error_pct) <= 26 for figure in found)


PLAIN = HEADER.strip() + ",stack,nodes,variant,weight_format\n"
PLAIN_ROW = ROW.strip()


@pytest.mark.parametrize(
    ("cells", "stack", "routing", "formats"),
    [
        ("fused,,,", "fused", "balanced", ("mxfp4", "mxfp8", "bf16")),
        ("kernel,,,", "kernel", "uniform", ("mxfp4", "mxfp8", "bf16")),
        (",,nvfp4_combine_mxfp8,", "kernel", "uniform", ("nvfp4", "nvfp4", "mxfp8")),
        (",,nvfp4_bf16wire,", "kernel", "uniform", ("nvfp4", "nvfp4", "bf16")),
        (",,dg_fp8xfp4,", "kernel", "uniform", ("mxfp4", "mxfp8", "bf16")),
        ("fused,,nvfp4_bf16wire,fp8", "fused", "balanced", ("fp8", "nvfp4", "bf16")),
        ("deepep_ll,2,,", "staged low latency", "balanced", ("mxfp4", "mxfp8", "bf16")),
        ("staged-two-batch,,,", "staged two-batch", "balanced", ("mxfp4", "mxfp8", "bf16")),
        ("megamoe,,,", "megamoe", "balanced", ("mxfp4", "mxfp8", "bf16")),
    ],
)
def test_stack_variant_and_nodes_are_read(
    tmp_path: Path, cells: str, stack: str, routing: str, formats: tuple[str, str, str]
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(PLAIN + PLAIN_ROW + "," + cells + "\n")
    (row,) = read_table(path)
    assert (row.stack, row.drawn or row.routing) == (stack, routing)
    assert (row.expert.weight_format, row.expert.dispatch_format, row.expert.combine_format) == formats
    assert compare([row])[0].planned_us > 0


def test_nodes_move_ranks_apart(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(PLAIN + f"{PLAIN_ROW},fused,1,,\n{PLAIN_ROW},fused,4,,\n")
    inside, apart = compare(read_table(path))
    assert apart.planned_us > 1.5 * inside.planned_us


def test_units_are_taken_from_the_columns_name(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(HEADER.replace("latency_us", "latency_ms") + ROW.replace("407.9", "0.4079"))
    assert read_table(path)[0].latency_us == pytest.approx(407.9)


def test_an_unknown_stack_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(PLAIN + PLAIN_ROW + ",pipeline,,,\n")
    with pytest.raises(ValueError, match="line 2: stack 'pipeline' is not known; there are fused, kernel, staged"):
        read_table(path)


# ---- two editions of one guide ----


def test_august_stands_beside_april_and_changes_none_of_its_rows() -> None:
    found = guides()
    assert len(found) == len(AUGUST) == 10
    april = {each.what: 1e3 * each.conditions["batch_per_device"] / each.tokens_per_s_per_device for each in RESULTS}
    assert [each.april_ms for each in found] == [april[each.what] for each in found]
    flash = next(each for each in found if "batch 1536" in each.what)
    assert flash.april_ms == pytest.approx(20.33)
    assert flash.august_ms == 16.46
    assert median_of(found, "august_pct") < 10
    assert all(each.august_ms <= each.april_ms * 1.001 for each in found)


def test_august_says_the_same_in_both_of_its_columns() -> None:
    for (_, batch, _, _), (tpot_ms, tokens_per_s) in AUGUST.items():
        assert 1e3 * batch / 16 / tpot_ms == pytest.approx(tokens_per_s, rel=2e-3)


def test_the_constants_that_ship_are_those_that_were_fitted() -> None:
    """`python -m benchmarks.fit_layer --write docs/data/layer_fit.json` found them."""
    fitted = json.loads((DATA / "layer_fit.json").read_text())["constants"]
    assert len(fitted) > 15
    for key, value in fitted.items():
        where, figure = key.split(".")
        for name in ("blackwell", "hopper") if where == "*" else (where,):
            assert getattr(load_profile(name), figure).value == value, key
    assert {key: fitted[key] for key in NORMAL_SMS} == fit(NORMAL_SMS, samples(NORMAL_EXCHANGES)), "a second's work"
