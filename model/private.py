"""All that models use of torch and transformers that these call private, each with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def empty(module: nn.Module) -> None:
    """Takes a module's own parameters, and has FSDP, which would copy them before every call, manage none of it.

    The names stay, with None: transformers misses deleted ones around a call. torch's public reshard() keeps the
    parameters, and nothing public ends FSDP for one module.
    """
    if isinstance(module, FSDPModule):
        _release(module._get_fsdp_state())
    for name in list(module._parameters):
        module._parameters[name] = None


def attention_of(model: Any) -> str:
    """Which implementation of attention a model of transformers runs: what sets it is public, nothing that tells is."""
    found: str = model.config._attn_implementation
    return found


def sharded_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters that FSDP shards for the module, as optimisers know them; none where FSDP does not manage it.

    Around a call the module itself has others, whose counts of changes FSDP keeps as they are.
    """
    if not isinstance(module, FSDPModule):
        return []
    return [parameter.sharded_param for group in _groups(module._get_fsdp_state()) for parameter in group.fsdp_params]


def before_state_dicts(module: nn.Module, hook: Callable[[nn.Module, str, bool], None]) -> None:
    """Has hook called before all others that are asked for a state dict: FSDP's would look for what is gone, and torch
    has no public order of them."""
    module.register_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    hooks = module._state_dict_pre_hooks
    hooks.move_to_end(next(reversed(hooks)), last=False)  # type: ignore[attr-defined]


def with_parameters(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A shallow copy whose own parameters are plain tensors, None for names that are not given: setattr() would refuse
    them, and on a shallow copy change the module itself."""
    copied = copy.copy(module)
    copied.__dict__["_parameters"] = dict.fromkeys(module._parameters) | tensors
    return copied


def _release(state: Any) -> None:
    for group in _groups(state):
        for parameter in group.fsdp_params:
            parameter.free_unsharded_param()
            for name in ("sharded_param", "_sharded_param_data", "_unsharded_param"):
                vars(parameter).pop(name, None)  # hooks of the module keep the object
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups.clear()
    else:
        state._fsdp_param_group = None


def _groups(state: Any) -> list[Any]:
    """torch before 2.13 has one group, or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def model_class(config: Any) -> Any:
    """The class of a configuration's causal language model, else the one of transformers that its architectures name.

    AutoModelForCausalLM, which is public, tells the first only by making one. ValueError where there is neither.
    """
    import transformers

    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in known:
        found = known[type(config)]
        return found[0] if isinstance(found, tuple | list) else found
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "config_class", None) is type(config):
            return found
    raise ValueError(
        f"model_type {config.model_type!r} is no language model that transformers knows, and architectures "
        f"{config.architectures} names no class of it"
    )


def dtype_plan(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of names and the dtypes in which transformers keeps such tensors: nothing public joins its two lists."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def may_be_missing(model: Any) -> list[str]:
    """Patterns of tensors that a checkpoint need not have: a class attribute that only from_pretrained() reads."""
    return list(model._keys_to_ignore_on_load_missing or ())


def may_be_unused(model: Any) -> list[str]:
    """Patterns of tensors that a checkpoint may have and the model has not: as may_be_missing()."""
    return list(model._keys_to_ignore_on_load_unexpected or ())
