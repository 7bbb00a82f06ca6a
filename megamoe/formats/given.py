"""Weights as they are handed in, looked through: what cannot be taken is refused by name, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megamoe.ambient import not_plain
from megamoe.formats.mxfp4 import MXFP4, MXFP4_MAX_SCALE
from megamoe.parallel.private import arrived

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes whose values are the weights
GivenWeight = Tensor | MXFP4 | tuple[Tensor, Tensor]


@contextmanager
def about(what: str) -> Iterator[None]:
    """Has a ValueError of the block begin with what it is about."""
    try:
        yield
    except ValueError as refusal:
        raise ValueError(f"{what}: {refusal}") from refusal


def elsewhere(tensor: object, what: str) -> str:
    """Why this is no tensor that can be read, "" where it is: its values must lie on this rank."""
    if not isinstance(tensor, Tensor):
        return f"{what} must be a tensor, got {type(tensor).__name__}"
    found = "one on meta, which holds no values" if tensor.is_meta else not_plain(tensor)
    if not found:
        return ""
    instead = ": give its full_tensor() or to_local()" if hasattr(tensor, "to_local") else ""
    return f"{what} must be a plain dense tensor that lies on this rank, got {found}{instead}"


def lying_here(weight: GivenWeight, what: str) -> Tensor | MXFP4:
    """A weight, or a stack of some, whose values lie on this rank. ValueError for anything else."""
    if isinstance(weight, tuple):
        if len(weight) != 2:
            raise ValueError(f"{what} must be a tensor, MXFP4 or (packed, scales), got {len(weight)} items")
        weight = MXFP4.from_bytes(*weight)
    if not isinstance(weight, Tensor | MXFP4):
        raise ValueError(f"{what} must be a tensor, MXFP4 or (packed, scales), got {type(weight).__name__}")
    if isinstance(weight, MXFP4):
        return MXFP4(here(weight.packed, what), here(weight.scales, what))
    return here(weight, what)


def here(tensor: Tensor, what: str) -> Tensor:
    """A tensor whose values lie on this rank, as its memory has them. ValueError for anything else."""
    tensor = arrived(tensor)
    if fault := elsewhere(tensor, what):
        raise ValueError(fault)
    return tensor.resolve_neg()


def as_weight(weight: GivenWeight, size: tuple[int, int], what: str) -> Tensor | MXFP4:
    """A weight matrix of the given size, checked: float tensor or MXFP4. ValueError names what was found."""
    weight = lying_here(weight, what)
    if tuple(weight.shape) != size:
        raise ValueError(f"{what} must have shape {list(size)}, got {list(weight.shape)}")
    if isinstance(weight, MXFP4):
        if fault := scale_fault(weight.scales, what):
            raise ValueError(fault)
    elif weight.dtype not in _PLAIN:
        scaled = weight.dtype.itemsize == 1
        hint = ", which means nothing without its scales: give a pair (packed, scales) or floats" if scaled else ""
        raise ValueError(f"{what} must be a float tensor or MXFP4, got {weight.dtype}{hint}")
    return weight


def as_bias(bias: Tensor, size: int, what: str) -> Tensor:
    """A bias [size], FP32 or BF16, finite. ValueError names what was found."""
    bias = here(bias, what)
    if tuple(bias.shape) != (size,):
        raise ValueError(f"{what} must have shape [{size}], got {list(bias.shape)}")
    if bias.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{what} must be torch.float32 or torch.bfloat16, got {bias.dtype}")
    if fault := bias_fault(bias, what):
        raise ValueError(fault)
    return bias


def bias_fault(bias: Tensor, what: str) -> str:
    """Why a bias's values cannot be taken, "" where they can."""
    wrong = int((~bias.isfinite()).sum())
    return f"{what}: {wrong} of {bias.numel()} values are NaN or infinite" if wrong else ""


def scale_fault(scales: Tensor, what: str) -> str:
    """Why scales cannot be taken, "" where they can."""
    largest = int(scales.max())
    if largest <= MXFP4_MAX_SCALE:
        return ""
    return f"{what} has a scale byte of {largest}; above {MXFP4_MAX_SCALE} (2^125) BF16 cannot hold the weights"
