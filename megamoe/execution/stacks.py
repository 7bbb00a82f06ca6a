"""Experts' weights as a user hands them in: stacks of all experts or of this rank's, one expert at a time."""

# E experts in all   H hidden   I intermediate

from __future__ import annotations

from torch import Tensor

from megamoe.execution.experts import Experts, Weight
from megamoe.formats import MXFP4

Stack = Tensor | MXFP4


def load_stacks(experts: Experts, num_experts: int, gate_up: Weight, down: Weight) -> None:
    """Takes gate_up [E, 2I, H] and down [E, H, I], of all num_experts or of this rank's: all of them, or none.

    Everything is looked through before anything is taken. Where taking is interrupted, what was not taken is missing.
    """
    ids, stacks = experts.ids, {"gate_up": as_stack(gate_up, "gate_up"), "down": as_stack(down, "down")}
    for name, stack in stacks.items():
        if stack.shape[0] not in (num_experts, len(ids)):
            raise ValueError(
                f"{name} holds {stack.shape[0]} experts, expected all {num_experts} or this rank's {len(ids)}"
            )
    firsts = {name: 0 if stack.shape[0] == num_experts else ids.start for name, stack in stacks.items()}
    for expert in ids:
        experts.check(expert, *(_item(stack, expert - firsts[name]) for name, stack in stacks.items()))
    experts.forget(ids)
    for expert in ids:
        experts.load(expert, *(_item(stack, expert - firsts[name]) for name, stack in stacks.items()))


def as_stack(weight: Weight, name: str) -> Stack:
    """A stack of experts' weights with three dimensions, MXFP4 pairs made one record."""
    if isinstance(weight, tuple):
        if len(weight) != 2:
            raise ValueError(f"{name} must be a tensor, MXFP4 or (packed, scales), got {len(weight)} items")
        weight = MXFP4.from_bytes(*weight)
    if not isinstance(weight, Tensor | MXFP4) or len(weight.shape) != 3:
        found = list(weight.shape) if isinstance(weight, Tensor | MXFP4) else type(weight).__name__
        raise ValueError(f"{name} must be [experts, rows, columns], got {found}")
    return weight


def _item(stack: Stack, index: int) -> Stack:
    return MXFP4(stack.packed[index], stack.scales[index]) if isinstance(stack, MXFP4) else stack[index]


def shortened(ids: list[int]) -> str:
    """[0, 1, 2, 3, 4, 5] -> '0, 1, 2, 3, ... (6)'"""
    return ", ".join(map(str, ids)) if len(ids) <= 5 else f"{', '.join(map(str, ids[:4]))}, ... ({len(ids)})"
