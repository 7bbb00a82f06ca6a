"""Reads from a config.json which kinds of attention a model's layers have, and their sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megamoe.catalog.huggingface_keys import Config, count, first, flag, per_layer
from megamoe.catalog.schema import Attention, AttentionKind

# transformers' names, the letters of Nemotron's pattern, and the numbers of MiMo's and MiniMax's
BLOCKS = {"M": "linear", "E": "moe", "*": "full", "-": "mlp", "mamba": "linear", "linear_attention": "linear"}
BLOCKS |= {"moe": "moe", "mlp": "mlp", "attention": "full", "full_attention": "full"}
LAYERS = {"full_attention": "full", "attention": "full", "linear_attention": "linear", "sliding_attention": "sliding"}
LAYERS |= {"chunked_attention": "chunked", "minimax_m3_sparse": "sparse"}
RATIOS: dict[int, AttentionKind] = {0: "sliding", 4: "csa", 128: "hca"}


def attention_of(text: Config) -> tuple[Attention, ...]:
    """The attention of a model, one entry for each kind; ValueError names a key that is missing or not understood."""
    if first(text, "compress_ratios") is not None:
        return _v4(text)
    if block_types(text):
        kinds = Counter(kind for kind in block_types(text) if kind in ("linear", "full"))
        return tuple(_mamba(text, n) if kind == "linear" else _gqa(text, n) for kind, n in kinds.items())
    if first(text, "kv_lora_rank") is not None:
        return _mla(text)
    return tuple(_ONE_KIND[kind](text, n) for kind, n in Counter(_layer_kinds(text)).items())


def block_types(text: Config) -> list[str]:
    """linear, full, moe or mlp for each block of a model whose blocks are one of them; empty for other models."""
    blocks = first(text, "hybrid_override_pattern", "layers_block_type")
    if blocks is None:
        return []
    unknown = sorted({str(block) for block in blocks if block not in BLOCKS})
    if unknown:
        raise ValueError(f"blocks of type {', '.join(map(repr, unknown))} are not known here")
    return [BLOCKS[block] for block in blocks]


def _layer_kinds(text: Config) -> list[str]:
    """full, linear, sliding, chunked or sparse for each layer."""
    layers = count(text, "num_hidden_layers")
    for key, off, on in (("hybrid_layer_pattern", "full", "sliding"), ("attn_type_list", "linear", "full")):
        if first(text, key):
            return [on if entry else off for entry in per_layer(text, key, layers)]
    if first(text, "layer_types"):
        return [_known(kind) for kind in per_layer(text, "layer_types", layers)]
    blocks: Config = first(text, "sparse_attention_config") or {}
    if blocks:
        return ["sparse" if entry else "full" for entry in per_layer(blocks, "sparse_attention_freq", layers)]
    interval = first(text, "full_attention_interval")
    if interval:
        return ["linear" if (layer + 1) % interval else "full" for layer in range(layers)]
    if first(text, "attention_chunk_size") and str(text.get("model_type", "")).startswith("llama4"):
        return ["chunked" if (layer + 1) % 4 else "full" for layer in range(layers)]  # its default
    everywhere = first(text, "sliding_window") and first(text, "use_sliding_window") is not False
    return ["sliding" if everywhere else "full"] * layers


def _known(kind: str) -> str:
    if kind not in LAYERS:
        raise ValueError(f"layer_types has {kind!r}; known are {', '.join(LAYERS)}")
    return LAYERS[kind]


def _gqa(text: Config, layers: int, **more: Any) -> Attention:
    heads = count(text, "num_attention_heads")
    dim = first(text, "head_dim") or count(text, "hidden_size") // heads
    v_dim = first(text, "v_head_dim")
    sizes = {"heads": heads, "kv_heads": first(text, "num_key_value_heads", "num_attention_groups") or heads}
    sizes |= {"head_dim": dim, "v_head_dim": v_dim if v_dim != dim else None}
    gate = flag(text, "attn_output_gate") or str(text.get("model_type")) == "qwen3_next"
    return Attention(**{"kind": "gqa", "layers": layers, **sizes, "output_gate": gate, **more})


def _sliding(text: Config, layers: int) -> Attention:
    """Layers of a local window, which some families give heads of their own."""
    other = first(text, "attention_other_setting") or {}
    heads = first(text, "swa_num_attention_heads", "num_sliding_attention_heads")
    own = {
        "heads": heads or other.get("num_attention_heads"),
        "kv_heads": first(text, "swa_num_key_value_heads") or other.get("num_attention_groups"),
        "head_dim": first(text, "swa_head_dim") or other.get("head_dim"),
    }
    own = {key: value for key, value in own.items() if value is not None}
    window = count(text, "sliding_window", "sliding_window_size")
    return _gqa(text, layers, kind="sliding", window=window, **own)


def _chunked(text: Config, layers: int) -> Attention:
    """Attention inside chunks, taken for a window as long as a chunk."""
    return _gqa(text, layers, kind="sliding", window=count(text, "attention_chunk_size"))


def _sparse(text: Config, layers: int) -> Attention:
    """MiniMax-M3: an index chooses blocks of tokens."""
    sizes: Config = first(text, "sparse_attention_config") or {}
    chosen = count(sizes, "sparse_topk_blocks") * count(sizes, "sparse_block_size")
    index = {"index_heads": count(sizes, "sparse_num_index_heads"), "index_dim": count(sizes, "sparse_index_dim")}
    return _gqa(text, layers, **index, index_topk=chosen)


def _linear(text: Config, layers: int) -> Attention:
    """Gated delta rule of Qwen3-Next and after; MiniMax's lightning attention has plain heads."""
    if first(text, "linear_num_value_heads") is None:
        heads, dim = count(text, "num_attention_heads"), count(text, "head_dim")
        return Attention(kind="linear", layers=layers, heads=heads, kv_heads=heads, head_dim=dim, v_head_dim=dim)
    return Attention(
        kind="linear",
        layers=layers,
        heads=count(text, "linear_num_value_heads"),
        kv_heads=count(text, "linear_num_key_heads"),
        head_dim=count(text, "linear_key_head_dim"),
        v_head_dim=count(text, "linear_value_head_dim"),
    )


def _mamba(text: Config, layers: int) -> Attention:
    return Attention(
        kind="linear",
        layers=layers,
        heads=count(text, "mamba_num_heads"),
        kv_heads=count(text, "n_groups"),
        head_dim=count(text, "ssm_state_size"),
        v_head_dim=count(text, "mamba_head_dim"),
    )


_ONE_KIND = {"full": _gqa, "sliding": _sliding, "chunked": _chunked, "sparse": _sparse, "linear": _linear}


def _mla(text: Config) -> tuple[Attention, ...]:
    """MLA on all layers; with an index (V3.2, GLM-5), which GLM-5.2 shares; beside KDA layers (Kimi Linear, K3)."""
    layers = count(text, "num_hidden_layers")
    sizes: Config = {
        "heads": count(text, "num_attention_heads"),
        "q_lora": first(text, "q_lora_rank"),
        "kv_lora": count(text, "kv_lora_rank"),
        "rope_dim": count(text, "qk_rope_head_dim"),
        "qk_nope_dim": count(text, "qk_nope_head_dim"),
        "v_head_dim": count(text, "v_head_dim"),
        "output_gate": flag(text, "mla_use_output_gate"),
    }
    kda: Config = first(text, "linear_attn_config") or {}
    if kda:
        linear = len(kda.get("kda_layers") or ())
        heads, dim = count(kda, "num_heads"), count(kda, "head_dim")
        delta = Attention(kind="linear", layers=linear, heads=heads, kv_heads=heads, head_dim=dim, v_head_dim=dim)
        return delta, Attention(kind="mla", layers=layers - linear, **sizes)
    if first(text, "index_topk") is None:
        return (Attention(kind="mla", layers=layers, **sizes),)
    sizes |= {"index_heads": count(text, "index_n_heads"), "index_dim": count(text, "index_head_dim")}
    sizes["index_topk"] = count(text, "index_topk")
    kinds = Counter(per_layer(text, "indexer_types", layers) if first(text, "indexer_types") else ["full"] * layers)
    return tuple(Attention(kind="dsa", layers=n, index_shared=kind == "shared", **sizes) for kind, n in kinds.items())


def _v4(text: Config) -> tuple[Attention, ...]:
    """DeepSeek-V4: compress_ratios has an entry per layer, and one more for each MTP layer."""
    ratios = per_layer(text, "compress_ratios", count(text, "num_hidden_layers"))
    unknown = ", ".join(sorted({str(ratio) for ratio in ratios if ratio not in RATIOS}))
    if unknown:
        raise ValueError(f"compress_ratios has {unknown}; known are 0 (sliding), 4 (csa) and 128 (hca)")
    sizes: Config = {
        "heads": count(text, "num_attention_heads"),
        "kv_heads": count(text, "num_key_value_heads"),
        "head_dim": count(text, "head_dim"),
        "rope_dim": count(text, "qk_rope_head_dim"),
        "q_lora": count(text, "q_lora_rank"),
        "o_lora": count(text, "o_lora_rank"),
        "o_groups": count(text, "o_groups"),
        "window": count(text, "sliding_window"),
    }
    index: Config = {"index_heads": count(text, "index_n_heads"), "index_dim": count(text, "index_head_dim")}
    index["index_topk"] = count(text, "index_topk")
    return tuple(
        Attention(kind=RATIOS[r], layers=n, ratio=r or None, **sizes, **(index if r == 4 else {}))
        for r, n in Counter(ratios).items()
    )
