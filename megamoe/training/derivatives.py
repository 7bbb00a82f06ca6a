"""The activation backwards: derivatives as tables over all BF16 values, and sums whose order is written down."""

# n rows   I intermediate   N columns

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megamoe.activations import Activation
from megamoe.formats import BLOCK, chunks, dequantize_mxfp8, quantize_mxfp8
from megamoe.kernels.cpu.library import chosen
from megamoe.kernels.gating import Tables, gate_fp64, look_up, up_factor

LANES = BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class Derivatives:
    """Of an activation, at every BF16 value, evaluated in FP64 and rounded once.

    gate   [65536] float32: f'
    up     [65536] float32: of up's factor, None where that is up itself, shifted or not
    """

    gate: Tensor
    up: Tensor | None


@lru_cache(maxsize=8)
def derivatives_of(activation: Activation, device: torch.device) -> Derivatives:
    """An activation's derivatives. At a clamp's limit itself the value passes, as torch.clamp has it."""
    codes = torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.bfloat16)
    with torch.enable_grad():
        at = codes.to(torch.float64).requires_grad_()
        (gate,) = torch.autograd.grad(gate_fp64(at, activation).sum(), at)
    return Derivatives(gate.to(torch.float32).to(device), _of_up(codes, activation, device))


def _of_up(codes: Tensor, activation: Activation, device: torch.device) -> Tensor | None:
    limit = activation.limit_of_up
    if not activation.gated or limit is None:
        return None
    if activation.clamp == "tanh":
        found = 1 - torch.tanh(codes.to(torch.float64) / limit) ** 2
    else:
        found = (codes.to(torch.float64).abs() <= limit).to(torch.float64)
    return found.to(torch.float32).to(device)


def activate_backward(
    linear1: Tensor,
    weights: Tensor,
    gradient: Tensor,
    tables: Tables,
    *,
    quantized: bool,
    activated: Tensor,
) -> Tensor:
    """From the gradient of Linear-2's input to that of Linear-1's result, in its place.

    linear1 [n, 2I] or [n, I] bfloat16, Linear-1's result, becomes its gradient; weights [n] float32; gradient [n, I]
    float32; activated [n, I] bfloat16 gets Linear-2's input as the forward had it -> [n] float32, the gradients of
    weights. Each operation is one FP32 operation, in this order:

        p = f(gate) * factor            activated = rounded(p * weight)
        of weight = sum over I of gradient * p, in lanes
        s = gradient * weight           of gate = s * factor * f'(gate)         of up = s * f(gate) * factor'(up)
    """
    of_weights = weights.new_empty(len(weights))
    derivatives = derivatives_of(tables.activation, linear1.device)
    library = chosen() if linear1.device.type == "cpu" else None
    if library is not None:
        all_tables = tables, derivatives.gate, derivatives.up
        out = {"activated": activated, "of_weights": of_weights}
        library.activate_backward(linear1, weights, gradient, all_tables, quantized=quantized, **out)
        return of_weights
    for rows in chunks(len(linear1), linear1.shape[1]):
        part, weight, incoming = linear1[rows], weights[rows].unsqueeze(-1), gradient[rows]
        gate, up = part.chunk(2, -1) if tables.activation.gated else (part, None)
        value, slope = look_up(tables.gate, gate), look_up(derivatives.gate, gate)
        scaled = incoming * weight
        if up is None:
            product, of_gate = value, scaled * slope
        else:
            factor = up_factor(up, tables.activation) if tables.up is None else look_up(tables.up, up)
            product = value * factor
            of_gate = scaled * factor * slope
            of_up = scaled * value
            if derivatives.up is not None:
                of_up = of_up * look_up(derivatives.up, up)
            part[:, part.shape[1] // 2 :] = of_up
        result = product * weight
        activated[rows] = dequantize_mxfp8(quantize_mxfp8(result)) if quantized else result
        of_weights[rows] = sum_in_lanes(incoming * product, 1)
        part[:, : of_gate.shape[1]] = of_gate
    return of_weights


def sum_in_lanes(values: Tensor, dim: int) -> Tensor:
    """Sums float32 values over dimension 0 or 1 of two, in FP32 and one order, whatever their number.

    Lane j of 32 sums those whose index is j modulo 32, ascending from zero; then the lanes are summed, ascending from
    zero. What is missing to a multiple of 32 adds nothing.
        33 values: lane 0 is v[0] + v[32], lanes 1 to 31 are v[1] to v[31]
    """
    values = values.movedim(dim, 0)
    lanes = values.new_zeros(LANES, *values.shape[1:])
    for start in range(0, len(values), LANES):
        part = values[start : start + LANES]
        lanes[: len(part)] += part
    total = torch.zeros_like(lanes[0])
    for lane in lanes:
        total += lane
    return total
