"""Tiny checkpoints: a family's full shape, its own storage, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megamoe.catalog import load_model
from megamoe.model.deepseek_v4.config import DeepSeekV4Config
from megamoe.model.loading.load import load, load_tokenizer
from megamoe.model.making.tiny import FAMILIES, VOCABULARY, byte_tokenizer, write_tiny
from tests.commands import files_no_larger_than, invoked, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        write_tiny(path / family, family)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_whole_with_its_tokenizer(folder: Path, family: str) -> None:
    model = load(folder / family)
    assert model.megamoe_report.unused == ()
    assert len({str(each) for each in model.megamoe_report.weight_formats.values()}) == 1
    assert load_tokenizer(folder / family).eos_token_id == model.config.eos_token_id
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, VOCABULARY)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planner_reads_every_family(folder: Path, family: str) -> None:
    model = load_model(str(folder / family))
    assert sum(each.layers for each in model.attention) == model.layers
    if family == "deepseek-v4-flash":
        assert {(each.kind, each.ratio) for each in model.attention} == {("sliding", None), ("csa", 4), ("hca", 8)}


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("mixtral", (0, 1), "^num_experts of mixtral must be at least 1, got 0$"),
        ("mixtral", (4, 5), "^topk of mixtral must be 1 to 4, its experts, got 5$"),
        ("qwen3-moe", (4, 0), "^topk of qwen3-moe must be 1 to 4, its experts, got 0$"),
        ("deepseek-v3", (7, 2), "^num_experts of deepseek-v3 must be an even number of at least 2, since it has two "),
        ("deepseek-v3", (8, 5), "^topk of deepseek-v3 must be 1 to 4, the 4 experts of one of its 2 groups, got 5$"),
    ],
)
def test_experts_that_a_family_cannot_have_are_refused_by_name(
    tmp_path: Path, family: str, sizes: tuple[int, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        write_tiny(tmp_path / "tiny", family, num_experts=sizes[0], topk=sizes[1])


def test_deepseek_v4_has_every_attention_both_routers_and_packed_experts(folder: Path) -> None:
    path = folder / "deepseek-v4-flash"
    config = json.loads((path / "config.json").read_text())
    kinds = {"sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"}
    assert set(config["layer_types"]) == kinds
    assert set(config["mlp_layer_types"]) == {"hash_moe", "moe"}
    assert config["expert_dtype"] == "fp4"
    tensors = load_file(path / "model.safetensors")
    weight = tensors["layers.1.ffn.experts.15.w1.weight"]
    scale = tensors["layers.1.ffn.experts.15.w1.scale"]
    assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (64, 64))
    assert (scale.dtype, tuple(scale.shape)) == (torch.float8_e8m0fnu, (64, 4))
    assert tensors["layers.0.ffn.shared_experts.w2.weight"].dtype == torch.float8_e4m3fn
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert table.shape == (VOCABULARY, 2)
    assert bool((table[:, 0] != table[:, 1]).all())
    assert set(table.flatten().tolist()) == set(range(16))
    assert {"embed.weight", "head.weight", "norm.weight", "hc_head_fn", "layers.2.attn.kv_norm.weight"} <= set(tensors)
    assert tensors["layers.3.attn.attn_sink"].dtype == torch.float32
    assert DeepSeekV4Config.read(path).shape.num_experts == 16
    assert {f"layers.{layer}.ffn.gate.bias" in tensors for layer in (1, 2, 3)} == {True}


def test_gpt_oss_has_its_own_packed_stacks(folder: Path) -> None:
    tensors = load_file(folder / "gpt-oss" / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tensors[f"{name}_blocks"].shape == (16, 192, 4, 16)
    assert tensors[f"{name}_scales"].shape == (16, 192, 4)
    assert bool(tensors[f"{name}_bias"].count_nonzero())


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v4-flash"])
def test_the_seed_says_which_numbers(folder: Path, family: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    for seed in (0, 1):
        write_tiny(tmp_path / str(seed), family, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    known = (folder / family / "model.safetensors").read_bytes()
    assert (tmp_path / "0" / "model.safetensors").read_bytes() == known
    assert (tmp_path / "1" / "model.safetensors").read_bytes() != known


def test_any_text_is_tokens_and_back() -> None:
    tokenizer = byte_tokenizer()
    text = "Experts,  waves\n专家 \N{ROCKET}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_command_says_what_it_made_and_refuses_a_folder_that_is_there(tmp_path: Path) -> None:
    done = invoked("tiny", tmp_path / "model", "--like", "qwen3-moe", "--seed", 3, "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["like"] == "qwen3-moe"
    assert report["parameters"] > 500_000
    assert report["bytes"] > 1_000_000
    assert "is there already: give a folder that is new" in refused("tiny", tmp_path / "model")
    said = refused("tiny", tmp_path / "other", "--like", "gpt-5")
    assert "like must be one of deepseek-v4-flash, deepseek-v3, gpt-oss, mixtral, qwen3-moe, got 'gpt-5'" in said
    said = refused("tiny", tmp_path / "other", "--like", "deepseek-v3", "--num-experts", 6, "--topk", 4)
    assert "topk of deepseek-v3 must be 1 to 3, the 3 experts of one of its 2 groups, got 4" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    for umask, rights in ((0o022, 0o644), (0o007, 0o660)):
        before = os.umask(umask)
        try:
            write_tiny(tmp_path / str(umask), "mixtral")
        finally:
            os.umask(before)
        assert {each.stat().st_mode & 0o777 for each in (tmp_path / str(umask)).iterdir()} == {rights}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megamoe.model.making.tiny.write_tokenizer", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path / "model", "mixtral")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert "cannot be made: Not a directory" in refused("tiny", tmp_path / "file" / "model")


@pytest.mark.parametrize("most", [500, 4000, 50_000], ids=["config", "tokenizer", "weights"])
def test_a_disk_that_is_full_is_said_and_leaves_nothing(tmp_path: Path, most: int) -> None:
    with files_no_larger_than(most):
        done = invoked("tiny", tmp_path / "made", "--like", "mixtral", COLUMNS="200")
    assert done.exit_code == 1, done.output
    assert done.stderr.splitlines() == [
        f"failed: {tmp_path / 'made'}: File too large: files may not be as large here: see ulimit -f"
    ]
    assert not list(tmp_path.iterdir())
