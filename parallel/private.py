"""All that the runtime uses of torch that torch calls private, each with the reason.

Overridden besides, where they are due: nn.Module._apply, without which casts of a model would change packed weights,
and nn.Module._save_to_state_dict, which torch's documentation names for weights that are no parameters.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def has_function_modes() -> bool:
    """Whether a mode of torch's functions is on; a default device is one, and the only one that torch tells of in
    public."""
    return bool(torch._C._len_torch_function_stack())


def without_function_modes() -> AbstractContextManager[object]:
    """A block in which no mode of torch's functions is on. torch ends in public no mode that it did not begin."""
    return torch._C.DisableTorchFunction() if has_function_modes() else nullcontext()


def in_functional_transform() -> bool:
    """Whether vmap, grad or another of torch.func runs this code. Its inputs need not show it, and torch.func has no
    function that tells."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def known_groups() -> list[dist.ProcessGroup]:
    """Every process group that torch.distributed has made and keeps: in public it tells of the default one alone."""
    return list(distributed_c10d._world.pg_map)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether it stands for many tensors at once, as in torch.autograd.grad(..., is_grads_batched=True), which runs a
    backward for all of them and shows it by nothing public."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def arrived(tensor: torch.Tensor) -> torch.Tensor:
    """What a collective of torch.distributed.tensor or of functional collectives gave, once it is there: such a result
    is waited for when torch first computes with it, and in public nothing else waits."""
    functional = sys.modules.get("torch.distributed._functional_collectives")
    if functional is None or not isinstance(tensor, functional.AsyncCollectiveTensor):
        return tensor
    found: torch.Tensor = tensor.wait()
    return found


def abort_group(world: dist.ProcessGroup) -> None:
    """Ends torch's default group without waiting for peers. ProcessGroup.abort(), which is public, leaves the group
    registered, and destroy_process_group(), which would not, waits for what a lost peer never does."""
    distributed_c10d._abort_process_group(world)


def abort_backend(group: dist.ProcessGroup, device: torch.device) -> None:
    """Ends all that is queued for a device. ProcessGroup.abort(), which is public, ends what the group's backends for
    other devices do, too."""
    group._get_backend(device).abort()


def symmetric_memory() -> Any:
    """torch's symmetric memory, an alpha without a public name (torch 2.13). Imported when first asked for."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory


def share_storage(storage: torch.UntypedStorage) -> tuple[Any, ...]:
    """A handle by which another process maps a GPU's storage: what torch.multiprocessing pickles. Its own queues would
    do this in public, for tensors that are sent through them alone."""
    handle: tuple[Any, ...] = storage._share_cuda_()  # type: ignore[no-untyped-call]
    return handle


def open_storage(handle: tuple[Any, ...]) -> torch.UntypedStorage:
    """The storage of a handle of share_storage(), mapped into this process."""
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared_cuda(*handle)
    return storage
