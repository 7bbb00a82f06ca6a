"""A plan: does communication hide for this model on this hardware at this EP size, why, and with how much to spare."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.catalog import Hardware, Model, Profile
from megamoe.planner.layer.cost import LayerTime
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.rule import Rule, landed, threshold
from megamoe.planner.layer.stacks import Stack, check_kernel, check_node_limited, stack_time
from megamoe.planner.layer.tiles import reached_tflops

TOKENS_PER_RANK = 4096
_UNSCALED = {"mxfp8": "fp8"}  # the paper counts one byte per value and no scales


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """One expert-parallel layer on one kind of device; None is left to the planner (model formats, best waves)."""

    model: Model
    hardware: Hardware
    profile: Profile
    ep: int
    tokens_per_rank: int = TOKENS_PER_RANK
    routing: str = "balanced"
    redundant: int = 0
    waves: int | None = None
    weight_format: str | None = None
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    stack: Stack = "fused"
    two_batch: bool = False
    node_limited: bool = False

    def __post_init__(self) -> None:
        for name in ("ep", "tokens_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        slots = self.model.num_experts + self.redundant
        if self.ep > slots:
            raise ValueError(f"EP{self.ep} is larger than the {slots} experts of {self.model.name}")
        weights = self.weight_format or self.model.weight_format
        check_node_limited(self.stack, self.node_limited)
        check_kernel(self.profile, self.stack, weights, self.dispatch_format)

    @property
    def expert(self) -> Expert:
        return Expert.of(
            self.model,
            weight_format=self.weight_format,
            dispatch_format=self.dispatch_format,
            combine_format=self.combine_format,
        )

    @property
    def device(self) -> Device:
        return Device.of(self.hardware, self.profile, self.compute_format)

    @property
    def compute_format(self) -> str:
        """This package's own layer multiplies in BF16, whatever its weights are kept in."""
        if self.stack == "megamoe" and "bf16" in self.hardware.formats:
            return "bf16"
        return compute_format(self.hardware, self.weight_format or self.model.weight_format, self.dispatch_format)

    @property
    def once(self) -> float | None:
        """Tokens that go to another domain for a pair, where dispatch is node-limited and there are several."""
        domain = int(self.hardware.scaleup_domain.value)
        return landed(self.model.num_experts, self.model.topk, self.ep, domain) if self.node_limited else None

    @property
    def serial(self) -> bool:
        """Whether each stage waits for the one before it, so that nothing can hide."""
        return self.stack == "staged" and not self.two_batch


@dataclass(frozen=True, slots=True)
class Plan:
    """The rule by tier at the device's peak and at what it achieves, and the layer's time.

    rules      the paper's count: no scales, every pair leaves the scale-up tier; the NIC's tier only what crosses it
    counted    the same with scales, and only the pairs that leave
    achieved   as counted, at the compute and the bandwidth that the profile says are reached
    """

    request: PlanRequest
    rules: tuple[Rule, ...]
    counted: tuple[Rule, ...]
    achieved: tuple[Rule, ...]
    layer: LayerTime

    @property
    def binding(self) -> Rule | None:
        """The rule with the least margin; None where nothing is sent."""
        return min(self.rules, key=lambda rule: rule.margin, default=None)

    @property
    def hidden(self) -> bool:
        return self.binding is None or (self.binding.hidden and not self.request.serial)

    @property
    def verdict(self) -> str:
        return "hidden" if self.hidden else "exposed"

    @property
    def sentence(self) -> str:
        """The verdict in one line.

        HIDDEN  deepseek-v4-pro on gb200, EP16: 5556 <= 6144 FLOPs/Byte (margin 1.11); needs 814 GB/s, has 900
        """
        request, rule = self.request, self.binding
        where = f"{self.verdict.upper()}  {request.model.name} on {request.hardware.name}, EP{request.ep}"
        if request.stack != "fused":
            where += f", {request.stack}" + (" with two-batch overlap" if request.two_batch else "")
        if request.node_limited:
            where += ", node-limited"
        if rule is None:
            return f"{where}: nothing leaves the device"
        if request.serial:
            us = f"{self.layer.communication_us:.0f} of {self.layer.layer_us:.0f} us are links"
            where += f": each stage waits for the one before, {us}"
            if rule.hidden:
                return f"{where}; two-batch overlap or the fused kernel would hide them"
            return f"{where}, more than overlap would hide"
        sign = "<=" if rule.hidden else ">"
        over = "" if rule.tier == "scale-up" else f" over the {rule.tier}"
        return (
            f"{where}: {rule.ratio:.0f} {sign} {rule.threshold:.0f} FLOPs/Byte{over} (margin {rule.margin:.2f}); "
            f"needs {rule.required_gb_s:.0f} GB/s, has {rule.gb_s:.0f}"
        )


def plan(request: PlanRequest) -> Plan:
    """ValueError for a request that makes no sense, or where nothing is known of a link that it needs."""
    device, expert = request.device, request.expert
    found = device.tiers(request.ep, once=request.once)
    plain = _UNSCALED.get(expert.dispatch_format, expert.dispatch_format)
    layer = stack_time(
        request.stack,
        expert,
        device,
        request.profile,
        ep=request.ep,
        tokens_per_rank=request.tokens_per_rank,
        routing=request.routing,
        redundant=request.redundant,
        waves=request.waves,
        two_batch=request.two_batch,
        node_limited=request.node_limited,
    )
    rules, counted, achieved = [], [], []
    for tier in found:
        scale_up = tier.name == "scale-up"
        back, there = tier.f_remote, None if request.once is None else tier.f_dispatch
        paper = (1.0, None) if scale_up else (back, there)
        limit = threshold(expert.intermediate, plain, expert.combine_format, paper[0], expert.gated, paper[1])
        rules.append(Rule(tier.name, device.tflops, tier.gb_s, paper[0], limit, paper[1]))
        limit = threshold(expert.intermediate, expert.dispatch_format, expert.combine_format, back, expert.gated, there)
        counted.append(Rule(tier.name, device.tflops, tier.gb_s, back, limit, there))
        inside = min(request.ep, device.scaleup_domain)
        reached = (
            device.link_bytes_s(inside, fused=request.stack == "fused") / 1e9 if scale_up else device.nic_bytes_s / 1e9
        )
        achieved.append(Rule(tier.name, reached_tflops(expert, device), reached, back, limit, there))
    return Plan(request, tuple(rules), tuple(counted), tuple(achieved), layer)


def larger_and_smaller(request: PlanRequest) -> list[PlanRequest]:
    """The same plan at every EP size that shares the experts evenly, smallest first."""
    experts = request.model.num_experts + request.redundant
    sizes = [ep for ep in range(1, experts + 1) if experts % ep == 0]
    return [replace(request, ep=ep) for ep in sizes]
