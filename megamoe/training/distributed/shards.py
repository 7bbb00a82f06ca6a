"""Parameters as DTensors: each rank's experts a shard of the stack of all. Imported only where DTensors are."""

# E experts in all   e experts of this rank

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from megamoe.training.distributed.mesh import check_even


def shard(parameter: nn.Parameter, mesh: DeviceMesh, num_experts: int) -> nn.Parameter:
    """parameter [e, ...] of this rank -> a DTensor [E, ...], Shard(0), over the same memory.

    ValueError where a layer has other experts on a rank than Shard(0).
    """
    check_even(num_experts, mesh.size())
    if isinstance(parameter, DTensor):
        raise ValueError("the parameters are DTensors already")
    whole = torch.empty(num_experts, *parameter.shape[1:], device="meta")
    made = DTensor.from_local(
        parameter.detach(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def own_shards(given: Mapping[str, Any], prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a state dict with plain tensors [E, ...] of all experts this rank's shards, as DTensors like parameters."""
    found = {}
    for name, parameter in parameters.items():
        whole = given.get(prefix + name)
        assert isinstance(parameter, DTensor)
        if isinstance(whole, Tensor) and not isinstance(whole, DTensor) and whole.shape == parameter.shape:
            mesh, (placement,) = parameter.device_mesh, parameter.placements
            parts = torch.split(whole, -(-len(whole) // mesh.size()))
            rank = mesh.get_local_rank()
            own = parts[rank] if rank < len(parts) else whole[:0]
            found[prefix + name] = DTensor.from_local(
                own, mesh, [placement], run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
    return found


def summed_over_shards(gradient: Tensor, partials: Tensor, largest: bool) -> Tensor:
    """Partial sums of a DTensor's slices along dimension 0 -> those of the whole DTensor, the same on all ranks.

    gradient  DTensor [D, ...]    partials [d, ...] float64, of what this rank has of it    largest: or partial maxima

    Where dimension 0 is sharded, ranks have different slices; where another one is, parts of the same, which torch then
    sums in an order of its own. ValueError for gradients that are partial themselves.
    """
    assert isinstance(gradient, DTensor)
    placements = list(gradient.placements)
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise ValueError(f"a gradient is {placement} over its mesh: reduce it before its norm is asked for")
        if placement.is_shard() and placement.dim != 0:  # type: ignore[attr-defined]
            placements[axis] = Partial("max" if largest else "sum")
    shape = gradient.shape[:1] or torch.Size([1])
    made = DTensor.from_local(partials, gradient.device_mesh, placements, run_check=False, shape=shape, stride=(1,))
    return made.full_tensor()
