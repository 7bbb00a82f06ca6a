"""DeepSeek-V4 checkpoints, routers and blocks: read by name, refused by name, the same bits on any number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from megamoe.formats import dequantize_mxfp4
from megamoe.launch.ranks import LocalRanks
from megamoe.model.deepseek_v4.blocks import ExpertStack, MoEBlock
from megamoe.model.deepseek_v4.checkpoint import Checkpoint
from megamoe.model.deepseek_v4.config import DeepSeekV4Config
from megamoe.model.deepseek_v4.synthetic import SMALL, write_checkpoint
from megamoe.model.loading.files import INDEX, write_tensors
from megamoe.model.router import Router
from megamoe.parallel.group import EPGroup
from megamoe.routing.waves import Waves

CONFIG = SMALL.model_copy(
    update={
        "hidden_size": 128,
        "moe_intermediate_size": 64,
        "n_routed_experts": 7,
        "num_experts_per_tok": 3,
        "vocab_size": 500,
        "num_hidden_layers": 3,
    }
)
EXPERT = "layers.1.ffn.experts.4.w2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint") / "small"
    write_checkpoint(path, CONFIG)
    return path


def test_a_written_checkpoint_has_deepseeks_names_and_dtypes(checkpoint: Path) -> None:
    where = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    names = {
        "embed.weight": ("BF16", [500, 128]),
        "layers.0.ffn.gate.weight": ("BF16", [7, 128]),
        "layers.0.ffn.gate.tid2eid": ("I32", [500, 3]),
        "layers.1.ffn.gate.bias": ("F32", [7]),
        "layers.2.ffn.experts.6.w1.weight": ("I8", [64, 64]),
        "layers.2.ffn.experts.6.w1.scale": ("F8_E8M0", [64, 4]),
        "layers.2.ffn.experts.6.w2.weight": ("I8", [128, 32]),
        "layers.2.ffn.experts.6.w2.scale": ("F8_E8M0", [128, 2]),
        "layers.2.ffn.shared_experts.w3.weight": ("F8_E4M3", [64, 128]),
        "layers.2.ffn.shared_experts.w3.scale": ("F8_E8M0", [1, 1]),
    }
    for name, expected in names.items():
        with safe_open(checkpoint / where[name], framework="pt") as file:
            view = file.get_slice(name)
            assert (view.get_dtype(), view.get_shape()) == expected, name
    assert "layers.0.ffn.gate.bias" not in where
    assert "layers.1.ffn.gate.tid2eid" not in where


def read_own(group: EPGroup, path: Path) -> tuple[int, int, list[int]]:
    with Checkpoint.open(path) as opened:
        before = opened.bytes_read
        model = ExpertStack.load(opened, group)
        first = model.blocks[0]
        assert isinstance(first, MoEBlock)
        return opened.bytes_read - before, model.expert_bytes, list(first.routed.local_experts)


def test_a_rank_reads_its_own_experts_and_no_others(ranks: LocalRanks, checkpoint: Path) -> None:
    found = ranks.run(read_own, checkpoint, size=3)
    assert [ids for _, _, ids in found] == [[0, 1, 2], [3, 4], [5, 6]]
    common = found[0][0] - found[0][1]
    for read, held, ids in found:
        assert held == 3 * len(ids) * (3 * 128 * 64 // 2 + 3 * 128 * 64 // 32)
        assert read == held + common, "beyond its experts, a rank reads what every rank has"


def outputs(group: EPGroup, path: Path, token_ids: Tensor, waves: Waves) -> Tensor:
    mine = token_ids[len(token_ids) * group.rank // group.size : len(token_ids) * (group.rank + 1) // group.size]
    with Checkpoint.open(path) as opened:
        hidden = opened.embedding(mine)
        return ExpertStack.load(opened, group, waves=waves)(hidden, mine)


@pytest.mark.parametrize("waves", [1, 3, "auto"])
def test_all_layers_give_the_same_bits_on_any_number_of_ranks(
    ranks: LocalRanks, checkpoint: Path, waves: Waves
) -> None:
    token_ids = torch.randint(0, 500, (67,), generator=torch.Generator().manual_seed(0))
    alone = ranks.run(outputs, checkpoint, token_ids, 1, size=1)[0]
    assert alone.isfinite().all()
    for ep_size in (2, 3, 4):
        together = torch.cat(ranks.run(outputs, checkpoint, token_ids, waves, size=ep_size))
        assert torch.equal(together, alone), ep_size


# ---- what can be wrong with a checkpoint ----


LAYER_0, LAYER_1 = "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"


def edit(path: Path, change: Callable[[dict[str, Tensor]], object], shard: str = LAYER_1) -> None:
    tensors = load_file(path / shard)
    change(tensors)
    save_file(tensors, path / shard)


def truncate(path: Path) -> None:
    shard = path / LAYER_1
    shard.write_bytes(shard.read_bytes()[:-100])


def drop_expert(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{EXPERT}.weight"]

    edit(path, change)


def wrong_shape(path: Path) -> None:
    edit(path, lambda tensors: tensors.update({f"{EXPERT}.scale": tensors[f"{EXPERT}.scale"][:, :1].contiguous()}))


def wrong_dtype(path: Path) -> None:
    edit(path, lambda tensors: tensors.update({f"{EXPERT}.weight": tensors[f"{EXPERT}.weight"].to(torch.float32)}))


def scales_of_another_kind(path: Path) -> None:
    scale = f"{EXPERT}.scale"
    edit(path, lambda tensors: tensors.update({scale: tensors[scale].view(torch.float8_e4m3fn)}))


def nan_scale(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        scale = tensors[f"{EXPERT}.scale"].view(torch.uint8)
        scale[0, 0] = 255
        tensors[f"{EXPERT}.scale"] = scale.view(torch.float8_e8m0fnu)

    edit(path, change)


def wild_table(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.ffn.gate.tid2eid"][3, 1] = 7

    edit(path, change, LAYER_0)


def infinite_gate(path: Path) -> None:
    edit(path, lambda tensors: tensors["layers.1.ffn.gate.weight"].view(-1)[:2].fill_(torch.inf))


def nan_in_shared_expert(path: Path) -> None:
    name = "layers.1.ffn.shared_experts.w2.weight"
    edit(path, lambda tensors: tensors[name].view(torch.uint8).view(-1)[:3].fill_(0xFF))


def config_without(path: Path) -> None:
    text = json.loads((path / "config.json").read_text())
    del text["moe_intermediate_size"]
    text["expert_dtype"] = "fp8"
    (path / "config.json").write_text(json.dumps(text))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model-00003-of-00004.safetensors is truncated"),
    "expert_missing": (
        drop_expert,
        r"says that model-00003-of-00004.safetensors has layers.1.ffn.experts.4.w2.\w+, which it has not",
    ),
    "wrong_shape": (wrong_shape, r"layers.1.ffn.experts.4.w2.scale has shape \[128, 1\], expected \[128, 2\]"),
    "wrong_dtype": (wrong_dtype, r"layers.1.ffn.experts.4.w2.weight has dtype F32, expected I8 or U8 or F4"),
    "other_scales": (
        scales_of_another_kind,
        r"layers.1.ffn.experts.4.w2.scale has dtype F8_E4M3, expected F8_E8M0 or U8",
    ),
    "nan_scale": (nan_scale, r"layers.1.ffn: down of expert 4 has a scale byte of 255"),
    "hash_table_out_of_range": (wild_table, r"tid2eid holds expert ids 0 to 7, expected \[0, 7\)"),
    "gate_infinite": (infinite_gate, r"layers.1.ffn.gate.weight: 2 of \d+ values are NaN or infinite in bfloat16"),
    "nan_in_shared_expert": (nan_in_shared_expert, r"shared_experts.w2.weight: 3 of \d+ values are NaN or infinite"),
    "shard_missing": (lambda p: (p / "model-00002-of-00004.safetensors").unlink(), "lacks model-00002-of-00004"),
    "index_unreadable": (lambda p: (p / INDEX).write_text("{"), "has no weight_map that can be read"),
    "no_index": (lambda p: (p / INDEX).unlink(), "holds neither model.safetensors.index.json nor model.safetensors"),
    "no_config": (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    "other_model": (
        lambda p: (p / "config.json").write_text('{"model_type": "mixtral"}'),
        "config.json is of a model of type 'mixtral', and this runs those of deepseek_v4; megamoe.model.load",
    ),
    "no_model_type": (lambda p: (p / "config.json").write_text("{}"), "model_type: Field required"),
    "config_incomplete": (config_without, "moe_intermediate_size: Field required; expert_dtype: Input should be 'fp4'"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "broken"
    write_checkpoint(path, CONFIG)
    change, message = BROKEN[broken]
    change(path)
    with pytest.raises(ValueError, match=message), Checkpoint.open(path) as opened:
        ExpertStack.load(opened)


SPELLINGS = [(torch.uint8, torch.uint8), (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu), (torch.int8, torch.uint8)]


@pytest.mark.parametrize(("packed", "scales"), SPELLINGS, ids=str)
def test_experts_are_read_in_every_spelling_of_their_bytes(
    checkpoint: Path, tmp_path: Path, packed: torch.dtype, scales: torch.dtype
) -> None:
    path = tmp_path / "spelled"
    write_checkpoint(path, CONFIG)

    def spell(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].view(packed if name.endswith("weight") else scales)

    edit(path, spell)
    with Checkpoint.open(path) as spelled, Checkpoint.open(checkpoint) as plain:
        for got, expected in zip(spelled.expert(1, 4), plain.expert(1, 4), strict=True):
            assert torch.equal(got.packed, expected.packed)
            assert torch.equal(got.scales, expected.scales)


# ---- routers ----


def test_scored_router_chooses_by_bias_and_weighs_without_it() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 64, generator=rng).to(torch.bfloat16)
    weight, bias = torch.randn(9, 64, generator=rng).to(torch.bfloat16) / 8, torch.randn(9, generator=rng)
    ids, weights = Router(weight, 4, 2.5, bias=bias)(hidden, torch.zeros(50, dtype=torch.int64))
    scores = torch.nn.functional.softplus(hidden.double() @ weight.double().T).sqrt()
    expected = (scores + bias).topk(4).indices
    assert torch.equal(ids, expected)
    chosen = scores.gather(1, expected)
    assert torch.allclose(weights.double(), chosen / chosen.sum(1, keepdim=True) * 2.5, rtol=1e-5)
    assert weights.dtype == torch.float32


def test_a_router_multiplies_by_the_weight_that_it_has_now() -> None:
    rng = torch.Generator().manual_seed(0)
    router = Router(torch.randn(9, 64, generator=rng).to(torch.bfloat16), 4, 2.5, bias=torch.zeros(9))
    hidden = torch.randn(5, 64, generator=rng).to(torch.bfloat16)
    router.scores(hidden)
    router.weight.data = router.weight.flip(0)
    assert torch.equal(router.scores(hidden), Router(router.weight, 4, 2.5, bias=torch.zeros(9)).scores(hidden))
    router.weight.data.copy_(router.weight.flip(0))
    assert torch.equal(router.scores(hidden), Router(router.weight, 4, 2.5, bias=torch.zeros(9)).scores(hidden))
    with torch.inference_mode():
        router = Router(router.weight.clone(), 4, 2.5, bias=torch.zeros(9))
        router.scores(hidden)
        router.weight.neg_()
        assert torch.equal(router.scores(hidden), Router(router.weight, 4, 2.5, bias=torch.zeros(9)).scores(hidden))


def test_hash_router_chooses_by_token_id() -> None:
    table = torch.tensor([[0, 2], [1, 2], [2, 0]], dtype=torch.int32)
    router = Router(torch.randn(3, 32).to(torch.bfloat16), 2, 1.5, table=table)
    ids, weights = router(torch.randn(4, 32).to(torch.bfloat16), torch.tensor([2, 0, 0, 1]))
    assert ids.tolist() == [[2, 0], [0, 2], [0, 2], [1, 2]]
    assert torch.allclose(weights.sum(1), torch.full((4,), 1.5))


@pytest.mark.parametrize("num_experts", [5, 32, 257])
def test_scores_of_a_token_do_not_depend_on_the_batch_or_the_threads(num_experts: int) -> None:
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(133, 512, generator=rng).to(torch.bfloat16)
    weight = torch.randn(num_experts, 512, generator=rng).to(torch.bfloat16)
    router = Router(weight, 3, 1.0, bias=torch.zeros(num_experts))
    scores = router.scores(hidden)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for part in (slice(0, 1), slice(7, 8), slice(31, 34), slice(100, 133)):
            assert torch.equal(router.scores(hidden[part]), scores[part])


def test_a_router_takes_a_bias_or_a_table() -> None:
    with pytest.raises(ValueError, match=r"either a bias \(scored\) or a table \(hash-routed\)"):
        Router(torch.zeros(3, 32), 2, 1.0)


@pytest.mark.parametrize("name", ["DeepSeek-V4-Pro", "DeepSeek-V4-Flash"])
def test_the_published_configs_are_understood(name: str, tmp_path: Path) -> None:
    published = {
        "DeepSeek-V4-Pro": {"hidden_size": 7168, "moe_intermediate_size": 3072, "n_routed_experts": 384},
        "DeepSeek-V4-Flash": {"hidden_size": 4096, "moe_intermediate_size": 2048, "n_routed_experts": 256},
    }[name]
    text = {
        **published,
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "expert_dtype": "fp4",
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": 61,
        "rms_norm_eps": 1e-06,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    }
    (tmp_path / "config.json").write_text(json.dumps(text))
    config = DeepSeekV4Config.read(tmp_path)
    assert config.shape.hidden == published["hidden_size"]
    assert config.shape.intermediate == published["moe_intermediate_size"]
    assert [config.is_hash_routed(layer) for layer in (0, 2, 3)] == [True, True, False]


def test_dequantised_experts_are_what_was_written(checkpoint: Path) -> None:
    with Checkpoint.open(checkpoint) as opened:
        gate_up, down = opened.expert(1, 4)
        gate = opened.tensor("layers.1.ffn.experts.4.w1.weight", (64, 64), "I8")
        assert torch.equal(gate_up.packed[:64], gate.view(torch.uint8))
        values = dequantize_mxfp4(down)
        assert values.shape == (128, 64)
        assert 0.5 < float(values.float().std()) * 64**0.5 < 2.5


def test_tensors_go_into_a_pipe_or_a_device_and_not_into_its_place(tmp_path: Path) -> None:
    """safetensors writes a file beside the one that it is given, and has it take that one's place."""
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_tensors({"hidden": torch.ones(2, 3)}, pipe)
    assert torch.equal(load(os.read(reader, 10_000))["hidden"], torch.ones(2, 3))
    os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
