"""Refuses a config.json that has keys which place layers and which nothing has read: a plan without them is wrong.

A key places layers if its name speaks of a part of a layer and of a place (attn_layer_period, moe_every_n_layers), and
its value leaves something out: null, false, 0, an empty list, and a period of 1 do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megamoe.catalog.huggingface.keys import Config


def words_of(key: str) -> frozenset[str]:
    """attn_layerPeriod -> attn, layer, period"""
    return frozenset(re.split(r"[_\W]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()))


PARTS = words_of(
    "layer layers block blocks attn attention moe expert experts dense sparse mlp ffn mamba mamba2 ssm linear window "
    "sliding swa global local full recurrent conv hybrid cache kv cross rnn delta kda gdn lightning"
)
PLACES = words_of(
    "period offset pattern interval freq frequency frequencies step stride types every layers replace schedule layout "
    "placement"
)
LAYER_PLACES = words_of("only start end skip skipped list map enum ratio first last prefix configs")
LAST_PLACES = words_of("ids idx idxs index indices indexes positions position type per layer")
CYCLES = words_of("period interval freq frequency frequencies step stride every")
WORDS = words_of("pattern schedule layout placement map enum list layers types")
# parts that no plan counts, and MTP layers, which come on top
OTHER = words_of(
    "rope nope rotary norm layernorm rmsnorm init initializer drop dropout layerdrop dropped aux auxiliary loss "
    "token tokens tokenizer mtp nextn predict eagle draft medusa vision visual image video audio speech talker "
    "code2wav encoder scale scaling theta temperature bias eps limit limits quant quantization dtype act "
    "activation softcapping logit logits feature features chunk kernel kernels checkpointing parallel hash "
    "router routing topk projection cudagraph deepstack fused residual seed"
)
NAMES = {
    "attn_res_block_size": False,  # residual connections
    "num_hash_layers": False,  # routes by a table, in layers that have experts as the others do
    "sparse_disable_index_value": False,
    "prefix_dense_intermediate_size": False,
    "hidden_size_per_layer_input": False,  # Gemma's embeddings beside each layer
    "vocab_size_per_layer_input": False,
    "global_step": False,
    "accept_hidden_layer": False,  # of Qwen-Omni's talker
    "num_attention_layers": True,
    "layer_group_size": True,
    "moe_group_size": False,
    "n_layer": True,
    "use_cla": True,  # layers that share the keys and values of another
    "cla_share_factor": False,  # inert without use_cla
    "kv_source_layers": True,
    "no_rope_layers": False,
    "per_layer_config": True,
    "parallel_attn_mlp_res": True,  # a plain MLP beside the experts of every layer
    "residual_moe": True,
    "attention_kv_lora_dim": True,  # a latent cache by another name
    "pyramid_num_routed": True,
}
WHOLE = {"num_layers", "n_layers", "n_layer", "num_decoder_layers"}  # the number of layers itself


def refuse_unread(text: Config, layers: int) -> None:
    """ValueError names the keys of a config that place layers and were not read."""
    unread = sorted(_unread(text, layers))
    if unread:
        few = ", ".join(unread[:6]) + (f" and {len(unread) - 6} more" if len(unread) > 6 else "")
        one = len(unread) == 1
        raise ValueError(
            f"{few}: {'a key that places' if one else 'keys that place'} layers and {'is' if one else 'are'} not known "
            f"here; a plan without {'it' if one else 'them'} would be wrong. Write the model's sizes as a YAML file"
        )


def _unread(config: Config, layers: int, *, above: str = "") -> Iterator[str]:
    for key, value in config.items():
        words = words_of(key)
        if OTHER & words and NAMES.get(key) is not True:
            continue
        placed = _leaves_out(key, value, layers) and _places(key, value, layers, bool(above))
        if placed and key not in config.read:
            yield above + key
        elif isinstance(value, Mapping) and (PARTS & words or above):
            yield from _unread(value if isinstance(value, Config) else Config(value), layers, above=f"{above}{key}.")


def _places(key: str, value: Any, layers: int, inside: bool) -> bool:
    """Whether a key of this name and kind of value can place layers."""
    if key in NAMES:
        return NAMES[key]
    if value is True:
        return False
    words, last = words_of(key), key.lower().rsplit("_", 1)[-1]
    of_layers = bool({"layer", "layers", "block", "blocks"} & words)
    if isinstance(value, list) and len(value) >= layers and len({str(entry) for entry in value}) > 1:
        return True  # something for each layer
    if not (inside or PARTS & words):
        return False
    if isinstance(value, float):
        return bool((PLACES | LAYER_PLACES) & words) and of_layers
    if isinstance(value, str):
        return bool(WORDS & words)
    return bool(PLACES & words or (of_layers and LAYER_PLACES & words) or last in LAST_PLACES)


def _leaves_out(key: str, value: Any, layers: int) -> bool:
    """False for values that leave a model as it is without the key."""
    number_of_one = key.lower().rsplit("_", 1)[-1] in ("index", "idx", "position", "id")
    if value is None or value is False or value in ("", [], {}) or (value == 0 and not number_of_one):
        return False
    if type(value) is int and ((value == 1 and CYCLES & words_of(key)) or (value == layers and key in WHOLE)):
        return False
    return not (isinstance(value, list) and len(value) >= layers and all(entry in (None, False, 0) for entry in value))
