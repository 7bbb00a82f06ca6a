"""The backward's oracle: its numeric contract on one device, in plain torch, expert by expert.

moe_backward() is what the layer's gradients must be to the bit; moe_backward_fp64() differentiates the same quantised
operands in FP64, with straight-through rounding, to measure error against.
"""

# T tokens   H hidden   I intermediate   K experts per token   E experts   n rows of one expert

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megamoe.activations import Activation
from megamoe.execution.products import linear
from megamoe.formats import WEIGHT_FORMATS
from megamoe.reference import activated_fp32, bounded_up, gate_function, round_mxfp8
from megamoe.shape import MoEShape


@dataclass(frozen=True, slots=True)
class Gradients:
    """hidden [T, H] bfloat16, topk_weights [T, K], gate_up [E, 2I, H], down [E, H, I], biases, float32.

    All are float64 where moe_backward_fp64() made them.
    """

    hidden: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What a layer was called with, and how: gate_up [E, 2I, H], down [E, H, I], biases where the shape has them."""

    shape: MoEShape
    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    weight_format: str = "mxfp4"
    dispatch_format: str = "mxfp8"
    gradient_format: str = "bf16"

    @property
    def quantized(self) -> bool:
        return WEIGHT_FORMATS[self.weight_format].activations == "mxfp8"

    def tokens(self) -> Tensor:
        """As experts read them, bfloat16."""
        tokens = self.hidden.to(torch.bfloat16)
        return round_mxfp8(tokens) if self.quantized or self.dispatch_format == "mxfp8" else tokens

    def dense(self, weight: Tensor) -> Tensor:
        """One expert's matrix as the layer multiplies by it, bfloat16."""
        held = WEIGHT_FORMATS[self.weight_format]
        return held.dense(held.take(weight))

    def rounded(self, activated: Tensor) -> Tensor:
        return round_mxfp8(activated) if self.quantized else activated.to(torch.bfloat16)


def moe_backward(problem: Problem, gradient: Tensor) -> Gradients:
    """gradient [T, H], of the output -> the gradients of everything else.

    The rows of an expert are in the order of token, then slot: with several ranks, tokens are those of the global
    batch, rank after rank.
    """
    p, shape = problem, problem.shape
    received = gradient.to(torch.bfloat16)
    received = round_mxfp8(received) if p.gradient_format == "mxfp8" else received
    tokens = p.tokens()
    slots = torch.zeros(*p.topk_ids.shape, shape.hidden, dtype=torch.bfloat16)  # [T, K, H]
    out = _zeros(p, torch.float32)
    for expert in range(shape.num_experts):
        token, slot = (p.topk_ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        gate_up, down = p.dense(p.gate_up[expert]), p.dense(p.down[expert])
        x, g, weight = tokens[token], received[token], p.topk_weights[token, slot].unsqueeze(-1)
        first = linear(x, gate_up, dtype=torch.float32)
        if p.gate_up_bias is not None:
            first = first + p.gate_up_bias[expert]
        first = first.to(torch.bfloat16)
        unweighted = activated_fp32(first, torch.ones_like(weight), shape.activation)
        activated = p.rounded(unweighted * weight)
        of_activated = linear(g, _transposed(down), dtype=torch.float32)  # [n, I]
        of_first = _activation_backward(first, of_activated * weight, shape.activation).to(torch.bfloat16)
        of_tokens = linear(of_first, _transposed(gate_up))
        slots[token, slot] = round_mxfp8(of_tokens) if p.gradient_format == "mxfp8" else of_tokens
        of_weight = _sum_in_order(of_activated * unweighted, 1)
        if p.down_bias is not None and out.down_bias is not None and out.gate_up_bias is not None:
            wide = g.to(torch.float32)
            of_weight = of_weight + _sum_in_order(wide * p.down_bias[expert], 1)
            out.down_bias[expert] = _sum_in_order(wide * weight, 0)
            out.gate_up_bias[expert] = _sum_in_order(of_first.to(torch.float32), 0)
        out.topk_weights[token, slot] = of_weight
        # rows of the expert are what is summed over, in the order in which products sum
        out.gate_up[expert] = linear(_transposed(of_first), _transposed(x), dtype=torch.float32)
        out.down[expert] = linear(_transposed(g), _transposed(activated), dtype=torch.float32)
    total = torch.zeros(len(tokens), shape.hidden, dtype=torch.float32)
    for k in range(shape.topk):
        total = total + slots[:, k].to(torch.float32)
    out.hidden.copy_(total)
    return out


def moe_backward_fp64(problem: Problem, gradient: Tensor) -> Gradients:
    """The gradients by autograd, every product and sum in FP64; operands rounded where the forward rounds them."""
    p, shape = problem, problem.shape
    with torch.enable_grad():
        tokens = p.tokens().to(torch.float64).requires_grad_()
        topk_weights = p.topk_weights.to(torch.float64).requires_grad_()
        gate_up, down = (
            torch.stack([p.dense(each) for each in stack]).to(torch.float64).requires_grad_()
            for stack in (p.gate_up, p.down)
        )
        biases = [
            None if bias is None else bias.detach().to(torch.float64).requires_grad_()
            for bias in (p.gate_up_bias, p.down_bias)
        ]
        total = torch.zeros(len(tokens), shape.hidden, dtype=torch.float64)
        for expert in range(shape.num_experts):
            token, slot = (p.topk_ids == expert).nonzero(as_tuple=True)
            weight = topk_weights[token, slot].unsqueeze(-1)
            first = tokens[token] @ gate_up[expert].T
            first = first if biases[0] is None else first + biases[0][expert]
            first = _straight_through(first, lambda x: x.to(torch.bfloat16))
            activated = _activation_fp64(first, shape.activation) * weight
            activated = _straight_through(activated, lambda x: p.rounded(x.to(torch.float32)))
            second = activated @ down[expert].T
            second = second if biases[1] is None else second + weight * biases[1][expert]
            total = total.index_add(0, token, second)
        leaves = [tokens, topk_weights, gate_up, down, *(bias for bias in biases if bias is not None)]
        found = torch.autograd.grad(total, leaves, gradient.to(torch.float64), allow_unused=True)
    return Gradients(
        *(torch.zeros_like(leaf) if each is None else each for leaf, each in zip(leaves, found, strict=True))
    )


def _zeros(p: Problem, dtype: torch.dtype) -> Gradients:
    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.zeros(tensor.shape, dtype=dtype)

    gate_up, down, weights = (torch.zeros(each.shape, dtype=dtype) for each in (p.gate_up, p.down, p.topk_weights))
    hidden = torch.zeros(p.hidden.shape, dtype=torch.bfloat16)
    return Gradients(hidden, weights, gate_up, down, like(p.gate_up_bias), like(p.down_bias))


def _activation_backward(first: Tensor, scaled: Tensor, activation: Activation) -> Tensor:
    """first [n, 2I] or [n, I] bfloat16, scaled [n, I] float32: the gradient times weight -> float32 like first"""
    gate, up = first.chunk(2, -1) if activation.gated else (first, None)
    value, slope = (each.to(torch.float32) for each in _with_slope(partial(gate_function, activation=activation), gate))
    if up is None:
        return scaled * slope
    factor, of_factor = (each.to(torch.float32) for each in _with_slope(partial(bounded_up, activation=activation), up))
    if activation.up_shift:
        factor = factor + activation.up_shift
    return torch.cat((scaled * factor * slope, scaled * value * of_factor), -1)


def _with_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function of each BF16 value and its derivative, both in FP64."""
    with torch.enable_grad():
        at = x.to(torch.float64).requires_grad_()
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope


def _activation_fp64(first: Tensor, activation: Activation) -> Tensor:
    if not activation.gated:
        return gate_function(first, activation)
    gate, up = first.chunk(2, -1)
    return gate_function(gate, activation) * (bounded_up(up, activation) + activation.up_shift)


def _straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """x rounded; the gradient passes."""
    return x + (rounding(x.detach()).to(torch.float64) - x.detach())


def _transposed(matrix: Tensor) -> Tensor:
    """A copy whose rows lie one behind the other, also where torch takes one row for contiguous either way."""
    return matrix.new_empty(matrix.shape[1], matrix.shape[0]).copy_(matrix.T)


def _sum_in_order(values: Tensor, dim: int) -> Tensor:
    """In FP32: index j modulo 32 to lane j, ascending, then the lanes, ascending."""
    columns = values.unbind(dim)
    lanes = [torch.zeros_like(columns[0]) for _ in range(32)]
    for index, column in enumerate(columns):
        lanes[index % 32] = lanes[index % 32] + column
    total = torch.zeros_like(columns[0])
    for lane in lanes:
        total = total + lane
    return total
