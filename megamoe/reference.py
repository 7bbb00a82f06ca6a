"""The oracle: the layer's numeric contract on one device, in plain torch, expert by expert.

moe() is what the layer must give to the bit; moe_fp64() sums the same quantised operands exactly, to measure error
against. Source: DeepSeek-V4's expert layer (report, sections 3.1 and 3.3) and the arithmetic of its public kernel.
"""

# T tokens   H hidden   I intermediate   K experts per token   E experts   n rows of one expert

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.execution.products import linear
from megamoe.formats import MXFP4, WEIGHT_FORMATS, dequantize_mxfp4, dequantize_mxfp8, quantize_mxfp4, quantize_mxfp8
from megamoe.shape import MoEShape


def moe(
    shape: MoEShape,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    weight_format: str = "mxfp4",
    dispatch_format: str = "mxfp8",
) -> Tensor:
    """hidden [T, H], topk_ids [T, K], topk_weights [T, K], gate_up [E, 2I, H], down [E, H, I] -> [T, H] bfloat16"""
    quantized = WEIGHT_FORMATS[weight_format].activations == "mxfp8"
    tokens = _tokens(hidden, quantized or dispatch_format == "mxfp8")
    slots = torch.zeros(*topk_ids.shape, shape.hidden, dtype=torch.bfloat16)  # [T, K, H]
    for expert in range(shape.num_experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = _product(tokens[token], gate_up[expert], quantized).chunk(2, -1)  # [n, I]
        activated = _swiglu(gate, up, topk_weights[token, slot], shape.swiglu_limit)
        activated = round_mxfp8(activated) if quantized else activated.to(torch.bfloat16)
        slots[token, slot] = _product(activated, down[expert], quantized)
    total = torch.zeros(len(tokens), shape.hidden, dtype=torch.float32)
    for k in range(shape.topk):
        total = total + slots[:, k].to(torch.float32)
    return total.to(torch.bfloat16)


def moe_fp64(
    shape: MoEShape,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    weight_format: str = "mxfp4",
    dispatch_format: str = "mxfp8",
) -> Tensor:
    """The same with every product and sum in FP64, rounding only where the contract quantises -> [T, H] float64.

    Those places are the tokens, Linear-1's BF16 result and Linear-2's input: without them the operands would differ.
    """
    quantized = WEIGHT_FORMATS[weight_format].activations == "mxfp8"
    tokens = _tokens(hidden, quantized or dispatch_format == "mxfp8")
    total = torch.zeros(len(tokens), shape.hidden, dtype=torch.float64)
    for expert in range(shape.num_experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        first = tokens[token].to(torch.float64) @ _round(gate_up[expert], quantized).to(torch.float64).T
        gate, up = first.to(torch.bfloat16).chunk(2, -1)
        activated = _swiglu(gate, up, topk_weights[token, slot], shape.swiglu_limit)
        activated = round_mxfp8(activated) if quantized else activated.to(torch.bfloat16)
        second = activated.to(torch.float64) @ _round(down[expert], quantized).to(torch.float64).T
        total.index_add_(0, token, second)
    return total


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in FP64"""
    a, b = a.to(torch.float64), b.to(torch.float64)
    return float((a - b).norm() / b.norm())


def round_mxfp8(x: Tensor) -> Tensor:
    """x [..., K] rounded to MXFP8, as bfloat16."""
    return dequantize_mxfp8(quantize_mxfp8(x))


def _tokens(hidden: Tensor, quantized: bool) -> Tensor:
    tokens = hidden.to(torch.bfloat16)
    return round_mxfp8(tokens) if quantized else tokens


def _product(x: Tensor, weight: Tensor, quantized: bool) -> Tensor:
    """In the device's order of summation, one matrix at a time."""
    rounded: Tensor | MXFP4 = quantize_mxfp4(weight) if quantized else weight.to(torch.bfloat16)
    return linear(x, rounded)


def _round(weight: Tensor, quantized: bool) -> Tensor:
    return dequantize_mxfp4(quantize_mxfp4(weight)) if quantized else weight.to(torch.bfloat16)


def _swiglu(gate: Tensor, up: Tensor, weights: Tensor, limit: float | None) -> Tensor:
    """SiLU(gate) * up * weight in FP32, SiLU evaluated in FP64 and rounded -> [n, I] float32"""
    gate, up = gate.to(torch.float64), up.to(torch.float32)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate).to(torch.float32) * up * weights.unsqueeze(-1)
