"""Finds with numbers what an experts module does between its products, and whether its forward does nothing else."""

# N probed values   n columns   H hidden   I intermediate   E experts   T tokens   K experts per token

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.activations import CLAMPS, FUNCTIONS, Activation
from megamoe.kernels.gating import gate_fp64
from megamoe.model.private import with_parameters

CLOSE = 2e-6  # relative: families compute in FP32 here and there
_NEAR = 0.25  # below any clamp
_FAR = 1e12  # beyond any clamp, and its product with itself within FP32
_LAYOUT = {"num_experts": 3, "hidden_dim": 6, "hidden_size": 6, "intermediate_dim": 5, "intermediate_size": 5}
# both signs, the curved part of every function, and beyond every clamp
_VALUES = (0.0, 0.25, 1.0, 1.75, 3.0, 5.5, 6.9, 7.1, 9.9, 10.1, 13.0, 40.0, 300.0, 1e5, _FAR)

Gate = Callable[[Tensor, Tensor], Tensor]
Function = Callable[[Tensor], Tensor]


def activate_fp64(x: Tensor, activation: Activation) -> Tensor:
    """What the layer computes of x float64, without its roundings: [..., 2n], gate columns first, or [..., n]."""
    if not activation.gated:
        return gate_fp64(x, activation)
    gate, up = x.chunk(2, -1)
    limit = activation.limit_of_up
    if limit is not None:
        up = limit * torch.tanh(up / limit) if activation.clamp == "tanh" else up.clamp(-limit, limit)
    return gate_fp64(gate, activation) * (up + activation.up_shift)


def fit_activation(experts: nn.Module, *, gated: bool, interleaved: bool) -> Activation:
    """The Activation that equals the module's own at every probed value, to FP32 rounding.

    A module with a gate is asked through _apply_gate where it has one, else through act_fn(gate) * up; one without a
    gate through act_fn. ValueError with the value where no description fits.
    """
    with torch.no_grad(), torch.device("cpu"):
        f: Gate | Function
        if gated:
            f = _gate_of(experts, interleaved)
            candidates = [fit for clamp in CLAMPS if (fit := _fit_gated(f, clamp)) is not None]
        else:
            f = plain = _function_of(experts)
            function = _function(lambda x: float(plain(_one(x))[0]))
            candidates = [Activation(**function, gated=False)] if function else []
        misses = {}
        for candidate in candidates:
            miss = _miss(f, candidate)
            if not miss:
                return candidate
            misses[candidate] = miss
    known = f"f(gate) * up of {', '.join(FUNCTIONS)}" if gated else ", ".join(FUNCTIONS)
    raise ValueError(f"its activation is not {known}, clamped or not" + "".join(f"; {m}" for m in misses.values()))


def check_forward(
    experts: nn.Module, activation: Activation, *, transposed: bool, interleaved: bool, bias: bool
) -> None:
    """ValueError where the module's forward is more than its products, its activation and a weighted sum.

    A copy of the module with small random weights runs its own forward in FP64, and is held to the description. The
    module's weights are not read, and may be on the meta device.
    """
    num_experts, hidden, inner = _LAYOUT["num_experts"], _LAYOUT["hidden_dim"], _LAYOUT["intermediate_dim"]
    rows = activation.rows_per_output * inner
    rng = torch.Generator(device="cpu").manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, generator=rng, device="cpu")

    first, second = 3 * random(num_experts, rows, hidden), random(num_experts, hidden, inner)
    first_bias, second_bias = (random(num_experts, size) if bias else None for size in (rows, hidden))
    x, weights = random(7, hidden), random(7, 2).sigmoid()
    ids = torch.randint(0, num_experts, (7, 2), generator=rng, device="cpu")
    ids[:, 1] = (ids[:, 0] + 1 + ids[:, 1] % 2) % num_experts
    name = "gate_up_proj" if activation.gated else "up_proj"
    stacks = {name: first, "down_proj": second, f"{name}_bias": first_bias, "down_proj_bias": second_bias}
    if transposed:
        stacks |= {name: first.mT, "down_proj": second.mT}
    small = _with_weights(experts, {key: stack for key, stack in stacks.items() if stack is not None})
    whole = type(experts).forward
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = getattr(whole, "__wrapped__", whole)(small, x, ids, weights)
    except (AttributeError, IndexError, RuntimeError, TypeError) as failure:
        raise ValueError(f"its forward does not take what experts' forwards take: {failure}") from failure
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            row = first[expert] @ x[token] + (0.0 if first_bias is None else first_bias[expert])
            if activation.gated and interleaved:
                row = torch.cat((row[0::2], row[1::2]))
            out = second[expert] @ activate_fp64(row, activation)
            expected[token] += weight * (out + (0.0 if second_bias is None else second_bias[expert]))
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-4:  # NaN neither; some round between steps, and all who do something else are far off
        raise ValueError(
            f"its forward is not the weighted sum of down_proj(activation(up_proj(x))): the relative difference is "
            f"{error:.2g} on random weights"
        )


def _with_weights(experts: nn.Module, stacks: dict[str, Tensor]) -> nn.Module:
    """A copy of the module that shares nothing but what has no weights, with these ones."""
    small = with_parameters(experts, stacks)
    small.__dict__.pop("forward", None)
    for name, size in _LAYOUT.items():
        if name in small.__dict__:
            small.__dict__[name] = size
    return small


def _gate_of(experts: nn.Module, interleaved: bool) -> Gate:
    """f(gate [N], up [N]) -> [N], by the module's own _apply_gate where it has one."""

    def apply(gate: Tensor, up: Tensor) -> Tensor:
        # columns of a second output, so that a layout that is not the announced one shows
        columns = torch.stack((gate, up.flip(0), up, gate.flip(0)), -1)  # gate0, gate1, up0, up1
        if interleaved:
            columns = columns[:, [0, 2, 1, 3]]
        out: Tensor = _apply_gate(experts, columns)
        if tuple(out.shape) != (len(gate), 2):
            raise ValueError(f"its activation takes [N, 4] to {list(out.shape)}, not to [N, 2]")
        return out[:, 0].double()

    return apply


def _apply_gate(experts: nn.Module, columns: Tensor) -> Any:
    own = getattr(experts, "_apply_gate", None)
    if own is not None:
        return own(columns)
    gate, up = columns.chunk(2, -1)
    return _function_of(experts)(gate) * up


def _function_of(experts: nn.Module) -> Callable[[Tensor], Tensor]:
    function = getattr(experts, "act_fn", None)
    if not callable(function):
        raise ValueError("it has neither _apply_gate nor act_fn, so its activation cannot be asked")
    return function  # type: ignore[no-any-return]


def _fit_gated(f: Gate, clamp: str) -> Activation | None:
    """The activation with this clamp that equals f at a few values; None where there is none."""

    def at(gate: float, up: float) -> float:
        return float(f(_one(gate), _one(up))[0])

    slope = (at(_NEAR, _NEAR) - at(_NEAR, 0.0)) / _NEAR
    if not abs(slope) > 1e-9:
        raise ValueError(f"its output does not grow with up at gate {_NEAR}, so it is no f(gate) * up")
    if clamp == "tanh":
        # up's factor is L tanh(up / L), which is L far out
        ratio = at(_NEAR, _NEAR) / at(_NEAR, _FAR)
        if at(_NEAR, 0.0) != 0.0 or not 0.0 < ratio < 1.0:
            return None
        up_limit, shift, bounded = _nice(_NEAR / math.atanh(ratio)), 0.0, True
        near_up = up_limit * math.tanh(_NEAR / up_limit)
    else:
        shift = _nice(at(_NEAR, 0.0) / slope)
        up_limit = _nice(at(_NEAR, _FAR) / slope - shift)
        near_up, bounded = _NEAR + shift, up_limit < _FAR / 2
    if near_up == 0.0 or not up_limit > 0:
        return None
    limit = _nice(at(_FAR, _NEAR) / near_up) if bounded and clamp != "before" else up_limit
    limit = torch.finfo(torch.bfloat16).max if limit > _FAR / 2 else limit
    if not limit > 0:
        return None
    shrinks = limit / _NEAR * math.tanh(_NEAR / limit) if clamp == "tanh" else 1.0
    function = _function(lambda gate: at(gate, _NEAR) / near_up / shrinks)
    if not function or (clamp == "tanh" and (function["function"] != "silu" or limit > _FAR)):
        return None
    return Activation(
        **function,
        up_shift=shift,
        limit=limit if bounded else None,
        clamp=clamp if bounded else "before",
        up_limit=up_limit if bounded and up_limit != limit else None,
    )


def _function(f: Callable[[float], float]) -> dict[str, Any]:
    """The function's name and alpha, from one value; nothing where it is none. _miss() asks the others."""
    near = f(_NEAR)
    for function in ("relu2", "gelu_tanh"):
        if abs(near - float(gate_fp64(_one(_NEAR), Activation(function, gated=False)))) < CLOSE:
            return {"function": function}
    if 0.0 < near < _NEAR:
        return {"function": "silu", "alpha": _nice(float(torch.logit(_one(near / _NEAR))) / _NEAR)}
    return {}


def _miss(f: Gate | Function, activation: Activation) -> str:
    """Where f is not the activation, in words; empty where it is everywhere."""
    values = torch.tensor([sign * value for value in _VALUES for sign in (1.0, -1.0)], dtype=torch.float64)
    given = [each.flatten() for each in torch.meshgrid(values, values, indexing="ij")] if activation.gated else [values]
    found = f(*given).double()
    expected = activate_fp64(torch.stack(given, -1), activation).flatten()
    # of a negative gate GELU is a small difference of large numbers, rounded in FP32 by some
    cancelled = 1e-7 * given[0].abs().clamp(max=16.0) * (given[1].abs() if activation.gated else 1.0)
    wrong = ~((found - expected).abs() <= CLOSE * expected.abs() + cancelled + 1e-9)
    if not bool(wrong.any()):
        return ""
    index = int(wrong.nonzero()[0])
    names = ("gate", "up") if activation.gated else ("x",)
    place = ", ".join(f"{name} {float(each[index]):g}" for name, each in zip(names, given, strict=True))
    return f"at {place} it is {float(found[index]):.6g}, and {str(activation)!r} is {float(expected[index]):.6g}"


def _one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _nice(value: float) -> float:
    """The shortest number within a millionth of one that was found by dividing.    1.7020000004 -> 1.702"""
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 9))
    found = next((each for each in shorter if abs(each - value) <= 1e-6 * abs(value)), value)
    return 0.0 if abs(found) < 1e-6 else found
