"""Reads from a config.json which kind of attention, or what in its place, each of a model's layers has.

Kinds: full; indexed (full, of tokens that an index chooses); sparse (blocks that an index chooses); sliding; chunked;
linear (a state in place of a cache); conv (a state of few tokens); csa and hca of DeepSeek-V4.
"""

from __future__ import annotations

from collections.abc import Callable

from megamoe.catalog.huggingface.keys import (
    Config,
    agreed,
    count,
    first,
    given,
    marks,
    numbers,
    optional_count,
    per_layer,
    periodic,
    section,
    switch,
    whole,
)
from megamoe.catalog.schema import MOST

# transformers' names, older ones of remote code, and the letters of Nemotron's pattern
BLOCKS = {"M": "linear", "E": "moe", "*": "full", "-": "mlp", "mamba": "linear", "linear_attention": "linear"}
BLOCKS |= {"moe": "moe", "mlp": "mlp", "attention": "full", "full_attention": "full"}
LAYERS = {"full_attention": "full", "attention": "full", "linear_attention": "linear", "sliding_attention": "sliding"}
LAYERS |= {"chunked_attention": "chunked", "minimax_m3_sparse": "sparse", "indexed_attention": "indexed"}
LAYERS |= {"mamba": "linear", "mamba2": "linear", "conv": "conv"}
LAYERS |= {"compressed_sparse_attention": "csa", "heavily_compressed_attention": "hca"}
SAME = {"indexed": "full", "sparse": "full", "chunked": "sliding", "conv": "linear"}
LINEAR_SIZES: tuple[str, ...] = (
    "mamba_d_state",
    "mamba_num_heads",
    "mamba_n_heads",
    "ssm_state_size",
    "linear_num_value_heads",
)
LINEAR_SIZES += ("linear_num_heads", "linear_attn_config", "conv_L_cache", "full_attn_alpha_factor")
# families whose layers differ also where the config does not say how
HYBRID: tuple[str, ...] = (
    "afmoe",
    "bailing_hybrid",
    "bailing_moe_linear",
    "beam",
    "cohere2_moe",
    "exaone_moe",
    "flint",
    "gpt_oss",
)
HYBRID += ("granitemoehybrid", "granitemoe_swa", "jamba", "kimi_linear", "kolibri1", "lfm2_moe", "mimo_v2_flash")
HYBRID += ("minimax", "minimax_text_01", "muse_spark_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text")


def num_layers(text: Config) -> int:
    """Layers of the main model, each with attention and an MLP; blocks, where blocks are one of them."""
    blocks, layers = block_types(text), optional_count(text, "num_hidden_layers")
    if blocks and layers not in (None, len(blocks)):
        raise ValueError(f"it names the types of {len(blocks)} blocks, but num_hidden_layers is {layers}")
    layers = len(blocks) if blocks else count(text, "num_hidden_layers")
    if layers > MOST["layers"]:
        raise ValueError(f"num_hidden_layers is {layers}; it can be {MOST['layers']} at most")
    return layers


def block_types(text: Config) -> list[str]:
    """linear, full, moe or mlp for each block of a model whose blocks are one of them; empty for other models."""
    key = given(text, "hybrid_override_pattern") or _names_experts(text, "layers_block_type", "layer_types")
    if key is None:
        return []
    blocks = first(text, key)
    if not isinstance(blocks, str | list) or not blocks:
        raise ValueError(f"{key} is {blocks!r}; it must name the type of each block")
    unknown = sorted({str(block) for block in blocks if not isinstance(block, str) or block not in BLOCKS})
    if unknown:
        raise ValueError(f"blocks of type {', '.join(map(repr, unknown))} are not known here")
    return [BLOCKS[block] for block in blocks]


def _names_experts(text: Config, *keys: str) -> str | None:
    """The first key that lists blocks of experts among those of attention."""
    return next((key for key in keys if isinstance(text.get(key), list) and "moe" in text[key]), None)


def layer_kinds(text: Config, layers: int) -> list[str]:
    """The kind of each layer. ValueError where two keys contradict each other, or a hybrid family says nothing."""
    found = {key: read(text, layers) for key, read in STATEMENTS.items() if text.get(key) is not None}
    found |= _sliding_pattern(text, layers) | _llama4(text, layers)
    said = {key: kinds for key, kinds in found.items() if kinds}
    agreed({key: [SAME.get(kind, kind) for kind in kinds] for key, kinds in said.items()}, "the kinds of attention")
    if said:
        return next(iter(said.values()))
    family = str(text.get("model_type"))
    sizes = given(text, *LINEAR_SIZES)
    if sizes is not None or family in HYBRID:
        has = f"it has {sizes}" if sizes else f"model_type {family!r} has layers of several kinds of attention"
        raise ValueError(
            f"{has}, but no key that places them, such as layer_types or {', '.join(list(STATEMENTS)[3:7])}"
        )
    return ["sliding" if _window(text) else "full"] * layers


def _window(text: Config) -> bool:
    return (
        bool(first(text, "sliding_window", "sliding_window_size")) and switch(text, "use_sliding_window") is not False
    )


def _listed(key: str) -> Callable[[Config, int], list[str]]:
    def read(text: Config, layers: int) -> list[str]:
        return [_known(key, str(kind)) for kind in per_layer(text, key, layers)]

    return read


def _known(key: str, kind: str) -> str:
    if kind not in LAYERS:
        raise ValueError(f"{key} has {kind!r}; known are {', '.join(LAYERS)}")
    return LAYERS[kind]


def _chosen(key: str, off: str, on: str, read: Callable[[Config, str, int], list[bool]]) -> Callable[..., list[str]]:
    """A reader of a key that says of each layer whether it is `on`."""
    return lambda text, layers: [on if entry else off for entry in read(text, key, layers)]


def _last_of(text: Config, key: str, layers: int) -> list[bool]:
    """Every n-th layer, the n-th first."""
    every = count(text, key)
    return [(layer + 1) % every == 0 for layer in range(layers)]


def _last_of_group(text: Config, key: str, layers: int) -> list[bool]:
    """Ling and Ring: the last layer of each group. Implementations differ on a last group that is not whole."""
    group = count(text, key)
    if layers % group:
        raise ValueError(f"{key} {group} does not divide num_hidden_layers {layers}; say layer_types instead")
    return _last_of(text, key, layers)


def _numbered(text: Config, key: str, layers: int) -> list[bool]:
    chosen = numbers(text, key, layers)
    return [layer in chosen for layer in range(layers)]


def _attention_period(text: Config, key: str, layers: int) -> list[bool]:
    return periodic(text, key, "attn_layer_offset", layers)


def _kimi(text: Config, layers: int) -> list[str]:
    """Kimi Linear numbers its layers from 1: those of KDA, and maybe the others."""
    inner = section(text, "linear_attn_config")
    if given(inner, "kda_layers") is None:
        return []
    kda = numbers(inner, "kda_layers", layers, start=1)
    kinds = ["linear" if layer in kda else "full" for layer in range(layers)]
    full = numbers(inner, "full_attn_layers", layers, start=1) if given(inner, "full_attn_layers") else None
    if full is not None and full != set(range(layers)) - kda:
        raise ValueError("kda_layers and full_attn_layers of linear_attn_config do not share out all layers")
    return kinds


def _sparse(text: Config, layers: int) -> list[str]:
    inner = section(text, "sparse_attention_config")
    if not inner:
        return []
    return ["sparse" if entry else "full" for entry in marks(inner, "sparse_attention_freq", layers)]


STATEMENTS: dict[str, Callable[[Config, int], list[str]]] = {
    "hybrid_layer_pattern": _chosen("hybrid_layer_pattern", "full", "sliding", marks),
    "sparse_attention_config": _sparse,
    "layer_types": _listed("layer_types"),
    "attn_layer_period": _chosen("attn_layer_period", "linear", "full", _attention_period),
    "full_attention_interval": _chosen("full_attention_interval", "linear", "full", _last_of),
    "layer_group_size": _chosen("layer_group_size", "linear", "full", _last_of_group),
    "attn_type_list": _chosen("attn_type_list", "linear", "full", marks),
    "layers_block_type": _listed("layers_block_type"),
    "attn_layer_indices": _chosen("attn_layer_indices", "linear", "full", _numbered),
    "full_attn_idxs": _chosen("full_attn_idxs", "conv", "full", _numbered),
    "linear_attn_config": _kimi,
}


def _sliding_pattern(text: Config, layers: int) -> dict[str, list[str]]:
    """What says which layers have a window; nothing, where there is no window."""
    keys = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers", "max_window_layers")
    found = {key: _windows(text, key, layers) for key in keys if text.get(key) is not None}
    if given(text, "prefix_dense_sliding_window_pattern") and not found:
        raise ValueError("prefix_dense_sliding_window_pattern is given without sliding_window_pattern")
    return found if _window(text) else {}


def _windows(text: Config, key: str, layers: int) -> list[str]:
    """The kinds by one of the keys; empty, where it leaves them to others."""
    value = first(text, key)
    if key == "max_window_layers":
        return _above(text, key, layers)
    if isinstance(value, str) and value and set(value) <= {"L", "G"}:
        return ["full" if value[layer % len(value)] == "G" else "sliding" for layer in range(layers)]
    if value == 0:  # EXAONE without a window
        return []
    # Cohere counts its leading dense layers apart
    prefix_every, every = optional_count(text, "prefix_dense_sliding_window_pattern"), count(text, key)
    dense = min(whole(text, "first_k_dense_replace") or 0, layers) if prefix_every else 0
    places = [(layer + 1) % prefix_every for layer in range(dense)] if prefix_every else []
    places += [(layer + 1) % every for layer in range(layers - dense)]
    return ["sliding" if place else "full" for place in places]


def _above(text: Config, key: str, layers: int) -> list[str]:
    """Layers from max_window_layers on have a window; the MoE models of Qwen do otherwise, each in its own way."""
    least = whole(text, key) or 0
    if not _window(text):
        return []
    if str(text.get("model_type")).startswith("qwen"):
        if text.get("layer_types") is None:
            raise ValueError(
                f"{key} {least} with use_sliding_window is not read for the models of Qwen; say layer_types"
            )
        return []
    return ["sliding" if layer >= least else "full" for layer in range(layers)]


def _llama4(text: Config, layers: int) -> dict[str, list[str]]:
    """Llama-4's layers with rotary positions attend in chunks; without a key every fourth is one that does not."""
    if not str(text.get("model_type", "")).startswith("llama4") or not first(text, "attention_chunk_size"):
        return {}
    if first(text, "no_rope_layers"):
        return {"no_rope_layers": ["chunked" if entry else "full" for entry in marks(text, "no_rope_layers", layers)]}
    every = optional_count(text, "no_rope_layer_interval") or 4
    kinds = ["chunked" if (layer + 1) % every else "full" for layer in range(layers)]
    return {} if first(text, "layer_types") else {"no_rope_layer_interval": kinds}
