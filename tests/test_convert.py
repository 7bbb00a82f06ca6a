"""megamoe convert: what it writes loads to the same bits, is whole or not there, and goes on where it was cut off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamoe.model import load
from megamoe.model.loading import convert as convert_module
from megamoe.model.loading.convert import convert
from megamoe.model.loading.files import MANIFEST
from tests import checkpoints
from tests.checkpoints import FAMILIES
from tests.commands import files_no_larger_than, invoked, refused
from tests.test_loading import batch, folder, logits_of  # noqa: F401 the fixture

pytest.importorskip("transformers")


def same(a: Any, b: Any) -> bool:
    return torch.equal(logits_of(a, batch()), logits_of(b, batch()))


@pytest.mark.parametrize("name", [*FAMILIES, "fp8", "sharded"])
def test_mxfp4_that_was_written_is_mxfp4_that_was_rounded_while_loading(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    done = convert(folder / name, tmp_path / "to", experts="mxfp4", scales="best")
    found, expected = load(tmp_path / "to"), load(folder / name, experts="mxfp4", scales="best")
    assert set(found.megamoe_report.weight_formats.values()) == {"mxfp4"}
    assert same(found, expected)
    assert found.megamoe_report.expert_bytes < 0.3 * load(folder / name).megamoe_report.expert_bytes or name == "fp8"
    assert done.tensors_converted
    assert all(0.01 < error < 0.2 for error in done.quantization_error.values())


@pytest.mark.parametrize("name", ["native_v4", "gpt_oss_fp4", "fp8"])
def test_bf16_has_the_values_of_what_was_packed(folder: Path, tmp_path: Path, name: str) -> None:  # noqa: F811
    convert(folder / name, tmp_path / "to", experts="bf16")
    assert same(load(tmp_path / "to"), load(folder / name, experts="bf16"))


def test_gpt_oss_in_mxfp4_is_what_transformers_reads(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    from transformers import AutoModelForCausalLM

    convert(folder / "gpt_oss", tmp_path / "to", experts="mxfp4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    ours = load(tmp_path / "to", experts="bf16")
    own = ours.state_dict()["model.layers.0.mlp.experts.layer.experts.down"]
    assert torch.equal(own, theirs.model.layers[0].mlp.experts.down_proj.detach().mT)


def test_dense_tensors_are_copied_and_the_config_says_what_is_there(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    convert(folder / "native_v4", tmp_path / "to", experts="bf16")
    before, after = (load_file(path / "model.safetensors") for path in (folder / "native_v4", tmp_path / "to"))
    dense = [name for name in before if ".experts." not in name]
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in dense)
    assert {tensor.dtype for name, tensor in after.items() if ".experts." in name} == {torch.bfloat16}
    convert(folder / "mixtral", tmp_path / "packed", experts="mxfp4")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "mxfp4"}
    assert (tmp_path / "packed" / "generation_config.json").is_file()


# ---- cut off, and going on ----


class CutOffError(Exception):
    """In place of a machine that goes down."""


def cut_off_after(shards: int, path: Path) -> Any:
    def progress(done: int, total: int) -> None:  # noqa: ARG001
        if len(list(path.glob("*.safetensors"))) >= shards:
            raise CutOffError

    return progress


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(path.iterdir())}


def test_it_goes_on_where_it_was_cut_off(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    source, whole, target = folder / "sharded", tmp_path / "whole", tmp_path / "cut"
    convert(source, whole, experts="mxfp4")
    with pytest.raises(CutOffError):
        convert(source, target, experts="mxfp4", progress=cut_off_after(3, target))
    assert not (target / "config.json").exists()
    with pytest.raises(ValueError, match=r"holds no config\.json: megamoe convert was cut off; run it again"):
        load(target)
    damaged = sorted(target.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")  # a shard that the disk lost a byte of
    done = convert(source, target, experts="mxfp4")
    assert done.shards_kept == 2
    assert contents(target) == contents(whole)
    assert convert(source, target, experts="mxfp4").shards_kept == done.shards


def test_the_manifest_has_the_checksum_of_every_shard(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    convert(folder / "sharded", tmp_path / "to", experts="mxfp4")
    manifest = json.loads((tmp_path / "to" / MANIFEST).read_text())
    files = sorted((tmp_path / "to").glob("*.safetensors"))
    assert len(files) > 3
    assert {file.name for file in files} == set(manifest["shards"])
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == manifest["shards"][file.name]["sha256"]


def test_a_source_that_is_written_to_meanwhile_is_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    source, target = tmp_path / "from", tmp_path / "to"
    shutil.copytree(folder / "sharded", source)
    last = sorted(source.glob("*.safetensors"))[-1]

    def progress(done: int, total: int) -> None:  # noqa: ARG001
        last.write_bytes(last.read_bytes())

    with pytest.raises(ValueError, match=f"{last.name} was changed or replaced after its header was read"):
        convert(source, target, experts="mxfp4", progress=progress)
    assert not (target / "config.json").exists()
    assert not list(target.glob(".*"))


def test_a_full_disk_and_ctrl_c_leave_what_the_next_run_goes_on_from(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target, whole = folder / "sharded", tmp_path / "to", tmp_path / "whole"
    convert(source, whole, experts="mxfp4")
    first = sorted(whole.glob("*.safetensors"))[0].name
    with files_no_larger_than((whole / first).stat().st_size // 2):
        full = invoked("convert", source, target, "--experts", "mxfp4", COLUMNS="200")
    assert full.exit_code == 1
    assert full.stderr.splitlines() == [
        f"{target} keeps the shards that are whole: the same command goes on from there",
        f"failed: {target / first}: File too large: files may not be as large here: see ulimit -f",
    ]
    assert {each.name for each in target.iterdir()} == {MANIFEST}
    with monkeypatch.context() as patched:  # Ctrl-C once a shard is written
        written = convert_module._write_json

        def write(file: Path, content: dict[str, Any]) -> None:
            written(file, content)
            os.kill(os.getpid(), signal.SIGINT)

        patched.setattr(convert_module, "_write_json", write)
        stopped = invoked("convert", source, target, "--experts", "mxfp4", COLUMNS="200")
    assert stopped.exit_code == 130
    assert "keeps the shards that are whole" in stopped.stderr
    assert {each.name for each in target.iterdir()} == {MANIFEST, first}
    assert invoked("convert", source, target, "--experts", "mxfp4").exit_code == 0
    assert contents(target) == contents(whole)


# ---- the command, and what it refuses ----


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    done = invoked("convert", folder / "mixtral", tmp_path / "a", "--experts", "mxfp4", "--format", "json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["tensors_converted"] == 2 * 5 * 3
    assert said["bytes_written"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    table = invoked("convert", folder / "mixtral", tmp_path / "a", "--experts", "mxfp4")
    assert table.exit_code == 0
    assert "1 shard, 1 of them kept from an earlier run" in table.stdout


def test_an_expert_that_the_other_format_cannot_hold_is_named(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    def spoil_scale(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name == "layers.1.ffn.experts.2.w2.scale":
            tensor.view(torch.uint8)[0, 0] = 255
        return {name: tensor}

    def spoil_weight(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name.endswith("layers.1.block_sparse_moe.experts.2.w2.weight"):
            tensor[0, 0] = float("nan")
        return {name: tensor.float()}  # what is BF16 already is copied as it is

    for family, spoil, experts, said in (
        ("native_v4", spoil_scale, "bf16", "layers.1.ffn.experts.2.w2.weight: 32 of 8192 weights are NaN or infinite"),
        ("mixtral", spoil_weight, "bf16", "experts.2.w2.weight: 1 of 6144 weights are NaN or infinite in BF16"),
        ("mixtral", spoil_weight, "mxfp4", "experts.2.w2.weight: quantize_mxfp4: 1 of 6144 weights are NaN"),
    ):
        source = tmp_path / f"{family}-{experts}"
        shutil.copytree(folder / family, source)
        checkpoints.rewrite(source, spoil)
        assert said in refused("convert", source, tmp_path / f"to-{source.name}", "--experts", experts)


def test_what_stays_after_a_refusal_halfway_is_said(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("sharded", "mixtral"):
        source, target = tmp_path / name, tmp_path / f"to-{name}"
        shutil.copytree(folder / name, source)
        shards = sorted(source.glob("*.safetensors"))
        last = max(number for number, shard in enumerate(shards) if any(".experts." in key for key in load_file(shard)))
        tensors = load_file(shards[last])
        next(each for key, each in tensors.items() if ".experts." in key)[0, 0] = float("nan")
        save_file(tensors, shards[last], {"format": "pt"})
        said = refused("convert", source, target, "--experts", "mxfp4")
        assert "weights are NaN or infinite" in said
        assert ("keeps" in said) == target.exists() == (name == "sharded")
        if name == "sharded":
            assert f"keeps what is whole, {last} of {len(shards)} shards" in said
            assert len(list(target.glob("*.safetensors"))) == last > 0


def test_dense_tensors_that_load_would_not_take_are_refused(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    name = "model.layers.0.self_attn.q_proj.weight"

    def changed(case: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        if key != name:
            return {key: tensor}
        cases = {"shape": {name: tensor[:-1]}, "dtype": {name: tensor.to(torch.int32)}}
        return cases.get(case, {})

    for case, message in (
        ("shape", "q_proj.weight is [63, 64], the config asks for [64, 64]"),
        ("dtype", "q_proj.weight has dtype I32, expected one of"),
        ("missing", f"has nothing for {name}"),
    ):
        source, target = tmp_path / case, tmp_path / f"to-{case}"
        shutil.copytree(folder / "mixtral", source)
        checkpoints.rewrite(source, partial(changed, case))
        assert message in refused("convert", source, target, "--experts", "mxfp4")
        assert not target.exists()


def test_dense_values_that_are_not_finite_are_refused_and_those_that_load_does_not_read_are_copied(
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    def spoilt(name: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
        return {key: tensor, "beside": torch.tensor([torch.nan])} | (
            {key: torch.full_like(tensor, torch.inf)} if key == name else {}
        )

    for name, message in (("model.norm.weight", "64 of 64 values are NaN or infinite in bfloat16"), ("none", "")):
        source, target = tmp_path / name, tmp_path / f"to-{name}"
        shutil.copytree(folder / "mixtral", source)
        checkpoints.rewrite(source, partial(spoilt, name))
        if message:
            assert f"{name}: {message}" in refused("convert", source, target, "--experts", "mxfp4")
            assert not target.exists()
        else:
            convert(source, target, experts="mxfp4")


def test_a_wrong_request_writes_nothing(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    source, target = folder / "mixtral", tmp_path / "to"
    assert "is the source itself" in refused("convert", source, source, "--experts", "mxfp4")
    assert "is no folder" in refused("convert", tmp_path / "none", target, "--experts", "mxfp4")
    shutil.copytree(source, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert "is truncated" in refused("convert", tmp_path / "broken", target, "--experts", "mxfp4")
    checkpoints.write(tmp_path / "odd", "mixtral", intermediate_size=80)
    assert "no multiple of 32" in refused("convert", tmp_path / "odd", target, "--experts", "mxfp4")
    assert not target.exists()
    target.mkdir()
    (target / "note.txt").write_text("mine")
    assert "is not empty" in refused("convert", source, target, "--experts", "mxfp4")
    assert contents(target) == {"note.txt": b"mine"}


def test_what_was_begun_otherwise_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    convert(folder / "mixtral", tmp_path / "to", experts="mxfp4")
    before = contents(tmp_path / "to")
    said = refused("convert", folder / "mixtral", tmp_path / "to", "--experts", "mxfp4", "--scales", "best")
    assert "was begun with scales 'contract'" in said
    assert "from another source" in refused("convert", folder / "qwen3_moe", tmp_path / "to", "--experts", "mxfp4")
    assert contents(tmp_path / "to") == before
