"""Reads from a config.json which of a model's layers have experts."""

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
    whole,
)
from megamoe.catalog.huggingface.mixers import block_types, num_layers

HAS_EXPERTS = {"sparse": True, "moe": True, "hash_moe": True, "dense": False, "mlp": False}
# transformers' own defaults of the leading layers without experts, where the config does not say them
DENSE_BY_DEFAULT = {"deepseek_v3": 3, "deepseek_v32": 3, "glm_moe_dsa": 3, "bailing_hybrid": 2, "lfm2_moe": 2}
DENSE_BY_DEFAULT |= dict.fromkeys(("hy_v3", "hy_v4", "mimo_v2_flash", "glm4_moe", "glm4_moe_lite", "glm4v_moe_text"), 1)
DENSE_BY_DEFAULT |= dict.fromkeys(("afmoe", "axk1", "ernie4_5_moe", "exaone_moe", "kimi_linear", "laguna"), 1)
LEADING: tuple[str, ...] = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "n_dense_layers")
LEADING += ("num_dense_first_layers", "moe_layer_num_skipped")
# every n-th layer, the n-th first; DeepSeek's moe_layer_freq is another: the layers whose number it divides
EVERY = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "moe_layer_frequency")


def layers_with_experts(text: Config) -> list[bool]:
    """For each layer (block, where blocks are attention or experts) whether it has experts.

    ValueError where two keys contradict each other, or no layer has experts.
    """
    blocks, layers = block_types(text), num_layers(text)
    said = {key: read(text, layers) for key, read in STATEMENTS.items() if text.get(key) is not None}
    if isinstance(first(text, "moe_layer_freq"), list):
        said["moe_layer_freq"] = marks(text, "moe_layer_freq", layers)
    if blocks:
        said = {"the types of its blocks": [kind == "moe" for kind in blocks]} | said
    rules, by_rule = _by_rules(text, layers, default=not said)
    if rules or not said:
        said[" with ".join(rules)] = by_rule
    has = agreed(said, "the layers that have experts") or []
    if not any(has):
        raise ValueError(f"none of its {len(has)} layers has experts")
    return has


def _types(text: Config, layers: int) -> list[bool]:
    entries = per_layer(text, "mlp_layer_types", layers)
    if unknown := [entry for entry in entries if entry not in HAS_EXPERTS]:
        raise ValueError(f"mlp_layer_types has {unknown[0]!r}; known are {', '.join(HAS_EXPERTS)}")
    return [HAS_EXPERTS[entry] for entry in entries]


def _periodic(text: Config, layers: int) -> list[bool]:
    return periodic(text, "expert_layer_period", "expert_layer_offset", layers)


def _enumerated(key: str) -> Callable[[Config, int], list[bool]]:
    def read(text: Config, layers: int) -> list[bool]:
        chosen = numbers(text, key, layers)
        return [layer in chosen for layer in range(layers)]

    return read


STATEMENTS: dict[str, Callable[[Config, int], list[bool]]] = {
    "mlp_layer_types": _types,
    "is_moe_layer": lambda text, layers: marks(text, "is_moe_layer", layers),
    "moe_layers_enum": _enumerated("moe_layers_enum"),
    "moe_layers": _enumerated("moe_layers"),
    "expert_layer_period": _periodic,
}


def _by_rules(text: Config, layers: int, *, default: bool) -> tuple[list[str], list[bool]]:
    """What the keys say that hold together: the names of those that leave layers out, and the layers that remain."""
    leading = {key: whole(text, key) or 0 for key in LEADING if given(text, key)}
    if default and not leading:
        leading = {"the default": DENSE_BY_DEFAULT.get(str(text.get("model_type")), 0)}
    steps = {key: optional_count(text, key) or 1 for key in EVERY}
    frequency = first(text, "moe_layer_freq")
    divisor = count(text, "moe_layer_freq") if frequency is not None and not isinstance(frequency, list) else 1
    plain = numbers(text, "mlp_only_layers", layers) if given(text, "mlp_only_layers") else set()
    last = _last(text, layers)
    has = [
        layer >= max(leading.values(), default=0)
        and layer <= last
        and layer % divisor == 0
        and layer not in plain
        and all((layer + 1) % step == 0 for step in steps.values())
        for layer in range(layers)
    ]
    names = [key for key, least in leading.items() if least] + [key for key, step in steps.items() if step > 1]
    names += ["moe_layer_freq"] if divisor > 1 else []
    names += ["mlp_only_layers"] if plain else []
    return names + (["moe_layer_end_index"] if last < layers - 1 else []), has


def _last(text: Config, layers: int) -> int:
    """ERNIE's last layer with experts; -1 is the last of all."""
    if text.get("moe_layer_end_index") == -1:
        given(text, "moe_layer_end_index")
        return layers - 1
    last = whole(text, "moe_layer_end_index")
    return layers - 1 if last is None else last
