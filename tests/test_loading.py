"""Checkpoints onto ranks: the values that are stored, the bits of one rank on any number, each rank its own bytes."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megamoe.launch.ranks import LocalRanks
from megamoe.model import load, load_tokenizer, regroup
from megamoe.model.dense import DenseLinear, DenseWeight, FP8Linear, compute_in_fixed_order
from megamoe.model.loading.files import TensorFiles
from megamoe.model.loading.report import Progress
from megamoe.model.loading.skeleton import build
from megamoe.model.loading.stored import stored_tensors
from megamoe.parallel.group import EPGroup
from tests import checkpoints
from tests.checkpoints import FAMILIES, VOCABULARY
from tests.moe_blocks import routed_experts

pytest.importorskip("transformers")
ALL = (*FAMILIES, "native_v4", "gpt_oss_fp4", "fp8", "sharded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all kinds, by name."""
    made: Path = tmp_path_factory.mktemp("loading")
    for family in FAMILIES:
        checkpoints.write(made / family, family)
    checkpoints.rewrite(checkpoints.write(made / "native_v4", "deepseek_v4"), checkpoints.native_fp4)
    checkpoints.rewrite(checkpoints.write(made / "gpt_oss_fp4", "gpt_oss"), checkpoints.gpt_oss_blocks)
    checkpoints.rewrite(
        checkpoints.write(made / "fp8", "qwen3_moe"),
        checkpoints.fp8_blocks,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    checkpoints.write(made / "sharded", "mixtral", shard="60KB")
    return made


def batch(rank: int = 0) -> Tensor:
    """[2, 24] token ids"""
    return torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(rank))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def subgroup(size: int) -> EPGroup | None:
    """A group of the first ranks; None on the others. All ranks must ask."""
    made = dist.new_group(list(range(size)))
    return EPGroup.of(made) if dist.get_rank() < size else None


# ---- the same on any number of ranks ----


def on_ranks(group: EPGroup, folder: Path, sizes: tuple[int, ...]) -> list[tuple[str, int, str, int, int]]:
    """Every checkpoint on groups of several sizes: its name, the size, digest of the logits, bytes read, experts."""
    found = []
    for size in sizes:
        there = subgroup(size)
        if there is not None:
            for name in ALL:
                model = load(folder / name, group=there)
                report = model.megamoe_report
                logits = logits_of(model, batch(group.rank))
                found.append((name, size, digest(logits), report.bytes_read, report.experts_read))
        dist.barrier()
    return found


def test_logits_have_the_bits_of_one_rank_and_a_rank_reads_its_own_experts(ranks: LocalRanks, folder: Path) -> None:
    found = ranks.run(on_ranks, folder, (2, 3, 4))
    for name in ALL:
        model = load(folder / name)
        report = model.megamoe_report
        expected = [digest(logits_of(model, batch(rank))) for rank in range(4)]
        layers = len(report.weight_formats)
        for rank, rows in enumerate(found):
            mine = {size: row for each, size, *row in rows if each == name}
            for size, (bits, bytes_read, experts) in mine.items():
                assert bits == expected[rank], (name, size, rank)
                of_experts = report.expert_bytes // report.experts_read
                assert bytes_read == report.dense_bytes + experts * of_experts, (name, size, rank)
        for size in (2, 3, 4):
            read = [next(row[4] for row in found[rank] if row[:2] == (name, size)) for rank in range(size)]
            assert sum(read) == report.experts_read, (name, size)
            assert max(read) - min(read) <= layers


# ---- what is stored is what computes ----


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    model = checkpoints.make_model(family, dtype="float32").float()
    model.save_pretrained(tmp_path)
    expected = logits_of(model, batch())
    found = load(tmp_path, experts="bf16")
    assert found.dtype == torch.float32
    error = float((logits_of(found, batch()) - expected).norm() / expected.norm())
    assert error < 2e-2, error
    assert not found.megamoe_report.unused


def test_a_row_has_the_same_bits_alone_and_in_any_batch(folder: Path) -> None:
    for name in ALL:
        model = load(folder / name)
        whole = logits_of(model, batch())
        assert torch.equal(logits_of(model, batch()[1:]), whole[1:]), name


def test_native_fp4_stays_as_it_is_stored(folder: Path) -> None:
    model = load(folder / "native_v4")
    assert set(model.megamoe_report.weight_formats.values()) == {"mxfp4"}
    assert not model.megamoe_report.quantization_error
    stored = load_file(folder / "native_v4" / "model.safetensors")
    own = model.state_dict()
    prefix = "model.layers.1.mlp.experts.layer.experts"
    expected = torch.cat([stored[f"layers.1.ffn.experts.3.{name}.weight"] for name in ("w1", "w3")]).view(torch.uint8)
    assert torch.equal(own[f"{prefix}.gate_up"][3], expected)
    scales = stored["layers.1.ffn.experts.3.w2.scale"].view(torch.uint8)
    assert torch.equal(own[f"{prefix}.down_scales"][3], scales)


def test_gpt_oss_fp4_is_read_in_its_order_of_rows(folder: Path) -> None:
    model = load(folder / "gpt_oss_fp4")
    stored = load_file(folder / "gpt_oss_fp4" / "model.safetensors")
    blocks = stored["model.layers.1.mlp.experts.gate_up_proj_blocks"][4].flatten(1)
    own = model.state_dict()["model.layers.1.mlp.experts.layer.experts.gate_up"][4]
    assert torch.equal(own, torch.cat((blocks[0::2], blocks[1::2])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_biases_of_experts_are_read_in_what_matrices_are(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) if name.endswith("_bias") else tensor}

    def widened(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor.to(torch.float32) if name.endswith("_bias") else tensor}

    shutil.copytree(folder / "gpt_oss", tmp_path / "a")
    own = logits_of(load(checkpoints.rewrite(tmp_path / "a", stored)), batch())
    assert torch.equal(own, logits_of(load(checkpoints.rewrite(tmp_path / "a", widened)), batch()))


def test_dense_fp8_stays_packed_and_computes_its_exact_values(folder: Path) -> None:
    packed, decoded = load(folder / "fp8"), load(folder / "fp8", dense="bf16")
    linear = packed.model.layers[0].self_attn.q_proj
    assert linear.values.dtype == torch.float8_e4m3fn
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = x.double() @ linear.weight.double().T
    assert float((linear(x).double() - exact).norm() / exact.norm()) < 3e-3
    assert torch.equal(linear(x[3:4]), linear(x)[3:4])
    a, b = logits_of(packed, batch()), logits_of(decoded, batch())
    assert float((a - b).norm() / b.norm()) < 0.1


@pytest.mark.parametrize("block", [(128, 128), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["powers_of_two", "any_scale"])
@pytest.mark.parametrize("columns", [130, 131])
def test_fp8_values_have_the_scale_of_their_block(
    tmp_path: Path, block: tuple[int, int], exact: bool, columns: int
) -> None:
    (tall, wide), rows, dice = block, 131, torch.Generator().manual_seed(3)
    values = torch.randn(rows, columns, generator=dice).to(torch.float8_e4m3fn)
    scales = torch.randint(-3, 4, (-(-rows // tall), -(-columns // wide)), generator=dice).double().exp2().float()
    scales *= 1.0 if exact else 1.25
    oracle = torch.tensor(
        [[float(values[r, c]) * float(scales[r // tall, c // wide]) for c in range(columns)] for r in range(rows)]
    )
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    with TensorFiles.open(tmp_path) as files:
        assert torch.equal(stored_tensors(files, block)["a.weight"].read_dense(files), oracle)
    linear = FP8Linear(values, scales, block)
    assert torch.equal(linear.weight.float(), oracle)
    x = torch.randn(3, columns, generator=dice).to(torch.bfloat16)
    torch.testing.assert_close(linear(x).double(), x.double() @ oracle.double().T, rtol=1e-2, atol=0.1)


# ---- rounding on the way ----


def test_the_error_of_rounding_is_stated_and_the_better_scales_are_better(folder: Path) -> None:
    contract, best = (load(folder / "mixtral", experts="mxfp4", scales=each) for each in ("contract", "best"))
    errors = [model.megamoe_report.quantization_error for model in (contract, best)]
    assert set(errors[0]) == {f"model.layers.{layer}.mlp.experts" for layer in range(2)}
    for name, error in errors[0].items():
        assert 0.05 < errors[1][name] < error < 0.2
    stored = load_file(folder / "mixtral" / "model.safetensors")
    from megamoe.formats import MXFP4, dequantize_mxfp4

    own = contract.state_dict()
    prefix = "model.layers.0.mlp.experts.layer.experts"
    squares = [0.0, 0.0]
    for expert in range(5):
        for key, names in (("gate_up", ("w1", "w3")), ("down", ("w2",))):
            each = [stored[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"] for name in names]
            weight = torch.cat(each).double()
            packed = MXFP4(own[f"{prefix}.{key}"][expert], own[f"{prefix}.{key}_scales"][expert])
            squares[0] += float((dequantize_mxfp4(packed, torch.float64) - weight).square().sum())
            squares[1] += float(weight.square().sum())
    assert errors[0]["model.layers.0.mlp.experts"] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5)


# ---- progress, reports, another group ----


def test_progress_counts_every_byte(folder: Path) -> None:
    seen: list[Any] = []
    model = load(folder / "mixtral", progress=seen.append)
    report = model.megamoe_report
    assert seen[-1].read == seen[-1].total == (report.bytes_read,)
    assert report.bytes_read == report.bytes_total
    assert re.match(r"read (\d\.\d MB) of \1 in ", str(report)), str(report)


def wanders(_: EPGroup, path: Path) -> list[tuple[int, int, str]]:
    """A model through groups of 2, 3 and 4 ranks; a rank that is new loads: experts kept, experts read, digest."""
    model, found = None, []
    for size in (2, 3, 4, 1):
        there = subgroup(size)
        if there is not None:
            if model is None:
                model = load(path, group=there)
                report = model.megamoe_report
            else:
                report = regroup(model, there)
            found.append((report.experts_kept, report.experts_read, digest(logits_of(model, batch()))))
        dist.barrier()
    return found


def test_in_another_group_a_rank_reads_only_what_it_lacks(ranks: LocalRanks, folder: Path) -> None:
    found = ranks.run(wanders, folder / "native_v4")
    expected = digest(logits_of(load(folder / "native_v4"), batch()))
    assert {bits for rank in found for _, _, bits in rank} == {expected}
    # 8 experts in 3 layers: 4 | 4, then 3 | 3 | 2, then 2 | 2 | 2 | 2, then 8
    assert [(kept, read) for kept, read, _ in found[0]] == [(0, 12), (9, 0), (6, 0), (6, 18)]
    assert [(kept, read) for kept, read, _ in found[1]] == [(0, 12), (6, 3), (3, 3)]
    assert [(kept, read) for kept, read, _ in found[2]] == [(0, 6), (0, 6)]


# ---- what cannot be loaded ----


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without(path: Path, name: str) -> None:
    checkpoints.rewrite(path, lambda each, tensor: {} if each == name else {each: tensor})


def changed(path: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    checkpoints.rewrite(path, lambda each, tensor: {each: change(tensor) if each == name else tensor})


def renamed(path: Path, part: str, other: str) -> None:
    checkpoints.rewrite(path, lambda name, tensor: {name.replace(part, other): tensor})


def as_pickle(path: Path) -> None:
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def wrong_index(path: Path) -> None:
    names = [*load_file(path / "model.safetensors"), "model.layers.9.weight"]
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )


def lost_shard(path: Path) -> None:
    names = load_file(path / "model.safetensors")
    index = {"weight_map": {**dict.fromkeys(names, "model.safetensors"), "lm_head.weight": "other.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def doubled(path: Path) -> None:
    shutil.copy(path / "model.safetensors", path / "other.safetensors")
    lost_shard(path)


def header_without_dtypes(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"dtype"', b'"dtypo"'))


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model.safetensors is truncated: it has \d+ bytes, and \S+ ends at byte \d+"),
    "no_config": (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    "config_unreadable": (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read"),
    "config_that_is_no_object": (lambda p: (p / "config.json").write_text("5"), "config.json has no model_type"),
    "unknown_model": (lambda p: edit_config(p, model_type="nothing_at_all"), "nothing_at_all"),
    "size_that_is_no_number": (lambda p: edit_config(p, hidden_size="x"), "'hidden_size' expected int, got str"),
    "code_of_its_own": (
        lambda p: edit_config(p, model_type="nothing_at_all", auto_map={"AutoConfig": "code.Config"}),
        "contains custom code",
    ),
    "no_experts": (lambda p: edit_config(p, model_type="llama"), "has no routed experts"),
    "no_language_model": (lambda p: edit_config(p, model_type="vit"), "is no language model"),
    "pickle": (as_pickle, "pytorch_model.bin and no safetensors: pickles run code"),
    "shard_missing": (lost_shard, "lacks other.safetensors, which its index names"),
    "tensors_in_two_files": (doubled, r"two files have a tensor \S+"),
    "header_unreadable": (header_without_dtypes, "model.safetensors has a header that cannot be read: 'dtype'"),
    "index_of_nothing": (wrong_index, "says that model.safetensors has model.layers.9.weight, which it has not"),
    "expert_missing": (lambda p: without(p, EXPERT), r"has 5 experts, and the checkpoint has 4 tensors like"),
    "expert_missing_in_between": (
        lambda p: renamed(p, "experts.2.", "experts.7."),
        r"has experts 0 to 4, and where expert 2 should be the checkpoint has \S+experts.3.w1.weight",
    ),
    "more_experts_than_the_config_says": (
        lambda p: edit_config(p, num_local_experts=4),
        r"block_sparse_moe.gate.weight is \[5, 64\], the config asks for \[4, 64\]",
    ),
    "layer_missing": (lambda p: edit_config(p, num_hidden_layers=3), "has nothing for model.layers.2.mlp.experts"),
    "dense_missing": (lambda p: without(p, "model.norm.weight"), "has nothing for model.norm.weight"),
    "experts_of_another_shape": (
        lambda p: changed(p, EXPERT, lambda each: each[:, :-1]),
        r"needs \[64, 96\] of expert 2, the checkpoint has .*w2.weight \[64, 95\]",
    ),
    "dense_of_another_shape": (
        lambda p: changed(p, "model.norm.weight", lambda each: each[:-1]),
        r"model.norm.weight is \[63\], the config asks for \[64\]",
    ),
    "experts_of_another_dtype": (
        lambda p: changed(p, EXPERT, lambda each: each.to(torch.int32)),
        r"w2.weight has dtype I32, expected one of F64, F32, F16, BF16",
    ),
    "scales_without_a_place": (
        lambda p: changed(p, EXPERT, lambda each: each.to(torch.float8_e4m3fn)),
        "w2.weight is F8_E4M3 and no tensor has its scales",
    ),
    "not_a_number": (
        lambda p: changed(p, EXPERT, lambda each: each.fill_(torch.nan)),
        "weights are NaN or infinite",
    ),
    "dense_not_a_number": (
        lambda p: changed(p, "lm_head.weight", lambda each: each.index_fill(1, torch.tensor(3), torch.nan)),
        r"model.safetensors: lm_head.weight: 160 of 10240 values are NaN or infinite in bfloat16",
    ),
}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_experts_in_bf16_are_finite(folder: Path, tmp_path: Path, value: float) -> None:
    shutil.copytree(folder / "mixtral", tmp_path / "spoilt")
    changed(tmp_path / "spoilt", EXPERT, lambda each: each.index_fill(1, torch.tensor(3), value))
    with pytest.raises(ValueError, match=r"experts: down of expert 2: 64 of 6144 weights are NaN or infinite in BF16"):
        load(tmp_path / "spoilt")


def spoilt(value: float) -> Callable[[Tensor], Tensor]:
    """One of a tensor's values is another; a byte where it is of FP8."""

    def change(tensor: Tensor) -> Tensor:
        raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        raw.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("mixtral", "model.embed_tokens.weight", torch.nan, "1 of 10240 values are NaN or infinite in bfloat16"),
        ("mixtral", "model.norm.weight", torch.inf, "1 of 64 values are NaN or infinite"),
        ("mixtral", "model.layers.1.self_attn.q_proj.weight", -torch.inf, "1 of 4096 values are NaN or infinite"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", torch.nan, "1 of 320 values are NaN or infinite"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", torch.inf, "1 of 8 values are NaN"),
        ("fp8", "model.layers.0.self_attn.k_proj.weight", 0x7F, "values are NaN or infinite in float8_e4m3fn"),
        ("fp8", "model.layers.0.self_attn.k_proj.weight_scale_inv", torch.nan, "NaN or infinite in float32"),
        ("native_v4", "layers.0.ffn.shared_experts.w1.scale", 0xFF, "NaN or infinite in float32"),
        ("native_v4", "layers.0.ffn.gate.tid2eid", 8, "has expert ids 0 to 8, expected 0 to 7"),
        ("native_v4", "layers.0.ffn.gate.tid2eid", -1, "has expert ids -1 to 7, expected 0 to 7"),
    ],
)
def test_what_every_rank_has_is_finite_and_names_experts_that_there_are(
    folder: Path, tmp_path: Path, name: str, tensor: str, value: float, message: str
) -> None:
    shutil.copytree(folder / name, tmp_path / "spoilt")
    changed(tmp_path / "spoilt", tensor, spoilt(value))
    with pytest.raises(ValueError, match=rf"{re.escape(tensor)}:? .*{re.escape(message)}"):
        load(tmp_path / "spoilt")


def test_minus_infinity_in_a_routers_bias_switches_an_expert_off(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "deepseek_v3", tmp_path / "off")
    changed(tmp_path / "off", "model.layers.1.mlp.gate.e_score_correction_bias", spoilt(-torch.inf))
    assert logits_of(load(tmp_path / "off"), batch()).isfinite().all()


def test_tensors_of_layers_that_the_config_has_not_are_said(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "mixtral", tmp_path / "short")
    edit_config(tmp_path / "short", num_hidden_layers=1)
    with pytest.warns(
        UserWarning, match=r"has model.layers.1.block_sparse_moe.\S+ and \d+ others, for which the model"
    ):
        load(tmp_path / "short")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -1}, r"config.json: transformers makes no MixtralForCausalLM of it: RuntimeError"),
        (
            {"hidden_act": "abacus"},
            r"config.json: transformers makes no MixtralForCausalLM of it: KeyError\('abacus'\)",
        ),
        ({"dtype": "abacus"}, "config.json: transformers cannot read it: AttributeError.*'abacus'"),
        ({"dtype": "float8_e4m3fn"}, "config.json: dtype must be one of torch.float64, .*, got torch.float8_e4m3fn"),
        ({"quantization_config": "fp8"}, "config.json: quantization_config must be an object, got 'fp8'"),
        (
            {"quantization_config": {"weight_block_size": [128]}},
            r"weight_block_size must be two positive integers, got",
        ),
    ],
    ids=["negative", "activation", "no_dtype", "dtype", "quantization", "block"],
)
def test_a_config_that_nothing_is_made_of_is_a_value_error(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    shutil.copytree(folder / "mixtral", tmp_path / "odd")
    edit_config(tmp_path / "odd", **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "odd")


def test_a_generation_config_that_is_a_list_is_a_value_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "mixtral", tmp_path / "odd")
    (tmp_path / "odd" / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json: 'list' object is not a mapping"):
        load(tmp_path / "odd")


@pytest.mark.parametrize(
    ("checkpoint", "ending", "expected"),
    [
        ("native_v4", "experts.3.w2.scale", "are no MXFP4: expected a scale per 32 values"),
        ("gpt_oss_fp4", "down_proj_scales", "are no MXFP4: expected a scale per 32 values"),
        ("gpt_oss_fp4", "down_proj_blocks", "are no MXFP4: expected a scale per 32 values"),
        ("fp8", "weight_scale_inv", "expected a scale per 128 x 128 values"),
    ],
)
def test_scales_that_do_not_fit_their_values_are_refused(
    folder: Path, tmp_path: Path, checkpoint: str, ending: str, expected: str
) -> None:
    shutil.copytree(folder / checkpoint, tmp_path / "cut")
    checkpoints.rewrite(tmp_path / "cut", lambda name, each: {name: each[..., :-1] if name.endswith(ending) else each})
    with pytest.raises(ValueError, match=expected):
        load(tmp_path / "cut")


def test_a_format_of_others_is_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    def as_nvfp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if ".experts." not in name:
            return {name: tensor}
        rows, columns = tensor.shape
        scales = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        return {name: torch.zeros(rows, columns // 2, dtype=torch.uint8), f"{name}_scale": scales}

    shutil.copytree(folder / "mixtral", tmp_path / "nvfp4")
    checkpoints.rewrite(tmp_path / "nvfp4", as_nvfp4)
    edit_config(tmp_path / "nvfp4", quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(
        ValueError, match=r"_scale has dtype F8_E4M3, expected .*; config.json says quant_method 'modelopt'"
    ):
        load(tmp_path / "nvfp4")


def with_header(file: Path, change: Callable[[dict[str, Any]], None], more: bytes = b"") -> None:
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + more)


def overlapping(header: dict[str, Any]) -> None:
    header[EXPERT]["data_offsets"] = header[EXPERT.replace("w2", "w1").replace("2.w1", "1.w2")]["data_offsets"]


def test_bytes_that_two_tensors_share_or_none_has_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, change, more, message in (
        ("shared", overlapping, b"", r"ends at byte \d+, and \S+, which is next, begins at \d+"),
        ("more", lambda _: None, b"\0" * 8, r"8 more than its header says: something else wrote to it"),
    ):
        shutil.copytree(folder / "mixtral", tmp_path / name)
        with_header(tmp_path / name / "model.safetensors", change, more)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)


def test_tensors_without_a_place_have_any_dtype_of_the_format(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "mixtral", tmp_path / "more")
    file = tmp_path / "more" / "model.safetensors"
    dtypes = (torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.bool)
    more = {f"beside.{number}": torch.ones(2, dtype=dtype) for number, dtype in enumerate(dtypes)}
    save_file({**load_file(file), **more}, file)
    with pytest.warns(UserWarning, match="has beside.0 and 4 others, for which the model"):
        assert load(tmp_path / "more").megamoe_report.unused == tuple(more)


@pytest.mark.parametrize("given", [str, Path, os.fsencode, lambda name: f"{name}/"], ids=["str", "Path", "bytes", "/"])
def test_a_checkpoint_is_found_however_its_folder_is_given(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Callable[[str], Any]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "größe").symlink_to(folder / "mixtral")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(given("~/größe")).megamoe_report.unused == ()
    monkeypatch.chdir(tmp_path)
    model = load(given("größe"))
    monkeypatch.chdir("elsewhere")
    assert regroup(model, None).experts_read == 0
    assert model.megamoe_loading.files.path == tmp_path / "größe"


def test_a_loaded_model_is_neither_saved_nor_copied(folder: Path, tmp_path: Path) -> None:
    model = load(folder / "mixtral")
    with pytest.raises(ValueError, match=r"cannot be saved, .* `megamoe convert` writes it in another format"):
        model.save_pretrained(tmp_path / "saved")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="is neither copied nor pickled: load it again"):
            copied(model)


def test_torch_compile_and_a_default_device_change_nothing(folder: Path) -> None:
    with torch.device("meta"):
        model = load(folder / "mixtral")
    expected = logits_of(model, batch())
    assert torch.equal(expected, logits_of(load(folder / "mixtral"), batch()))
    torch._dynamo.reset()
    assert torch.equal(logits_of(torch.compile(model, backend="eager"), batch()), expected)


def refused(group: EPGroup, folders: list[list[Path]]) -> list[str]:
    """What loading each of this rank's folders raises, all on the same group, and that the group is good afterwards."""
    said = []
    for folder in folders:
        try:
            load(folder[group.rank], group=group, experts="mxfp4")
        except ValueError as refusal:
            said.append(str(refusal))
        else:
            said.append("")
    return said


def test_what_is_broken_for_one_rank_is_refused_by_all(ranks: LocalRanks, folder: Path, tmp_path: Path) -> None:
    whole = folder / "mixtral"
    folders = []
    for name, (change, _) in BROKEN.items():
        shutil.copytree(whole, tmp_path / name)
        change(tmp_path / name)
        folders.append([whole, tmp_path / name, whole, whole])
    found = ranks.run(refused, [*folders, [whole] * 4])
    for rank, said in enumerate(found):
        assert said[-1] == "", said
        for (name, (_, message)), refusal in zip(BROKEN.items(), said, strict=False):
            assert re.search(message, refusal), (name, rank, refusal)
            assert refusal.startswith("rank 1: ") == (rank != 1), (name, rank, refusal)


def test_ranks_that_ask_for_different_things_are_all_refused(ranks: LocalRanks, folder: Path) -> None:
    said = ranks.run(differently, folder / "mixtral")
    assert all("ranks load differently: rank 1 has 'bf16 checkpoint contract 2 blocks'" in each for each in said)


def differently(group: EPGroup, path: Path) -> str:
    try:
        load(path, group=group, experts="bf16" if group.rank == 1 else "mxfp4")
    except ValueError as refusal:
        return str(refusal)
    return ""


def calls_meanwhile(group: EPGroup, path: Path) -> tuple[Tensor, Tensor, bool]:
    """A layer's output before and during a load of the same group, and whether the call came after all was read."""
    routed = next(iter(routed_experts(load(path, group=group)).values()))
    rng = torch.Generator().manual_seed(1)
    given = (
        torch.randn(5, 64, generator=rng).bfloat16(),
        torch.arange(10).view(5, 2) % 5,
        torch.rand(5, 2, generator=rng),
    )
    before, found, order = routed(*given), list[Tensor](), list[str]()

    def call() -> None:
        found.append(routed(*given))
        order.append("called")

    thread = threading.Thread(target=call)

    def shown(_: Progress) -> None:
        if thread.ident is None:
            thread.start()
        order.append("read")

    load(path, group=group, progress=shown)
    thread.join()
    return before, found[0], order[-1] == "called" and order.count("called") == 1


def test_a_call_from_another_thread_waits_until_all_is_read(ranks: LocalRanks, folder: Path) -> None:
    for before, during, waited in ranks.run(calls_meanwhile, folder / "mixtral", size=2):
        assert torch.equal(before, during)
        assert waited


def loads_or_calls(group: EPGroup, path: Path) -> str:
    """Rank 0 loads a second model, and rank 1 calls a layer of the first."""
    model = load(path, group=group)
    try:
        if group.rank == 0:
            load(path, group=group)
        else:
            next(iter(routed_experts(model).values())).idle()
    except (RuntimeError, ValueError) as refusal:
        return str(refusal)
    return ""


def test_a_rank_that_calls_while_another_loads_is_refused_on_both(ranks: LocalRanks, folder: Path) -> None:
    loading, calling = ranks.run(loads_or_calls, folder / "mixtral", size=2)
    assert "rank 1: a layer" in loading
    assert "rank 0: loading" in loading
    assert calling


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"experts": "fp4"}, "experts must be one of checkpoint, mxfp4, bf16, got 'fp4'"),
        ({"dense": "fp8"}, "dense must be one of checkpoint, bf16"),
        ({"scales": "worst"}, "scales must be one of contract, best"),
        ({"device": "meta"}, "device must be one that can hold weights, got 'meta': leave it out for the CPU"),
        ({"device": "abacus"}, "device must be one that torch knows, got 'abacus'"),
        ({"path": None}, "path must be a path, as str, bytes or os.PathLike, got None"),
        ({"path": 3}, "path must be a path, as str, bytes or os.PathLike, got 3"),
        ({"path": ""}, "path must be a path, got ''"),
    ],
    ids=["experts", "dense", "scales", "meta", "device", "no_path", "number", "empty"],
)
def test_what_is_asked_wrongly_is_said(folder: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**{"path": folder / "mixtral", **asked})


def rewritten(file: Path) -> None:
    """In place, as long as it was."""
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


def replaced(file: Path) -> None:
    """By another file, which was written before this one's header was read."""
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewritten, r"model.safetensors was changed or replaced after its header was read, so \S+ is not what"),
        (replaced, "model.safetensors was changed or replaced after its header was read"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "model.safetensors (is truncated|was changed)"),
        (Path.unlink, "model.safetensors cannot be opened"),
    ],
    ids=["rewritten", "replaced", "truncated", "removed"],
)
def test_a_file_that_changes_while_it_is_loaded_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "mixtral"
    shutil.copytree(folder / "mixtral", path)

    def changing(*given: Any) -> Any:
        change(path / "model.safetensors")
        return build(*given)

    monkeypatch.setattr("megamoe.model.loading.load.build", changing)  # what comes after the headers
    with pytest.raises(ValueError, match=message):
        load(path)
    monkeypatch.undo()
    if change in (rewritten, replaced):
        assert load(path).megamoe_report.unused == ()


@pytest.mark.parametrize(("change", "refused"), [(None, False), (rewritten, True)], ids=["as it was", "rewritten"])
def test_a_mount_that_makes_up_inode_numbers_is_read_and_what_changes_there_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None] | None,
    refused: bool,
) -> None:
    path, numbers, stat = tmp_path / "mixtral", count(1), os.fstat
    shutil.copytree(folder / "mixtral", path)

    def made_up(descriptor: int) -> os.stat_result:
        found = stat(descriptor)
        times = {name: getattr(found, name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}
        return os.stat_result((found.st_mode, next(numbers), *found[2:]), times)

    def changing(*given: Any) -> Any:
        if change is not None:
            change(path / "model.safetensors")
        return build(*given)

    monkeypatch.setattr("megamoe.model.loading.load.build", changing)  # what comes after the headers
    monkeypatch.setattr(os, "fstat", made_up)
    with pytest.raises(ValueError, match="was changed or replaced after") if refused else nullcontext():
        assert load(path).megamoe_report.unused == ()
    assert next(numbers) > 3, "each time that a file was opened it had another number"


def test_a_size_that_fp4_cannot_have_is_refused(tmp_path: Path) -> None:
    checkpoints.write(tmp_path, "mixtral", intermediate_size=80)
    with pytest.raises(ValueError, match="intermediate 80 is no multiple of 32"):
        load(tmp_path, experts="mxfp4")


def test_a_missing_tokenizer_is_said(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        load_tokenizer(folder / "mixtral")


class Router(nn.Module):
    """Multiplies a parameter itself."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(24, 7168, generator=rng), requires_grad=False)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.table)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, table: nn.functional.linear(x, table),
    "linear_by_name": lambda x, table: nn.functional.linear(weight=table, input=x),
    "matmul": lambda x, table: torch.matmul(x, table.T),
    "operator": lambda x, table: x @ table.t(),
    "method": lambda x, table: x.matmul(table.T),
    "mm_by_name": lambda x, table: torch.mm(x, mat2=table.T),
    "cast_first": lambda x, table: x.float() @ table.float().T,
    "bmm": lambda x, table: torch.bmm(x[None], table.T[None])[0],
    "stack": lambda x, table: (x[None, None] @ table.view(2, 12, 7168).mT)[0].transpose(0, 1).flatten(1),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_with_a_parameter_keep_the_order(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """At a size at which torch sums in another order for one row than for many."""
    router = Router(product)
    x = torch.randn(264, 7168, generator=torch.Generator().manual_seed(1))
    plain = router(x)
    compute_in_fixed_order(router)
    together = router(x)
    assert torch.equal(torch.cat([router(each[None]) for each in x[:16]]), together[:16])
    assert torch.allclose(together, plain, atol=1e-2)


def test_a_weight_that_was_changed_is_packed_anew_and_its_former_memory_is_no_weight() -> None:
    router = Router(PRODUCTS["matmul"])
    x = torch.randn(5, 7168, generator=torch.Generator().manual_seed(1))
    compute_in_fixed_order(router)
    before = router(x)
    with torch.no_grad():
        router.table.mul_(2)
    assert torch.equal(router(x), 2 * before)
    former = router.table.data
    router.double()
    assert torch.allclose(router(x.double()), 2 * before.double(), atol=1e-2)
    router.product = lambda x, _: x @ torch.from_numpy(former.numpy()).T  # an activation that lies there now
    doubled = router(x)
    former.mul_(2)
    assert torch.equal(router(x), 2 * doubled)


def _by_numpy(weight: Tensor, new: Tensor) -> None:
    weight.detach().numpy()[...] = new.numpy()


def _in_inference_mode(weight: Tensor, new: Tensor) -> None:
    with torch.inference_mode():
        weight.copy_(new)


CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "data": lambda weight, new: weight.data.copy_(new),
    "detached": lambda weight, new: weight.detach().copy_(new),
    "data_of_another": lambda weight, new: setattr(weight, "data", new),
    "numpy": _by_numpy,
    "inference_mode": _in_inference_mode,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("product", [PRODUCTS["linear"], PRODUCTS["cast_first"]], ids=["linear", "cast_first"])
def test_weights_that_come_while_a_model_serves_count_however_they_are_written(
    product: Callable[[Tensor, Tensor], Tensor], change: Callable[[Tensor, Tensor], object]
) -> None:
    serving, fresh = Router(product), Router(product)
    x = torch.randn(5, 7168, generator=torch.Generator().manual_seed(1))
    new = torch.randn(serving.table.shape, generator=torch.Generator().manual_seed(2))
    fresh.table.data.copy_(new)
    for each in (serving, fresh):
        compute_in_fixed_order(each)
    with torch.no_grad():
        before = serving(x)
        change(serving.table, new)
        assert not torch.equal(before, fresh(x))
        assert torch.equal(serving(x), fresh(x))


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_the_weight_of_a_linear_module_is_to_be_read_only(fp8: bool) -> None:
    values = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    module: DenseLinear | FP8Linear = (
        FP8Linear(values.to(torch.float8_e4m3fn), torch.ones(1, 2), (32, 32))
        if fp8
        else DenseLinear(DenseWeight.of(values.to(torch.bfloat16)))
    )
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        module.weight.mul_(2)
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), x @ module.weight.float().T, rtol=1e-3, atol=1e-3)


def test_what_was_packed_of_a_weight_goes_when_the_weight_changes() -> None:
    router, x = Router(lambda x, weight: x @ weight.float().t()), torch.ones(3, 7168)
    router.table.data = router.table.data.bfloat16()
    compute_in_fixed_order(router)
    router(x)
    gc.collect()
    held = sum(isinstance(each, DenseWeight) for each in gc.get_objects())
    for _ in range(3):
        with torch.no_grad():
            router.table.mul_(2)
        router(x)
    gc.collect()
    assert sum(isinstance(each, DenseWeight) for each in gc.get_objects()) == held
