"""Reads from a config.json the sizes of each kind of attention that a model's layers have."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megamoe.catalog.huggingface.keys import Config, count, first, flag, given, optional_count, per_layer, section
from megamoe.catalog.huggingface.mixers import block_types, layer_kinds, num_layers
from megamoe.catalog.schema import Attention, AttentionKind

RATIOS: dict[int, AttentionKind] = {0: "sliding", 4: "csa", 128: "hca"}


def attention_of(text: Config) -> tuple[Attention, ...]:
    """The attention of a model, one entry for each kind; ValueError names a key that is missing or not understood."""
    if first(text, "compress_ratios") is not None:
        return _v4_of_ratios(text, per_layer(text, "compress_ratios", num_layers(text)))
    if block_types(text):
        kinds = Counter(kind for kind in block_types(text) if kind in ("linear", "full"))
        return tuple(_ONE_KIND[kind](text, n) for kind, n in kinds.items())
    kinds_of_layers = layer_kinds(text, num_layers(text))
    if {"csa", "hca"} & set(kinds_of_layers):
        return _v4_of_kinds(text, kinds_of_layers)
    if first(text, "kv_lora_rank") is not None:
        return _latent(text, kinds_of_layers)
    if "indexed" in kinds_of_layers:
        raise ValueError("layers of indexed_attention without a latent cache (kv_lora_rank) are not known here")
    if first(text, "num_attention_heads_per_layer") is not None:
        heads = per_layer(text, "num_attention_heads_per_layer", len(kinds_of_layers))
        return tuple(
            _ONE_KIND[kind](text, n, heads=each)
            for (kind, each), n in Counter(zip(kinds_of_layers, heads, strict=True)).items()
        )
    return tuple(_ONE_KIND[kind](text, n) for kind, n in Counter(kinds_of_layers).items())


def _gqa(text: Config, layers: int, **more: Any) -> Attention:
    heads = count(text, "num_attention_heads")
    dim = optional_count(text, "head_dim", "attention_head_dim", "kv_channels") or count(text, "hidden_size") // heads
    v_dim = optional_count(text, "v_head_dim")
    sizes: dict[str, int | None] = {
        "heads": heads,
        "kv_heads": optional_count(text, "num_key_value_heads", "num_attention_groups") or heads,
    }
    sizes |= {"head_dim": dim, "v_head_dim": v_dim if v_dim != dim else None}
    gate = flag(text, "attn_output_gate") or str(text.get("model_type")) == "qwen3_next"
    return Attention(**{"kind": "gqa", "layers": layers, **sizes, "output_gate": gate, **more})


def _sliding(text: Config, layers: int, **more: Any) -> Attention:
    """Layers of a local window, which some families give heads of their own."""
    other = section(text, "attention_other_setting")
    heads = optional_count(text, "swa_num_attention_heads", "num_sliding_attention_heads")
    own: dict[str, int | None] = {
        "heads": heads or optional_count(other, "num_attention_heads"),
        "kv_heads": optional_count(text, "swa_num_key_value_heads") or optional_count(other, "num_attention_groups"),
        "head_dim": optional_count(text, "swa_head_dim") or optional_count(other, "head_dim"),
    }
    said = {key: value for key, value in own.items() if value is not None}
    window = count(text, "sliding_window", "sliding_window_size")
    return _gqa(text, layers, **{"kind": "sliding", "window": window, **said, **more})


def _chunked(text: Config, layers: int, **more: Any) -> Attention:
    """Attention inside chunks, taken for a window as long as a chunk."""
    return _gqa(text, layers, kind="sliding", window=count(text, "attention_chunk_size"), **more)


def _sparse(text: Config, layers: int, **more: Any) -> Attention:
    """MiniMax-M3: an index chooses blocks of tokens. transformers writes its sizes without a section."""
    sizes = section(text, "sparse_attention_config") or text
    chosen = count(sizes, "sparse_topk_blocks", "index_topk_blocks") * count(
        sizes, "sparse_block_size", "index_block_size"
    )
    index = {"index_heads": count(sizes, "sparse_num_index_heads", "index_n_heads")}
    index["index_dim"] = count(sizes, "sparse_index_dim", "index_head_dim")
    return _gqa(text, layers, **index, index_topk=chosen, **more)


def _linear(text: Config, layers: int, **_: Any) -> Attention:
    """What keeps a state in place of a cache: Mamba, gated delta rule, KDA, or MiniMax's and Ling's lightning."""
    if given(text, "mamba_num_heads", "mamba_n_heads"):
        return _mamba2(text, layers)
    if given(text, "mamba_d_state"):
        return _mamba1(text, layers)
    if given(text, "linear_num_value_heads"):
        heads, kv_heads = count(text, "linear_num_value_heads"), count(text, "linear_num_key_heads")
        dim, v_dim = count(text, "linear_key_head_dim"), count(text, "linear_value_head_dim")
        return Attention(kind="linear", layers=layers, heads=heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim)
    kda = section(text, "linear_attn_config")
    if kda:
        heads, dim = count(kda, "num_heads"), count(kda, "head_dim")
    elif given(text, "linear_num_heads"):
        heads, dim = count(text, "linear_num_heads"), count(text, "linear_head_dim")
    else:
        heads = count(text, "num_attention_heads")
        dim = optional_count(text, "head_dim") or count(text, "hidden_size") // heads
    return Attention(kind="linear", layers=layers, heads=heads, kv_heads=heads, head_dim=dim, v_head_dim=dim)


def _mamba2(text: Config, layers: int) -> Attention:
    return Attention(
        kind="linear",
        layers=layers,
        heads=count(text, "mamba_num_heads", "mamba_n_heads"),
        kv_heads=count(text, "n_groups", "mamba_n_groups"),
        head_dim=count(text, "ssm_state_size", "mamba_d_state"),
        v_head_dim=_mamba2_head(text),
    )


def _mamba2_head(text: Config) -> int:
    if text.get("mamba_d_head") == "auto":
        given(text, "mamba_d_head")
        return count(text, "mamba_expand") * count(text, "hidden_size") // count(text, "mamba_n_heads")
    return count(text, "mamba_head_dim", "mamba_d_head")


def _mamba1(text: Config, layers: int) -> Attention:
    """Jamba's Mamba: a state of d_state for each of expand * hidden channels.

    Counted as expand * dt_rank heads, whose two gates are as large as its projections to and from dt_rank, and expand
    key heads, as large as its B and C.
    """
    hidden, expand = count(text, "hidden_size"), count(text, "mamba_expand")
    rank = -(-hidden // 16)
    if text.get("mamba_dt_rank") != "auto":
        rank = optional_count(text, "mamba_dt_rank") or rank
    channels = hidden * expand
    heads = expand * rank if channels % (expand * rank) == 0 else 1
    state = count(text, "mamba_d_state")
    sizes: dict[str, Any] = {"kv_heads": expand, "head_dim": state, "v_head_dim": channels // heads}
    return Attention(kind="linear", layers=layers, heads=heads, **sizes)


def _conv(text: Config, layers: int, **_: Any) -> Attention:
    """LFM2's gated short convolution: the last conv_L_cache tokens, and four projections as wide as hidden.

    Counted as one head; key heads of half of hidden in all are as large as the fourth projection.
    """
    hidden, taps = count(text, "hidden_size"), count(text, "conv_L_cache")
    sizes: dict[str, Any] = {"kv_heads": max(1, hidden // (2 * taps)), "head_dim": taps, "v_head_dim": hidden}
    return Attention(kind="linear", layers=layers, heads=1, **sizes)


_ONE_KIND = {"full": _gqa, "sliding": _sliding, "chunked": _chunked, "sparse": _sparse}
_ONE_KIND |= {"linear": _linear, "conv": _conv}


def _latent(text: Config, kinds: list[str]) -> tuple[Attention, ...]:
    """MLA; with an index (V3.2, GLM-5), which GLM-5.2 shares; beside linear layers (Kimi Linear, K3, Ling 2.5)."""
    if other := set(kinds) - {"full", "indexed", "linear"}:
        raise ValueError(
            f"layers of kind {', '.join(sorted(other))} with a latent cache (kv_lora_rank) are not known here"
        )
    sizes: dict[str, Any] = {
        "heads": count(text, "num_attention_heads"),
        "q_lora": optional_count(text, "q_lora_rank"),
        "kv_lora": count(text, "kv_lora_rank"),
        "rope_dim": count(text, "qk_rope_head_dim"),
        "qk_nope_dim": count(text, "qk_nope_head_dim"),
        "v_head_dim": count(text, "v_head_dim"),
        "output_gate": flag(text, "mla_use_output_gate"),
    }
    linear = kinds.count("linear")
    entries = [_linear(text, linear)] if linear else []
    if first(text, "index_topk") is None:
        if linear < len(kinds):
            entries.append(Attention(kind="mla", layers=len(kinds) - linear, **sizes))
        return tuple(entries)
    sizes |= {"index_heads": count(text, "index_n_heads"), "index_dim": count(text, "index_head_dim")}
    sizes["index_topk"] = count(text, "index_topk")
    if sizes["q_lora"] is None:
        raise ValueError("an index (index_topk) without q_lora_rank is not known here")
    indexers = Counter(
        index for index, kind in zip(_indexers(text, len(kinds)), kinds, strict=True) if kind != "linear"
    )
    shared = {"shared": True, "full": False}
    return *entries, *(Attention(kind="dsa", layers=n, index_shared=shared[k], **sizes) for k, n in indexers.items())


def _indexers(text: Config, layers: int) -> list[str]:
    """For each layer whether it runs an index (full) or takes what an earlier one chose (shared): GLM-5.2."""
    if first(text, "indexer_types") is not None:
        types = per_layer(text, "indexer_types", layers)
    elif first(text, "index_topk_pattern") is not None:
        letters = first(text, "index_topk_pattern")
        if not isinstance(letters, str | list):
            raise ValueError(f"index_topk_pattern is {letters!r}; it must name the indexer of each layer")
        names = [{"F": "full", "S": "shared"}.get(str(each), each) for each in letters]
        types = per_layer(Config({"index_topk_pattern": names}), "index_topk_pattern", layers)
    else:
        every = optional_count(text, "index_topk_freq") or 1
        offset = first(text, "index_skip_topk_offset")
        skipped = 2 if offset is None else count(text, "index_skip_topk_offset")
        types = ["shared" if max(layer - skipped + 1, 0) % every else "full" for layer in range(layers)]
    if unknown := [kind for kind in types if kind not in ("full", "shared")]:
        raise ValueError(f"an indexer of type {unknown[0]!r} is not known here; known are full and shared")
    return types


def _v4_of_kinds(text: Config, kinds: list[str]) -> tuple[Attention, ...]:
    """V4 as transformers writes it, with the kind of each layer and the ratio of each kind."""
    rates = section(text, "compress_rates")
    layers: dict[str, tuple[AttentionKind, int]] = {
        "sliding": ("sliding", 0),
        "csa": ("csa", optional_count(rates, "compressed_sparse_attention") or 4),
        "hca": ("hca", optional_count(rates, "heavily_compressed_attention") or 128),
    }
    if unknown := set(kinds) - set(layers):
        raise ValueError(f"layers of kind {', '.join(sorted(unknown))} beside compressed ones are not known here")
    return _v4(text, [layers[kind] for kind in kinds])


def _v4_of_ratios(text: Config, ratios: list[Any]) -> tuple[Attention, ...]:
    """V4 as DeepSeek writes it: compress_ratios has an entry per layer, and one more for each MTP layer."""
    unknown = ", ".join(sorted({str(ratio) for ratio in ratios if ratio not in RATIOS}))
    if unknown:
        raise ValueError(f"compress_ratios has {unknown}; known are 0 (sliding), 4 (csa) and 128 (hca)")
    return _v4(text, [(RATIOS[ratio], ratio) for ratio in ratios])


def _v4(text: Config, layers: list[tuple[AttentionKind, int]]) -> tuple[Attention, ...]:
    """DeepSeek-V4, with each layer's kind and how many tokens an entry of its cache stands for."""
    sizes: dict[str, Any] = {
        "heads": count(text, "num_attention_heads"),
        "kv_heads": count(text, "num_key_value_heads"),
        "head_dim": count(text, "head_dim"),
        "rope_dim": count(text, "qk_rope_head_dim"),
        "q_lora": count(text, "q_lora_rank"),
        "o_lora": count(text, "o_lora_rank"),
        "o_groups": count(text, "o_groups"),
        "window": count(text, "sliding_window"),
    }
    index: dict[str, Any] = {"index_heads": count(text, "index_n_heads"), "index_dim": count(text, "index_head_dim")}
    index["index_topk"] = count(text, "index_topk")
    return tuple(
        Attention(kind=kind, layers=n, ratio=ratio or None, **sizes, **(index if kind == "csa" else {}))
        for (kind, ratio), n in Counter(layers).items()
    )
