"""What takes a rank's experts for a copy of every other rank's, refused by name before it sums or overwrites them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from megamoe.execution.experts import describe
from megamoe.training.distributed.mesh import ranks_of
from megamoe.training.layer import TrainableMoE, living_layers

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


def layers_on_several(parameters: Iterable[Tensor], ranks: Sequence[int]) -> list[TrainableMoE]:
    """Layers whose experts are among the parameters, and that more than one of these ranks of the program share."""
    asked = {id(each) for each in parameters}
    return [
        layer
        for layer in living_layers()
        if layer.group.size > 1
        and any(id(each) in asked for each in _held(layer))
        and len(set(ranks).intersection(ranks_of(layer.group))) > 1
    ]


def _held(layer: TrainableMoE) -> list[Tensor]:
    """Its experts, also where a framework has them."""
    return [*layer.experts.parameters(), *getattr(layer.experts, "owners", ())]


def said_of(layer: TrainableMoE) -> str:
    """The layer for an error, and that its experts are other ones on each rank."""
    return f"the experts of layer {layer.name!r}, of which each rank has others ({describe(layer.local_experts)} here)"


def _before_wrapping(module: nn.Module, name: str, wrapped: nn.Module | None) -> None:
    """DistributedDataParallel takes a module before it broadcasts what that has."""
    if torch.compiler.is_compiling():  # torch traces calls of this, with modules that are half made
        return
    if not isinstance(module, DistributedDataParallel) or name != "module" or wrapped is None:
        return
    named = {name: each for name, each in wrapped.named_parameters() if name not in module.parameters_to_ignore}
    layers = layers_on_several(named.values(), dist.get_process_group_ranks(module.process_group))
    if layers:
        own = {id(each) for layer in layers for each in _held(layer)}
        names = [name for name, each in named.items() if id(each) in own]
        raise ValueError(
            f"DistributedDataParallel would overwrite {said_of(layers[0])}, by rank 0's: before it wraps the model, "
            f"leave out {', '.join(names)}, with "
            "DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)"
        )


def _before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    """ZeroRedundancyOptimizer broadcasts each parameter from the rank that has stepped it."""
    del args, kwargs
    known = getattr(sys.modules.get(_ZERO), "ZeroRedundancyOptimizer", None)
    if known is None or not isinstance(optimizer, known):
        return
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    layers = layers_on_several(parameters, dist.get_process_group_ranks(optimizer.process_group))
    if layers:
        raise ValueError(
            f"ZeroRedundancyOptimizer would overwrite {said_of(layers[0])}, by those of the rank that steps them: give "
            "it the other parameters, and the layer's an optimizer of their own"
        )


register_module_module_registration_hook(_before_wrapping)
register_optimizer_step_pre_hook(_before_step)
