"""A training step of a layer: does communication hide in both passes, what each takes, what a device holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megamoe.planner.layer.device import Device
from megamoe.planner.layer.plan import Plan, PlanRequest, plan
from megamoe.planner.layer.rule import GATED_FLOPS, PLAIN_FLOPS, Rule, allowed
from megamoe.planner.layer.stacks import launched
from megamoe.planner.layer.tiles import reached_tflops
from megamoe.planner.training.backward import Backward, backward_time
from megamoe.planner.training.memory import TrainingMemory, training_memory
from megamoe.schedule.backward import GRADIENT_FORMATS, SAVED, Saved
from megamoe.schedule.formats import value_bytes

WEIGHT_FORMATS = ("mxfp4", "bf16")  # that the training layer has
_UNSCALED = {"mxfp8": 1.0}  # the paper counts no scales


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Forward and backward of a layer that trains. rules, counted, achieved: the backward's, as those of Plan."""

    forward: Plan
    backward: Backward
    rules: tuple[Rule, ...]
    counted: tuple[Rule, ...]
    achieved: tuple[Rule, ...]
    memory: TrainingMemory
    saved: Saved
    gradient_format: str

    @property
    def step_us(self) -> float:
        return self.forward.layer.layer_us + self.backward.backward_us

    @property
    def exposed_us(self) -> float:
        return self.forward.layer.exposed_us + self.backward.exposed_us

    @property
    def binding(self) -> Rule | None:
        """The backward's rule with the least margin; None where nothing is sent."""
        return min(self.rules, key=lambda rule: rule.margin, default=None)

    @property
    def tightest(self) -> Rule | None:
        """The rule of either pass with the least margin."""
        found = [rule for rule in (self.binding, self.forward.binding) if rule is not None]
        return min(found, key=lambda rule: rule.margin, default=None)

    @property
    def backward_hidden(self) -> bool:
        return self.binding is None or self.binding.hidden

    @property
    def hidden(self) -> bool:
        return self.backward_hidden and self.forward.hidden

    @property
    def verdict(self) -> str:
        return "hidden" if self.hidden else "exposed"

    @property
    def sentence(self) -> str:
        """The verdict of both passes in one line.

        HIDDEN  training deepseek-v4-pro on gb200, EP16: backward 2778 <= 12288 FLOPs/Byte (margin 4.42), forward ...
        """
        request = self.forward.request
        where = f"{self.verdict.upper()}  training {request.model.name} on {request.hardware.name}, EP{request.ep}"
        backward, forward, tightest = self.binding, self.forward.binding, self.tightest
        if backward is None or forward is None or tightest is None:
            return f"{where}: nothing leaves the device"
        needs = f"needs {tightest.required_gb_s:.0f} GB/s, has {tightest.gb_s:.0f}"
        return f"{where}: backward {_compared(backward)}, forward {_compared(forward)}; {needs}"

    def as_dict(self) -> dict[str, Any]:
        """What `megamoe plan --format json` has of it under "training"."""
        found, rule = self.backward, self.binding
        times: tuple[str, ...] = (
            "fixed_us",
            "core_us",
            "sum_us",
            "recompute_us",
            "data_us",
            "weights_us",
            "alone_us",
            "dispatch_us",
        )
        times += ("combine_us", "communication_us", "exposed_us")
        held = ("masters_gb", "gradients_gb", "optimizer_gb", "packed_gb", "kept_gb", "in_flight_gb", "kept_layer_gb")
        return {
            "saved": self.saved,
            "gradient_format": self.gradient_format,
            "step_us": self.step_us,
            "forward_us": self.forward.layer.layer_us,
            "backward_us": found.backward_us,
            "forward_verdict": self.forward.verdict,
            "backward_verdict": "hidden" if self.backward_hidden else "exposed",
            "backward_threshold_flops_per_byte": rule and rule.threshold,
            "backward_margin": rule and rule.margin,
            "backward_required_link_gb_s": rule.required_gb_s if rule else 0.0,
            **{f"backward_{key}": getattr(found, key) for key in times},
            "backward_communication_hidden": found.hidden,
            **{f"memory_{key}": getattr(self.memory, key) for key in held},
        }


def _compared(rule: Rule) -> str:
    sign = "<=" if rule.hidden else ">"
    over = "" if rule.tier == "scale-up" else f" over the {rule.tier}"
    return f"{rule.ratio:.0f} {sign} {rule.threshold:.0f} FLOPs/Byte{over} (margin {rule.margin:.2f})"


def plan_training(request: PlanRequest, saved: Saved = "tokens", gradient_format: str = "bf16") -> TrainingPlan:
    """ValueError for what the training layer of this package does not have, by name, and as plan()."""
    check_training(request, saved, gradient_format)
    forward = plan(request)
    expert, device = request.expert, request.device
    backward = backward_time(
        expert, launched(device, request.profile), request.profile, ep=request.ep,
        tokens_per_rank=request.tokens_per_rank, routing=request.routing, redundant=request.redundant,
        waves=forward.layer.waves, saved=saved, gradient_format=gradient_format,
    )  # fmt: skip
    memory = training_memory(
        expert, device.memory_gb, layers=request.model.moe_layers, slots=request.model.num_experts + request.redundant,
        ep=request.ep, tokens=request.tokens_per_rank, rows=forward.layer.rows, waves=forward.layer.waves,
        saved=saved, gradient_format=gradient_format,
    )  # fmt: skip
    rules = _rules(forward, device, saved, gradient_format)
    return TrainingPlan(forward, backward, *rules, memory, saved, gradient_format)


def check_training(request: PlanRequest, saved: str, gradient_format: str) -> None:
    """ValueError names what there is."""
    if request.stack != "megamoe":
        what = {"fused": "a fused kernel", "staged": "DeepEP and grouped products"}[request.stack]
        raise ValueError(
            f"--phase train plans stack megamoe, this package's layer, not {request.stack}: no table of the "
            f"backward of {what} is published that the planner could be held against"
        )
    if request.node_limited:
        raise ValueError("a layer that trains sends a token once to each rank: node_limited is of the forward alone")
    weights = request.expert.weight_format
    if weights not in WEIGHT_FORMATS:
        raise ValueError(f"weight_format {weights} does not train; there is {' and '.join(WEIGHT_FORMATS)}")
    if request.dispatch_format not in GRADIENT_FORMATS:
        raise ValueError(f"dispatch_format {request.dispatch_format} does not train; there is bf16 and mxfp8")
    if saved not in SAVED:
        raise ValueError(f"saved is {saved!r}; there is {', '.join(SAVED)}")
    if gradient_format not in GRADIENT_FORMATS:
        raise ValueError(f"gradient_format is {gradient_format!r}; there is {' and '.join(GRADIENT_FORMATS)}")


def backward_flops(gated: bool, saved: str) -> int:
    """Of a pair and h*d: two products for each of the forward's, and Linear-1 again unless its results are kept.

    gated, tokens kept -> 16      activations kept -> 12
    """
    forward = GATED_FLOPS if gated else PLAIN_FLOPS
    return 2 * forward + (0 if saved == "activations" else forward - 2)


def _rules(
    forward: Plan, device: Device, saved: str, gradient_format: str
) -> tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[Rule, ...]]:
    """C / B <= F d / (b_out + b_home) / f_remote, F the backward's FLOPs of a pair and h*d, tier by tier."""
    request, expert = forward.request, forward.request.expert
    flops = backward_flops(expert.gated, saved)
    again = expert.dispatch_format if saved == "dispatch-again" else None
    formats = [gradient_format, gradient_format, *([again] if again else [])]
    plain = sum(_UNSCALED.get(each, value_bytes(each)) for each in formats)
    scaled = sum(map(value_bytes, formats))
    rules, counted, achieved = [], [], []
    for paper, forward_counted, reached in zip(forward.rules, forward.counted, forward.achieved, strict=True):
        limit = allowed(flops, expert.intermediate, plain, paper.f_remote)
        rules.append(Rule(paper.tier, device.tflops, paper.gb_s, paper.f_remote, limit))
        limit = allowed(flops, expert.intermediate, scaled, forward_counted.f_remote)
        counted.append(Rule(paper.tier, device.tflops, paper.gb_s, forward_counted.f_remote, limit))
        rate = reached_tflops(expert, device)
        achieved.append(Rule(paper.tier, rate, reached.gb_s, reached.f_remote, limit))
    assert request.stack == "megamoe"
    return tuple(rules), tuple(counted), tuple(achieved)
