"""What the MoE blocks of a model take and give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.layer import MegaMoE
from megamoe.model.experts import RoutedExperts


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that have experts in them, by name, but for the layer itself."""
    return {name: m for name, m in model.named_modules() if "experts" in m._modules and not isinstance(m, MegaMoE)}


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


def record_blocks(model: nn.Module, token_ids: Tensor) -> dict[str, Call]:
    """What every MoE block was given and gave."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = args, kwargs, _first(output)

        return hook

    handles = [block.register_forward_hook(note(name), with_kwargs=True) for name, block in blocks(model).items()]
    with torch.no_grad():
        model(token_ids)
    for handle in handles:
        handle.remove()
    return calls


def repeat_blocks(model: nn.Module, calls: dict[str, Call]) -> dict[str, Tensor]:
    """What every MoE block of the model gives for what a block of that name was given."""
    with torch.no_grad():
        return {name: _first(block(*calls[name][0], **calls[name][1])) for name, block in blocks(model).items()}


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def routed_experts(model: nn.Module) -> dict[str, RoutedExperts]:
    """Those of a loaded model, by the names of their modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}
