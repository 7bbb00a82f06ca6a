"""torch's process groups as they are found: which backend serves a device, which ranks they are of, how they end."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megamoe.parallel.private import abort_group

_LAST_RESORT_S = 300.0


def check_group(group: object) -> None:
    """ValueError for what is no process group, with what to give instead, and for one that this rank is not in."""
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in the group that new_group() made: a layer can be had on its members only")
    if not isinstance(group, dist.ProcessGroup):
        hint = ', whose get_group("name of the axis") is one' if hasattr(group, "get_group") else ""
        raise ValueError(f"group must be a torch ProcessGroup, an EPGroup or None, got {type(group).__name__}{hint}")


def backend_for(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that serves a device type in a group, which can have several: "cpu:gloo,cuda:nccl".

    ValueError where none does: gloo, which takes any device in collectives, moves rows from and to a CPU only.
    """
    has = dict(each.split(":") for each in dist.get_backend_config(group).lower().split(","))
    if device.type not in has or (device.type != "cpu" and has[device.type] == "gloo"):
        listed = ",".join(f"{kind}:{name}" for kind, name in sorted(has.items()))
        raise ValueError(
            f"the group has no backend that moves rows between {device.type} devices, it has {listed}: make it with "
            f'init_process_group() without a backend, or with "cpu:gloo,{device.type}:..."'
        )
    return has[device.type]


def check_made_for(made_for: str | None, device: torch.device | str | None) -> None:
    """ValueError where a group's transport moves rows of another device type than a layer's."""
    wanted = None if device is None else torch.device(device).type
    if None not in (made_for, wanted) and wanted not in (made_for, "meta"):
        raise ValueError(
            f"the EPGroup moves rows of {made_for} devices, the layer is on {wanted}: make it for those, with "
            f'EPGroup.of(group, "{wanted}") or init_group("{wanted}", ...)'
        )


def global_ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """The group's ranks in the whole program, by rank in the group; empty where they are the same.

    ValueError for a group that has been destroyed.
    """
    try:
        ranks = tuple(dist.get_process_group_ranks(group))
    except KeyError as unknown:
        raise ValueError("the group has been destroyed, or torch does not know it: make it anew") from unknown
    return () if ranks == tuple(range(len(ranks))) else ranks


def backend_timeout_s(device: torch.device, deadline_s: float) -> float:
    """What torch is told as the time-out of a group's collectives.

    NCCL's watchdog ends the whole process when its time-out has passed. So it gets a far one, as the last resort: the
    deadline is kept by the transport, which raises.
    """
    return deadline_s if device.type == "cpu" else 4 * deadline_s + _LAST_RESORT_S


def end_group(world: dist.ProcessGroup, device: torch.device, *, in_peace: bool) -> None:
    """Ends torch's default group, which must be `world`. On an accelerator where a peer may be gone it is aborted:
    destroying it would wait for what the peer will never do."""
    if in_peace or device.type == "cpu":
        dist.destroy_process_group(world)
    else:
        abort_group(world)
