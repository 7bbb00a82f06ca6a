"""Takes the weights of a loaded transformers experts module into a layer, and runs such a module on one rank."""

# T tokens   H hidden   K experts per token   E experts in all   e experts that a module holds

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from megamoe.ambient import eager
from megamoe.execution.checks import check_gradient
from megamoe.formats.given import GivenWeight
from megamoe.model.experts import RoutedExperts
from megamoe.model.packed import PackedExperts
from megamoe.model.private import before_state_dicts, empty
from megamoe.model.structure import Structure, read_structure
from megamoe.model.training.stock import TrainedExperts
from megamoe.parallel.group import EPGroup
from megamoe.training.steps import refuse_parametrized

NAME = "megamoe"  # in transformers' registries

# layers without a group of ranks share buffers and turns with the first layer of their model that lives
_FIRST: WeakValueDictionary[int, RoutedExperts] = WeakValueDictionary()


def structure_of(experts: nn.Module) -> Structure:
    """Structure of an experts module, stock or with packed weights. ValueError where it does not fit."""
    return experts.structure if isinstance(experts, PackedExperts) else read_structure(experts)


def hand_over(experts: nn.Module, structure: Structure, group: EPGroup | None, topk: int) -> RoutedExperts:
    """A layer with the module's weights, which hold all experts of the structure or this rank's.

    The weights leave the module one expert at a time on their way into the layer, and all of them are gone from it
    afterwards. The layer becomes the module's submodule `routed`. ValueError as MegaMoE and its load_expert() raise it.
    """
    refuse_parametrized(experts)
    if isinstance(experts, PackedExperts):
        weight_format = experts.packing.weight_format
    else:
        weight_format = str(getattr(experts, "weight_format", "bf16"))
    device = next(experts.parameters(recurse=False)).device
    routed = RoutedExperts(
        structure, topk, group, weight_format=weight_format, name=type(experts).__name__, device=device
    )
    held = next(experts.parameters(recurse=False)).shape[0]
    ids = routed.layer.local_experts
    assert held == len(ids), f"the module holds {held} experts, and this rank has {len(ids)}"
    for index, expert in enumerate(ids):
        routed.load(expert, *_matrices(experts, structure, index), *_biases(experts, structure, index))
    empty(experts)
    experts.routed = routed
    before_state_dicts(experts, _refuse_state_dict)
    return routed


def _matrices(experts: nn.Module, structure: Structure, index: int) -> tuple[GivenWeight, GivenWeight]:
    if isinstance(experts, PackedExperts):
        return experts.matrix(structure.first, index), experts.matrix("down_proj", index)
    return experts.get_parameter(structure.first)[index].detach(), experts.get_parameter("down_proj")[index].detach()


def _biases(experts: nn.Module, structure: Structure, index: int) -> tuple[Tensor, ...]:
    names = (f"{structure.first}_bias", "down_proj_bias") if structure.has_bias else ()
    return tuple(experts.get_parameter(name)[index].detach() for name in names)


def _refuse_state_dict(experts: nn.Module, prefix: str, keep_vars: bool) -> None:  # noqa: ARG001
    raise ValueError(
        f"the weights of {prefix.rstrip('.') or type(experts).__name__} are in this rank's layer since its first call, "
        "and no state dict of the model has them: save the model before it is called, or load it again"
    )


def _refuse_other_implementation(experts: nn.Module, args: object) -> None:  # noqa: ARG001
    """ValueError where transformers is told to run a module by another implementation after its weights have left."""
    chosen = getattr(getattr(experts, "config", None), "_experts_implementation", NAME)
    if chosen != NAME and "forward" not in vars(experts):
        raise ValueError(
            f"the weights of {type(experts).__name__} are in this rank's layer since its first call, and "
            f"experts_implementation={chosen!r} would need them: load the model again"
        )


def refuse_late_training(experts: nn.Module, hidden_states: Tensor) -> None:
    """ValueError where a gradient is asked for of experts whose weights have left the module."""
    if experts.training and torch.is_grad_enabled() and hidden_states.requires_grad:
        raise ValueError(
            f"the weights of {type(experts).__name__} went over into this rank's layer, which does not train, since "
            "the model's first call was in eval mode: load the model again and have a call in train mode come first "
            "(of a Trainer: eval_on_start=False)"
        )


@eager
def run_alone(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The module's forward on the layer, without other ranks: [T, H], [T, K] int64, [T, K] -> [T, H].

    Where transformers has spread the experts over ranks, the module's e experts are all that the layer knows, and ids
    of e or more add nothing. A module whose first call is in train mode keeps its weights and trains.
    """
    trained: TrainedExperts | None = getattr(experts, "trained", None)
    routed: RoutedExperts | None = getattr(experts, "routed", None)
    if trained is None and routed is None:
        refuse_parametrized(experts)
        if not experts.training:
            name = f"hidden of {type(experts).__name__} in eval mode"
            check_gradient(name, hidden_states, "have a call in train mode come first")  # it keeps its weights
        trained, routed = _begin_alone(experts, top_k_index.shape[-1])
    if trained is not None:
        return trained(hidden_states, top_k_index, top_k_weights)
    assert routed is not None
    refuse_late_training(experts, hidden_states)
    out: Tensor = routed(hidden_states, top_k_index, top_k_weights)
    return out


def _begin_alone(experts: nn.Module, topk: int) -> tuple[TrainedExperts | None, RoutedExperts | None]:
    """The module's first call: in train mode its weights stay, else they go over into the layer."""
    model = id(getattr(experts, "config", experts))
    group = _FIRST[model].layer.group if model in _FIRST else None
    structure = structure_of(experts)
    if experts.training:
        trained = TrainedExperts(experts, structure, group, topk)
        _FIRST.setdefault(model, trained.routed)
        return trained, None
    routed = hand_over(experts, structure, group, topk)
    experts.register_forward_pre_hook(_refuse_other_implementation)
    _FIRST.setdefault(model, routed)
    return None, routed
