"""Which layers have experts, and which a cache, by the keys of a config.json: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamoe.catalog import Model, parameters
from megamoe.catalog.huggingface import model_from_config
from tests.commands import refused

# fmt: off
MOE: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "head_dim": 128, "num_key_value_heads": 8, "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 65536,
}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 256}
MAMBA2 = {"mamba_n_heads": 128, "mamba_d_head": "auto", "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2}
DELTA = {"linear_num_value_heads": 32, "linear_num_key_heads": 16}
DELTA |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
INDEX = {"q_lora_rank": 1536, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
JAMBA = {
    **MOE, **MAMBA, "model_type": "jamba", "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 8,
    "attn_layer_offset": 4, "num_logits_to_keep": 1, "sliding_window": None, "use_mamba_kernels": True,
}
# (keys, layers with experts, layers of each kind of attention), of 32 layers
PLACED: dict[str, tuple[dict[str, Any], int, dict[str, int]]] = {
    "jamba": (JAMBA, 16, {"linear": 28, "gqa": 4}),
    "jamba_with_other_periods": (
        {**JAMBA, "expert_layer_period": 4, "attn_layer_period": 5}, 8, {"linear": 26, "gqa": 6},
    ),
    "every_layer_by_a_period_of_1": (
        {**JAMBA, "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0},
        32, {"gqa": 32},
    ),
    "bamba": ({**MAMBA2, "attn_layer_indices": [9, 18, 27]}, 32, {"linear": 29, "gqa": 3}),
    "granite_hybrid": (
        {**MAMBA2, "model_type": "granitemoehybrid", "layer_types": (["mamba"] * 7 + ["attention"]) * 4},
        32, {"linear": 28, "gqa": 4},
    ),
    "layers_block_type_of_mixers": (
        {**MAMBA2, "layers_block_type": ["mamba", "attention"] * 16}, 32, {"linear": 16, "gqa": 16},
    ),
    "nemotron_h": (
        {**MAMBA2, "hybrid_override_pattern": "MEMEM*E-" * 4}, 12, {"linear": 12, "gqa": 4},
    ),
    "qwen3_next": ({**DELTA, "model_type": "qwen3_next", "full_attention_interval": 4}, 32, {"linear": 24, "gqa": 8}),
    "ling_groups": ({"layer_group_size": 8, "first_k_dense_replace": 1}, 31, {"linear": 28, "gqa": 4}),
    "ling_groups_latent": (
        {**LATENT, "layer_group_size": 4, "linear_num_heads": 32, "linear_head_dim": 128}, 32, {"linear": 24, "mla": 8},
    ),
    "kimi_linear": (
        {**LATENT, "linear_attn_config": {
            "num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4,
            "kda_layers": [n for n in range(1, 33) if n % 4], "full_attn_layers": [4, 8, 12, 16, 20, 24, 28, 32],
        }, "first_k_dense_replace": 1, "moe_layer_freq": 1},
        31, {"linear": 24, "mla": 8},
    ),
    "minimax_text_01": (
        {"model_type": "minimax_text_01", "attn_type_list": ([0] * 7 + [1]) * 4}, 32, {"linear": 28, "gqa": 4},
    ),
    "minimax": (
        {"model_type": "minimax", "layer_types": ["full_attention", "linear_attention"] * 16,
         "full_attn_alpha_factor": 1},
        32, {"linear": 16, "gqa": 16},
    ),
    "lfm2_moe": (
        {"model_type": "lfm2_moe", "conv_L_cache": 3, "full_attn_idxs": [2, 6, 10, 14, 18, 21], "num_dense_layers": 2},
        30, {"linear": 26, "gqa": 6},
    ),
    "llama4": (
        {"model_type": "llama4_text", "attention_chunk_size": 8192, "interleave_moe_layer_step": 2,
         "moe_layers": list(range(1, 32, 2)), "no_rope_layers": [1, 1, 1, 0] * 8},
        16, {"sliding": 24, "gqa": 8},
    ),
    "llama4_by_intervals": (
        {"model_type": "llama4_text", "attention_chunk_size": 8192, "no_rope_layer_interval": 8},
        32, {"sliding": 28, "gqa": 4},
    ),
    "ernie4_5_moe": (
        {"moe_layer_start_index": 4, "moe_layer_end_index": 27, "moe_layer_interval": 2}, 12, {"gqa": 32},
    ),
    "ernie4_5_moe_to_the_last": ({"moe_layer_start_index": 1, "moe_layer_end_index": -1}, 31, {"gqa": 32}),
    "deepseek_by_a_divisor": ({**LATENT, "first_k_dense_replace": 3, "moe_layer_freq": 4}, 7, {"mla": 32}),
    "glm_index_by_frequency": (
        {**LATENT, **INDEX, "index_topk_freq": 4, "index_skip_topk_offset": 3}, 32, {"dsa": 32},
    ),
    "hunyuan_per_layer_lists": (
        {"num_experts_per_tok": None, "moe_topk": [2] * 32, "moe_intermediate_size": [3072] * 32,
         "num_shared_expert": [1] * 32, "moe_layer_num_skipped": 2, "use_cla": False, "cla_share_factor": 2},
        30, {"gqa": 32},
    ),
    "dots1": (
        {"model_type": "dots1", "first_k_dense_replace": 1, "sliding_window": None, "max_window_layers": 62},
        31, {"gqa": 32},
    ),
    "afmoe": (
        {"model_type": "afmoe", "num_dense_layers": 2, "global_attn_every_n_layers": 4, "sliding_window": 2048},
        30, {"sliding": 24, "gqa": 8},
    ),
    "exaone_moe": (
        {"is_moe_layer": [False] + [True] * 31, "sliding_window_pattern": "LLLG", "sliding_window": 128},
        31, {"sliding": 24, "gqa": 8},
    ),
    "cohere2_moe_counts_its_dense_layers_apart": (
        {"first_k_dense_replace": 3, "prefix_dense_sliding_window_pattern": 1, "sliding_window_pattern": 4,
         "sliding_window": 4096}, 29, {"gqa": 10, "sliding": 22},
    ),
    "qwen3_moe": (
        {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3], "use_sliding_window": False, "sliding_window": 4096,
         "max_window_layers": 28}, 14, {"gqa": 32},
    ),
    "laguna": (
        {"layer_types": ["full_attention", "sliding_attention"] * 16, "num_attention_heads_per_layer": [48, 64] * 16,
         "sliding_window": 512}, 32, {"gqa": 16, "sliding": 16},
    ),
    "arctic": ({"moe_layer_frequency": 2, "parallel_attn_mlp_res": False}, 16, {"gqa": 32}),
    "training_keys": (
        {"layer_norm_eps": 1e-6, "num_hash_layers": 3, "mlp_ratio": 4, "global_step": 1000, "pad_token_id": 3,
         "vision_feature_layer": -1, "layer_rope_theta": [1.0, 2.0] * 16, "mtp_layer_types": ["full_attention"],
         "moe_layer_step": 1, "dense_layers": [], "sliding_attention_pattern": None, "n_layers": 32,
         "attention_projection_layout": "fused_qkv", "moe_router_aux_loss_coef_start_layer": 4},
        32, {"gqa": 32},
    ),
}
# fmt: on


def read(*keys: dict[str, Any], **more: Any) -> Model:
    config = MOE | {key: entry for each in (*keys, more) for key, entry in each.items()}
    return model_from_config(config, name="read", source="a test")


def kinds(model: Model) -> dict[str, int]:
    found: dict[str, int] = {}
    for attention in model.attention:
        found[attention.kind] = found.get(attention.kind, 0) + attention.layers
    return found


@pytest.mark.parametrize("family", PLACED)
def test_layers_are_where_the_family_places_them(family: str) -> None:
    keys, moe_layers, attention = PLACED[family]
    model = read(keys)
    assert (model.moe_layers, kinds(model)) == (moe_layers, attention)


def test_jamba_has_45_billion_routed_parameters_and_a_cache_in_4_layers() -> None:
    model = read(JAMBA)
    counted = parameters(model)
    assert counted.routed == 16 * 16 * 3 * 4096 * 14336
    assert counted.total == pytest.approx(51.6e9, rel=0.01)  # transformers' own model of this config: 51.57
    assert [entry.layers for entry in model.attention if entry.kind != "linear"] == [4]
    mamba = next(entry for entry in model.attention if entry.kind == "linear")
    assert mamba.heads * (mamba.head_dim or 0) * (mamba.v_head_dim or 0) == 2 * 4096 * 16  # d_inner * d_state


def test_a_latent_index_is_shared_between_the_layers_of_a_frequency() -> None:
    model = read(LATENT, INDEX, index_topk_freq=4, index_skip_topk_offset=3)
    assert {entry.index_shared: entry.layers for entry in model.attention} == {False: 10, True: 22}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_every_n_layers", 2),
        ("expert_period", 2),
        ("attention_pattern", "FSSS"),
        ("ssm_layer_offset", 3),
        ("attn_layer_idx", [3, 7]),
        ("dense_layers", [0]),
        ("moe_layer_map", {"0": "dense"}),
        ("block_types", ["recurrent", "recurrent", "attention"]),
        ("block_configs", [{"ffn": {"num_experts": 8}}]),
        ("linear_attention_layers", [1, 2]),
        ("n_leading_dense_layers", 1),
        ("num_kv_shared_layers", 8),
        ("use_cla", True),
        ("parallel_attn_mlp_res", True),
        ("per_layer_config", {"05": {"head_dim": 512}}),
        ("something_new", [1, 2] * 16),
        ("attn_layer_offset", 4),
        ("mambaLayerPeriod", 8),
        ("ffn_layer_ratio", 0.5),
    ],
)
def test_a_key_that_places_layers_and_is_not_known_refuses_the_config(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}[:.].* places? layers .* Write the model's sizes as a YAML file$"):
        read({key: value})


def test_unread_keys_are_named_together_and_those_of_sections_with_their_path() -> None:
    with pytest.raises(
        ValueError, match=r"^attn_config\.full_every, moe_layer_skip: keys that place layers and are not"
    ):
        read(attn_config={"full_every": 4}, moe_layer_skip=3, vision_config={"full_attn_layers": [1]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_layer_period": 2}, "^expert_layer_period is given without expert_layer_offset$"),
        ({"attn_layer_period": 4, "attn_layer_offset": 4}, "^attn_layer_offset 4 is not below attn_layer_period 4$"),
        ({"layer_group_size": 5}, "^layer_group_size 5 does not divide num_hidden_layers 32; say layer_types instead$"),
        (
            {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "first_k_dense_replace": 2},
            "^mlp_layer_types and first_k_dense_replace contradict each other on the layers that have experts",
        ),
        (
            {"expert_layer_period": 2, "expert_layer_offset": 0, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
            "^expert_layer_period and decoder_sparse_step with mlp_only_layers contradict",
        ),
        (
            {**DELTA, "full_attention_interval": 4, "layer_types": ["full_attention"] * 32},
            "^layer_types and full_attention_interval contradict each other on the kinds of attention",
        ),
        ({"layer_types": ["full_attention"] * 31}, "^layer_types has 31 entries for 32 layers$"),
        ({"layer_types": ["full_attention"] * 40}, "^layer_types has 40 entries for 32 layers$"),
        ({"hybrid_override_pattern": "ME" * 20}, "^it names the types of 40 blocks, but num_hidden_layers is 32$"),
        ({"mlp_layer_types": ["odd"] * 32}, "^mlp_layer_types has 'odd'; known are sparse, "),
        ({"mlp_only_layers": [32]}, "^mlp_only_layers has 32; the layers are 0 to 31$"),
        (MAMBA2, "^it has mamba_d_state, but no key that places them, such as layer_types or attn_layer_period"),
        ({"model_type": "gpt_oss"}, "^model_type 'gpt_oss' has layers of several kinds of attention, but no key"),
        (
            {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 8},
            "^max_window_layers 8 with use_sliding_window is not read for the models of Qwen; say layer_types$",
        ),
        ({"enable_moe_block": False}, r"^no Mixture-of-Experts model \(no model_type\): enable_moe_block is false$"),
        ({"num_experts": 1}, r"^no Mixture-of-Experts model \(no model_type\): num_experts is 1$"),
        ({**LATENT, "layer_types": ["sliding_attention"] * 32}, "^layers of kind sliding with a latent cache"),
    ],
)
def test_keys_that_contradict_or_leave_open_refuse_the_config(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(changes)


WRONG: list[Any] = [
    "x",
    "",
    -1,
    True,
    1.5,
    [],
    ["x"],
    [None],
    [8, 16],
    [8] * 31,
    [8] * 31 + [9],
    [[8]] * 32,
    {},
    {"a": 1},
]
COUNTS: tuple[str, ...] = (
    "num_attention_heads",
    "intermediate_size",
    "num_experts",
    "hidden_size",
    "num_experts_per_tok",
    "vocab_size",
)
COUNTS += ("num_hidden_layers", "num_key_value_heads", "head_dim", "expert_layer_period", "attn_layer_period")
MORE_COUNTS = ("expert_layer_offset", "first_k_dense_replace", "max_position_embeddings", "decoder_sparse_step")


@pytest.mark.parametrize("key", COUNTS + MORE_COUNTS)
def test_a_number_that_is_none_is_refused_by_name(key: str) -> None:
    wrong = [*WRONG, 10**30, *([0, None] if key in COUNTS[:7] else [])]
    for value in wrong:
        with pytest.raises(ValueError, match=rf"\b(moe_)?{key}\b"):
            read(JAMBA, {key: value})


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("layer_types", ["full_attention", 3, {}, [[]] * 32, [None] * 32]),
        ("mlp_layer_types", ["sparse", 3, {}, [[]] * 32, [None] * 32, [7] * 32]),
        ("attn_type_list", ["1", 1, [2] * 32, [{}] * 32]),
        ("moe_layers", ["a,b", 3, [[1]], [1.5], [-1], [True]]),
        ("full_attention_interval", [0, "4", [4], -4, True, {}]),
        ("sliding_window_pattern", ["LSG", [4], -4, True]),
        ("hybrid_override_pattern", [7, {}, "XYZ", [[]]]),
        ("use_sliding_window", ["yes", 2, []]),
        ("tie_word_embeddings", ["no", [], 7]),
        ("hidden_act", [3, ["silu"]]),
        ("swiglu_limit", ["7", [7.0], True, 10**400, float("nan")]),
        ("quantization_config", ["fp8", ["fp8"], 8, {"quant_method": 8}, {"config_groups": [1]}]),
        ("linear_attn_config", ["kda", [1], {"kda_layers": 3}, {"kda_layers": [0]}, {"kda_layers": [[1]]}]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(key: str, wrong: list[Any]) -> None:
    for value in wrong:
        config = {"sliding_window": 4096, key: value}
        with pytest.raises(ValueError, match=rf"{key}|quant_method|config_groups|kda_layers|blocks of type"):
            read(config)


def test_a_list_where_a_number_is_expected_is_a_request_that_is_wrong(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for keys, said in (
        (
            {"num_attention_heads": [32, 16]},
            "num_attention_heads is [32, 16]; it must be a whole number above 0, or one",
        ),
        ({"intermediate_size": [1] * 31 + [2]}, "intermediate_size differs from layer to layer (1, 2)"),
        ({"moe_every_n_layers": 2}, "moe_every_n_layers: a key that places layers"),
    ):
        config.write_text(json.dumps(MOE | keys))
        assert said in refused("plan", "--model", config, "--hardware", "h200", "--ep", 8)
    config.write_text('{"num_experts": ' + "9" * 5000 + "}")
    assert "config.json is not JSON: Exceeds the limit" in refused("catalog", "show", config)
    config.write_text(json.dumps(MOE | {"num_experts": 2**40}))
    assert "num_experts 1099511627776 is more than 65536, the most that" in refused("catalog", "show", config)
    (tmp_path / "hf_quant_config.json").write_text("[]")
    assert "hf_quant_config.json holds an object of keys" in refused("catalog", "show", config)
