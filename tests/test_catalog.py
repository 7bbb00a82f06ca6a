"""The catalog: every figure has a source, the published numbers come back, and mistakes are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest

from megamoe.catalog import (
    Figure,
    Model,
    figures,
    find_profile,
    load_hardware,
    load_machine,
    load_model,
    load_profile,
    names,
    override,
    parameters,
    split_overrides,
)
from megamoe.catalog.huggingface import model_from_config
from megamoe.catalog.load import _HERE, Kind
from megamoe.catalog.parameters import attention_parameters, expert_parameters
from megamoe.catalog.schema import LINKS, Tag

LOAD: dict[Kind, Callable[[str], Any]] = {
    "hardware": load_hardware,
    "models": load_model,
    "profiles": load_profile,
    "machines": load_machine,
}
KINDS: tuple[Kind, ...] = get_args(Kind)
ENTRIES = [(kind, name) for kind in KINDS for name in names(kind)]
every_entry = pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{kind}-{name}" for kind, name in ENTRIES])


# ---- every file ----


@every_entry
def test_every_file_loads_under_its_own_name_and_says_where_its_figures_come_from(kind: Kind, name: str) -> None:
    entry = LOAD[kind](name)
    assert entry.name == name
    assert entry.title
    assert entry.source if isinstance(entry, Model) else figures(entry)
    for key, figure in figures(entry).items():
        assert figure.tag in get_args(Tag)
        assert len(figure.source) > 5, key
        assert (figure.way is not None) == (key in LINKS), key


@every_entry
def test_no_figure_is_called_the_vendors_where_its_source_says_that_none_was_found(kind: Kind, name: str) -> None:
    unsure = ("no source", "no figure found", "projection", "low confidence", "was not read", "not fitted")
    for key, figure in figures(LOAD[kind](name)).items():
        if any(word in figure.source for word in unsure):
            assert figure.tag == "assumed", key


@pytest.mark.parametrize("kind", ["hardware", "models"])
def test_an_alias_stands_for_one_entry_and_hides_no_name(kind: Kind) -> None:
    owners = [(alias, name) for name in names(kind) for alias in LOAD[kind](name).aliases]
    aliases = [alias for alias, _ in owners]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(names(kind))
    assert all(LOAD[kind](alias).name == owner for alias, owner in owners)


@pytest.mark.parametrize("text", ["yaml", "json"])
def test_what_comes_through_a_pipe_is_loaded_as_often_as_it_is_asked_for(tmp_path: Path, text: str) -> None:
    """bash's <(...), which can be read once."""
    os.mkfifo(pipe := tmp_path / "pipe")
    said = (_HERE / "models" / "deepseek-v3.yaml").read_bytes()
    if text == "json":
        keys = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8}
        keys |= {"num_experts_per_tok": 2, "num_hidden_layers": 32, "vocab_size": 32000, "num_attention_heads": 32}
        said = json.dumps(keys).encode()
    with ThreadPoolExecutor(1) as writer:
        writer.submit(pipe.write_bytes, said)
        first, second = load_model(pipe), load_model(str(pipe))
    assert first == second
    assert first.name == ("deepseek-v3" if text == "yaml" else "piped")


def test_names_are_found_however_they_are_written() -> None:
    assert load_hardware("GB200_NVL72").name == "gb200"
    assert load_model("deepseek-ai/DeepSeek-V4-Pro").name == "deepseek-v4-pro"
    assert load_model("DeepSeek-R1").name == "deepseek-v3"


def test_a_folder_of_the_same_name_does_not_hide_the_catalogs_model(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mixtral-8x7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("mixtral-8x7b").num_experts == 8


# ---- hardware: the published figures ----

# bf16, fp8, fp4 TFLOP/s; memory GB, TB/s; scale-up GB/s one way, domain; NIC GB/s
DEVICES = {
    "a100": (312, None, None, 80, 2.04, 300, 8, 25),
    "h100": (989, 1979, None, 80, 3.35, 450, 8, 50),
    "h800": (989, 1979, None, 80, 3.35, 200, 8, 50),
    "h20": (148, 296, None, 96, 4.0, 450, 8, 50),
    "h200": (989, 1979, None, 141, 4.8, 450, 8, 50),
    "b200": (2250, 4500, 9000, 180, 8.0, 900, 8, 50),
    "gb200": (2500, 5000, 10000, 186, 8.0, 900, 72, 50),
    "b300": (2250, 4500, 12600, 268, 8.0, 900, 8, 100),
    "gb300": (2500, 5000, 15000, 288, 8.0, 900, 72, 100),
    "rubin": (4000, 17500, 35000, 288, 22, 1800, 72, 200),
    "mi300x": (1307, 2615, None, 192, 5.3, 448, 8, 50),
    "mi325x": (1307, 2615, None, 256, 6.0, 448, 8, 50),
    "mi355x": (2500, 5000, 10100, 288, 8.0, 537.6, 8, 50),
    "mi455x": (5000, 10000, 20000, 432, 19.6, 1800, 72, 300),
    "ascend-910b": (313, None, None, 64, 1.6, 392, 8, 25),
    "ascend-910c": (752, None, None, 128, 3.2, 392, 384, 50),
    "ascend-950pr": (None, 919, 1784, 128, 1.6, 1000, 32, None),
    "ascend-950dt": (486, 919, 1783, 96, 4.0, 840, 1024, 100),
    "a100-pcie": (312, None, None, 80, 1.935, 32, 8, 25),
    "h100-pcie": (756, 1513, None, 80, 2.0, 64, 8, 50),
    "l40s": (362.05, 733, None, 48, 0.864, 32, 8, 25),
    "rtx-5090": (209.5, 419, 1676, 32, 1.792, 64, 4, None),
    "rtx-pro-6000": (503.8, 1007.6, 2015.2, 96, 1.792, 64, 8, 50),
    "dgx-spark": (125, 250, 500, 128, 0.273, 25, 1, 25),
    "mi350x": (2300, 4600, 9200, 288, 8.0, 537.6, 8, 50),
    "gaudi-3": (1835, 1835, None, 128, 3.67, 525, 8, 75),
    "xeon-6": (524, None, None, 768, 0.845, 288, 2, 50),
    "epyc-turin": (55.3, None, None, 768, 0.614, 256, 2, 50),
    "tpu7x": (2307, 4614, None, 206.2, 7.37, 600, 9216, None),
}


def value(figure: Figure | None) -> float | None:
    return None if figure is None else figure.one_way


def test_the_table_holds_every_device() -> None:
    assert sorted(DEVICES) == names("hardware")


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_has_its_published_figures(name: str) -> None:
    h = load_hardware(name)
    peaks = (value(h.bf16_tflops), value(h.fp8_tflops), value(h.fp4_tflops))
    links = (value(h.scaleup_gb_s), value(h.scaleup_domain), value(h.nic_gb_s))
    assert (*peaks, value(h.memory_gb), value(h.memory_tb_s), *links) == DEVICES[name]


# 8-bit peak over one-way scale-up, FLOPs/Byte
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h100", 4398),
        ("h800", 9895),
        ("h20", 658),
        ("b200", 5000),
        ("gb200", 5556),
        ("gb300", 5556),
        ("rubin", 9722),
        ("mi300x", 5837),
        ("mi355x", 9301),
        ("ascend-950dt", 1094),
        ("tpu7x", 7690),
    ],
)
def test_flops_per_byte_of_the_scale_up_link_come_out_as_published(name: str, expected: int) -> None:
    hardware = load_hardware(name)
    assert round(hardware.tflops("fp8") * 1e3 / hardware.scaleup_gb_s.one_way) == expected


@pytest.mark.parametrize("name", ["mi300x", "mi325x", "mi355x", "ascend-910b"])
def test_a_machine_of_pairs_has_the_sum_of_its_seven_pairs(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.p2p_gb_s is not None
    assert hardware.scaleup_gb_s.one_way == pytest.approx(7 * hardware.p2p_gb_s.one_way)


def test_a_figure_of_both_directions_counts_half() -> None:
    figure = load_hardware("h800").scaleup_gb_s
    assert (figure.value, figure.way, figure.one_way) == (400, "both", 200)


def test_a_format_that_a_device_lacks_is_refused_with_those_it_has() -> None:
    assert load_hardware("ascend-910c").tflops("int8") == 1504
    with pytest.raises(ValueError, match=r"^ascend-910c has no fp8 peak; it has bf16 752, int8 1504 TFLOP/s$"):
        load_hardware("ascend-910c").tflops("fp8")


def test_the_price_is_the_neoclouds_and_none_where_nobody_gave_one() -> None:
    price = load_hardware("gb200").usd_per_hour
    assert price is not None
    assert (price.value, load_hardware("tpu7x").usd_per_hour) == (2.75, None)


# ---- models: the published figures ----

# hidden, intermediate, layers, dense layers, experts, topk, shared experts
MODELS = {
    "deepseek-v3": (7168, 2048, 61, 3, 256, 8, 1),
    "deepseek-v3.2": (7168, 2048, 61, 3, 256, 8, 1),
    "deepseek-v4-flash": (4096, 2048, 43, 0, 256, 6, 1),
    "deepseek-v4.1-flash": (5120, 2304, 40, 0, 384, 6, 1),
    "deepseek-v4-pro": (7168, 3072, 61, 0, 384, 6, 1),
    "kimi-k2": (7168, 2048, 61, 1, 384, 8, 1),
    "kimi-k2.5": (7168, 2048, 61, 1, 384, 8, 1),
    "kimi-k3": (7168, 3072, 93, 1, 896, 16, 2),
    "qwen3-235b-a22b": (4096, 1536, 94, 0, 128, 8, 0),
    "qwen3-30b-a3b": (2048, 768, 48, 0, 128, 8, 0),
    "qwen3-coder-480b-a35b": (6144, 2560, 62, 0, 160, 8, 0),
    "qwen3-next-80b-a3b": (2048, 512, 48, 0, 512, 10, 1),
    "qwen3.5-397b-a17b": (4096, 1024, 60, 0, 512, 10, 1),
    "qwen3.5-122b-a10b": (3072, 1024, 48, 0, 256, 8, 1),
    "qwen3.5-35b-a3b": (2048, 512, 40, 0, 256, 8, 1),
    "qwen3.8-2.4t-a95b": (8192, 2048, 92, 0, 512, 10, 1),
    "glm-4.5": (5120, 1536, 92, 3, 160, 8, 1),
    "glm-5": (6144, 2048, 78, 3, 256, 8, 1),
    "glm-5.2": (6144, 2048, 78, 3, 256, 8, 1),
    "gpt-oss-120b": (2880, 2880, 36, 0, 128, 4, 0),
    "gpt-oss-20b": (2880, 2880, 24, 0, 32, 4, 0),
    "mixtral-8x7b": (4096, 14336, 32, 0, 8, 2, 0),
    "mixtral-8x22b": (6144, 16384, 56, 0, 8, 2, 0),
    "llama-4-maverick": (5120, 8192, 48, 0, 128, 1, 1),
    "llama-4-scout": (5120, 8192, 48, 0, 16, 1, 1),
    "minimax-m2.5": (3072, 1536, 62, 0, 256, 8, 0),
    "minimax-m3": (6144, 3072, 60, 3, 128, 4, 1),
    "step-3.7-flash": (4096, 1280, 45, 3, 288, 8, 1),
    "hy3-preview": (4096, 1536, 80, 1, 192, 8, 1),
    "mimo-v2-flash": (4096, 2048, 48, 1, 256, 8, 0),
    "nemotron-3-super": (4096, 2688, 88, 0, 512, 22, 1),
    "nemotron-3-ultra": (8192, 5120, 108, 0, 512, 22, 1),
}


def test_the_table_holds_every_model() -> None:
    assert sorted(MODELS) == names("models")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_its_published_sizes(name: str) -> None:
    m = load_model(name)
    assert (m.hidden, m.intermediate, m.layers, m.dense_layers, m.num_experts, m.topk, m.shared_experts) == MODELS[name]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("deepseek-v4-pro", {"hca": 31, "csa": 30}),
        ("deepseek-v4-flash", {"sliding": 2, "csa": 21, "hca": 20}),
        ("kimi-k3", {"linear": 69, "mla": 24}),
        ("qwen3-next-80b-a3b", {"linear": 36, "gqa": 12}),
        ("nemotron-3-super", {"linear": 40, "gqa": 8}),
    ],
)
def test_layers_of_each_kind_of_attention(name: str, kinds: dict[str, int]) -> None:
    assert {attention.kind: attention.layers for attention in load_model(name).attention} == kinds


def test_layers_with_experts_are_counted_where_not_every_layer_has_them() -> None:
    counted = {name: load_model(name) for name in ("deepseek-v3", "llama-4-maverick", "nemotron-3-super")}
    assert {name: (m.moe_layers, m.mlp_layers) for name, m in counted.items()} == {
        "deepseek-v3": (58, 3),
        "llama-4-maverick": (24, 24),
        "nemotron-3-super": (40, 0),
    }


# ---- parameters ----

# What one token uses is stated by different rules; these are farther than 5 % from ours, which counts the head and not
# the embedding.
ACTIVE_BY_ANOTHER_RULE = {
    "qwen3-next-80b-a3b": (1.10, 1.25),  # 3.6, sold as "3B"
    "qwen3.5-122b-a10b": (0.88, 0.92),  # 9.8 with the embedding of 0.8
    "minimax-m3": (1.05, 1.09),  # 23.5 without the head of 1.2
    "llama-4-maverick": (0.94, 0.96),  # 17.2 with the embedding of 1.0
    "llama-4-scout": (0.94, 0.96),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_make_the_stated_total_and_active_parameters(name: str) -> None:
    model = load_model(name)
    counted = parameters(model)
    assert model.total_params_b is not None
    assert counted.total / 1e9 == pytest.approx(model.total_params_b.value, rel=0.05)
    if model.active_params_b is not None:
        low, high = ACTIVE_BY_ANOTHER_RULE.get(name, (0.95, 1.05))
        assert low <= counted.active / 1e9 / model.active_params_b.value <= high


def test_only_kimi_k3_has_no_stated_active_parameters() -> None:
    assert [name for name in names("models") if load_model(name).active_params_b is None] == ["kimi-k3"]


def test_the_parts_make_the_total_and_mtp_stands_apart() -> None:
    p = parameters(load_model("deepseek-v3"))
    assert p.total == p.routed + p.shared + p.mlp + p.attention + p.router + p.embedding + p.head
    assert p.mtp / 1e9 == pytest.approx(11.6, abs=0.1)  # stated as 14 with the embedding and head, 0.9 each, of its own
    assert p.routed == 58 * 256 * 3 * 7168 * 2048


def test_one_layer_of_mla_counted_by_hand() -> None:
    (mla,) = load_model("deepseek-v3").attention
    q, kv = 7168 * 1536 + 1536 * 128 * 192, 7168 * 576 + 512 * 128 * 256
    assert attention_parameters(mla, 7168) == q + kv + 128 * 128 * 7168


def test_one_layer_of_v4s_sparse_attention_counted_by_hand() -> None:
    csa = next(a for a in load_model("deepseek-v4-flash").attention if a.kind == "csa")
    q, kv, o = 4096 * 1024 + 1024 * 64 * 512, 4096 * 512, 64 * 512 * 1024 + 8 * 1024 * 4096
    compressors = 2 * 4096 * 2 * 512 + 2 * 4096 * 2 * 128
    assert attention_parameters(csa, 4096) == q + kv + o + compressors + 1024 * 64 * 128 + 4096 * 64


def test_an_expert_without_a_gate_has_two_matrices_of_the_width_that_travels() -> None:
    assert expert_parameters(load_model("nemotron-3-super")) == 2 * 1024 * 2688
    assert expert_parameters(load_model("kimi-k3")) == 3 * 3584 * 3072
    # DeepSeek-V4-Pro's published checkpoint: 35.1 MB an expert at 4.25 bits
    assert expert_parameters(load_model("deepseek-v4-pro")) * 4.25 / 8 == pytest.approx(35.1e6, rel=1e-3)


# ---- what is not in the catalog ----


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_hardware, "gb20", r"^no hardware is called 'gb20'; the nearest are gb200, dgx-spark, b200$"),
        (load_hardware, "gh100", r"^no hardware is called 'gh100'; the nearest are h100, "),
        (load_model, "deepseek-v4", r"^no model is called 'deepseek-v4'; the nearest are .*deepseek-v4-pro"),
        (load_model, "moonshotai/Kimi-K4", r"the nearest are kimi-k3, kimi-k2.5, kimi-k2$"),
        (load_profile, "hoper", r"^no profile is called 'hoper'; the nearest is hopper$"),
        (load_hardware, "zzzz", r"^no hardware is called 'zzzz'; there is a100, a100-pcie, ascend-910b, .*xeon-6$"),
        (load_hardware, "mine.yaml", r"^there is no file mine.yaml$"),
        (load_model, "some/config.json", r"^there is no file some/config.json$"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(load: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name)


# ---- a user's own files ----

OWN = """
name: mine
title: my machine
profile: default
fp8_tflops: {value: 100, tag: measured, source: my bench}
memory_gb: {value: 24, tag: vendor, source: its box}
memory_tb_s: {value: 1, tag: vendor, source: its box}
scaleup_gb_s: {value: 64, tag: vendor, source: its box, way: both}
scaleup_domain: {value: 4, tag: vendor, source: its box}
"""


def own(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in OWN
    path = folder / "mine.yaml"
    path.write_text(OWN.replace(old, new) if old else OWN)
    return path


def test_a_path_to_a_yaml_file_works_wherever_a_name_does(tmp_path: Path) -> None:
    hardware = load_hardware(own(tmp_path))
    assert (hardware.name, hardware.scaleup_gb_s.one_way, hardware.nic_gb_s) == ("mine", 32, None)
    assert find_profile(hardware).name == "default"


def test_a_file_may_name_a_profile_that_lies_beside_it(tmp_path: Path, monkeypatch: Any) -> None:
    shipped = Path(sys.modules["megamoe.catalog"].__file__ or "").parent / "profiles" / "default.yaml"
    (tmp_path / "fitted.yaml").write_text(shipped.read_text().replace("name: default", "name: fitted"))
    hardware = load_hardware(own(tmp_path, "profile: default", "profile: fitted.yaml"))
    monkeypatch.chdir("/")
    assert find_profile(hardware).name == "fitted"
    assert find_profile(hardware, "hopper").name == "hopper"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fp8_tflops:", "fp8_tflop:", r"unknown key 'fp8_tflop'; the nearest are fp8_tflops"),
        ("tag: measured", "tags: measured", r"unknown key 'fp8_tflops.tags'; the nearest is tag \(and 1 more\)"),
        ("memory_gb: {value: 24, tag: vendor, source: its box}", "", r"'memory_gb' is missing"),
        (", way: both", "", r"scaleup_gb_s needs way: one-way or both"),
        ("way: both", "way: duplex", r"scaleup_gb_s.way is 'duplex'; input should be 'one-way' or 'both'"),
        ("value: 24,", "value: 24, way: both,", r"memory_gb is no link and has no way"),
        ("value: 24", "value: -24", r"memory_gb: a figure is a number of 0 or more, not -24"),
        ("value: 24", "value: much", r"memory_gb.value is 'much'; input should be a valid number"),
        ("source: my bench", "source: ' '", r"fp8_tflops: a figure needs a source"),
        ("tag: measured", "tag: guessed", r"fp8_tflops.tag is 'guessed'; input should be 'measured', 'vendor'"),
        ("value: 4,", "value: 4.5,", r"scaleup_domain counts devices, 4.5 is no whole number"),
        ("fp8_tflops: {value: 100, tag: measured, source: my bench}", "", r"no peak is given"),
        ("title: my machine", "title: my: machine", r" line 3: mapping values are not allowed (here|in this context)"),
        ("title: my machine", "name: twice", r" line 3: name is given twice"),
        ("title: my machine", "title: [", r" line \d+: "),
        (OWN, "- 1\n", r" holds no keys; a hardware starts with name: and title:"),
    ],
)
def test_a_mistake_in_a_file_is_named_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = own(tmp_path, old, new)
    with pytest.raises(ValueError, match=message) as caught:
        load_hardware(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 9}, r"topk 9 is more than num_experts 8"),
        ({"dense_layers": 2}, r"dense_layers 2 leaves none of 2 layers for experts"),
        ({"dense_layers": 1}, r"dense_layers 1 needs dense_intermediate"),
        ({"num_moe_layers": 3}, r"num_moe_layers 3 is more than layers 2"),
        ({"layers": 3}, r"the attention kinds have 2 layers together, the model has 3"),
        ({"attention": [{"kind": "mla", "layers": 2, "heads": 4}]}, r"attention of kind mla needs kv_lora, rope_dim, "),
        (
            {"attention": [{"kind": "gqa", "layers": 2, "heads": 4, "kv_head": 2}]},
            r"unknown key 'attention.0.kv_head'; the",
        ),
        ({"hidden": 0}, r"hidden is 0; input should be greater than 0"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    gqa = {"kind": "gqa", "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64}
    sizes = {"hidden": 256, "intermediate": 128, "layers": 2, "num_experts": 8, "topk": 2, "vocab": 1000}
    said = {"name": "small", "title": "small", "source": "made up", "tag": "assumed", "attention": [gqa]}
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**said, **sizes, **change}))  # JSON is YAML
    with pytest.raises(ValueError, match=message):
        load_model(path)


# ---- overrides ----


def test_an_override_says_that_it_was_set_by_hand_and_leaves_the_rest() -> None:
    before = load_hardware("h800")
    after = override(before, {"scaleup_gb_s": "450", "announced": "true"})
    assert after.scaleup_gb_s == Figure(value=450, tag="assumed", source="set on the command line", way="one-way")
    assert (before.scaleup_gb_s.one_way, after.announced, after.memory_gb) == (200, True, before.memory_gb)


def test_a_figure_that_was_missing_can_be_set_and_one_that_may_be_missing_taken_away() -> None:
    assert value(override(load_hardware("tpu7x"), {"nic_gb_s": "25"}).nic_gb_s) == 25
    assert override(load_hardware("gb200"), {"nic_gb_s": "none"}).nic_gb_s is None


def test_overrides_of_a_model_and_a_profile() -> None:
    model = override(load_model("deepseek-v4-pro"), {"topk": "8", "weight_format": "bf16", "gated": "false"})
    assert (model.topk, model.weight_format, model.gated) == (8, "bf16", False)
    assert model.notes["topk"] == "set on the command line"
    profile = load_profile("default")
    key = next(iter(figures(profile)))
    assert figures(override(profile, {key: "0.5"}))[key].tag == "assumed"


@pytest.mark.parametrize(
    ("thing", "changes", "message"),
    [
        ("gb200", {"scaleup_gbs": "1"}, r"^hardware has no key 'scaleup_gbs' to set; the nearest are scaleup_gb_s"),
        ("gb200", {"scaleup_gb_s": "-3"}, r"^hardware.scaleup_gb_s is -3; it must be a number of 0 or more$"),
        ("gb200", {"scaleup_gb_s": "nan"}, r"^hardware.scaleup_gb_s is nan; it must be"),
        ("gb200", {"scaleup_gb_s": "fast"}, r"^hardware.scaleup_gb_s is 'fast', which is not a number$"),
        ("gb200", {"scaleup_gb_s": "none"}, r"^hardware.scaleup_gb_s is 'none', which is not a number$"),
        (
            "gb200",
            {"nic_gb_s": "0"},
            r"^hardware gb200: nic_gb_s is 0; where there is nothing, leave the key out or set",
        ),
        ("deepseek-v3", {"topk": "0"}, r"^model deepseek-v3: topk is '0'; input should be greater than 0$"),
        ("deepseek-v3", {"topk": "300"}, r"^model deepseek-v3: topk 300 is more than num_experts 256$"),
        ("deepseek-v3", {"weight_format": "fp4"}, r"weight_format is 'fp4'; input should be 'bf16', 'fp8', 'mxfp4'"),
        ("deepseek-v3", {"attention": "mla"}, r"^model has no key 'attention' to set"),
        ("deepseek-v3", {"hiden": "1"}, r"^model has no key 'hiden' to set; the nearest are .*hidden"),
    ],
)
def test_a_wrong_override_is_refused_with_the_numbers(thing: str, changes: dict[str, str], message: str) -> None:
    entry: Any = load_hardware(thing) if thing in names("hardware") else load_model(thing)
    with pytest.raises(ValueError, match=message):
        override(entry, changes)


def test_settings_are_split_by_the_thing_they_set() -> None:
    settings = ["hardware.scaleup_gb_s=450", "model.topk = 8", "hardware.profile=a=b.yaml"]
    expected = {"hardware": {"scaleup_gb_s": "450", "profile": "a=b.yaml"}, "model": {"topk": "8"}, "profile": {}}
    assert split_overrides(settings) == expected
    assert split_overrides([]) == {"hardware": {}, "model": {}, "profile": {}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scaleup_gb_s=450", r"'scaleup_gb_s=450' is not of the form hardware.KEY=VALUE"),
        ("hardware.scaleup_gb_s", r"is not of the form"),
        ("hardware.scaleup_gb_s=", r"is not of the form"),
        ("hardwar.scaleup_gb_s=1", r"'hardwar.scaleup_gb_s=1' sets 'hardwar'; the nearest is hardware"),
        ("hardware.scaleup=1", r"hardware has no key 'scaleup' to set; the nearest are scaleup_gb_s, scaleup_domain"),
        ("model.name=x", r"model has no key 'name' to set"),
    ],
)
def test_a_setting_of_another_shape_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_overrides([setting])


# ---- Hugging Face ----

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
FOUR_BITS = {"num_bits": 4, "type": "float", "group_size": 32}
# fmt: off
V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "max_position_embeddings": 163840, "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 2.5, "hidden_act": "silu", "quantization_config": FP8,
}
QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "attn_output_gate": True, "full_attention_interval": 4, "head_dim": 256,
    "hidden_size": 4096, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 64,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "moe_intermediate_size": 1024, "mtp_num_hidden_layers": 1, "num_attention_heads": 32, "num_experts": 512,
    "num_experts_per_tok": 10, "num_hidden_layers": 60, "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 1024, "vocab_size": 248320,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3": V3,
    "deepseek-v3.2": {**V3, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    "deepseek-v4-flash": {
        "model_type": "deepseek_v4", "expert_dtype": "fp4", "head_dim": 512, "hidden_size": 4096,
        "index_head_dim": 128, "index_n_heads": 64, "index_topk": 512, "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 64,
        "num_experts_per_tok": 6, "num_hidden_layers": 43, "num_hash_layers": 3, "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1, "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024,
        "qk_rope_head_dim": 64, "quantization_config": FP8, "routed_scaling_factor": 1.5, "sliding_window": 128,
        "swiglu_limit": 10.0, "vocab_size": 129280, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    },
    "kimi-k2": {
        **V3,
        "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_routed_experts": 384, "num_attention_heads": 64,
        "vocab_size": 163840, "max_position_embeddings": 131072, "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
    },
    "kimi-k3": {
        "model_type": "kimi_k3",
        "text_config": {
            "model_type": "kimi_linear", "hidden_act": "situ", "first_k_dense_replace": 1, "moe_layer_freq": 1,
            "hidden_size": 7168, "intermediate_size": 33792, "moe_intermediate_size": 3072, "kv_lora_rank": 512,
            "max_position_embeddings": 1048576, "mla_use_output_gate": True, "num_attention_heads": 96,
            "num_experts": 896, "num_experts_per_token": 16, "num_hidden_layers": 93, "num_shared_experts": 2,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "routed_expert_hidden_size": 3584, "routed_scaling_factor": 1.0, "vocab_size": 163840,
            "linear_attn_config": {"head_dim": 128, "num_heads": 96, "kda_layers": [n for n in range(1, 92) if n % 4]},
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": FOUR_BITS}},
            },
        },
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 12288, "max_position_embeddings": 40960, "mlp_only_layers": [],
        "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 94, "num_key_value_heads": 4, "sliding_window": None, "vocab_size": 151936,
    },
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256,
        "hidden_size": 2048, "intermediate_size": 5120, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
        "moe_intermediate_size": 512, "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
        "num_hidden_layers": 48, "num_key_value_heads": 2, "shared_expert_intermediate_size": 512,
        "use_sliding_window": False, "vocab_size": 151936, "mtp_num_hidden_layers": 1,
    },
    "qwen3.5-397b-a17b": {"model_type": "qwen3_5_moe", "text_config": QWEN35, "vision_config": {"hidden_size": 1152}},
    "glm-4.5": {
        "model_type": "glm4_moe", "num_hidden_layers": 92, "hidden_size": 5120, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151552,
        "max_position_embeddings": 202752, "n_routed_experts": 160, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    },
    "glm-5.2": {
        **V3,
        "model_type": "glm_moe_dsa", "hidden_size": 6144, "intermediate_size": 12288, "num_hidden_layers": 78,
        "num_attention_heads": 64, "q_lora_rank": 2048, "qk_nope_head_dim": 192, "v_head_dim": 256,
        "vocab_size": 154880, "max_position_embeddings": 1048576, "quantization_config": None,
        "index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048,
        "indexer_types": ["full"] * 3 + (["shared"] * 3 + ["full"]) * 18 + ["shared"] * 3,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "head_dim": 64, "hidden_size": 2880, "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 18, "max_position_embeddings": 131072,
        "num_attention_heads": 64, "experts_per_token": 4, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "num_local_experts": 128, "sliding_window": 128, "swiglu_limit": 7.0, "vocab_size": 201088,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_key_value_heads": 8, "num_local_experts": 8, "sliding_window": None, "vocab_size": 32000,
    },
    "llama-4-maverick": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120,
            "interleave_moe_layer_step": 2, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "max_position_embeddings": 1048576, "num_attention_heads": 40, "num_experts_per_tok": 1,
            "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 128, "vocab_size": 202048,
        },
    },
    "minimax-m2.5": {
        "model_type": "minimax_m2", "num_hidden_layers": 62, "hidden_size": 3072, "num_attention_heads": 48,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 1536, "vocab_size": 200064,
        "num_experts_per_tok": 8, "num_local_experts": 256, "max_position_embeddings": 196608,
        "num_mtp_modules": 3, "shared_intermediate_size": 0, "quantization_config": FP8,
    },
    "minimax-m3": {
        "model_type": "minimax_m3", "dense_intermediate_size": 12288, "head_dim": 128, "hidden_size": 6144,
        "intermediate_size": 3072, "max_position_embeddings": 1048576, "moe_layer_freq": [0] * 3 + [1] * 57,
        "n_shared_experts": 1, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 60,
        "num_key_value_heads": 4, "num_local_experts": 128, "num_nextn_predict_layers": 1,
        "routed_scaling_factor": 2.0, "swiglu_limit": 7.0, "vocab_size": 200064,
        "sparse_attention_config": {
            "sparse_attention_freq": [0] * 3 + [1] * 57, "sparse_block_size": 128, "sparse_index_dim": 128,
            "sparse_num_index_heads": 4, "sparse_topk_blocks": 16,
        },
    },
    "hy3-preview": {
        "model_type": "hy_v3", "vocab_size": 120832, "hidden_size": 4096, "intermediate_size": 13312,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 262144, "num_experts": 192, "num_experts_per_tok": 8,
        "num_shared_experts": 1, "moe_intermediate_size": 1536, "router_scaling_factor": 2.826,
        "num_nextn_predict_layers": 1,
    },
    "mimo-v2-flash": {
        "model_type": "mimo_v2_flash", "num_hidden_layers": 48, "hidden_size": 4096, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128, "intermediate_size": 16384,
        "vocab_size": 152576, "max_position_embeddings": 262144, "sliding_window": 128, "n_routed_experts": 256,
        "swa_num_key_value_heads": 8, "moe_intermediate_size": 2048, "num_experts_per_tok": 8,
        "hybrid_layer_pattern": [0] + ([1] * 4 + [0] + [1]) * 7 + [1] * 4 + [0], "n_shared_experts": None,
        "moe_layer_freq": [0] + [1] * 47, "routed_scaling_factor": None, "quantization_config": FP8,
    },
    "nemotron-3-super": {
        "model_type": "nemotron_h", "head_dim": 128, "hidden_size": 4096, "intermediate_size": 2688,
        "hybrid_override_pattern": "MEMEMEM*E" + "MEMEMEM*E" * 2 + "MEMEMEMEM*E" * 4 + "MEMEMEM*E" + "MEMEMEME",
        "mamba_head_dim": 64, "mamba_num_heads": 128, "max_position_embeddings": 262144, "n_groups": 8,
        "mlp_hidden_act": "relu2", "moe_intermediate_size": 2688, "moe_latent_size": 1024,
        "moe_shared_expert_intermediate_size": 5376, "n_routed_experts": 512, "n_shared_experts": 1,
        "num_attention_heads": 32, "num_experts_per_tok": 22, "num_hidden_layers": 88, "num_key_value_heads": 2,
        "num_nextn_predict_layers": 1, "routed_scaling_factor": 5.0, "ssm_state_size": 128, "vocab_size": 131072,
        "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    },
}
# fmt: on
NOT_SIZES = {"name", "title", "source", "aliases", "notes", "total_params_b", "active_params_b"}


def sizes(model: Model) -> dict[str, Any]:
    """What a config.json determines; how the layers with experts are described may differ, their number not."""
    said = {key: entry for key, entry in model.model_dump().items() if key not in NOT_SIZES}
    del said["num_moe_layers"], said["moe_every"]
    attention = sorted(said["attention"], key=lambda entry: json.dumps(entry, sort_keys=True))
    return {**said, "attention": attention, "moe_layers": model.moe_layers, "mlp_layers": model.mlp_layers}


def read(config: dict[str, Any], **changes: Any) -> Model:
    changed = {key: entry for key, entry in {**config, **changes}.items() if entry != "absent"}
    return model_from_config(changed, name="read", source="a test")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_json_is_read_as_the_catalogs_own_entry(name: str) -> None:
    assert sizes(read(CONFIGS[name])) == sizes(load_model(name))


def test_a_folder_a_path_and_a_renamed_config_are_found(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(V3))
    (tmp_path / "v3.json").write_text(json.dumps(V3))
    assert load_model(folder) == load_model(str(folder / "config.json"))
    assert [load_model(path).name for path in (folder, tmp_path / "v3.json")] == ["my-model", "v3"]
    assert load_model(folder).source == str(folder / "config.json")


def test_the_quantization_may_lie_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**V3, "quantization_config": None}))
    assert load_model(tmp_path).weight_format == "bf16"
    config = {key: entry for key, entry in V3.items() if key != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert (load_model(tmp_path).weight_format, load_model(tmp_path).dense_format) == ("nvfp4", "bf16")


MIXED = {"model.layers.9.mlp.experts.0.up_proj": {"quant_algo": "NVFP4"}, "model.layers.9.q": {"quant_algo": "MXFP8"}}
GROUPS = {
    "group_0": {"targets": ["model.layers.9.self_attn.q_proj"], "weights": {"num_bits": 8, "type": "float"}},
    "group_1": {"targets": ["model.layers.9.mlp.experts"], "weights": {**FOUR_BITS, "group_size": 16}},
}


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, ("bf16", "bf16")),
        (FP8, ("fp8", "fp8")),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ("fp8", "fp8")),
        ({**FP8, "moe_quant_algo": "NVFP4"}, ("nvfp4", "fp8")),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED}, ("nvfp4", "fp8")),
        ({"quant_method": "modelopt", "config_groups": GROUPS}, ("nvfp4", "fp8")),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, ("int8", "int8")),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, ("mxfp4", "bf16")),
    ],
)
def test_formats_of_a_quantized_checkpoint(quantization: dict[str, Any] | None, expected: tuple[str, str]) -> None:
    model = read(V3, quantization_config=quantization)
    assert (model.weight_format, model.dense_format) == expected
    assert ("weight_format" in model.notes) == ((quantization or {}).get("quant_method") == "awq")


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({"decoder_sparse_step": 2}, 47),
        ({"mlp_only_layers": [0, 5, 93]}, 91),
        ({"moe_layers_enum": "4,5,6"}, 3),
        ({"first_k_dense_replace": 4}, 90),
        ({"mlp_layer_types": ["dense", "sparse"] * 47}, 47),
    ],
)
def test_layers_with_experts_in_the_spellings_of_the_families(changes: dict[str, Any], moe_layers: int) -> None:
    model = read(CONFIGS["qwen3-235b-a22b"], **changes)
    assert (model.moe_layers, model.mlp_layers) == (moe_layers, 94 - moe_layers)
    assert model.dense_intermediate == 12288


def test_a_family_not_known_here_is_read_by_the_common_keys() -> None:
    model = read(CONFIGS["mixtral-8x7b"], model_type="new", num_local_experts="absent", num_routed_experts=8)
    assert sizes(model) == sizes(load_model("mixtral-8x7b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_routed_experts": "absent"},
            r"no Mixture-of-Experts model \(model_type 'deepseek_v3'\): it has none of num_e",
        ),
        ({"num_experts_per_tok": "absent", "vocab_size": "absent"}, r"without num_experts_per_tok, vocab_size$"),
        ({"num_hidden_layers": "absent"}, r"without num_hidden_layers$"),
        ({"v_head_dim": "absent"}, r"^v_head_dim is missing$"),
        ({"hidden_size": "wide"}, r"^hidden_size is 'wide'; it must be a whole number above 0$"),
        ({"num_attention_heads": -1}, r"^num_attention_heads is -1; it must be a whole number above 0$"),
        ({"first_k_dense_replace": 61}, r"^none of its 61 layers has experts$"),
        ({"mlp_layer_types": ["dense"] * 3}, r"^mlp_layer_types has 3 entries for 61 layers$"),
        ({"compress_ratios": [7] * 61}, r"^compress_ratios has 7; known are 0 \(sliding\), 4 \(csa\) and 128 \(hca\)$"),
        (
            {"kv_lora_rank": None, "layer_types": ["spiral"] * 61},
            r"^layer_types has 'spiral'; known are full_attention",
        ),
        ({"quantization_config": {"quant_method": "spqr"}}, r"^quantization 'spqr' is not known here; known are nvfp4"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 3}},
            r"^weights of 3 bits and type 'int' are not known",
        ),
    ],
)
def test_a_config_that_cannot_be_read_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(V3, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json is not JSON: "),
        ("[]", r"config.json: a config.json holds an object of keys, not list$"),
        (json.dumps({"model_type": "llama"}), r"config.json: no Mixture-of-Experts model \(model_type 'llama'\)"),
        (json.dumps({**V3, "num_experts_per_tok": 999}), r"config.json: topk 999 is more than num_experts 256$"),
    ],
)
def test_a_broken_config_file_is_named_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r" has no config.json$"):
        load_model(tmp_path)


# ---- what it costs ----

COST = """
import json, sys, time
from megamoe.catalog import find_profile, load_hardware, load_model
def once():
    start = time.perf_counter()
    find_profile(load_hardware("gb200"))
    load_model("deepseek-v4-pro")
    return time.perf_counter() - start
heavy = [name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "transformers", "matplotlib")]
print(json.dumps([min(once() for _ in range(5)), heavy]))
"""


def test_loading_takes_no_torch_no_numpy_and_under_15_ms() -> None:
    done = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, timeout=60, check=True)
    seconds, heavy = json.loads(done.stdout)
    assert heavy == []
    assert seconds < 0.015
