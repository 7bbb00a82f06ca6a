"""Tiny random checkpoints of families of transformers, and what their MoE blocks take and give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from megamoe.formats import quantize_mxfp4
from megamoe.layer import MegaMoE

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY = 160
COMMON = {"hidden_size": 128, "vocab_size": VOCABULARY, "num_attention_heads": 4, "num_experts_per_tok": 3}
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def configuration(family: str) -> PreTrainedConfig:
    """12 experts, which 1, 2, 3 and 4 ranks divide"""
    makers: dict[str, Callable[[], PreTrainedConfig]] = {
        "deepseek_v4": lambda: DeepseekV4Config(
            **COMMON,
            moe_intermediate_size=64,
            n_routed_experts=12,
            num_hidden_layers=4,
            layer_types=[*KINDS, KINDS[1]],
            mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
            head_dim=64,
            q_lora_rank=64,
            o_groups=2,
            o_lora_rank=32,
            hc_mult=2,
            sliding_window=16,
            compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            index_n_heads=2,
            index_head_dim=64,
            index_topk=4,
            swiglu_limit=1.0,
            initializer_range=0.1,
        ),
        "deepseek_v3": lambda: DeepseekV3Config(
            **COMMON,
            intermediate_size=96,
            moe_intermediate_size=48,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            n_routed_experts=12,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            num_key_value_heads=4,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=32,
            v_head_dim=32,
            initializer_range=0.1,
        ),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **COMMON,
            intermediate_size=96,
            moe_intermediate_size=48,
            num_experts=12,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=32,
            norm_topk_prob=True,
            initializer_range=0.1,
        ),
        "mixtral": lambda: MixtralConfig(
            **COMMON,
            intermediate_size=96,
            num_local_experts=12,
            num_hidden_layers=2,
            num_key_value_heads=2,
            initializer_range=0.1,
        ),
        "gpt_oss": lambda: GptOssConfig(
            **COMMON,
            intermediate_size=96,
            num_local_experts=12,
            num_hidden_layers=2,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=16,
            initializer_range=0.1,
        ),
    }
    return makers[family]()


def write_checkpoint(family: str, path: Path) -> Path:
    """Random weights in BF16; experts of deepseek_v4 and gpt_oss in FP4, as their own checkpoints have them."""
    torch.manual_seed(0)
    config = configuration(family)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                order = torch.rand(len(tensor), config.n_routed_experts).argsort(-1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(path)
    if family == "deepseek_v4":
        _rewrite(path, _deepseek_v4, {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}, expert_dtype="fp4")
    if family == "gpt_oss":
        _rewrite(path, _gpt_oss, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return path


def _rewrite(
    path: Path, change: Callable[[str, Tensor], dict[str, Tensor]], quantization: dict[str, Any], **entries: Any
) -> None:
    file, config = path / "model.safetensors", path / "config.json"
    tensors = {key: part for name, tensor in load_file(file).items() for key, part in change(name, tensor).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization, **entries}))


def _deepseek_v4(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if ".experts." in name:
        q = quantize_mxfp4(tensor)
        scale = name.replace(".weight", ".scale")
        return {name: q.packed.view(torch.int8), scale: q.scales.view(torch.float8_e8m0fnu)}
    if ".shared_experts." in name:
        scale = name.replace(".weight", ".scale")
        return {name: tensor.to(torch.float8_e4m3fn), scale: torch.ones(1, 1).to(torch.float8_e8m0fnu)}
    return {name: tensor}


def _gpt_oss(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        q = quantize_mxfp4(tensor.mT.contiguous())
        return {f"{name}_blocks": q.packed.view(*q.scales.shape, 16), f"{name}_scales": q.scales}
    return {name: tensor}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that have experts in them, by name, but for the layer itself."""
    return {name: m for name, m in model.named_modules() if "experts" in m._modules and not isinstance(m, MegaMoE)}


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


def record_blocks(model: nn.Module, token_ids: Tensor) -> tuple[Tensor, dict[str, Call]]:
    """Logits of the tokens, and what every MoE block was given and gave."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = args, kwargs, _first(output)

        return hook

    handles = [block.register_forward_hook(note(name), with_kwargs=True) for name, block in blocks(model).items()]
    with torch.no_grad():
        logits: Tensor = model(token_ids).logits
    for handle in handles:
        handle.remove()
    return logits, calls


def repeat_blocks(model: nn.Module, calls: dict[str, Call]) -> dict[str, Tensor]:
    """What every MoE block of the model gives for what a block of that name was given."""
    with torch.no_grad():
        return {name: _first(block(*calls[name][0], **calls[name][1])) for name, block in blocks(model).items()}


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
