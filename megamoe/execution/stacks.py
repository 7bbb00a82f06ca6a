"""Experts' weights as a user hands them in: stacks of all experts or of this rank's, one expert at a time."""

# E experts in all   H hidden   I intermediate

from __future__ import annotations

from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.formats import MXFP4
from megamoe.formats.given import GivenWeight, here, lying_here

Stack = Tensor | MXFP4


def load_stacks(
    experts: Experts,
    num_experts: int,
    gate_up: GivenWeight,
    down: GivenWeight,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> None:
    """Takes gate_up [E, 2I, H] and down [E, H, I], of all num_experts or of this rank's: all of them, or none.

    Biases [E, 2I] and [E, H] likewise. Everything is looked through before anything is taken. Where taking is
    interrupted, what was not taken is missing.
    """
    ids, weights = experts.ids, (as_stack(gate_up, "gate_up"), as_stack(down, "down"))
    given = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    biases = {name: _as_biases(bias, name) for name, bias in given.items() if bias is not None}
    for name, stack in (*zip(("gate_up", "down"), weights, strict=True), *biases.items()):
        if stack.shape[0] not in (num_experts, len(ids)):
            raise ValueError(
                f"{name} holds {stack.shape[0]} experts, expected all {num_experts} or this rank's {len(ids)}"
            )

    def place(stack: Stack, expert: int) -> int:
        return expert if stack.shape[0] == num_experts else expert - ids.start

    def one(expert: int) -> tuple[Stack, Stack, Tensor | None, Tensor | None]:
        first, second = (_item(stack, place(stack, expert)) for stack in weights)
        own = {name: bias[place(bias, expert)] for name, bias in biases.items()}
        return first, second, own.get("gate_up_bias"), own.get("down_bias")

    for expert in ids:
        experts.check(expert, *one(expert))
    experts.forget(ids)
    for expert in ids:
        experts.load(expert, *one(expert))


def as_stack(weight: GivenWeight, name: str) -> Stack:
    """A stack of experts' weights with three dimensions, MXFP4 pairs made one record."""
    stack = lying_here(weight, name)
    if len(stack.shape) != 3:
        raise ValueError(f"{name} must be [experts, rows, columns], got {list(stack.shape)}")
    return stack


def _as_biases(bias: Tensor, name: str) -> Tensor:
    bias = here(bias, name)
    if bias.dim() != 2:
        raise ValueError(f"{name} must be [experts, columns], got {list(bias.shape)}")
    return bias


def _item(stack: Stack, index: int) -> Stack:
    return MXFP4(stack.packed[index], stack.scales[index]) if isinstance(stack, MXFP4) else stack[index]


def shortened(ids: list[int]) -> str:
    """[0, 1, 2, 3, 4, 5] -> '0, 1, 2, 3, ... (6)'"""
    return ", ".join(map(str, ids)) if len(ids) <= 5 else f"{', '.join(map(str, ids[:4]))}, ... ({len(ids)})"
