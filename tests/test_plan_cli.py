"""megamoe plan and its kin: the verdict's line, the keys that programs read, exit codes, and refusals of one line."""

from __future__ import annotations

import csv
import json
import logging
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import megamoe
from megamoe.launch.cli.main import COMMANDS, app
from megamoe.launch.cli.planner.plan_file import read_plan
from megamoe.launch.terminal import exit_codes

TABLE = Path(__file__).parents[1] / "docs" / "data" / "mega_moe_gb200_deepseek_v4_pro.csv"
PRO = ("--model", "deepseek-v4-pro", "--hardware", "gb200")
SENTENCE = "HIDDEN  deepseek-v4-pro on gb200, EP16: 5556 <= 6144 FLOPs/Byte (margin 1.11); needs 814 GB/s, has 900"


def run(*arguments: object, code: int = 0) -> Any:
    done = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, [str(each) for each in arguments])
    assert done.exit_code == code, (arguments, done.exit_code, done.output, done.exception)
    return done


def as_json(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--format", "json", code=code).stdout)


def refused(*arguments: object) -> str:
    """What is said to a request that is wrong: one line, nothing on stdout."""
    done = run(*arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# ---- plan ----


def test_the_first_line_is_the_verdict() -> None:
    assert run("plan", *PRO, "--ep", 16).stdout.splitlines()[0] == SENTENCE


def test_the_readme_shows_what_the_planner_prints() -> None:
    """Each `$ megamoe plan ...` or compare in it, and the indented lines below, which the command prints in a row."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = re.findall(r"^    \$ megamoe ((?:plan|compare) .*)\n((?:    .+\n)+)", readme, re.MULTILINE)
    assert len(shown) == 2
    for command, below in shown:
        printed = "\n".join(line.rstrip() for line in run(*command.split()).stdout.splitlines())
        assert textwrap.dedent(below).rstrip() in printed, command


def test_tables_fit_in_80_columns() -> None:
    for arguments in (("--ep", 16), ("--ep", 16, "--batch", 96, "--context", 8192, "--mtp", 1, "--devices", 32)):
        lines = run("plan", *PRO, *arguments).stdout.splitlines()
        said = [line for line in lines if not line.startswith(("HIDDEN", "paper: "))]
        assert max(map(len, said)) <= 80, max(said, key=len)


def test_json_has_the_keys_that_programs_read() -> None:
    found = as_json("plan", *PRO, "--ep", 16)
    assert found["verdict"] == "hidden"
    assert found["threshold_flops_per_byte"] == 6144
    assert (found["weight_format"], found["dispatch_format"]) == ("mxfp4", "mxfp8")
    assert as_json("plan", *PRO, "--ep", 16, "--weight-format", "fp8")["weight_format"] == "fp8"
    assert found["hardware_flops_per_byte"] == pytest.approx(5000e3 / 900)
    assert found["margin"] == pytest.approx(1.10592)
    assert found["required_link_gb_s"] == pytest.approx(5000e3 / 6144)
    assert found["waves"] >= 1
    assert found["layer_us"] == pytest.approx(found["fixed_us"] + found["core_us"] + found["sum_us"])
    parts = ("experts", "weights", "cache", "activations")
    assert found["memory_gb"] == pytest.approx(sum(found[f"memory_{part}_gb"] for part in parts))
    assert found["memory_cache_gb"] == 0  # caches come with a workload
    for key in ("tokens_per_s_per_device", "tpot_ms", "usd_per_million_tokens", "devices"):
        assert found[key] is None
    assert (found["fits"], found["ep"], found["tokens_per_rank"]) == (True, 16, 4096)


def test_a_workload_fills_in_the_serving_keys() -> None:
    found = as_json("plan", *PRO, "--ep", 16, "--batch", 96, "--context", 8192, "--mtp", 1, "--devices", 32)
    assert found["devices"] == 32
    assert found["tokens_per_rank"] == 192
    assert found["tokens_per_s_per_device"] == pytest.approx(96 * 1e3 / found["tpot_ms"])
    price_per_s = 2.75 / 3600
    assert found["usd_per_million_tokens"] == pytest.approx(price_per_s / found["tokens_per_s_per_device"] * 1e6)
    steps = [value for key, value in found.items() if key.startswith("step_") and key != "step_us"]
    assert found["step_us"] == pytest.approx(sum(steps))
    assert found["memory_cache_gb"] > 0


def test_the_layer_of_a_workload_is_the_one_that_serves() -> None:
    found = as_json("plan", *PRO, "--ep", 16, "--batch", 64)
    alone = as_json("plan", *PRO, "--ep", 16, "--tokens-per-rank", 64)
    assert found["layer_us"] == pytest.approx(alone["layer_us"])


def test_a_plan_without_room_says_what_would_fit_and_fails() -> None:
    done = run("plan", "--model", "deepseek-v4-pro", "--hardware", "h100", "--ep", 8, code=1)
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("DOES NOT FIT  deepseek-v4-pro on h100, EP8: ")
    assert second.startswith("HIDDEN  deepseek-v4-pro on h100, EP8: ")
    found = as_json("plan", "--model", "deepseek-v4-pro", "--hardware", "h100", "--ep", 8, code=1)
    assert (found["verdict"], found["fits"]) == ("hidden", False)
    smallest = found["smallest_ep"]
    assert f"EP{smallest} would ({found['smallest_devices']} devices)" in first
    assert as_json("plan", "--model", "deepseek-v4-pro", "--hardware", "h100", "--ep", smallest)["fits"]
    smaller = max(ep for ep in range(1, smallest) if 384 % ep == 0)
    assert not as_json("plan", "--model", "deepseek-v4-pro", "--hardware", "h100", "--ep", smaller, code=1)["fits"]


def test_the_best_ep_size_is_picked_and_said() -> None:
    done = run("plan", *PRO, "--devices", 16, "--context", 8192)
    assert done.stderr.startswith("picked ep ")
    found = as_json("plan", *PRO, "--devices", 16, "--context", 8192)
    assert set(found["picked"]) == {"ep", "batch", "attention_tp", "microbatches"}
    flags = [part for key, value in found["picked"].items() for part in (f"--{key.replace('_', '-')}", value)]
    again = as_json("plan", *PRO, "--devices", 16, "--context", 8192, *flags)
    assert again["tokens_per_s_per_device"] == found["tokens_per_s_per_device"]
    other = as_json("plan", *PRO, "--devices", 16, "--context", 8192, "--batch", 8, "--ep", 16)
    assert other["tokens_per_s_per_device"] < found["tokens_per_s_per_device"]


def test_targets_are_met_or_named() -> None:
    found = as_json("plan", *PRO, "--context", 8192, "--tpot-ms", 25, "--target-tps", 200_000)
    assert found["tpot_ms"] <= 25
    assert found["tokens_per_s"] >= 200_000
    group = found["tokens_per_s_per_device"] * found["ep"] * found["attention_tp"]
    assert found["tokens_per_s"] - group < 200_000  # one group fewer would not do
    missed = run("plan", *PRO, "--ep", 16, "--batch", 256, "--tpot-ms", 5, code=1)
    assert "MISSES  tpot_ms is " in missed.stdout
    assert "none of " in refused("plan", *PRO, "--tpot-ms", 0.001)


def test_overrides_reach_the_figures() -> None:
    found = as_json("plan", *PRO, "--ep", 16, "--set", "hardware.scaleup_gb_s=450", "--set", "model.topk=8")
    assert (found["verdict"], found["link_gb_s"]) == ("exposed", 450)
    assert found["rows"] == 4096 * 8
    assert found["set"] == ["hardware.scaleup_gb_s=450", "model.topk=8"]


def test_nothing_leaves_a_single_rank() -> None:
    found = as_json("plan", "--model", "gpt-oss-20b", "--hardware", "gb200", "--ep", 1)
    assert (found["verdict"], found["margin"], found["threshold_flops_per_byte"]) == ("hidden", None, None)
    assert (found["required_link_gb_s"], found["communication_us"], found["rules"]) == (0, 0, [])


def test_report_is_one_page_of_its_own(tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    done = run("plan", *PRO, "--ep", 16, "--report", page)
    assert done.stdout.splitlines()[0] == SENTENCE
    assert f"wrote {page}" in done.stderr
    text = page.read_text()
    for section in ("h-timeline", "h-roofline", "h-pareto", "h-memory", "h-sensitivity", "h-terms", "h-inputs"):
        assert f'id="{section}"' in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "set on the command line" not in text


# ---- files ----


def test_a_plan_file_is_the_flags_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("model: deepseek-v4-pro\nhardware: gb200\nep: 16\nset: {hardware.scaleup_gb_s: 450}\n")
    assert as_json("plan", "--config", file)["link_gb_s"] == 450
    assert as_json("plan", "--config", file, "--ep", 8)["ep"] == 8
    assert as_json("plan", "--config", file, "--set", "hardware.scaleup_gb_s=300")["link_gb_s"] == 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: a\nhardware: b\neps: 3\n", "line 3: unknown key 'eps'; the nearest are ep"),
        ("model: a\nep: sixteen\n", "line 2: ep is 'sixteen'"),
        ("model: a\nep: 3\nep: 4\n", "line 3: ep is given twice"),
        ("model: [a\n", "line 2: "),
        ("- 3\n", "holds no keys"),
        ("", "holds no keys"),
    ],
    ids=["unknown", "no_number", "twice", "broken", "list", "empty"],
)
def test_a_plan_file_is_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    assert said in refused("plan", "--config", file)


def test_recommend_writes_plans_that_say_the_same(tmp_path: Path) -> None:
    load = ("--requests-per-s", 20, "--input-tokens", 4000, "--output-tokens", 800)
    targets = ("--tpot-ms", 25, "--ttft-ms", 1500, "--microbatches", 1, "--kv-format", "fp8")
    found = as_json("recommend", *PRO, *load, *targets, "--write", tmp_path / "plan.yaml")
    assert found["devices"] == found["prefill"]["devices"] + found["decode"]["devices"]
    assert found["decode"]["load_tokens_per_s"] == 16_000
    for phase, file in (("decode", "plan.yaml"), ("prefill", "plan-prefill.yaml")):
        again, pool = as_json("plan", "--config", tmp_path / file), found[phase]
        for key in ("tokens_per_s_per_device", "devices", "ep", "batch", "memory_gb"):
            assert again[key] == pytest.approx(pool[key]), key
        assert again["phase"] == read_plan(tmp_path / file)["phase"] == phase
        assert pool["devices"] * again["tokens_per_s_per_device"] >= pool["load_tokens_per_s"]
    assert as_json("plan", "--config", tmp_path / "plan.yaml")["tpot_ms"] == pytest.approx(found["tpot_ms"])
    assert found["tpot_ms"] <= 25
    assert found["ttft_ms"] <= 1500


# ---- sweep, compare, require, explain ----


def test_more_bandwidth_never_takes_longer() -> None:
    rows = as_json(
        "sweep", *PRO, "--ep", 16, "--over", "hardware.scaleup_gb_s", "--from", 100, "--to", 1600, "--steps", 16
    )
    times = [row["layer_us"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert [row["verdict"] for row in rows] == ["exposed"] * 8 + ["hidden"] * 8  # 814 GB/s lies between
    assert len({row["required_link_gb_s"] for row in rows}) == 1


def test_more_sequences_raise_the_rate_and_the_time_of_a_token() -> None:
    rows = as_json("sweep", *PRO, "--ep", 16, "--over", "batch", "--from", 1, "--to", 256, "--steps", 9, "--log")
    assert [row["batch"] for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for key in ("tokens_per_s_per_device", "tpot_ms", "memory_gb"):
        assert [row[key] for row in rows] == sorted(row[key] for row in rows), key


def test_a_sweep_writes_its_rows_and_its_figure(tmp_path: Path) -> None:
    rows, figure = tmp_path / "rows.csv", tmp_path / "rows.svg"
    done = run("sweep", *PRO, "--over", "ep", "--values", "4,8,16", "--csv", rows, "--figure", figure)
    assert f"wrote {rows}" in done.stderr
    with rows.open() as file:
        found = list(csv.DictReader(file))
    assert [row["ep"] for row in found] == ["4", "8", "16"]
    assert [row["fits"] for row in found] == ["False", "True", "True"]
    assert float(found[2]["layer_us"]) == pytest.approx(as_json("plan", *PRO, "--ep", 16)["layer_us"])
    text = figure.read_text()
    assert text.startswith("<svg")
    assert text.count("<circle") == 4  # three values, one of them ringed
    assert "deepseek-v4-pro on gb200 over ep" in text


def test_formats_are_swept_by_name() -> None:
    rows = as_json("sweep", *PRO, "--ep", 16, "--over", "combine-format", "--values", "bf16,mxfp8,nvfp4")
    assert [row["threshold_flops_per_byte"] for row in rows] == sorted(row["threshold_flops_per_byte"] for row in rows)


def test_one_command_answers_which_topology() -> None:
    """Top-4 of 6144 values, BF16 both ways: 84 KiB across 8 devices, and of 16 in two nodes 48 KiB between them."""
    sizes = ("model.topk=4", "model.hidden=6144")
    flags = [part for size in sizes for part in ("--set", size)]
    formats = ("--dispatch-format", "bf16", "--combine-format", "bf16")
    rows = as_json("compare", "h100", "gb200", "--model", "glm-4.5", "--ep", "8,16", *flags, *formats)
    found = {(row["hardware"], row["ep"]): row for row in rows}
    assert {key: row["domains"] for key, row in found.items()} == {
        ("h100", 8): 1,
        ("h100", 16): 2,
        ("gb200", 8): 1,
        ("gb200", 16): 1,
    }
    kib = {key: row["token_bytes_across_devices"] / 1024 for key, row in found.items()}
    assert kib["h100", 8] == kib["gb200", 8] == 84
    assert kib["h100", 16] == kib["gb200", 16] == 90
    assert [row["token_bytes_across_domains"] / 1024 for row in rows] == [0, 48, 0, 0]
    assert found["h100", 16]["binding_tier"] == "nic"
    assert found["h100", 16]["verdict"] == "exposed"
    table = run("compare", "h100", "gb200", "--model", "glm-4.5", "--ep", "8,16,32,64").stdout
    assert max(map(len, table.splitlines())) <= 84
    assert "2 of 8" in table


def test_compare_has_a_row_for_each_name_in_order() -> None:
    rows = as_json("compare", "h800", "gb200", "mi355x", "--model", "deepseek-v4-pro", "--ep", "8")
    assert [row["hardware"] for row in rows] == ["h800", "gb200", "mi355x"]
    assert [row["verdict"] for row in rows] == ["exposed", "hidden", "exposed"]
    models = as_json("compare", "deepseek-v3", "deepseek-v4-pro", "--by", "model", "--hardware", "gb200", "--ep", "16")
    assert [row["threshold_flops_per_byte"] for row in models] == [4096, 6144]


def test_compare_names_the_row_that_cannot_be_planned() -> None:
    small = ("--set", "hardware.scaleup_domain=8")
    done = run("compare", "tpu7x", "gb200", "--model", "deepseek-v4-pro", "--ep", "16", *small)
    assert "tpu7x: EP16 spans 2 scale-up domains of 8" in done.stderr
    assert "gb200" in done.stdout
    assert "EP16 spans" in refused("compare", "tpu7x", "--model", "deepseek-v4-pro", "--ep", "16", *small)


def test_require_prints_every_input() -> None:
    found = as_json("require", *PRO, "--ep", 16)
    assert found["sentence"] == SENTENCE
    keys = [row["key"] for row in found["require"]]
    assert keys[:3] == ["hardware.scaleup_gb_s", "ep", "tokens_per_rank"]
    assert {"combine_format", "dispatch_format", "model.intermediate", "hardware.fp8_tflops"} <= set(keys)
    assert run("require", *PRO, "--ep", 16).stdout.splitlines()[0] == SENTENCE
    alone = run("require", "--model", "gpt-oss-20b", "--hardware", "gb200", "--ep", 1).stdout
    assert "nothing is sent" in alone


def test_explain_prints_every_term() -> None:
    found = as_json("explain", *PRO, "--ep", 16, "--batch", 96)
    terms = {term["name"]: term for term in found["terms"]}
    assert terms["paper, scale-up: threshold"]["numbers"] == "6 x 3072 / (1 + 2) / 1"
    assert {"compute", "memory", "layer", "TPOT", "memory: cache"} <= set(terms)
    said = run("explain", *PRO, "--ep", 16).stdout
    assert said.splitlines()[0] == SENTENCE
    assert "= 6 x 3072 / (1 + 2) / 1" in said


# ---- catalog, validate ----


def test_a_recommendation_names_the_tokens_that_are_cached_already() -> None:
    load = ("--requests-per-s", 2, "--input-tokens", 400, "--cached-tokens", 300, "--output-tokens", 80)
    done = run("recommend", "--model", "gpt-oss-20b", "--hardware", "h100", *load)
    assert "2 requests/s of 400 tokens in (300 of them cached) and 80 out" in done.stdout.splitlines()[0]


def test_what_changes_nothing_and_what_no_link_hides_is_said() -> None:
    done = run("plan", *PRO, "--ep", 8, "--links", "nic=50x4,25x4")
    assert done.stderr.endswith("links of nic change nothing: no row crosses one at EP8\n")
    assert "change nothing" not in run("plan", *PRO, "--ep", 8, "--links", "scaleup=900x4,450x4").stderr
    why = "staged is exposed on any link: each of its stages waits for the one before\n"
    assert run("sweep", *PRO, "--ep", 8, "--over", "stack", "--values", "fused,staged").stdout.endswith(why)
    by_stack = ("compare", "--by", "stack", *PRO, "--ep", 8, "fused")
    assert run(*by_stack, "staged").stdout.endswith(why)
    assert not run(*by_stack, "staged-two-batch").stdout.endswith(why)


def test_a_machine_that_calibrate_wrote_is_shown_and_named_as_a_shell_reads_it(tmp_path: Path) -> None:
    runs, written = Path(__file__).parents[1] / "docs" / "data" / "lab_runs.json", tmp_path / "a machine.yaml"
    done = run("calibrate", runs, "--write", written)
    assert f"wrote {written}: megamoe bench --machine '{written}'\n" in done.stderr
    assert as_json("catalog", "show", written)["kind"] == "machines"


def test_the_catalog_lists_and_shows_everything() -> None:
    found = as_json("catalog", "list")
    assert {"hardware", "models", "profiles"} <= set(found)
    names = [entry["name"] for kind in found.values() for entry in kind]
    assert {"gb200", "deepseek-v4-pro", "blackwell"} <= set(names)
    table = run("catalog", "list").stdout
    assert all(f"\n{name} " in table for name in names)
    assert [entry["name"] for entry in as_json("catalog", "list", "hardware")["hardware"]] == [
        entry["name"] for entry in found["hardware"]
    ]


def test_a_figure_is_shown_with_unit_way_tag_and_source() -> None:
    line = next(line for line in run("catalog", "show", "gb200").stdout.splitlines() if line.startswith("scaleup_gb_s"))
    assert line.split() == ["scaleup_gb_s", "900", "GB/s", "one", "way", "vendor"]
    shown = as_json("catalog", "show", "gb200")
    assert shown["kind"] == "hardware"
    assert shown["scaleup_gb_s"]["way"] == "one-way"
    assert all(shown[key]["source"] for key in shown if isinstance(shown[key], dict))
    assert as_json("catalog", "show", "v4-pro")["name"] == "deepseek-v4-pro"  # an alias


def test_validate_prints_the_errors_of_a_table() -> None:
    found = as_json("validate", TABLE)
    assert found["rows"] == 256
    keys = {"rows", "median_abs_pct_error", "p95_abs_pct_error", "max_abs_pct_error"}
    for group in (found, *found["by_ep_size"].values(), *found["by_routing"].values()):
        assert keys <= set(group)
    assert set(found["by_ep_size"]) == {"4", "8", "16", "32"}
    assert sum(group["rows"] for group in found["by_routing"].values()) == 256


def test_validate_without_a_table_knows_what_was_published() -> None:
    found = as_json("validate")
    assert set(found) == {"deepgemm-316", "deepep-dispatch", "isca", "serving"}
    assert found["isca"]["max_abs_pct_error"] < 0.1
    for group in found.values():
        for row in group["compared"]:
            assert row["error_pct"] == pytest.approx(100 * (row["ours"] / row["published"] - 1))


def test_a_kernels_profile_is_named_by_plan_and_by_validate(tmp_path: Path) -> None:
    kernel = ("--profile", "flashinfer-nvfp4")
    formats = ("--weight-format", "nvfp4", "--dispatch-format", "nvfp4")
    shown = run("plan", "--model", "deepseek-v3", "--hardware", "b200", "--ep", 8, *kernel, *formats).stdout
    assert "profile flashinfer-nvfp4: FlashInfer moe_ep" in shown
    assert "fitted" not in run("plan", *PRO, "--ep", 16).stdout
    rows = (TABLE.parent / "flashinfer_fused_gb200_ep4.csv").read_text().splitlines()
    path = tmp_path / "nvfp4.csv"
    path.write_text("\n".join(row for row in rows if "dg_fp8xfp4" not in row))
    own, by_kernel = as_json("validate", path), as_json("validate", path, *kernel)
    assert by_kernel["median_abs_pct_error"] < own["median_abs_pct_error"]
    assert len(by_kernel["assumed"]) == len(own["assumed"]) + 1
    assert f"{TABLE}, row 1: profile flashinfer-nvfp4 is of a kernel for" in refused("validate", TABLE, *kernel)
    assert "--profile is of a file's rows" in refused("validate", *kernel)


def test_validate_names_the_file_and_the_row(tmp_path: Path) -> None:
    lines = TABLE.read_text().splitlines()[:3]
    table = tmp_path / "rows.csv"
    table.write_text("\n".join([*lines[:2], lines[2].replace("balanced", "foo")]))
    assert f"{table}, " in refused("validate", table)
    assert "foo" in refused("validate", table)
    assert "there is no file" in refused("validate", tmp_path / "none.csv")


# ---- what is wrong ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "deepseek-v5-pro", "--hardware", "gb200"), "the nearest are deepseek-v4-pro"),
        (("--model", "deepseek-v4-pro", "--hardware", "gb20"), "the nearest are gb200, dgx-spark, b200"),
        (("--model", "deepseek-v4-pro"), "no hardware is given"),
        ((*PRO, "--ep", 0), "ep is 0"),
        ((*PRO, "--ep", 1000), "EP1000 is larger than the 384 experts"),
        ((*PRO, "--ep", 16, "--devices", 0), "devices is 0"),
        ((*PRO, "--ep", 16, "--devices", 24), "24 devices cannot be divided into groups of EP16"),
        ((*PRO, "--ep", 16, "--batch", 0), "batch is 0"),
        ((*PRO, "--ep", 16, "--tokens-per-rank", 0), "tokens_per_rank is 0"),
        ((*PRO, "--ep", 16, "--context", 9_999_999), "a context of 9999999 is longer than"),
        ((*PRO, "--ep", 16, "--waves", 10**9), "waves is 1000000000; the planner goes up to 4096"),
        ((*PRO, "--ep", 16, "--set", "hardware.scaleup_gb_s=-3"), "hardware.scaleup_gb_s is -3"),
        ((*PRO, "--ep", 16, "--set", "hardware.scaleup=3"), "the nearest are scaleup_gb_s"),
        ((*PRO, "--ep", 16, "--set", "hardware.scaleup_gb_s=1e-300"), "a layer takes 1e+306 us"),
        ((*PRO, "--ep", 16, "--set", "hardware.scaleup_gb_s=1e-308"), "the result is no number"),
        ((*PRO, "--ep", 16, "--set", "hardware.scaleup_gb_s=1e300"), "cannot be calculated with"),
        ((*PRO, "--ep", 16, "--routing", "zipff"), "routing 'zipff' is not known"),
        ((*PRO, "--ep", 16, "--combine-format", "fp9"), "the nearest are fp8"),
        ((*PRO, "--ep", 16, "--tpot-ms", 0), "tpot_ms is 0"),
        ((*PRO, "--target-tps", 1e30), "target_tps 1e+30 takes more devices than the planner goes up to: 10000000 of "),
        ((*PRO, "--target-tps", 1e308), "target_tps 1e+308 takes more devices than the planner goes up to"),
        ((*PRO, "--ep", 16, "--batch", 4, "--ttft-ms", 3), "ttft_ms is a target of prefill"),
        ((*PRO, "--config", "/nowhere.yaml"), "cannot read /nowhere.yaml"),
        ((*PRO, "--report", "/nowhere/page.html"), "is in no folder that exists"),
        ((*PRO, "--report", "page.pdf"), "report page.pdf must end in .html"),
    ],
)
def test_a_wrong_plan_is_refused_in_one_line(arguments: tuple[object, ...], said: str) -> None:
    assert said in refused("plan", *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sweep", *PRO, "--over", "contex", "--values", "1"), "the nearest is context"),
        (("sweep", *PRO, "--over", "ep", "--values", "8,x"), "ep 'x' is no whole number"),
        (("sweep", *PRO, "--over", "ep", "--from", "8"), "--from A --to B"),
        (("sweep", *PRO, "--over", "ep", "--values", "8,1000"), "EP1000 is larger"),
        (("sweep", *PRO, "--over", "ep", "--values", "8", "--figure", "a.png"), "must end in .svg"),
        (("compare", "gb200", "--model", "glm-4.5", "--ep", "8,a"), "is no list of EP sizes"),
        (("compare", "gb200", "--hardware", "h100", "--model", "glm-4.5"), "leave --hardware out"),
        (("compare", "gb20", "--model", "glm-4.5"), "the nearest are gb200"),
        (("catalog", "show", "gb20"), "the nearest are gb200"),
        (("catalog", "show", "zzz"), "megamoe catalog list"),
        (("catalog", "show", ""), "an empty name is no model's"),
        (
            ("plan", "--model", "https://host/config.json", "--hardware", "h100"),
            "is an address, and nothing is downloaded",
        ),
        (("sweep", *PRO, "--over", "ep=8,16"), "'ep=8,16' is more than a key: --over ep --values 8,16"),
        (("calibrate", "."), ". is a folder"),
        (("explain", *PRO, "--ep", "999"), "EP999 is larger"),
        (("require", *PRO, "--ep", "999"), "EP999 is larger"),
        (
            ("recommend", *PRO, "--requests-per-s", "0", "--input-tokens", "1", "--output-tokens", "1"),
            "requests_per_s is 0",
        ),
        (
            ("recommend", *PRO, "--requests-per-s", "1e30", "--input-tokens", "4096", "--output-tokens", "500"),
            "requests_per_s is 1e+30; the planner goes up to 1e+12",
        ),
        (
            ("recommend", *PRO, "--requests-per-s", "1e10", "--input-tokens", "4096", "--output-tokens", "500"),
            "requests_per_s 1e+10 takes more devices than the planner goes up to: 10000000 of them carry ",
        ),
        (
            ("recommend", *PRO, "--requests-per-s", "1", "--input-tokens", "1", "--output-tokens", "1000000000000"),
            "output_tokens is 1000000000000; the planner goes up to 1000000000",
        ),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(*arguments)


# ---- the command itself ----


def test_help_lists_every_command_once() -> None:
    said = run("--help").stdout
    for name in COMMANDS:
        assert said.count(f"\n│ {name} ") == 1, name
    for name in COMMANDS:
        assert "Usage: megamoe" in run(name, "--help").stdout.replace("root", "megamoe")


def test_what_the_library_logs_is_a_line_on_stderr_while_a_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("megamoe.parallel.somewhere")
    with exit_codes():
        log.warning("rank %d is [lost]", 1)
        log.info("nobody asked")
    assert capsys.readouterr().err == "rank 1 is [lost]\n"
    assert not logging.getLogger("megamoe").handlers


MODULES = (
    "import sys; from megamoe.launch.cli.main import app; app({arguments}, standalone_mode=False); print(*sys.modules)"
)


def started(*arguments: object) -> set[str]:
    """Top-level modules that a command in a fresh interpreter has imported."""
    code = MODULES.format(arguments=[str(each) for each in arguments])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return {name for name in done.stdout.splitlines()[-1].split() if "." not in name or name.startswith("megamoe")}


def test_a_plan_imports_nothing_that_it_does_not_need() -> None:
    plan = started("plan", *PRO, "--ep", 16, "--batch", 64)
    assert "megamoe.planner.serving.serving" in plan
    assert not {"torch", "numpy", "matplotlib", "jinja2", "megamoe.planner.report", "megamoe.launch.cli.bench"} & plan
    assert "megamoe.catalog.huggingface" not in plan, "a name of the catalog needs no reader of config.json"
    assert "numpy" in started("plan", *PRO, "--ep", 16, "--routing", "zipf_1.1")
    listed = started("--help")
    assert "torch" not in listed
    assert "numpy" not in listed


def test_a_plan_takes_little_longer_than_the_version() -> None:
    """Core time of whole commands that take turns, which other programs lengthen alike."""
    ratios = []
    for _ in range(5):
        version, plan = (_core_s(*arguments) for arguments in (["--version"], ["plan", *PRO, "--ep", "16"]))
        ratios.append(plan / version)
    assert min(ratios) < 1.7


def _core_s(*arguments: str) -> float:
    command = [sys.executable, "-c", "from megamoe.launch.cli.main import main; main()", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[0] == (SENTENCE if "plan" in arguments else megamoe.__version__)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
