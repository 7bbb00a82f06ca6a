"""A tiny random model of every family of transformers whose experts have an expert-parallel rule."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

RULE = "ep_dispatch_experts"
VOCABULARY, EXPERTS = 128, 8

# what a configuration's fields become where it has them
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 16,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """A folder of transformers' models, its configuration with the rule, and the model that takes token ids."""

    name: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]


def families(names: Sequence[str] = ()) -> list[Family]:
    """Those of these names, or all of them in the installed transformers, by name. ValueError for a name that none has.

    Folders that only pass another's configuration on are not.
    """
    root = Path(inspect.getfile(transformers)).parent / "models"
    files = {file.parent.name: file for file in sorted(root.glob("*/configuration_*.py")) if RULE in file.read_text()}
    unknown = sorted(set(names) - files.keys())
    if unknown:
        raise ValueError(f"no family is called {', '.join(unknown)}; there are {', '.join(files)}")
    return [_family(name, file.stem) for name, file in files.items() if not names or name in names]


def _family(name: str, file: str) -> Family:
    configs = _classes(f"transformers.models.{name}.{file}", PreTrainedConfig)
    configs = [each for each in configs if RULE in (getattr(each, "base_model_ep_plan", None) or {}).values()]
    config = min(configs, key=lambda each: (CONFIGS.get(name) != each.__name__, "Vision" in each.__name__))
    if config in MODEL_FOR_CAUSAL_LM_MAPPING:
        return Family(name, config, MODEL_FOR_CAUSAL_LM_MAPPING[config])
    models = _classes(f"transformers.models.{name}.{file.replace('configuration_', 'modeling_')}", PreTrainedModel)
    models = [each for each in models if getattr(each, "config_class", None) is config or _takes(each, config)]
    models = [each for each in models if not each.__name__.endswith("PreTrainedModel")]
    return Family(name, config, min(models, key=lambda each: "CausalLM" not in each.__name__))


def _takes(model: type, config: type) -> bool:
    hint = inspect.signature(model).parameters.get("config")
    return hint is not None and hint.annotation in (config, config.__name__)


def _classes(module: str, base: type) -> list[Any]:
    loaded = importlib.import_module(module)
    return [
        each
        for _, each in inspect.getmembers(loaded, inspect.isclass)
        if each.__module__ == loaded.__name__ and issubclass(each, base)
    ]


# of several configurations with the rule
CONFIGS = {"qwen3_omni_moe": "Qwen3OmniMoeTextConfig", "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextConfig"}

# what a family's configuration needs besides or instead; limits are low enough that they are met
ENTRIES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v4": {"o_groups": 2, "sliding_window": 16, "swiglu_limit": 1.0},
    "diffusion_gemma": {"global_head_dim": 32},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [96, 96],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 2, 4]},
    },
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "glm5_next": {"qk_rope_head_dim": 0, "head_dim": 0, "swiglu_limit": 1.0},
    "hy_v4": {"swiglu_limit": 1.0},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mimo_v2_flash": {"head_dim": 48, "num_key_value_heads": 2},
    "minimax_m3_vl": {"swiglu_limit": 1.0},
    "muse_spark": {"moe_hidden_size": 64},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"pad_token_id": 1, "swiglu_limits": [0.5] * 4, "swiglu_limits_shared": [0.5] * 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: Family) -> PreTrainedConfig:
    known = set(inspect.signature(family.config).parameters)
    known |= set(getattr(family.config, "__dataclass_fields__", {}))
    entries = {name: value for name, value in SIZES.items() if name in known or name in family.config.attribute_map}
    return family.config(**entries | ENTRIES.get(family.name, {}))


def write_tiny(family: Family, path: Path) -> None:
    """A checkpoint in FP32. Weights of experts and routers are large enough that experts are told apart and clamped."""
    torch.manual_seed(0)
    model = family.model(tiny_config(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, last = name.rpartition(".")
            if module.endswith("experts") and "proj" in last:
                parameter.normal_(0.0, 0.1 if last.endswith("bias") else 2.0 / parameter.shape[-1] ** 0.5)
            elif last == "weight" and module.rpartition(".")[2] in ("gate", "router"):
                parameter.normal_(0.0, 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # zeros in a fresh model
            order = torch.rand(len(buffer), EXPERTS).argsort(-1)
            buffer.copy_(order[:, : buffer.shape[1]])
    model.save_pretrained(path)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The routed experts of a model, stock or packed, by name."""
    found = {}
    for name, module in model.named_modules():
        down = module._parameters.get("down_proj")
        if (
            name.rpartition(".")[2] == "experts"
            and ("down_proj" in module._parameters)
            and (down is None or down.ndim == 3)
        ):
            found[name] = module
    return found
