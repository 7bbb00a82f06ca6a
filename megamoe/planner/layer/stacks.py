"""A layer by what runs it: the fused kernel, DeepEP with grouped products, or this package's own layer."""

# T tokens of a rank   P ranks   W waves

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megamoe.catalog import Profile
from megamoe.planner.layer.cost import LayerTime, layer_time
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.rule import found_among
from megamoe.planner.layer.staged import staged_time

Stack = Literal["fused", "staged", "megamoe"]
STACKS: tuple[Stack, ...] = ("fused", "staged", "megamoe")
_LAUNCHES, _AROUND = 8, 3  # of a wave: two exchanges, their copies, two products, two activations; around all waves
_MOST_WAVES = 8  # schedule/cost_model.py


def check_kernel(profile: Profile, stack: str, weight_format: str, dispatch_format: str) -> None:
    """ValueError where the profile is of one fused kernel, which runs no other stack and no other formats."""
    if not profile.one_kernel:
        return
    if stack != "fused":
        raise ValueError(f"profile {profile.name} is of one fused kernel; the {stack} stack has kernels of its own")
    if weight_format not in profile.weight_formats or dispatch_format not in profile.dispatch_formats:
        has = f"{' or '.join(profile.weight_formats)} weights and {' or '.join(profile.dispatch_formats)} tokens"
        raise ValueError(
            f"profile {profile.name} is of a kernel for {has}, not {weight_format} and {dispatch_format}; give "
            f"weight_format {profile.weight_formats[0]} and dispatch_format {profile.dispatch_formats[0]}"
        )


def check_node_limited(stack: str, node_limited: bool) -> None:
    """ValueError where a stack is asked for node-limited dispatch whose kernels do as they do."""
    if node_limited and stack == "staged":
        raise ValueError(
            "node_limited is of the fused and the megamoe stack; of the staged one DeepEP's normal kernels send a "
            "token once to each node as they are, and its low-latency kernels never do"
        )


def stack_time(
    stack: Stack,
    expert: Expert,
    device: Device,
    profile: Profile,
    *,
    ep: int,
    tokens_per_rank: float,
    routing: str = "balanced",
    redundant: int = 0,
    waves: int | None = None,
    two_batch: bool = False,
    node_limited: bool = False,
) -> LayerTime:
    """Time of one layer. waves: of the stacks that have them, None for the best; two_batch: of the staged one.

    node_limited: of the others, a token goes once to each other scale-up domain. ValueError for sizes that make no
    sense, and for waves, two_batch or node_limited of a stack that does not have them.
    """
    check_node_limited(stack, node_limited)
    if two_batch and stack != "staged":
        raise ValueError(f"two-batch overlap is a way to run the staged stack; {stack} overlaps within the layer")
    if stack == "staged":
        if waves is not None:
            raise ValueError("the staged stack has no waves; two_batch runs it in two halves")
        return staged_time(
            expert, device, profile, ep=ep, tokens_per_rank=tokens_per_rank, routing=routing, redundant=redundant,
            two_batch=two_batch,
        )  # fmt: skip
    if stack == "fused":
        return layer_time(
            expert, device, ep=ep, tokens_per_rank=tokens_per_rank, routing=routing, redundant=redundant, waves=waves,
            node_limited=node_limited,
        )  # fmt: skip
    return own_time(
        expert, device, profile, ep=ep, tokens_per_rank=tokens_per_rank, routing=routing, redundant=redundant,
        waves=waves, node_limited=node_limited,
    )  # fmt: skip


def own_time(
    expert: Expert,
    device: Device,
    profile: Profile,
    *,
    ep: int,
    tokens_per_rank: float,
    routing: str = "balanced",
    redundant: int = 0,
    waves: int | None = None,
    node_limited: bool = False,
) -> LayerTime:
    """This package's layer: waves of launched kernels, whose exchanges run on a stream of their own.

    Assumed throughout, nothing of it was run on a GPU: a wave is eight launches, tokens are quantised before the first
    and slots are summed after the last, up to 8 waves. Products run in BF16 (`device` is that format's), and a token
    goes once to each rank, or node-limited once to each other domain and on from there.
    """
    return layer_time(
        expert, launched(device, profile), ep=ep, tokens_per_rank=tokens_per_rank, routing=routing,
        redundant=redundant, waves=waves, most_waves=_MOST_WAVES, staging=False, sent=sent_once(expert, ep),
        node_limited=node_limited,
    )  # fmt: skip


def sent_once(expert: Expert, ep: int) -> float:
    """Tokens that travel for a row where each goes once to a rank.    16 experts, top-4, 2 ranks -> 0.481"""
    return ep * found_among(expert.num_experts, expert.topk, 1 / ep) / expert.topk


def launched(device: Device, profile: Profile) -> Device:
    """The device with launches in place of what a persistent kernel takes, and exchanges in kernels of their own.

    Those share SMs and memory with products: they overlap as well as memory does, at most.
    """
    return replace(
        device,
        fixed_us=_AROUND * profile.kernel_us.value,
        expert_us=0.0,
        barrier_us=0.0,
        wave_us=_LAUNCHES * profile.kernel_us.value,
        fused_link_efficiency=device.link_efficiency,
        overlap=min(device.overlap, device.memory_overlap),
    )
