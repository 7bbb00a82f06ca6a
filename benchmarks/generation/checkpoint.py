"""The model that all generate with: a Qwen3-MoE made on the spot, random, most of whose work is its experts'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megamoe.ambient import undisturbed
from megamoe.model.loading.skeleton import config_of


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model; experts and layer sizes are those of benchmarks.peers."""

    hidden: int = 1024
    intermediate: int = 512
    num_experts: int = 16
    topk: int = 4
    layers: int = 6
    vocabulary: int = 4096

    @property
    def text(self) -> str:
        return (
            f"Qwen3-MoE, random: hidden {self.hidden}, intermediate {self.intermediate}, {self.num_experts} experts, "
            f"top-{self.topk}, {self.layers} layers, vocabulary {self.vocabulary}"
        )


def write_model(path: Path, sizes: Sizes) -> None:
    """A checkpoint of transformers in BF16. No token ends a text."""
    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.intermediate,
        intermediate_size=sizes.intermediate,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.topk,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        num_key_value_heads=max(2, sizes.hidden // 256),
        head_dim=64,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=8192,
        norm_topk_prob=True,
        initializer_range=0.05,  # large enough that the two most likely tokens are rarely a rounding apart
        eos_token_id=None,
        bos_token_id=None,
    )
    with undisturbed(torch.device("cpu")), torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def described(path: Path) -> str:
    """A given checkpoint in words."""
    config = json.loads((path / "config.json").read_bytes())
    return f"{path.name}: {', '.join(config.get('architectures') or [config['model_type']])}"


def vocabulary_of(path: Path) -> int:
    return int(config_of(path).get_text_config(decoder=True).vocab_size)
