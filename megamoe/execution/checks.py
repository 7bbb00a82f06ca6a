"""What a layer can be given wrongly, refused with the argument's name, what was found and what was expected."""

# T tokens of this rank   H hidden   K experts per token

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from megamoe.ambient import in_a_transform, loses_denormals, not_plain
from megamoe.formats import BLOCK, WEIGHT_FORMATS
from megamoe.routing.wire import COMBINE_FORMATS, DISPATCH_FORMATS
from megamoe.shape import MoEShape

TRANSPORTS = ("auto", "fused")
_TOKENS = (torch.bfloat16, torch.float32)


def check_input(shape: MoEShape, device: torch.device, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Checks all but values. Raises ValueError that names the argument, what was found and what was expected."""
    if _is_right(shape, device, hidden, topk_ids, topk_weights):
        return
    given = {"hidden": hidden, "topk_ids": topk_ids, "topk_weights": topk_weights}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if found := not_plain(tensor):
            raise ValueError(f"{name} must be a plain dense tensor that lies on this rank, got {found}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the layer is on {device}")
    _check_shape("hidden", hidden, ("T", shape.hidden))
    _check_shape("topk_ids", topk_ids, (len(hidden), shape.topk))
    _check_shape("topk_weights", topk_weights, (len(hidden), shape.topk))
    if hidden.dtype not in _TOKENS:
        raise ValueError(f"hidden must be torch.bfloat16 or torch.float32, got {hidden.dtype}")
    if topk_ids.dtype != torch.int64:
        raise ValueError(f"topk_ids must be torch.int64, got {topk_ids.dtype}")
    if topk_weights.dtype != torch.float32:
        raise ValueError(f"topk_weights must be torch.float32, got {topk_weights.dtype}")
    for name, tensor in given.items():
        check_gradient(name, tensor)


def _is_right(shape: MoEShape, device: torch.device, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> bool:
    """Whether nothing is wrong, in few operations. False where that takes a closer look."""
    given = hidden, topk_ids, topk_weights
    if not type(hidden) is type(topk_ids) is type(topk_weights) is Tensor or forward_ad._current_level >= 0:
        return False
    if any(each.layout is not torch.strided or each.requires_grad or each.device != device for each in given):
        return False
    slots = (len(hidden), shape.topk) if hidden.dim() else ()
    return (
        hidden.shape == (*slots[:1], shape.hidden)
        and topk_ids.shape == topk_weights.shape == slots
        and hidden.dtype in _TOKENS
        and topk_ids.dtype == torch.int64
        and topk_weights.dtype == torch.float32
    )


def check_gradient(name: str, tensor: Tensor, instead: str = "make it a TrainableMoE") -> None:
    """ValueError where a gradient is asked for, backward or forward, that there is none of; instead: what has one."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, and this layer has no backward: {instead}, or call it under torch.no_grad()"
        )
    if forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise ValueError(f"{name} carries a tangent, and the layer has no forward-mode derivative")


def check_name(name: str) -> None:
    """ValueError for a layer's name that ranks could not tell each other."""
    if not isinstance(name, str):
        raise ValueError(f"name must be a string, got {type(name).__name__}")
    try:
        name.encode()
    except UnicodeEncodeError as wrong:
        raise ValueError(f"name must be text that UTF-8 can hold, got {name!r}") from wrong


def check_machine(machine: object) -> None:
    """ValueError for what is neither None nor the catalog's Machine, which is not imported for this."""
    if machine is not None and not hasattr(machine, "wave_us"):
        found = type(machine).__name__
        raise ValueError(f"machine must be what megamoe.catalog.load_machine() reads, or None, got {found}")


def check_transport(transport: str, max_tokens_per_rank: int | None) -> None:
    """ValueError for a transport that there is not, for "fused" where it cannot be, for a bound that says nothing."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if transport == "auto":
        if max_tokens_per_rank is not None:
            raise ValueError("max_tokens_per_rank is of use with transport='fused' alone: leave it out")
        return
    if find_spec("triton") is None:
        raise ValueError("transport='fused' is a Triton kernel, and Triton is not installed: leave transport out")
    if isinstance(max_tokens_per_rank, bool) or not isinstance(max_tokens_per_rank, int) or max_tokens_per_rank < 1:
        raise ValueError(
            "transport='fused' has buffers of a fixed size: max_tokens_per_rank must be a positive integer, got "
            f"{max_tokens_per_rank!r}"
        )


def check_device(device: torch.device | str | None) -> torch.device:
    """The device that holds a layer's weights, as its tensors will have it: "cuda" is the current one, "cuda:0".

    The CPU where none is given, whatever torch's default device is. ValueError for a device that there is not.
    """
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as wrong:
        raise ValueError(f"device must be one that torch knows, got {device!r}") from wrong
    if found.type == "meta":
        raise ValueError("device must be one that can hold weights, got 'meta': leave it out for the CPU")
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as none:
        said = str(none).partition("\n")[0]
        raise ValueError(f"device {found} is none of this machine's, or not of this build of torch: {said}") from none


def check_ambient() -> None:
    """ValueError where what surrounds a call leaves no way to a right result."""
    transform = in_a_transform()
    if transform:
        raise ValueError(f"the layer was called inside of {transform}, which cannot follow it: call it outside")
    if loses_denormals():
        raise ValueError(
            "torch.set_flush_denormal(True) was set before torch began its worker threads, which now flush denormal "
            "numbers for good: set it later, or torch.set_num_threads(1) before the first call"
        )


def any_wrong(shape: MoEShape, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """[1] int64, where the ids are: 1 where check_values() would complain."""
    if topk_ids.device.type == "cpu" and _all_right(shape, topk_ids, topk_weights):
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    return (_unknown(shape, topk_ids) | _not_finite(topk_ids, topk_weights)).any().to(torch.int64).unsqueeze(0)


def _all_right(shape: MoEShape, topk_ids: Tensor, topk_weights: Tensor) -> bool:
    """Whether nothing is wrong, in three operations. False where the weights' sum does not tell: it can overflow."""
    if not topk_ids.numel():
        return True
    least, most = topk_ids.aminmax()
    return int(least) >= -1 and int(most) < shape.num_experts and math.isfinite(topk_weights.sum())


def check_values(shape: MoEShape, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """ValueError for ids that there are not and weights that are not finite; masked slots may have any."""
    wrong = _unknown(shape, topk_ids)
    if bool(wrong.any()):
        token, slot = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"topk_ids[{token}, {slot}] is {int(topk_ids[token, slot])}, expected -1 or an expert in "
            f"[0, {shape.num_experts}); {int(wrong.sum())} of {topk_ids.numel()} are outside"
        )
    wrong = _not_finite(topk_ids, topk_weights)
    if bool(wrong.any()):
        token, slot = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"topk_weights[{token}, {slot}] is {float(topk_weights[token, slot])}, expected a finite number; "
            f"{int(wrong.sum())} of {topk_weights.numel()} are not"
        )


def _unknown(shape: MoEShape, topk_ids: Tensor) -> Tensor:
    return (topk_ids < -1) | (topk_ids >= shape.num_experts)


def _not_finite(topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return ~topk_weights.isfinite() & (topk_ids >= 0)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | str, int]) -> None:
    wanted = [size if isinstance(want, str) else want for want, size in zip(expected, tensor.shape, strict=False)]
    if tensor.dim() != 2 or list(tensor.shape) != wanted:
        raise ValueError(f"{name} must have shape [{expected[0]}, {expected[1]}], got {list(tensor.shape)}")


def check_wire(dispatch_format: str, combine_format: str) -> None:
    """ValueError for formats in which nothing travels."""
    _check_known("dispatch_format", dispatch_format, DISPATCH_FORMATS)
    _check_known("combine_format", combine_format, COMBINE_FORMATS)


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in (names := tuple(known)):
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_formats(shape: MoEShape, weight_format: str, dispatch_format: str, combine_format: str) -> None:
    """ValueError for what is no shape, for formats that there are not, and for sizes that theirs cannot hold."""
    if not isinstance(shape, MoEShape):
        raise ValueError(
            f"shape must be a MoEShape(hidden, intermediate, num_experts, topk), got {type(shape).__name__}"
        )
    _check_known("weight_format", weight_format, WEIGHT_FORMATS)
    check_wire(dispatch_format, combine_format)
    packed = WEIGHT_FORMATS[weight_format].block > 1
    blocked = {"hidden": packed or "mxfp8" in (dispatch_format, combine_format), "intermediate": packed}
    for name, needed in blocked.items():
        size = getattr(shape, name)
        if needed and size % BLOCK:
            raise ValueError(
                f"{name} {size} is not a multiple of {BLOCK}, the block of MXFP4 and MXFP8; "
                'weight_format="bf16" with dispatch_format="bf16" and combine_format="bf16" takes any size'
            )
