"""How changes of weights show, also those that torch does not count, and the part of a parameter that a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class Watching(Protocol):
    """Experts that have to know of every step that changes their weights."""

    def sources(self) -> tuple[Tensor, ...]:
        """The parameters that optimisers hold."""
        ...

    def has_stepped(self) -> None:
        """An optimiser has changed one of them."""
        ...


_LOOKED_AT = 4  # values along each dimension of an expert's matrix


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Weights as they were: where they lie, changes as torch counts them, and some values, 16 of each matrix.

    The values show what torch does not count: a change through `.data`, by NumPy, by an optimiser of others.
    """

    counted: tuple[tuple[int, int, int], ...]
    values: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Seen:
        return cls(_counted(weights), _some_of_all(weights))

    def still(self, weights: Sequence[Tensor]) -> bool:
        """Whether weights show no change."""
        return self.counted == _counted(weights) and torch.equal(self.values, _some_of_all(weights))


def _counted(weights: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
    """Of a DTensor changes of the whole and those of its local tensor apart."""
    pairs = ((each, local(each.detach())) for each in weights)
    return tuple((part.data_ptr(), part._version, whole._version) for whole, part in pairs)


def _some_of_all(weights: Sequence[Tensor]) -> Tensor:
    """Some values of all weights in one tensor: to compare it waits for a GPU once, not once a weight."""
    return torch.cat([_some(each).flatten().to(torch.float32) for each in weights])


def _some(weight: Tensor) -> Tensor:
    """Some values of each slice along dimension 0, which is an expert's matrix or bias: a view.

    64 values along a dimension: those at 8, 24, 40 and 56
    """
    part = local(weight.detach())
    of_each = [slice(size // 8, None, -(-size // _LOOKED_AT)) for size in part.shape[1:]]
    places = (slice(None), *of_each)
    return part[places]


_living: WeakSet[Watching] = WeakSet()
_hooks: list[RemovableHandle] = []


def watch(experts: Watching) -> None:
    """Has the experts know of every step that an optimiser of torch makes with one of their parameters."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _living.add(experts)


def _after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    del args, kwargs
    stepped = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for experts in _living:
        if any(id(each) in stepped for each in experts.sources()):
            experts.has_stepped()


def refuse_parametrized(module: nn.Module) -> None:
    """ValueError where a value is calculated in place of one of the module's parameters, whose changes would be missed.

    So does torch.nn.utils.parametrize, and with it LoRA of parameters.
    """
    if is_parametrized(module):
        names = ", ".join(dict(module.parametrizations.named_children()))  # type: ignore[union-attr]
        raise ValueError(
            f"{type(module).__name__} has a parametrization of {names}: the layer multiplies by packed copies of "
            "parameters themselves; merge it with torch.nn.utils.parametrize.remove_parametrizations()"
        )


def local(tensor: Tensor) -> Tensor:
    """Of a DTensor what this rank has of it, through autograd where that is on; another tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    found: Tensor = tensor if to_local is None else to_local()
    return found
