"""Routing kept in balance without a loss for it: a bias that chooses experts, moved by the sign of their load."""

# E experts

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float = 1e-3) -> None:
    """Moves a router's bias [E], in place: up by rate for an expert below the mean load, down for one above it.

    tokens_per_expert   [E] integers, of all ranks: TrainableMoE.tokens_per_expert, or a sum of them over several calls

    The bias is to be added to scores where experts are chosen, and nowhere else. All ranks know all counts, so nothing
    is exchanged, and biases have the same bits on every rank and for any number of ranks.
        bias 0, loads 5, 1, 3 (mean 3)  ->  bias -rate, +rate, 0
    Source: DeepSeek-V3 report, section 2.1.2, auxiliary-loss-free load balancing. ValueError for other shapes, dtypes.
    """
    if bias.dim() != 1 or tokens_per_expert.shape != bias.shape:
        raise ValueError(
            f"bias and tokens_per_expert must be [E], got {list(bias.shape)} and {list(tokens_per_expert.shape)}"
        )
    if tokens_per_expert.is_floating_point():
        raise ValueError(f"tokens_per_expert must be counts, of an integer dtype, got {tokens_per_expert.dtype}")
    loads = tokens_per_expert.to(bias.device, torch.int64)
    bias.add_(torch.sign(loads.sum() - len(loads) * loads).to(bias.dtype), alpha=rate)
