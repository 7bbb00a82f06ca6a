"""A transformers model's experts as a layer that trains."""

# E experts   H hidden   K experts per token

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.distributed as dist
from torch import nn

from megamoe.layer import MegaMoE
from megamoe.model.experts import RoutedExperts
from megamoe.model.loading.expert_weights import parameter_names
from megamoe.model.loading.skeleton import find_blocks, set_module
from megamoe.parallel.group import EPGroup
from megamoe.training import TrainableMoE


class TrainableRoutedExperts(RoutedExperts):
    """RoutedExperts whose layer trains: options are TrainableMoE's."""

    layer_type: ClassVar[type[MegaMoE]] = TrainableMoE
    layer: TrainableMoE


def make_trainable(
    model: Any, group: EPGroup | dist.ProcessGroup | None = None, *, weight_format: str = "mxfp4", **options: Any
) -> dict[str, TrainableMoE]:
    """Puts a TrainableMoE in the place of each block's routed experts -> the layers, by the names of those modules.

    model     of transformers, with all of its experts' weights, the same on every rank. This rank's experts become
              master weights; the others' are let go
    options   of TrainableMoE: master_dtype, gradient_format, saved, rounding, ...

    The rest of the model stays transformers' own, whole on every rank: megamoe.training.sum_gradients() is for its
    gradients, dense_parameters() finds them. ValueError, and nothing has changed, for a model without routed experts
    and for experts that do not fit, see read_structure().
    """
    blocks, ranks = tuple(find_blocks(model)), EPGroup.of(group)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no routed experts")
    made: dict[str, TrainableRoutedExperts] = {}
    for block in blocks:
        experts = model.get_submodule(block.name)
        made[block.name] = routed = TrainableRoutedExperts(
            block.structure, block.topk, ranks, weight_format=weight_format, name=block.name, **options
        )
        stacks = [experts.get_parameter(name).detach() for name in parameter_names(block.structure)]
        for expert in routed.layer.local_experts:
            routed.load(expert, *(stack[expert] for stack in stacks))
    for name, routed in made.items():
        set_module(model, name, routed)
    return {name: routed.layer for name, routed in made.items()}


def dense_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of all that every rank has whole: what is no TrainableMoE's."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, TrainableMoE))
    for name, parameter in model.named_parameters():
        if not name.startswith(layers):
            yield name, parameter
