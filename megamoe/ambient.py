"""What torch keeps per thread or per process and a user may have set: a layer's bits depend on none of it.

Autocast, default device, grad mode, inference mode and flushing of denormals are put aside for as long as a layer
works, and stand as they were afterwards. Compilers run the layer as it is, between two graphs. What would give wrong
numbers or no gradient where one is asked for is refused: see checks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from megamoe.parallel.private import has_function_modes, in_functional_transform, without_function_modes

P = ParamSpec("P")
T = TypeVar("T")

_GRAIN = 65_536  # values for each thread, twice as many as torch needs to give a thread any
_TINY = sys.float_info.min  # the least normal number of FP64


def undisturbed(device: torch.device) -> AbstractContextManager[object]:
    """A block that computes on device, and on the CPU, as in a fresh process, without gradients."""
    calm = not (
        torch.is_inference_mode_enabled()
        or has_function_modes()
        or torch.is_autocast_enabled("cpu")
        or (device.type != "cpu" and _autocasts(device.type))
        or _flushes_denormals()
    )
    return torch.no_grad() if calm else _set_right(device)


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@contextmanager
def _set_right(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # what stays must not become an inference tensor
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_function_modes())
        for kind in {device.type, "cpu"}:
            if _autocasts(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if _flushes_denormals():
            stack.enter_context(_keeping_denormals())
        yield


def _flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers for 0: torch can be told to, and does not say whether it was."""
    return _TINY * 0.5 == 0.0


def loses_denormals() -> bool:
    """Whether some of torch's worker threads flush denormals for good: those that began while they were flushed.

    Looked for where this thread flushes them, and nowhere else.
    """
    if not _flushes_denormals():
        return False
    with _keeping_denormals():
        size = torch.get_num_threads() * _GRAIN
        least = torch.ones(size, dtype=torch.int32, device="cpu").view(torch.float32)
        return not bool((least * 1.0).view(torch.int32).all())


@contextmanager
def _keeping_denormals() -> Iterator[None]:
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """A function that torch.compile neither traces nor looks into. Nothing is imported for those who do not compile."""
    disabled: list[Callable[P, T]] = []

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return inner


class Keeping:
    """What nn.Module._apply() does to tensors, less what would change them: they keep their dtype.

    whose     for errors, "layer 'moe'"
    moves     whether they may go to another device; ValueError where they may not
    emptied   whether any was replaced by a tensor of other values, as to_empty() does
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], whose: str, *, moves: bool) -> None:
        self._fn, self._whose, self._moves, self.emptied = fn, whose, moves, False

    def __call__(self, tensor: Tensor) -> Tensor:
        probe = self._fn(tensor.new_zeros(1))  # what it does, seen on one value: a tensor may be large
        if probe.device != tensor.device and not self._moves:
            raise ValueError(
                f"{self._whose} was made for {tensor.device} and does not move to {probe.device}: make it with "
                f"device={str(probe.device)!r} and load its weights there"
            )
        if probe.dtype != tensor.dtype:
            return tensor.to(probe.device)
        changed = self._fn(tensor)
        if changed is not tensor and changed.device == tensor.device:
            self.emptied |= not torch.equal(changed.view(torch.uint8), tensor.view(torch.uint8))
        return changed


def settled(tensor: Tensor) -> Tensor:
    """Contiguous, and with a negation that torch has put off carried out: kernels read memory as it is."""
    return tensor.resolve_neg().contiguous() if tensor.is_neg() else tensor.contiguous()


def not_plain(tensor: Tensor) -> str:
    """What a tensor is whose values do not lie here as its strides say, "" for one whose values do."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.layout is not torch.strided:
        return f"{type(tensor).__name__} of layout {tensor.layout}"
    return ""


def can_tell_nobody() -> bool:
    """Whether tensors that are made here stand for others, or are fake: none of them can be sent to another rank."""
    return in_functional_transform() or type(torch.empty(0, device="cpu")) is not Tensor


def in_a_transform() -> str:
    """What of torch only pretends to compute here, "" where nothing does: a layer could not but give wrong numbers."""
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return "torch.jit.trace"
    if in_functional_transform():
        return "a transform of torch.func"
    if can_tell_nobody():
        return "a FakeTensorMode"
    return ""
