"""A checkpoint of a model that trains: each rank writes its own experts, in the format that they are multiplied in."""

# e experts of this rank   H hidden   I intermediate   N outputs   K inputs

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from megamoe.formats import MXFP4, dequantize_mxfp4, quantize_mxfp4
from megamoe.model.deepseek_v4.config import FP4_EXPERTS, native_name
from megamoe.model.loading.convert import config_with
from megamoe.model.loading.files import CONFIG, INDEX, draft_of, settle, write_tensors
from megamoe.model.loading.together import run_together
from megamoe.model.training.experts import TrainableRoutedExperts
from megamoe.parallel.group import EPGroup
from megamoe.paths import AnyPath, lasting_path_of

_WHAT = "saving"
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def save_native(
    model: Any, path: AnyPath, group: EPGroup | dist.ProcessGroup | None = None, *, tokenizer: Any = None
) -> None:
    """Writes a checkpoint that megamoe.model.load() reads as it is, of a model that make_trainable() has changed.

    path    of a folder that is new, on a file system that all ranks share; it has its name once all is in it

    Experts are written as the forward multiplies by them, master weights are not: in MXFP4 `w1.weight` (I8, two E2M1
    values a byte) and `w1.scale` (E8M0) under the family's own names, DeepSeek-V4's for a DeepSeek-V4, or in BF16. All
    else keeps its dtype. Rank r writes shard r; rank 0 also what every rank has, config.json and the tokenizer. All
    ranks must call. ValueError on every rank where path is taken or cannot be written, and for a family whose
    checkpoints have all experts in one tensor (gpt-oss), which ranks cannot write apart; PeerError where one is lost.
    """
    path, ranks = lasting_path_of(path), EPGroup.of(group)
    draft = draft_of(path, "partial")
    shard = draft / _shard(ranks.rank, ranks.size)
    tensors, first = _tensors(model, ranks), ranks.rank == 0
    for work in (
        lambda: _begin(path, draft) if first else None,
        lambda: write_tensors(tensors, shard),
        lambda: _finish(model, path, draft, ranks.size, tokenizer) if first else None,
    ):
        _on_every_rank(ranks, work)


def _on_every_rank(group: EPGroup, work: Callable[[], None]) -> None:
    """Returns when all ranks have done their work. What one raises, all raise."""

    def attempt(stop: object) -> None:
        del stop
        try:
            work()
        except OSError as refusal:
            raise ValueError(
                f"{refusal.filename or 'the checkpoint'} cannot be written: {refusal.strerror}"
            ) from refusal

    with group.turn(_WHAT, torch.device("cpu")):
        run_together(group, _WHAT, attempt, lambda: (0, 0), lambda _: None)


def _shard(rank: int, size: int) -> str:
    return f"model-{rank + 1:05d}-of-{size:05d}.safetensors"


def _tensors(model: Any, group: EPGroup) -> dict[str, Tensor]:
    """What this rank writes."""
    routed = {name: each for name, each in model.named_modules() if isinstance(each, TrainableRoutedExperts)}
    if not routed:
        raise ValueError(f"{type(model).__name__} has no experts that train: make_trainable() comes first")
    found: dict[str, Tensor] = {}
    for name, experts in routed.items():
        found |= _experts(model, name, experts)
    if group.rank == 0:
        within = tuple(f"{name}." for name in routed)
        tied = getattr(model, "_tied_weights_keys", None) if model.config.tie_word_embeddings else None
        dense = {
            name: each.detach()
            for name, each in model.state_dict().items()
            if not name.startswith(within) and name not in (tied or ())
        }
        found |= {_own_name(model, name): each for name, each in revert_weight_conversion(model, dense).items()}
    return found


def _experts(model: Any, name: str, experts: TrainableRoutedExperts) -> dict[str, Tensor]:
    """This rank's, matrix by matrix."""
    layer, structure = experts.layer, experts.structure
    state, stacks = layer.inference_state_dict(), dict[str, Tensor]()
    for parameter, key in ((structure.first, "gate_up"), ("down_proj", "down")):
        values = state[f"experts.{key}"]
        if layer.weight_format == "mxfp4":
            values = dequantize_mxfp4(MXFP4(values, state[f"experts.{key}_scales"]))
        stacks[f"{name}.{parameter}"] = values  # [e, N, K] bfloat16, exactly what the forward multiplies by
    found: dict[str, Tensor] = {}
    for theirs, tensor in revert_weight_conversion(model, stacks).items():
        if structure.is_transposed or structure.has_bias or not _EXPERT.search(theirs) or tensor.dim() != 2:
            raise ValueError(
                f"{type(model).__name__} keeps {theirs} of all experts in one tensor, which ranks cannot write apart: "
                "train it as transformers loads it (ep_implementation='megamoe'), whose save_pretrained() writes it"
            )
        expert = _EXPERT.sub(lambda found: f".experts.{int(found[1]) + layer.local_experts.start}.", theirs)
        found |= _stored(_own_name(model, expert), tensor, layer.weight_format)
    return found


def _stored(name: str, tensor: Tensor, weight_format: str) -> dict[str, Tensor]:
    """tensor [N, K] under its name, or the two that MXFP4 has."""
    if weight_format != "mxfp4":
        return {name: tensor}
    packed = quantize_mxfp4(tensor)
    assert torch.equal(dequantize_mxfp4(packed), tensor), name
    scale = f"{name.removesuffix('.weight')}.scale"
    return {name: packed.packed.view(torch.int8), scale: packed.scales.view(torch.float8_e8m0fnu)}


def _own_name(model: Any, name: str) -> str:
    return native_name(name) if model.config.model_type == "deepseek_v4" else name


def _begin(path: Path, draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)  # what a run that was cut off has left
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: give a folder that is new")
    draft.mkdir(parents=True)


def _finish(model: Any, path: Path, draft: Path, size: int, tokenizer: Any) -> None:
    """The index, the configuration, the tokenizer; then the folder's name."""
    weight_map, total = dict[str, str](), 0
    for name in (_shard(rank, size) for rank in range(size)):
        if not (draft / name).is_file():
            raise ValueError(f"{draft} has no {name}: path must be on a file system that all ranks share")
        with safe_open(draft / name, "pt") as shard:
            weight_map |= dict.fromkeys(shard.keys(), name)
        total += (draft / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (draft / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    (layer, *_) = (each.layer for each in model.modules() if isinstance(each, TrainableRoutedExperts))
    dtype = str(model.dtype).removeprefix("torch.")
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": dtype}
    if model.config.model_type == "deepseek_v4" and layer.weight_format == "mxfp4":
        config |= FP4_EXPERTS
    else:
        config = config_with(config, layer.weight_format, dense_fp8=False)
    (draft / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    settle(draft, path)
