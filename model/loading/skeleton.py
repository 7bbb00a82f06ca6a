"""A transformers model without weights, from config.json alone, and its parts: routed experts, dense tensors."""

# K experts per token

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig

from megamoe.model.loading.files import CONFIG, config_file
from megamoe.model.private import dtype_plan, model_class
from megamoe.model.structure import Structure, read_structure

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANT_METHODS = ("fp8", "mxfp4")  # of transformers' configs


@dataclass(frozen=True, slots=True)
class Block:
    """Routed experts of one layer: the module's name and what it is; K."""

    name: str
    structure: Structure
    topk: int


@dataclass(frozen=True, slots=True)
class Skeleton:
    """model: on the meta device, but for its non-persistent buffers, which have their values.

    tensors   its state dict
    dtypes    of each tensor, as from_pretrained() would have it
    """

    model: Any
    config: Any
    blocks: tuple[Block, ...]
    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is. ValueError where there is none, or it cannot be read."""
    file = config_file(path)
    try:
        config = json.loads(file.read_bytes())
    except ValueError as broken:
        raise ValueError(f"{file} cannot be read: {broken}") from broken
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{file} has no model_type")
    if not isinstance(config.get("quantization_config") or {}, dict):
        raise ValueError(f"{file}: quantization_config must be an object, got {config['quantization_config']!r}")
    return config


def fp8_block(config: dict[str, Any]) -> tuple[int, int]:
    """Values that share a scale in FP8: the config's, else 128 x 128. ValueError where that is no pair of integers."""
    said = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    if len(said) != 2 or not all(isinstance(each, int) and each > 0 for each in said):
        raise ValueError(f"{CONFIG}: weight_block_size must be two positive integers, got {said!r}")
    return said[0], said[1]


@contextmanager
def naming_format(config: dict[str, Any]) -> Iterator[None]:
    """A ValueError of the block ends in the config's quant_method, where that is of a format which is not read."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    try:
        yield
    except ValueError as refusal:
        if method is None or method in QUANT_METHODS:
            raise
        raise ValueError(
            f"{refusal}; {CONFIG} says quant_method {method!r}: of quantised checkpoints MXFP4 and FP8 with a scale "
            "for each block of values are read"
        ) from refusal


def config_of(path: Path) -> Any:
    """transformers' config of path/config.json. ValueError where there is none, or has values that it does not take."""
    read_config(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as refusal:
        raise ValueError(f"{path / CONFIG}: {' '.join(str(refusal).split())}") from refusal
    except (ValueError, OSError) as refusal:
        raise ValueError(f"{path / CONFIG}: {str(refusal).strip().partition(chr(10))[0]}") from refusal
    except Exception as failure:
        raise ValueError(f"{path / CONFIG}: transformers cannot read it: {failure!r}") from failure


@contextmanager
def _as_refusal(what: str) -> Iterator[None]:
    """Whatever a model's own code stumbles over in its config is a ValueError with what, by the first line of it."""
    try:
        yield
    except Exception as failure:
        raise ValueError(f"{what}: {repr(failure).partition(chr(10))[0]}") from failure


def build(path: Path, stored_dtype: torch.dtype | None) -> Skeleton:
    """The model of path/config.json. stored_dtype: where the config names none.

    ValueError for an architecture that transformers does not know, that is no language model, has no routed experts, or
    experts that do not fit the layer.
    """
    config = config_of(path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = config.dtype or stored_dtype or torch.float32
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"{path / CONFIG}: dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    kind = model_class(config)
    with ExitStack() as stack, _as_refusal(f"{path / CONFIG}: transformers makes no {kind.__name__} of it"):
        for context in kind.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        model = kind(config)
    model.config.dtype = dtype
    _fill_buffers(model)
    blocks = tuple(find_blocks(model))
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no routed experts")
    tensors = model.state_dict()
    return Skeleton(model, config, blocks, tensors, _dtypes(model, tensors, dtype))


def _fill_buffers(model: Any) -> None:
    """Non-persistent buffers get their values, which no checkpoint has: transformers' own initialisation."""
    for name, buffer in model.named_non_persistent_buffers():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    with torch.device("cpu"):  # whatever the caller's default device is
        model.initialize_weights()


def find_blocks(model: nn.Module) -> Iterator[Block]:
    """The routed experts of a model of transformers, one after another. ValueError for experts that do not fit."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        above, _, leaf = name.rpartition(".")
        if leaf == "experts" and own.get("down_proj") is not None and own["down_proj"].dim() == 3:
            parent = model.get_submodule(above)
            yield Block(name, read_structure(module), _topk(parent, model))


def _topk(parent: nn.Module, model: Any) -> int:
    """K as the block's router has it, else as the config does."""
    for module in parent.modules():
        for key in ("top_k", "topk", "num_experts_per_tok"):
            if isinstance(getattr(module, key, None), int):
                return int(getattr(module, key))
    config = model.config.get_text_config()
    for key in ("num_experts_per_tok", "moe_topk", "top_k", "top_k_experts", "num_experts_per_token"):
        if isinstance(getattr(config, key, None), int):
            return int(getattr(config, key))
    raise ValueError(f"{type(parent).__name__}: neither its router nor the config says how many experts a token has")


def _dtypes(model: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    plan = {re.compile(key.replace("*", ".*")): each for key, each in dtype_plan(model, dtype).items()}
    found = {}
    for name, tensor in tensors.items():
        planned = next((each for key, each in plan.items() if key.search(name)), None)
        found[name] = planned if planned is not None and tensor.is_floating_point() else tensor.dtype
    return found


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter without gradients, or a buffer, in place of the one on meta."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    is_buffer = any(each == leaf for each, _ in module.named_buffers(recurse=False))
    setattr(module, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
