"""Writes a small expert model with random weights in DeepSeek-V4's own checkpoint format: real names, real dtypes."""

# E experts   H hidden   I intermediate   V vocabulary   K experts per token

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megamoe.ambient import undisturbed
from megamoe.formats import quantize_e4m3_blocks, quantize_mxfp4
from megamoe.model.deepseek_v4.config import DeepSeekV4Config
from megamoe.model.loading.files import INDEX, write_tensors

VOCABULARY = 129_280  # DeepSeek-V4's

SMALL = DeepSeekV4Config(
    model_type="deepseek_v4",
    hidden_size=512,
    moe_intermediate_size=768,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=6,
    num_hidden_layers=2,
    num_hash_layers=1,
    vocab_size=VOCABULARY,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    rms_norm_eps=1e-6,
    scoring_func="sqrtsoftplus",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    expert_dtype="fp4",
)


def num_steps(config: DeepSeekV4Config) -> int:
    """How often write_checkpoint calls its progress: once per expert, and once per shard."""
    return config.num_hidden_layers * (config.n_routed_experts + 1) + 1


def write_checkpoint(
    path: Path, config: DeepSeekV4Config = SMALL, *, seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Writes shards, index and, last, config.json: a folder with a config.json is complete.

    One shard for the embedding, then one a layer. Weights are normal, scaled so that values keep their size from
    layer to layer; the selection bias is not zero and the hash table spreads tokens over all experts.
    """
    with undisturbed(torch.device("cpu")):
        _write_shards(path, config, seed, progress)
    (path / "config.json").write_text(config.model_dump_json(indent=1), encoding="utf-8")


def _write_shards(path: Path, config: DeepSeekV4Config, seed: int, progress: Callable[[str], None]) -> None:
    """Everything but config.json."""
    path.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    count = config.num_hidden_layers + 1
    shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    weight_map: dict[str, str] = {}
    embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
    for rows in torch.split(embedding, 8192):  # in pieces: a whole FP32 copy would double the memory
        rows.copy_(_randn(rows.shape, rng))
    _save(path, shards[0], {"embed.weight": embedding}, weight_map)
    del embedding
    progress(shards[0])
    for layer in range(config.num_hidden_layers):
        tensors = _layer_tensors(config, layer, rng, progress)
        _save(path, shards[layer + 1], tensors, weight_map)
        progress(shards[layer + 1])
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    (path / INDEX).write_text(index, encoding="utf-8")


def _save(path: Path, shard: str, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    write_tensors(tensors, path / shard)
    weight_map |= dict.fromkeys(tensors, shard)


def _layer_tensors(
    config: DeepSeekV4Config, layer: int, rng: torch.Generator, progress: Callable[[str], None]
) -> dict[str, Tensor]:
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    matrices = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    name = f"layers.{layer}.ffn"
    tensors = {f"layers.{layer}.ffn_norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    tensors[f"{name}.gate.weight"] = (_randn((experts, hidden), rng) / hidden**0.5).to(torch.bfloat16)
    if config.is_hash_routed(layer):
        # K different experts a token: the first of a random order
        order = torch.rand(config.vocab_size, experts, generator=rng, dtype=torch.float32).argsort(-1)
        tensors[f"{name}.gate.tid2eid"] = order[:, : config.num_experts_per_tok].to(torch.int32).contiguous()
    else:
        tensors[f"{name}.gate.bias"] = _randn((experts,), rng) * 0.1
    for expert in range(experts):
        for key, size in matrices.items():
            quantized = quantize_mxfp4(_matrix(size, rng))
            tensors[f"{name}.experts.{expert}.{key}.weight"] = quantized.packed.view(torch.int8)
            tensors[f"{name}.experts.{expert}.{key}.scale"] = quantized.scales.view(torch.float8_e8m0fnu)
        progress(f"{name}.experts.{expert}")
    if config.n_shared_experts:
        for key, size in matrices.items():
            values, scales = quantize_e4m3_blocks(_matrix(size, rng))
            tensors[f"{name}.shared_experts.{key}.weight"] = values
            tensors[f"{name}.shared_experts.{key}.scale"] = scales.view(torch.float8_e8m0fnu)
    return tensors


def _matrix(size: tuple[int, int], rng: torch.Generator) -> Tensor:
    return _randn(size, rng).mul_(1.5 / size[1] ** 0.5)


def _randn(size: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """The same numbers whatever torch's default dtype is."""
    return torch.randn(size, generator=rng, dtype=torch.float32)
