"""Reads the sizes of a Mixture-of-Experts model from its Hugging Face config.json.

Families differ in the names of the same sizes, and in how they say which layers have experts; a name that several
families share is read the same way for all, so a new model of a known shape needs no code here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamoe.catalog.huggingface_attention import attention_of, block_types
from megamoe.catalog.huggingface_formats import formats_of
from megamoe.catalog.huggingface_keys import Config, count, first, flag, per_layer
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
DENSE_WIDTH = ("intermediate_size_mlp", "dense_intermediate_size", "intermediate_size")
MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
SCALING = ("routed_scaling_factor", "router_scaling_factor", "moe_router_scaling_factor")
HAS_EXPERTS = {"sparse", "moe", "hash_moe"}
DENSE_BY_DEFAULT = {"hy_v3": 1, "hy_v4": 1, "mimo_v2_flash": 1}


def model_from_config(config: Mapping[str, Any], *, name: str, source: str) -> Model:
    """A Model from the contents of a config.json.

    ValueError names the keys that are missing, when the config is of no Mixture-of-Experts model or of a shape that is
    not known here; pydantic's ValidationError where sizes contradict each other.
    """
    text = _language_part(config)
    _require(text)
    has_experts = _layers_with_experts(text)
    leading = has_experts.index(True)
    mixed = not all(has_experts[leading:])
    formats, (shared, shared_width) = formats_of(text), _shared(text)
    return Model(
        name=name,
        title=name,
        source=source,
        tag="vendor",
        hidden=count(text, "hidden_size"),
        intermediate=count(text, *WIDTH),
        layers=len(has_experts),
        dense_layers=0 if mixed else leading,
        dense_intermediate=count(text, *DENSE_WIDTH) if _has_plain_mlps(text, has_experts) else None,
        num_moe_layers=sum(has_experts) if mixed else None,
        num_experts=count(text, *EXPERTS),
        topk=count(text, *TOPK),
        shared_experts=shared,
        shared_intermediate=shared_width,
        routed_hidden=first(text, "routed_expert_hidden_size", "moe_latent_size"),
        gated=first(text, "mlp_hidden_act", "hidden_act") not in ("relu", "relu2"),
        vocab=count(text, "vocab_size"),
        tied_embeddings=flag(text, "tie_word_embeddings"),
        mtp_layers=first(text, *MTP) or 0,
        max_positions=first(text, "max_position_embeddings", "seq_length"),
        attention=attention_of(text),
        weight_format=formats.experts,
        dense_format=formats.rest,
        swiglu_limit=first(text, "swiglu_limit"),
        routed_scaling_factor=first(text, *SCALING),
        notes={"weight_format": formats.note} if formats.note else {},
    )


def _language_part(config: Mapping[str, Any]) -> Config:
    """The language model's keys over the outer ones: multimodal configs nest them, once or twice."""
    if not isinstance(config, Mapping):
        raise ValueError(f"a config.json holds an object of keys, not {type(config).__name__}")
    text = dict(config)
    for key in NESTED * 2:
        inner = text.pop(key, None)
        if isinstance(inner, Mapping):
            text.update(inner)
    return text


def _require(text: Config) -> None:
    family = f"model_type {text['model_type']!r}" if "model_type" in text else "no model_type"
    if first(text, *EXPERTS) is None:
        raise ValueError(f"no Mixture-of-Experts model ({family}): it has none of {', '.join(EXPERTS)}")
    needed = {"num_experts_per_tok": TOPK, "hidden_size": ("hidden_size",), "vocab_size": ("vocab_size",)}
    needed |= {"moe_intermediate_size": WIDTH, "num_attention_heads": ("num_attention_heads",)}
    if not block_types(text):
        needed["num_hidden_layers"] = ("num_hidden_layers",)
    missing = [key for key, names in needed.items() if first(text, *names) is None]
    if missing:
        raise ValueError(f"a Mixture-of-Experts model ({family}) without {', '.join(missing)}")


def _layers_with_experts(text: Config) -> list[bool]:
    """For each layer (block, where blocks are attention or experts) whether it has experts."""
    blocks = block_types(text)
    has = [kind == "moe" for kind in blocks] if blocks else _pattern(text, count(text, "num_hidden_layers"))
    if not any(has):
        raise ValueError(f"none of its {len(has)} layers has experts")
    return has


def _pattern(text: Config, layers: int) -> list[bool]:
    kinds, frequency = first(text, "mlp_layer_types"), first(text, "moe_layer_freq")
    enumerated = first(text, "moe_layers_enum")
    if kinds:
        return [kind in HAS_EXPERTS for kind in per_layer(text, "mlp_layer_types", layers)]
    if isinstance(frequency, list):
        return [bool(entry) for entry in per_layer(text, "moe_layer_freq", layers)]
    if enumerated:
        items = enumerated.split(",") if isinstance(enumerated, str) else enumerated
        chosen = {int(item) for item in items}
        return [layer in chosen for layer in range(layers)]
    dense = first(text, "first_k_dense_replace", "moe_layer_start_index")
    if dense is None:
        dense = DENSE_BY_DEFAULT.get(str(text.get("model_type")), 0)
    every = first(text, "interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_interval") or frequency or 1
    plain = set(first(text, "mlp_only_layers") or ())
    return [layer >= dense and (layer + 1) % every == 0 and layer not in plain for layer in range(layers)]


def _has_plain_mlps(text: Config, has_experts: list[bool]) -> bool:
    blocks = block_types(text)
    return "mlp" in blocks if blocks else not all(has_experts)


def _shared(text: Config) -> tuple[int, int | None]:
    """Number and width (None: that of the routed ones) of the shared experts; Llama-4 has one without saying so."""
    width = first(text, *SHARED_WIDTH)
    unsaid = 1 if width or str(text.get("model_type", "")).startswith("llama4") else 0
    shared = count(text, *SHARED) if first(text, *SHARED) else unsaid
    differs = shared and width and width != count(text, *WIDTH)
    return shared, width if differs else None
