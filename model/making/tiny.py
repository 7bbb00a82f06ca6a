"""Tiny random checkpoints with all that is special about a family, for tests and bug reports."""

# N outputs   K inputs   E experts   K experts per token   V vocabulary

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from megamoe.ambient import undisturbed
from megamoe.formats import quantize_e4m3_blocks, quantize_mxfp4
from megamoe.model.deepseek_v4.config import FP4_EXPERTS, native_name
from megamoe.model.loading.files import write_tensors
from megamoe.model.making.files import new_folder, no_bars
from megamoe.paths import AnyPath, lasting_path_of

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCABULARY = 256 + 3  # a token for each byte, and these
_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
_STD = 0.1  # of random weights: texts differ, and no activation leaves its range


def _common(num_experts: int, topk: int) -> dict[str, Any]:
    """What all families have, under the names that all of them know."""
    tokenizer = byte_tokenizer()
    return {
        "hidden_size": 128,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_experts_per_tok": topk,
        "max_position_embeddings": 4096,
        "initializer_range": _STD,
        "num_local_experts": num_experts,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _deepseek_v4(num_experts: int, topk: int) -> PreTrainedConfig:
    return DeepseekV4Config(
        **_common(num_experts, topk),
        moe_intermediate_size=64,
        num_hidden_layers=4,
        layer_types=[*_KINDS, _KINDS[1]],
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
    )


def _deepseek_v3(num_experts: int, topk: int) -> PreTrainedConfig:
    common = _common(num_experts, topk)
    return DeepseekV3Config(
        **{key: value for key, value in common.items() if key != "num_local_experts"},
        n_routed_experts=common["num_local_experts"],
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
    )


def _qwen3_moe(num_experts: int, topk: int) -> PreTrainedConfig:
    common = _common(num_experts, topk)
    return Qwen3MoeConfig(
        **{key: value for key, value in common.items() if key != "num_local_experts"},
        num_experts=common["num_local_experts"],
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=32,
        norm_topk_prob=True,
    )


def _mixtral(num_experts: int, topk: int) -> PreTrainedConfig:
    return MixtralConfig(**_common(num_experts, topk), intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2)


def _gpt_oss(num_experts: int, topk: int) -> PreTrainedConfig:
    return GptOssConfig(
        **_common(num_experts, topk),
        intermediate_size=96,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=16,
    )


# ---- as a family's own checkpoints store them ----

Stored = dict[str, Tensor]

_FP32 = re.compile(r"(\.attn_sink|\.ape|\.gate\.bias|hc_(attn|ffn|head)_\w+)$")


def _native_deepseek_v4(name: str, tensor: Tensor) -> Stored:
    """Experts in MXFP4, I8 and E8M0; shared experts in E4M3 blocks with E8M0 scales; what is added or mixes in FP32."""
    name = native_name(name)
    scale = name.replace(".weight", ".scale")
    if ".ffn.experts." in name:
        q = quantize_mxfp4(tensor)
        return {name: q.packed.view(torch.int8), scale: q.scales.view(torch.float8_e8m0fnu)}
    if ".ffn.shared_experts." in name:
        values, scales = quantize_e4m3_blocks(tensor.to(torch.float32))
        return {name: values, scale: scales.view(torch.float8_e8m0fnu)}
    if name.endswith("tid2eid"):
        return {name: tensor.to(torch.int32)}
    return {name: tensor.to(torch.float32) if _FP32.search(name) else tensor}


def _native_gpt_oss(name: str, tensor: Tensor) -> Stored:
    """Experts in MXFP4, [E, N, K/32, 16] and [E, N, K/32], biases beside them."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    q = quantize_mxfp4(tensor.mT.contiguous())
    return {f"{name}_blocks": q.packed.reshape(*q.scales.shape, -1), f"{name}_scales": q.scales}


def _as_it_is(name: str, tensor: Tensor) -> Stored:
    return {name: tensor}


_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

# name -> configuration, how its checkpoints store a tensor, and what they add to config.json
FAMILIES: dict[str, tuple[Callable[[int, int], PreTrainedConfig], Callable[[str, Tensor], Stored], dict[str, Any]]] = {
    "deepseek-v4-flash": (
        _deepseek_v4,
        _native_deepseek_v4,
        {**FP4_EXPERTS, "num_hash_layers": 1, "topk_method": "noaux_tc"},
    ),
    "deepseek-v3": (_deepseek_v3, _as_it_is, {}),
    "gpt-oss": (_gpt_oss, _native_gpt_oss, {"quantization_config": _MXFP4}),
    "mixtral": (_mixtral, _as_it_is, {}),
    "qwen3-moe": (_qwen3_moe, _as_it_is, {}),
}


def write_tiny(path: AnyPath, like: str, *, seed: int = 0, num_experts: int = 16, topk: int = 2) -> int:
    """A random checkpoint of a family, with config.json and a tokenizer of bytes -> its parameters.

    The same seed gives the same numbers. ValueError for a family that is not in FAMILIES, where path is taken, and for
    experts that the family cannot have: DeepSeek-V3 has two groups of them.
    """
    if like not in FAMILIES:
        raise ValueError(f"like must be one of {', '.join(FAMILIES)}, got {like!r}")
    path = lasting_path_of(path)
    groups = 2 if like == "deepseek-v3" else 1  # a token's experts are of one of them
    if num_experts < groups or num_experts % groups:
        bound = "an even number of at least 2, since it has two groups of experts" if groups == 2 else "at least 1"
        raise ValueError(f"num_experts of {like} must be {bound}, got {num_experts}")
    if not 1 <= topk <= num_experts // groups:
        which = f"the {num_experts // groups} experts of one of its {groups} groups" if groups > 1 else "its experts"
        raise ValueError(f"topk of {like} must be 1 to {num_experts // groups}, {which}, got {topk}")
    configuration, native, entries = FAMILIES[like]
    with undisturbed(torch.device("cpu")), new_folder(path) as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(configuration(num_experts, topk), dtype=torch.float32)
            _fill(model)
        parameters: int = sum(each.numel() for each in model.parameters())
        with no_bars():
            model.to(torch.bfloat16).save_pretrained(folder)
        _store(folder, native, entries)
        write_tokenizer(folder)
    return parameters


def _fill(model: Any) -> None:
    """What a fresh model has zeros in, and what a trained one has not: biases, sinks, and the hash table's experts."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                # K different experts a token: the first of a random order
                order = torch.rand(len(tensor), model.config.num_local_experts).argsort(-1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif name.endswith(("bias", "sinks")):
                tensor.copy_(torch.randn(tensor.shape) * _STD)


def _store(folder: Path, native: Callable[[str, Tensor], Stored], entries: dict[str, Any]) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    whole = load(file.read_bytes())  # not mapped: Windows removes no such file
    tensors = {key: part for name, tensor in whole.items() for key, part in native(name, tensor).items()}
    file.unlink()  # which safetensors made readable by its owner alone
    write_tensors(tensors, file)
    written = {**json.loads(config.read_text(encoding="utf-8")), **entries}
    config.write_text(json.dumps(written, indent=1), encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no training: any text in VOCABULARY tokens, and back; with a plain chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable letter for each byte
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in (BEGIN, END, PAD)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)
    made.chat_template = _CHAT
    assert len(made) == VOCABULARY, len(made)
    return made


def write_tokenizer(path: Path) -> None:
    """Into the folder of a checkpoint."""
    byte_tokenizer().save_pretrained(path)
