"""Which meshes and groups fit a layer's own: their ranks, in their order, as the whole program numbers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_mesh(mesh: DeviceMesh, group: EPGroup) -> None:
    """ValueError where a mesh is not one dimension of exactly the group's ranks, in their order."""
    if not hasattr(mesh, "get_group"):
        raise ValueError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}: init_device_mesh() makes one")
    if mesh.ndim != 1:
        names = ", ".join(mesh.mesh_dim_names or ()) or "unnamed"
        raise ValueError(
            f"mesh has {mesh.ndim} dimensions ({names}), expected the one of the layer's ranks: give "
            'that dimension alone, as in mesh["ep"]'
        )
    found, expected = mesh.mesh.flatten().tolist(), ranks_of(group)
    if found != expected:
        raise ValueError(f"mesh is of ranks {_listed(found)}, and the layer's group of ranks {_listed(expected)}")


def ranks_of(group: EPGroup) -> list[int]:
    """The group's ranks in the whole program, in their order."""
    if group.size == 1:
        return [dist.get_rank()]
    known = group.clock.global_ranks if group.clock is not None else ()
    return list(known or range(group.size))


def check_even(num_experts: int, ep_size: int) -> None:
    """ValueError where DTensor's Shard(0) gives ranks other experts than the layer does: it fills rank after rank.

    7 experts on 4 ranks are 2, 2, 2, 1 both ways; 10 on 4 are 3, 3, 2, 2 here, and 3, 3, 3, 1 there
    """
    placement = Placement(num_experts, ep_size)
    here = [len(placement.experts(rank)) for rank in range(ep_size)]
    size = -(-num_experts // ep_size)
    there = [max(0, min(size, num_experts - rank * size)) for rank in range(ep_size)]
    if here != there:
        fits = max(n for n in range(1, ep_size) if num_experts % n == 0)
        raise ValueError(
            f"{num_experts} experts on {ep_size} ranks are {_listed(here)} here, and {_listed(there)} as DTensor's "
            f"Shard(0) lays them out: take a number of ranks that divides them, such as {fits}, or leave the "
            "parameters as they are"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
