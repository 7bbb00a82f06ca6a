"""A DeepSeek-V4 of some million parameters: transformers' own model, its experts a TrainableMoE."""

# V vocabulary   E experts   K experts per token   H hidden

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from megamoe import EPGroup, TrainableMoE
from megamoe.model.training.experts import make_trainable


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is small. Layers have sliding and heavily compressed attention in turns; the first is hash-routed."""

    vocab_size: int = 2048
    hidden: int = 128
    intermediate: int = 128
    layers: int = 4
    experts: int = 16
    topk: int = 2
    context: int = 1024


def configure(sizes: Sizes, end: int) -> DeepseekV4Config:
    """Without CSA layers, whose indexer has a loss of its own."""
    kinds = ["sliding_attention", "heavily_compressed_attention"] * sizes.layers
    return DeepseekV4Config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        layer_types=kinds[: sizes.layers],
        mlp_layer_types=["hash_moe", *["moe"] * (sizes.layers - 1)],
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.topk,
        num_attention_heads=4,
        head_dim=64,
        partial_rotary_factor=0.5,
        q_lora_rank=sizes.hidden // 2,
        o_groups=2,
        o_lora_rank=sizes.hidden // 4,
        initializer_range=0.04,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        sliding_window=64,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        max_position_embeddings=sizes.context,
        bos_token_id=end,
        eos_token_id=end,
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """model: of transformers; layers: its experts; routers: those that choose by scores, with their experts."""

    model: Any
    layers: list[TrainableMoE]
    routers: list[tuple[Any, TrainableMoE]]


def make_model(sizes: Sizes, end: int, group: EPGroup, seed: int = 0) -> Trained:
    """The same weights on every rank and for any number of ranks; each keeps its own experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV4ForCausalLM(configure(sizes, end))
        for block in model.model.layers:
            if block.mlp.is_hash:  # K different experts for each token, the first of a random order
                order = torch.rand(sizes.vocab_size, sizes.experts).argsort(-1)
                block.mlp.gate.tid2eid.copy_(order[:, : sizes.topk])
    layers = list(make_trainable(model, group, weight_format="mxfp4").values())
    blocks = [block.mlp for block in model.model.layers]
    routers = [(mlp.gate, layer) for mlp, layer in zip(blocks, layers, strict=True) if not mlp.is_hash]
    return Trained(model.train(), layers, routers)
