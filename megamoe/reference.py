"""The oracle: the layer's numeric contract on one device, in plain torch, expert by expert.

moe() is what the layer must give to the bit; moe_fp64() sums the same quantised operands exactly, to measure error
against. Source: DeepSeek-V4's expert layer (report, sections 3.1 and 3.3) and the arithmetic of its public kernel.
"""

# T tokens   H hidden   I intermediate   K experts per token   E experts   n rows of one expert

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megamoe.activations import Activation
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
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_format: str = "mxfp4",
    dispatch_format: str = "mxfp8",
    combine_format: str = "bf16",
) -> Tensor:
    """hidden [T, H], topk_ids [T, K], topk_weights [T, K], gate_up [E, 2I, H], down [E, H, I] -> [T, H] bfloat16

    Without a gate gate_up is [E, I, H]. gate_up_bias [E, 2I] and down_bias [E, H], where the shape has biases.
    """
    slots = results(
        *(shape, hidden, topk_ids, topk_weights, gate_up, down),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        weight_format=weight_format,
        dispatch_format=dispatch_format,
    )
    return sum_slots(RESULT_ROUNDING[combine_format](slots))


def results(
    shape: MoEShape,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_format: str = "mxfp4",
    dispatch_format: str = "mxfp8",
) -> Tensor:
    """moe() up to Linear-2's BF16 rounding: what each expert says to each of its tokens -> [T, K, H] bfloat16."""
    biases = _biases(shape, gate_up_bias, down_bias)
    quantized = WEIGHT_FORMATS[weight_format].activations == "mxfp8"
    tokens = _tokens(hidden, quantized or dispatch_format == "mxfp8")
    slots = torch.zeros(*topk_ids.shape, shape.hidden, dtype=torch.bfloat16)  # [T, K, H]
    for expert in range(shape.num_experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        weights = topk_weights[token, slot].unsqueeze(-1)
        first = _product(tokens[token], gate_up[expert], quantized, biases and biases[0][expert])
        activated = activated_fp32(first, weights, shape.activation)  # [n, I]
        activated = round_mxfp8(activated) if quantized else activated.to(torch.bfloat16)
        slots[token, slot] = _product(activated, down[expert], quantized, biases and weights * biases[1][expert])
    return slots


def sum_slots(slots: Tensor) -> Tensor:
    """Slots in ascending order in FP32 from zero, rounded once: [T, K, H] bfloat16 -> [T, H] bfloat16"""
    total = torch.zeros(len(slots), slots.shape[2], dtype=torch.float32)
    for slot in slots.unbind(1):
        total = total + slot.to(torch.float32)
    return total.to(torch.bfloat16)


def moe_fp64(
    shape: MoEShape,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weight_format: str = "mxfp4",
    dispatch_format: str = "mxfp8",
) -> Tensor:
    """The same with every product and sum in FP64, rounding only where the contract quantises -> [T, H] float64.

    Those places are the tokens, Linear-1's BF16 result and Linear-2's input: without them the operands would differ.
    Results are not rounded on their way home, so against this a combine format shows its whole error.
    """
    biases = _biases(shape, gate_up_bias, down_bias)
    quantized = WEIGHT_FORMATS[weight_format].activations == "mxfp8"
    tokens = _tokens(hidden, quantized or dispatch_format == "mxfp8")
    total = torch.zeros(len(tokens), shape.hidden, dtype=torch.float64)
    for expert in range(shape.num_experts):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        weights = topk_weights[token, slot].unsqueeze(-1)
        first = tokens[token].to(torch.float64) @ _round(gate_up[expert], quantized).to(torch.float64).T
        first = first + biases[0][expert].to(torch.float64) if biases else first
        activated = activated_fp32(first.to(torch.bfloat16), weights, shape.activation)
        activated = round_mxfp8(activated) if quantized else activated.to(torch.bfloat16)
        second = activated.to(torch.float64) @ _round(down[expert], quantized).to(torch.float64).T
        second = second + weights.to(torch.float64) * biases[1][expert].to(torch.float64) if biases else second
        total.index_add_(0, token, second)
    return total


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in FP64"""
    a, b = a.to(torch.float64), b.to(torch.float64)
    return float((a - b).norm() / b.norm())


def round_mxfp8(x: Tensor) -> Tensor:
    """x [..., K] rounded to MXFP8, as bfloat16."""
    return dequantize_mxfp8(quantize_mxfp8(x))


# what a combine format makes of results, wherever their experts are
RESULT_ROUNDING: Mapping[str, Callable[[Tensor], Tensor]] = {"bf16": lambda slots: slots, "mxfp8": round_mxfp8}


def _tokens(hidden: Tensor, quantized: bool) -> Tensor:
    tokens = hidden.to(torch.bfloat16)
    return round_mxfp8(tokens) if quantized else tokens


def _biases(shape: MoEShape, gate_up: Tensor | None, down: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both in FP32, where the shape has biases."""
    if not shape.bias:
        if gate_up is not None or down is not None:
            raise ValueError("biases were given for a shape without: make it with MoEShape(..., bias=True)")
        return None
    if gate_up is None or down is None:
        raise ValueError("the shape has bias=True, so gate_up_bias and down_bias are both needed")
    return gate_up.to(torch.float32), down.to(torch.float32)


def _product(x: Tensor, weight: Tensor, quantized: bool, bias: Tensor | None) -> Tensor:
    """In the device's order of summation, one matrix at a time; a bias joins the FP32 sum before it is rounded."""
    rounded: Tensor | MXFP4 = quantize_mxfp4(weight) if quantized else weight.to(torch.bfloat16)
    if bias is None:
        return linear(x, rounded)
    return (linear(x, rounded, dtype=torch.float32) + bias).to(torch.bfloat16)


def _round(weight: Tensor, quantized: bool) -> Tensor:
    return dequantize_mxfp4(quantize_mxfp4(weight)) if quantized else weight.to(torch.bfloat16)


def activated_fp32(first: Tensor, weights: Tensor, activation: Activation) -> Tensor:
    """f(gate) * up's factor * weight in FP32, f evaluated in FP64 and rounded; without a gate f(x) * weight.

    first [n, 2I] or [n, I] bfloat16, weights [n, 1] float32 -> [n, I] float32
    """
    if not activation.gated:
        return gate_function(first.to(torch.float64), activation).to(torch.float32) * weights
    gate, up = first.chunk(2, -1)
    factor = bounded_up(up.to(torch.float64), activation).to(torch.float32)
    if activation.up_shift:
        factor = factor + activation.up_shift
    return gate_function(gate.to(torch.float64), activation).to(torch.float32) * factor * weights


def gate_function(gate: Tensor, activation: Activation) -> Tensor:
    """f(gate) with its clamp, float64"""
    limit, clamp = activation.limit, activation.clamp
    if clamp == "tanh":
        return _limited(gate, limit, True) * torch.sigmoid(activation.alpha * gate)
    x = gate.clamp(max=limit) if limit is not None and clamp == "before" else gate
    if activation.function == "gelu_tanh":
        found = x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    elif activation.function == "relu2":
        found = torch.relu(x) ** 2
    elif activation.alpha == 1:
        found = torch.nn.functional.silu(x)
    else:
        found = x * torch.sigmoid(activation.alpha * x)
    return found.clamp(max=limit) if limit is not None and clamp == "after" else found


def bounded_up(up: Tensor, activation: Activation) -> Tensor:
    """up's factor before its shift, float64"""
    return _limited(up, activation.limit_of_up, activation.clamp == "tanh")


def _limited(x: Tensor, limit: float | None, smooth: bool) -> Tensor:
    if limit is None:
        return x
    return limit * torch.tanh(x / limit) if smooth else x.clamp(-limit, limit)
