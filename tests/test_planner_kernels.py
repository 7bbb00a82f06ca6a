"""Fused kernels that have a profile of their own: what they extend, what they are for, and how wrong they are."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from benchmarks.fit_kernels import KERNELS, rows_of
from megamoe.catalog import figures, find_profile, load_hardware, load_model, load_profile, names
from megamoe.planner.answer import answer
from megamoe.planner.explain import explain
from megamoe.planner.layer.cost import LayerTime, layer_time
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.plan import PlanRequest, plan
from megamoe.planner.layer.tiles import products_us, tiling_of
from megamoe.planner.question import ask
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.serving import costs_of
from megamoe.planner.serving.step import step_pieces
from megamoe.planner.validation.tables import by_profile, read
from megamoe.planner.validation.validate import Errors, compare

DATA = Path(__file__).parents[1] / "docs" / "data"
DEVICE_OF = {"blackwell": "b200", "hopper": "h200"}
NVFP4 = {"weight_format": "nvfp4", "dispatch_format": "nvfp4"}
HEADER = "hardware,model,hidden,intermediate,num_experts,topk,ep_size,tokens_per_rank,routing,stack,weight_format,"
HEADER += "dispatch_format,combine_format,profile,latency_us\n"
ROW = "b200,deepseek-v3,7168,2048,256,8,8,64,uniform,kernel,nvfp4,nvfp4,bf16,{profile},183.3\n"
every_kernel = pytest.mark.parametrize("name", KERNELS)


def took(name: str, tokens: float, combine_format: str = "bf16") -> LayerTime:
    """A layer of DeepSeek-V3 by one kernel, on EP8."""
    profile = load_profile(name)
    hardware = load_hardware(DEVICE_OF[profile.extends or ""])
    weights, tokens_in = profile.weight_formats[0], profile.dispatch_formats[0]
    expert = Expert(7168, 2048, 256, 8, True, weights, tokens_in, combine_format)
    device = Device.of(hardware, profile, compute_format(hardware, expert.weight_format, expert.dispatch_format))
    return layer_time(expert, device, ep=8, tokens_per_rank=tokens, staging=False)


# ---- what was fitted ----


def test_every_profile_of_one_kernel_is_fitted_and_held_to_its_rows() -> None:
    assert {name for name in names("profiles") if load_profile(name).one_kernel} == set(KERNELS)
    with (DATA / "holdouts.csv").open(newline="") as file:
        assert {line["profile"] for line in csv.DictReader(file)} == {*KERNELS, ""}


def test_the_constants_that_ship_are_those_that_were_fitted() -> None:
    """`python -m benchmarks.fit_kernels --write docs/data/kernel_fit.json` found them."""
    found = json.loads((DATA / "kernel_fit.json").read_text())
    assert {name: tuple(constants) for name, constants in found.items()} == KERNELS
    for name, constants in found.items():
        assert {key: getattr(load_profile(name), key).value for key in constants} == constants


BARS = {  # of the rows that were kept: median, largest, and the median that the device's own profile has at least
    "flashinfer-nvfp4": (6, 20, 8),
    "flashinfer-mxfp8": (10, 15, 9),
    "flashinfer-bf16": (12, 20, 25),
    "flashinfer-sm90": (4, 10, 10),
    "flashinfer-sm90-blockwise": (7, 22, 9),
    "deepgemm-sm90-unswapped": (8, 28, 18),
    "deepgemm-sm90-overlapped": (6, 22, 20),
}


@every_kernel
def test_rows_that_were_kept_are_met_and_better_than_by_the_devices_profile(name: str) -> None:
    fitted, kept = rows_of(name)
    assert not {id(row) for row in fitted} & {id(row) for row in kept}
    assert not KERNELS[name] or 0 <= len(fitted) - len(kept) <= 1
    found, own = Errors.of(compare(kept)), Errors.of(compare(kept, find_profile))
    most_median, most, least_own = BARS[name]
    assert found.median_abs_pct_error <= most_median
    assert found.max_abs_pct_error <= most
    assert own.median_abs_pct_error >= least_own
    assert own.max_abs_pct_error > found.max_abs_pct_error


def test_a_table_that_the_nvfp4_kernels_profile_was_not_fitted_to_is_met_better_by_it() -> None:
    """FlashInfer's tuning page, of which half fitted the profile of Blackwell."""
    table = read(DATA / "flashinfer_fused_gb200_ep4.csv")
    rows = [row for row in table.rows if row.expert.weight_format == "nvfp4"]
    own = Errors.of(compare(rows))
    found = Errors.of(compare(by_profile(replace(table, rows=rows), "flashinfer-nvfp4").rows))
    assert found.median_abs_pct_error < min(4, own.median_abs_pct_error)
    assert found.max_abs_pct_error < own.max_abs_pct_error


# ---- what they say ----


@every_kernel
def test_a_kernel_takes_no_less_for_more_tokens_and_no_less_than_its_call(name: str) -> None:
    times = [took(name, 2**number).layer_us for number in range(1, 14)]
    assert all(more >= less * (1 - 1e-9) for less, more in pairwise(times)), times
    assert times[0] > load_profile(name).fixed_us.value


@every_kernel
def test_a_kernel_has_the_figures_of_the_profile_that_it_extends(name: str) -> None:
    profile = load_profile(name)
    base = load_profile(profile.extends or "")
    own = {key for key, figure in figures(profile).items() if figure != figures(base).get(key)}
    assert set(KERNELS[name]) <= own
    assert len(own) <= 10
    assert not base.one_kernel
    assert profile.ll_dispatch_us == base.ll_dispatch_us


def test_the_kernel_that_swaps_nothing_multiplies_whole_tiles() -> None:
    """One tile of 64 rows up to 63 on average, then of 128: 64 rows are as many products as 128."""
    profile, hardware = load_profile("deepgemm-sm90-unswapped"), load_hardware("h20")
    device, expert = Device.of(hardware, profile), Expert(7168, 3072, 384, 6, True, "fp8")
    tilings = {rows: tiling_of(device, rows) for rows in (1, 48, 63, 64, 96, 500)}
    assert {rows: (each.block, each.step) for rows, each in tilings.items()} == {
        **dict.fromkeys((1, 48, 63), (64, 64)),
        **dict.fromkeys((64, 96, 500), (128, 128)),
    }
    one, two, same = (products_us(expert, device, [rows], [48], tilings[rows])[0] for rows in (48, 64, 96))
    assert one < same == two
    assert two == pytest.approx(2 * one, rel=0.1)


def test_a_slot_that_comes_home_in_fewer_bits_takes_slot_us_more_than_its_bytes() -> None:
    topk, slot_us = 8, load_profile("flashinfer-nvfp4").slot_us.value
    bf16, mxfp8 = (took("flashinfer-nvfp4", 1, combine_format=each).sum_us for each in ("bf16", "mxfp8"))
    assert bf16 < 0.1  # a token's slots are read in less than a tenth of a microsecond
    assert mxfp8 == pytest.approx(topk * slot_us, abs=0.1)
    assert took("flashinfer-mxfp8", 1, combine_format="mxfp8").sum_us < 0.1  # Blackwell's has none
    more = took("flashinfer-nvfp4", 4096, combine_format="mxfp8").sum_us - mxfp8
    assert 0 < more < took("flashinfer-nvfp4", 4096).sum_us


def test_explain_counts_the_slots_that_are_decoded() -> None:
    asked = {"model": "deepseek-v3", "hardware": "b200", "ep": 8, "profile": "flashinfer-nvfp4", **NVFP4}
    for combine, said in (("mxfp8", True), ("bf16", False)):
        found = answer(ask({**asked, "combine_format": combine}))
        (term,) = (term for term in explain(found) if term.name == "slot sum")
        assert term.value == pytest.approx(found.plan.layer.sum_us)
        slot_us = load_profile("flashinfer-nvfp4").slot_us.value
        assert (f"+ 8 x {slot_us:g}" in term.numbers, "k slot_us" in term.formula) == (said, said)


def test_of_a_whole_step_only_the_experts_are_the_kernels() -> None:
    def pieces(name: str) -> dict[tuple[str, str], float]:
        hardware = load_hardware("b200")
        d = Deployment(
            load_model("deepseek-v3"), hardware, find_profile(hardware, name), 8, 8, 32, 4096, weight_format="nvfp4",
            dispatch_format="nvfp4", dense_format="fp8",
        )  # fmt: skip
        return {(piece.name, piece.part): piece.us for piece in step_pieces(costs_of(d), d)}

    own, kernel = pieces("blackwell"), pieces("flashinfer-nvfp4")
    assert {name for name in own if own[name] != kernel[name]} == {("routed experts", "experts")}


# ---- what they are for ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "is of a kernel for nvfp4 weights and nvfp4 tokens, not fp8 and mxfp8; give weight_format nvfp4 and"),
        ({"weight_format": "nvfp4"}, "not nvfp4 and mxfp8"),
        ({**NVFP4, "stack": "staged"}, "is of one fused kernel; the staged stack has kernels of its own"),
        ({**NVFP4, "stack": "megamoe"}, "the megamoe stack has kernels of its own"),
        ({**NVFP4, "hardware": "h200"}, "is of a kernel for devices of profile blackwell; h200 is one of hopper"),
        ({**NVFP4, "hardware": "mi355x"}, "mi355x is one of default"),
        ({"batch": 32}, "not fp8 and mxfp8"),
        ({"phase": "train"}, "the megamoe stack has kernels of its own"),
    ],
    ids=["weights", "tokens", "staged", "megamoe", "hopper", "amd", "serving", "training"],
)
def test_a_kernel_is_refused_for_what_it_does_not_run(keys: dict[str, object], message: str) -> None:
    asked = {"model": "deepseek-v3", "hardware": "b200", "ep": 8, "profile": "flashinfer-nvfp4"}
    with pytest.raises(ValueError, match=message):
        answer(ask({**asked, **keys}))


def test_a_file_may_extend_a_profile_and_then_serves_every_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntitle: my kernel\nfitted: my runs\nextends: blackwell\n"
        'fixed_us: {value: 30, tag: measured, source: "my runs"}\n'
    )
    profile = load_profile(path)
    assert (profile.name, profile.fixed_us.value) == ("mine", 30)
    assert profile.feed_ps == load_profile("blackwell").feed_ps
    for hardware in ("b200", "mi355x"):
        own = load_hardware(hardware)
        request = PlanRequest(load_model("deepseek-v3"), own, find_profile(own, path), 8)
        less = replace(request, profile=load_profile("blackwell"))
        assert plan(request).layer.layer_us == pytest.approx(
            plan(less).layer.layer_us + 30 - less.profile.fixed_us.value
        )


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("blackwel", "extends 'blackwel', which is no profile; the nearest is blackwell"),
        ("flashinfer-nvfp4", "extends flashinfer-nvfp4, which extends blackwell itself; name that one"),
        ("[hopper]", r"extends '\['hopper'\]', which is no profile"),
    ],
    ids=["unknown", "twice", "list"],
)
def test_a_profile_that_extends_what_it_cannot_is_refused(tmp_path: Path, base: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ntitle: my kernel\nfitted: my runs\nextends: {base}\n")
    with pytest.raises(ValueError, match=message):
        load_profile(path)


# ---- tables ----


def test_a_rows_profile_plans_it_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(HEADER + ROW.format(profile="flashinfer-nvfp4") + ROW.format(profile=""))
    table = read(path)
    kernel, own = compare(table.rows)
    assert [row.profile for row in table.rows] == ["flashinfer-nvfp4", None]
    assert kernel.planned_us != own.planned_us
    assert any("profile flashinfer-nvfp4" in said and "fitted" in said for said in table.assumed)
    given = by_profile(table, "flashinfer-nvfp4")
    assert median(each.planned_us for each in compare(given.rows)) == kernel.planned_us
    assert given.assumed == table.assumed
    assert {each.planned_us for each in compare(table.rows, find_profile)} == {own.planned_us}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW.format(profile="flashinfer"), "line 2: no profile is called 'flashinfer'"),
        (ROW.format(profile="flashinfer-bf16"), "line 2: profile flashinfer-bf16 is of a kernel for bf16 weights"),
        (ROW.format(profile="flashinfer-nvfp4").replace("b200", "h100"), "line 2: .* for devices of profile blackwell"),
        (ROW.format(profile="flashinfer-nvfp4").replace("kernel", "deepep"), "line 2: .* the staged stack has"),
    ],
    ids=["unknown", "format", "device", "stack"],
)
def test_a_rows_profile_that_does_not_fit_is_refused(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(HEADER + row)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_profile_for_all_rows_names_the_row_that_it_is_none_for(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(HEADER + ROW.format(profile="") + ROW.format(profile="").replace("nvfp4,nvfp4", "mxfp4,mxfp8"))
    with pytest.raises(ValueError, match="row 2: profile flashinfer-nvfp4 is of a kernel for nvfp4 weights"):
        by_profile(read(path), "flashinfer-nvfp4")
