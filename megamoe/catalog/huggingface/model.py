"""Reads the sizes of a Mixture-of-Experts model from the keys of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamoe.catalog.huggingface.attention import attention_of
from megamoe.catalog.huggingface.formats import formats_of
from megamoe.catalog.huggingface.keys import (
    Config,
    count,
    first,
    flag,
    given,
    number,
    optional_count,
    switch,
    text_of,
    whole,
)
from megamoe.catalog.huggingface.layers import layers_with_experts
from megamoe.catalog.huggingface.mixers import block_types
from megamoe.catalog.huggingface.unread import refuse_unread
from megamoe.catalog.schema import Model

NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
TOPK = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k", "moe_k")
WIDTH = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "intermediate_size")
SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
DENSE_WIDTH = (
    "prefix_dense_intermediate_size",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "intermediate_size",
)
MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
SCALING = ("routed_scaling_factor", "router_scaling_factor", "moe_router_scaling_factor")
LATENT = ("routed_expert_hidden_size", "moe_latent_size", "moe_hidden_size")
SWITCHES = ("is_moe", "use_moe", "enable_moe_block")
OTHER_SHAPES = {
    "doge": "its experts are rows of an embedding",
    "jetmoe": "its attention heads are experts too",
    "longcat_flash": "its layers have two attentions and two plain MLPs each",
}


def model_from_config(config: Mapping[str, Any], *, name: str, source: str) -> Model:
    """A Model from the contents of a config.json.

    ValueError names the keys that are missing, when the config is of no Mixture-of-Experts model or of a shape that is
    not known here; pydantic's ValidationError where sizes contradict each other.
    """
    text = _language_part(config)
    _require(text)
    text.mtp_layers = whole(text, *MTP) or 0
    has_experts = layers_with_experts(text)
    leading = has_experts.index(True)
    mixed = not all(has_experts[leading:])
    attention, formats = attention_of(text), formats_of(text)
    shared, shared_width = _shared(text)
    activation = text_of(text, "mlp_hidden_act", "hidden_act")
    sizes: dict[str, Any] = {
        "hidden": count(text, "hidden_size"),
        "intermediate": count(text, *WIDTH),
        "layers": len(has_experts),
        "dense_layers": 0 if mixed else leading,
        "dense_intermediate": count(text, *DENSE_WIDTH) if _has_plain_mlps(text, has_experts) else None,
        "num_moe_layers": sum(has_experts) if mixed else None,
        "num_experts": count(text, *EXPERTS),
        "topk": count(text, *TOPK),
        "shared_experts": shared,
        "shared_intermediate": shared_width,
        "routed_hidden": optional_count(text, *LATENT),
        "gated": activation not in ("relu", "relu2"),
        "situ": activation == "situ",
        "vocab": count(text, "vocab_size"),
        "tied_embeddings": flag(text, "tie_word_embeddings"),
        "mtp_layers": text.mtp_layers,
        "max_positions": optional_count(text, "max_position_embeddings", "seq_length"),
        "swiglu_limit": number(text, "swiglu_limit"),
        "routed_scaling_factor": number(text, *SCALING),
    }
    refuse_unread(text, len(has_experts))
    return Model(
        name=name,
        title=name,
        source=source,
        tag="vendor",
        attention=attention,
        weight_format=formats.experts,
        dense_format=formats.rest,
        notes={"weight_format": formats.note} if formats.note else {},
        **sizes,
    )


def _language_part(config: Mapping[str, Any]) -> Config:
    """The language model's keys over the outer ones: multimodal configs nest them, once or twice."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a config.json holds an object of keys, not {type(config).__name__}")
    text: dict[str, Any] = dict(config)
    for key in NESTED * 2:
        inner = text.pop(key, None)
        if isinstance(inner, Mapping):
            text.update(inner)
    return Config(text)


def _require(text: Config) -> None:
    family = f"model_type {text['model_type']!r}" if "model_type" in text else "no model_type"
    if off := [key for key in SWITCHES if switch(text, key) is False]:
        raise ValueError(f"no Mixture-of-Experts model ({family}): {off[0]} is false")
    if reason := OTHER_SHAPES.get(str(text.get("model_type"))):
        raise ValueError(f"models of {family} cannot be planned: {reason}")
    if first(text, *EXPERTS) is None:
        raise ValueError(f"no Mixture-of-Experts model ({family}): it has none of {', '.join(EXPERTS)}")
    if first(text, *EXPERTS) in (0, 1):
        key = given(text, *EXPERTS)
        raise ValueError(f"no Mixture-of-Experts model ({family}): {key} is {first(text, *EXPERTS)}")
    needed = {"num_experts_per_tok": TOPK, "hidden_size": ("hidden_size",), "vocab_size": ("vocab_size",)}
    needed |= {"moe_intermediate_size": WIDTH, "num_attention_heads": ("num_attention_heads",)}
    if not block_types(text):
        needed["num_hidden_layers"] = ("num_hidden_layers",)
    missing = [key for key, names in needed.items() if first(text, *names) is None]
    if missing:
        raise ValueError(f"a Mixture-of-Experts model ({family}) without {', '.join(missing)}")


def _has_plain_mlps(text: Config, has_experts: list[bool]) -> bool:
    blocks = block_types(text)
    return "mlp" in blocks if blocks else not all(has_experts)


def _shared(text: Config) -> tuple[int, int | None]:
    """Number and width (None: that of the routed ones) of the shared experts; Llama-4 and Hunyuan have one unsaid."""
    width = _positive(text, *SHARED_WIDTH)
    unsaid = 1 if width or str(text.get("model_type", "")).startswith(("llama4", "hunyuan_v1_moe")) else 0
    shared = _positive(text, *SHARED) or unsaid
    differs = shared and width and width != count(text, *WIDTH)
    return shared, width if differs else None


def _positive(text: Config, *names: str) -> int | None:
    """A count that may also be 0: then, as where it is absent, None."""
    return optional_count(text, *names) if first(text, *names) not in (0, None) else None
