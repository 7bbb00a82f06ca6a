"""Tiny random checkpoints of several families, as transformers saves them and as their makers store them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamoe.formats import quantize_mxfp4
from megamoe.formats.e4m3 import quantize_e4m3_blocks

VOCABULARY = 160
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
}
_V4_LAYERS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 5},
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_experts": 7,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "gpt_oss": {
        "intermediate_size": 96,
        "head_dim": 16,
        "num_local_experts": 6,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v4": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "moe_intermediate_size": 64,
        "num_key_value_heads": 1,
        "n_routed_experts": 8,
        "q_lora_rank": 32,
        "o_lora_rank": 32,
        "o_groups": 2,
        "head_dim": 32,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 4,
        "sliding_window": 64,
        "hc_mult": 2,
        "layer_types": _V4_LAYERS,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
}
FAMILIES = tuple(CONFIGS)


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of transformers with random weights of ordinary size, in BF16 values, also of its routers' tables."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_COMMON, **CONFIGS[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of what is not drawn below
        model = AutoModelForCausalLM.from_config(config).eval()
    rng = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, scale: float) -> Tensor:
        return (torch.randn(tensor.shape, generator=rng) * scale).to(torch.bfloat16)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(draw(parameter, parameter.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                order = torch.rand(len(buffer), config.n_routed_experts, generator=rng).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                buffer.copy_(draw(buffer, 0.1))
    return model


def write(path: Path, family: str, seed: int = 0, *, shard: str = "5GB", **changes: Any) -> Path:
    """As save_pretrained() has it, in one file or in several."""
    make_model(family, seed, **changes).save_pretrained(path, max_shard_size=shard)
    return path


def rewrite(path: Path, change: Callable[[str, Tensor], dict[str, Tensor]], **config: Any) -> Path:
    """Every tensor of a checkpoint of one file in place of what change() makes of it; keys of its config."""
    file = path / "model.safetensors"
    made: dict[str, Tensor] = {}
    for name, tensor in load_file(file).items():
        made |= change(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, file, {"format": "pt"})
    known = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**known, **config}))
    return path


def native_fp4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """DeepSeek-V4's own: its names, experts I8 and E8M0, dense matrices FP8."""
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
    if ".experts." in name:
        packed = quantize_mxfp4(tensor)
        scales = packed.scales.view(torch.float8_e8m0fnu)
        return {name: packed.packed.view(torch.int8), name.replace(".weight", ".scale"): scales}
    if name.endswith((".wq_a.weight", ".wkv.weight", ".wo_a.weight", ".w1.weight", ".w3.weight")):
        values, scales = quantize_e4m3_blocks(tensor)
        return {name: values, name.replace(".weight", ".scale"): scales.view(torch.float8_e8m0fnu)}
    return {name: tensor}


def gpt_oss_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """gpt-oss's own: stacks [E, inputs, outputs] as *_blocks [E, outputs, inputs/32, 16] and *_scales."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    packed = quantize_mxfp4(tensor.mT.contiguous())
    return {f"{name}_blocks": torch.unflatten(packed.packed, -1, (-1, 16)), f"{name}_scales": packed.scales}


def fp8_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """FP8 as DeepSeek-V3 and transformers store it: 128 x 128 values share a float32 scale, named its inverse."""
    if tensor.dim() != 2 or not name.endswith("proj.weight"):
        return {name: tensor}
    scale = tensor.float().abs().amax() / 448.0
    values = (tensor.float() / scale).to(torch.float8_e4m3fn)
    blocks = tuple(-(-size // 128) for size in tensor.shape)
    return {name: values, name.replace(".weight", ".weight_scale_inv"): scale.expand(blocks)}


def fp8_in_blocks(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """As fp8_blocks(), each block with a scale of its own."""
    if tensor.dim() != 2 or not name.endswith("proj.weight"):
        return {name: tensor}
    rows, columns = tensor.shape
    tall, wide = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(tall * 128, wide * 128)
    padded[:rows, :columns] = tensor.float()
    scales = padded.view(tall, 128, wide, 128).abs().amax((1, 3)) / 448.0
    spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    values = (tensor.float() / spread).to(torch.float8_e4m3fn)
    return {name: values, name.replace(".weight", ".weight_scale_inv"): scales}
