"""A device that there is not, to hold the layer on every device that torch runs on.

Its tensors lie in CPU memory, and an operation that mixes them with the CPU's fails as it would on one that there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from megamoe.parallel.group import EPGroup

DEVICE = torch.device("lazy", 0)  # a type that torch knows and of which no machine has one
_COPIES = ("aten._to_copy", "aten.copy_", "aten._copy_from")
_TAKE_INDICES_OF_THE_CPU = ("aten.index.", "aten.index_put")
_tensor = torch.tensor


class Elsewhere(Tensor):
    """A tensor on DEVICE: `behind`, of the CPU, has its values."""

    behind: Tensor

    @staticmethod
    def __new__(cls, behind: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            behind.size(),
            strides=behind.stride(),
            storage_offset=behind.storage_offset(),
            dtype=behind.dtype,
            device=DEVICE,
        )
        made.behind = behind
        return made

    def tolist(self) -> Any:
        return self.behind.tolist()

    def record_stream(self, _: object) -> None:
        """As tensors of devices with streams have it."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, its results where they belong. RuntimeError where operands are on both devices."""
    name, tensors = str(func), [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = {id(each.behind): each for each in tensors if isinstance(each, Elsewhere)}
    here = [each for each in tensors if not isinstance(each, Elsewhere) and each.dim()]
    copies, device = name.startswith(_COPIES), kwargs.get("device")
    if there and here and not copies and not name.startswith(_TAKE_INDICES_OF_THE_CPU):
        raise RuntimeError(f"{name} was given tensors on {DEVICE} and on the CPU")
    goes_there = bool(there)
    if device is not None:
        goes_there, kwargs = device.type == DEVICE.type, {**kwargs, "device": torch.device("cpu")}
    elif copies and not name.startswith("aten._to_copy"):
        goes_there = isinstance(args[0], Elsewhere)
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))

    def placed(each: Any) -> Any:
        return there.get(id(each), each) if not (goes_there and isinstance(each, Tensor)) else _there(each, there)

    return tree_map(placed, found)


def _there(behind: Tensor, known: dict[int, Elsewhere]) -> Elsewhere:
    return known[id(behind)] if id(behind) in known else Elsewhere(behind)


def _inner(each: Any) -> Any:
    return each.behind if isinstance(each, Elsewhere) else each


class _Event:
    def record(self, stream: object) -> None:
        assert stream is not None


def _module(streams: bool) -> SimpleNamespace:
    """What torch has for a device type. Apple's GPUs, for one, have no streams that a program could ask for."""
    none = lambda *_: None  # noqa: E731
    if not streams:
        return SimpleNamespace(synchronize=none)
    stream = SimpleNamespace(wait_event=none, synchronize=none)
    return SimpleNamespace(
        current_stream=lambda _: stream, Event=_Event, device=lambda _: nullcontext(), synchronize=none, set_device=none
    )


@contextmanager
def pretended(*, streams: bool = True) -> Iterator[None]:
    """A block in which there is DEVICE, in this thread, with or without streams."""

    def filled(data: Any, **options: Any) -> Tensor:
        """torch.tensor(), which fills a device's memory itself."""
        device = options.get("device")
        if device is None or torch.device(device).type != DEVICE.type:
            return _tensor(data, **options)
        return _tensor(data, **{**options, "device": None}).to(DEVICE)

    with (
        _Mode(),  # type: ignore[no-untyped-call]
        mock.patch("torch.tensor", filled),
        mock.patch("torch.get_device_module", return_value=_module(streams)),
        # which refuse subclasses of tensors
        mock.patch("megamoe.execution.checks.not_plain", return_value=""),
        mock.patch("megamoe.formats.given.not_plain", return_value=""),
        mock.patch("megamoe.parallel.group.backend_for", return_value="pretended"),
    ):
        yield


def group_there(group: EPGroup) -> EPGroup:
    """The ranks of a group, on CPUs, as a group that moves rows between their pretended devices."""
    processes = dist.group.WORLD
    assert processes is not None
    assert processes.size() == group.size
    return EPGroup.of(processes, DEVICE, deadline_s=30.0)
