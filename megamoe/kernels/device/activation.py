"""What an expert does between its products, inside a tile: `activations.Activation` by constants of the kernel.

The table that CPUs have is a formula here, with FP32's exponential: the same within some units of the last place.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from megamoe.activations import Activation


def constants_of(activation: Activation) -> dict[str, Any]:
    """The constants that a kernel with an activation has of it."""
    return {
        "FUNCTION": activation.function,
        "GATED": activation.gated,
        "ALPHA": float(activation.alpha),
        "UP_SHIFT": float(activation.up_shift),
        "LIMIT": activation.limit,
        "UP_LIMIT": activation.limit_of_up,
        "CLAMP": activation.clamp,
    }


@triton.jit
def apply_function(gate, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, CLAMP: tl.constexpr):
    """f(gate) with its clamp in FP32; a NaN stays one.    silu: gate 2, LIMIT 1, "before" -> 1 / (1 + e^-1) = 0.731

    gate of any shape, float32 that BF16 holds
    """
    if LIMIT is not None and CLAMP == "before":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    if FUNCTION == "relu2":
        kept = tl.where(gate < 0, 0.0, gate)
        found = kept * kept
    elif FUNCTION == "gelu_tanh":
        # 0.5 (1 + tanh z) = 1 / (1 + e^-2z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        found = gate / (1 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    elif CLAMP == "tanh":
        found = bound(gate, LIMIT) / (1 + tl.exp(-ALPHA * gate))
    elif ALPHA == 1.0:
        found = gate / (1 + tl.exp(-gate))
    else:
        found = gate / (1 + tl.exp(-ALPHA * gate))
    if LIMIT is not None and CLAMP == "after":
        found = tl.where(found > LIMIT, LIMIT, found)
    return found


@triton.jit
def up_factor(up, UP_SHIFT: tl.constexpr, UP_LIMIT: tl.constexpr, CLAMP: tl.constexpr):
    """What f(gate) is multiplied by.    up 20, UP_LIMIT 7, UP_SHIFT 1, "before" -> 8"""
    if UP_LIMIT is not None:
        if CLAMP == "tanh":
            up = bound(up, UP_LIMIT)
        else:
            up = tl.where(up > UP_LIMIT, UP_LIMIT, tl.where(up < -UP_LIMIT, -UP_LIMIT, up))
    if UP_SHIFT != 0.0:
        up = up + UP_SHIFT
    return up


@triton.jit
def bound(x, LIMIT: tl.constexpr):
    """LIMIT * tanh(x / LIMIT), by its series where the exponentials would cancel.    x 4, LIMIT 4 -> 3.046"""
    y = x / LIMIT
    squared = y * y
    near = y * (1 - squared * (1 / 3 - squared * (2 / 15 - squared * (17 / 315))))
    shrunk = tl.exp(-2 * tl.abs(y))
    far = (1 - shrunk) / (1 + shrunk)
    return LIMIT * tl.where(squared < 0.04, near, tl.where(y < 0, -far, far))


@triton.jit
def load_bias(bias, expert, first_column, N: tl.constexpr, COLUMNS: tl.constexpr):
    """The expert's bias [COLUMNS] float32 of a tile's columns, 0 beyond N; bias [e, N] float32."""
    columns = first_column + tl.arange(0, COLUMNS)
    return tl.load(bias + expert.to(tl.int64) * N + columns, mask=columns < N, other=0.0)
