"""What an Activation means, in torch: f in FP64, up's factor in FP32, and both as tables over all BF16 values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import silu

from megamoe.activations import Activation


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """An activation as the CPU evaluates it. Linear-1's result is BF16, so a table is a whole function of it.

    gate   [65536] float32: f of every BF16 value, evaluated in FP64 and rounded once
    up     [65536] float32: up's factor, where it is more than a clamp and a sum; else None
    """

    activation: Activation
    gate: Tensor
    up: Tensor | None


@lru_cache(maxsize=8)
def tables_of(activation: Activation, device: torch.device) -> Tables:
    """An activation's tables. Layers with the same activation share them."""
    values = torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.bfloat16)
    gate = gate_fp64(values.to(torch.float64), activation).to(torch.float32).to(device)
    up = up_factor(values, activation).to(device) if activation.gated and activation.clamp == "tanh" else None
    return Tables(activation, gate, up)


def gate_fp64(gate: Tensor, activation: Activation) -> Tensor:
    """f(gate) with its clamp, float64 of any shape"""
    limit = activation.limit
    x = gate if limit is None or activation.clamp != "before" else gate.clamp(max=limit)
    if activation.clamp == "tanh":
        assert limit is not None
        found = limit * torch.tanh(x / limit) * torch.sigmoid(activation.alpha * x)
    elif activation.function == "silu":
        found = silu(x) if activation.alpha == 1 else x * torch.sigmoid(activation.alpha * x)
    elif activation.function == "gelu_tanh":
        found = x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))  # 1 + tanh z would cancel
    else:
        assert activation.function == "relu2", activation.function
        found = torch.relu(x).square()
    return found if limit is None or activation.clamp != "after" else found.clamp(max=limit)


def up_factor(up: Tensor, activation: Activation) -> Tensor:
    """up bfloat16 of any shape -> what f(gate) is multiplied by, float32: clamped, then shifted."""
    limit = activation.limit_of_up
    if limit is None:
        factor = up.to(torch.float32)
    elif activation.clamp == "tanh":
        factor = (limit * torch.tanh(up.to(torch.float64) / limit)).to(torch.float32)
    else:
        factor = up.to(torch.float32).clamp_(-limit, limit)
    return factor + activation.up_shift if activation.up_shift else factor


def activate_fp32(gate_up: Tensor, weights: Tensor, tables: Tables) -> Tensor:
    """f(gate) * up's factor * weight in FP32, without a gate f(x) * weight: gate_up [n, 2I] or [n, I] bfloat16.

    weights [n] float32 -> [n, I] float32
    """
    activation = tables.activation
    gate, up = gate_up.chunk(2, -1) if activation.gated else (gate_up, None)
    activated = look_up(tables.gate, gate)
    if up is not None:
        activated.mul_(up_factor(up, activation) if tables.up is None else look_up(tables.up, up))
    return activated.mul_(weights.unsqueeze(-1))


def look_up(table: Tensor, values: Tensor) -> Tensor:
    """table [65536], by bits of bfloat16; values [...] bfloat16 -> [...] of the table's dtype"""
    codes = values.view(torch.uint16).to(torch.int32).flatten()
    return table.index_select(0, codes).view(values.shape)
