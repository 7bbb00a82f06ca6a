"""The planner's whole answer to a question: the plan of a layer, what a device holds, and with a workload the serving.

Question -> answer -> Answer -> as_dict (the keys that programs read)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from megamoe.catalog.wording import plural
from megamoe.planner.layer.plan import Plan, plan
from megamoe.planner.layer.rule import Rule, hides_tflops
from megamoe.planner.layer.traffic import traffic
from megamoe.planner.question import Question, Subject, check_phase
from megamoe.planner.search.choose import Choice, choose, deployment_of, holding, request_of, sizes, training_of
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.memory import Memory, memory, smallest_ep
from megamoe.planner.serving.serving import Serving, costs_of, serve

if TYPE_CHECKING:
    from megamoe.planner.training.plan import TrainingPlan

LAYER_PARTS = (
    *(
        "fixed_us",
        "kernel_us",
        "graph_us",
        "stack_us",
        "core_us",
        "sum_us",
        "compute_us",
        "memory_us",
        "alone_us",
        "dispatch_us",
        "combine_us",
    ),
    *("communication_us", "exposed_us", "head_us", "stalls_us", "tail_us"),
)
MEMORY_PARTS = ("experts", "weights", "cache", "activations", "capacity")
SERVED = (
    *("tokens_per_s_per_device", "tokens_per_s_per_user", "tpot_ms", "ttft_ms", "usd_per_million_tokens"),
    "tokens_per_s_per_mw",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One plan. serving, step and devices are None without a workload; smallest_* only where it does not fit.

    training: the step of a layer that trains, whose forward plan is; None where none was asked for.
    """

    choice: Choice
    subject: Subject
    plan: Plan
    memory: Memory
    serving: Serving | None
    smallest_ep: int | None = None
    smallest_devices: int | None = None
    training: TrainingPlan | None = None

    @property
    def question(self) -> Question:
        return self.choice.question

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def missed(self) -> list[str]:
        """Targets that are not reached, in words."""
        served, asked = self.serving, self.question
        if served is None:
            return []
        found = [
            f"{key} is {got:.2f} ms, more than {wanted:g}"
            for key, got, wanted in (
                ("tpot_ms", served.tpot_ms, asked.tpot_ms),
                ("ttft_ms", served.ttft_ms, asked.ttft_ms),
            )
            if got is not None and wanted is not None and got > wanted
        ]
        total = served.tokens_per_s_per_device * served.deployment.devices
        if asked.target_tps is not None and total < asked.target_tps:
            found.append(
                f"{served.deployment.devices} devices make {total:.0f} tokens/s, fewer than {asked.target_tps:g}"
            )
        return found

    @property
    def verdict(self) -> str:
        """The first line: the plan's, or that it does not fit and what would."""
        return self.sentence if self.fits else self.no_room

    @property
    def sentence(self) -> str:
        """Whether communication hides, of the plan or of a training step."""
        return self.training.sentence if self.training else self.plan.sentence

    @property
    def hidden(self) -> bool:
        return self.training.hidden if self.training else self.plan.hidden

    @property
    def binding(self) -> Rule | None:
        """The rule with the least margin, of all passes."""
        return self.training.tightest if self.training else self.plan.binding

    @property
    def no_room(self) -> str:
        """DOES NOT FIT  deepseek-v4-pro on h100, EP8: 134.6 GB a device, 73.6 usable; EP24 would (24 devices)"""
        request = self.plan.request
        what = "training the routed experts of " if self.training else ""
        where = f"DOES NOT FIT  {what}{request.model.name} on {request.hardware.name}, EP{request.ep}"
        devices = plural(self.smallest_devices or 0, "device")
        would = f"EP{self.smallest_ep} would ({devices})" if self.smallest_ep else self._no_ep
        return f"{where}: {self.memory.total_gb:.1f} GB a device, {self.memory.capacity_gb:.1f} usable; {would}"

    @property
    def _no_ep(self) -> str:
        if self.serving and self.serving.largest_batch:
            return f"no EP size would, a batch of {self.serving.largest_batch} would"
        return "no EP size would"

    def as_dict(self) -> dict[str, Any]:
        """What `megamoe plan --format json` prints. null where nothing is asked, sent or known."""
        request, rule = self.plan.request, self.binding
        keys: dict[str, Any] = finite(
            {
                "model": request.model.name,
                "hardware": request.hardware.name,
                "profile": request.profile.name,
                "ep": request.ep,
                "verdict": "hidden" if self.hidden else "exposed",
                "fits": self.fits,
                "sentence": self.verdict,
                "threshold_flops_per_byte": rule and rule.threshold,
                "hardware_flops_per_byte": rule and rule.ratio,
                "margin": rule and rule.margin,
                "required_link_gb_s": rule.required_gb_s if rule else 0.0,
                "link_gb_s": rule and rule.gb_s,
                "binding_tier": rule and request.hardware.tier_names[rule.tier],
                "hides_tflops_per_gb_s": hides_tflops(request.expert.intermediate, request.expert.gated),
                "compute_format": request.compute_format,
                "weight_format": request.weight_format or request.model.weight_format,
                "dispatch_format": request.dispatch_format,
                "combine_format": request.combine_format,
                "rules": [
                    {"count": count, **rule_dict(each), "tier": request.hardware.tier_names[each.tier]}
                    for count, each in counts(self.plan)
                ],
                "tokens_per_rank": request.tokens_per_rank,
                "stack": request.stack,
                "two_batch": request.two_batch,
                "node_limited": request.node_limited,
                "routing": request.routing,
                "redundant": request.redundant,
                **self._traffic(),
                **self._layer(),
                **self._memory(),
                "smallest_ep": self.smallest_ep,
                "smallest_devices": self.smallest_devices,
                **self._workload(),
                "training": self._training(),
                "picked": {key: getattr(self.question, key) for key in self.choice.picked},
                "tried": self.choice.tried,
                "set": list(self.question.settings),
            }
        )
        return keys

    def _traffic(self) -> dict[str, Any]:
        sent = traffic(self.plan.request)
        return {
            "domains": sent.domains,
            "token_bytes_across_devices": sent.across_devices_bytes,
            "token_bytes_across_domains": sent.leaves_domain_bytes,
            "token_bytes_node_limited": sent.node_limited_bytes,
        }

    def _layer(self) -> dict[str, Any]:
        layer = self.plan.layer
        parts = {key: getattr(layer, key) for key in LAYER_PARTS}
        shares = {"communication_hidden": layer.hidden, "rows": layer.rows, "experts_touched": layer.experts_touched}
        return {"waves": layer.waves, "layer_us": layer.layer_us, **parts, **shares}

    def _training(self) -> dict[str, Any] | None:
        if self.training is None:
            return None
        tiers, rules = self.plan.request.hardware.tier_names, counts(self.training)
        return {
            **self.training.as_dict(),
            "backward_rules": [{"count": count, **rule_dict(each), "tier": tiers[each.tier]} for count, each in rules],
        }

    def _memory(self) -> dict[str, Any]:
        parts = {f"memory_{part}_gb": getattr(self.memory, f"{part}_gb") for part in MEMORY_PARTS}
        return {"memory_gb": self.memory.total_gb, **parts}

    def _workload(self) -> dict[str, Any]:
        served = self.serving
        keys = ("phase", "batch", "context", "attention_tp", "mtp", "microbatches")
        if served is None:
            nothing = dict.fromkeys((*keys, "devices", *SERVED, "tokens_per_s", "step_us"), None)
            return {**nothing, "phase": "train" if self.training else None, "missed": []}
        d = served.deployment
        step = asdict(served.step)
        return {
            **{key: getattr(d, "batch_per_device" if key == "batch" else key) for key in keys},
            "devices": d.devices,
            **{key: getattr(served, key) for key in SERVED},
            "tokens_per_s": served.tokens_per_s_per_device * d.devices,
            "step_us": served.step.total_us,
            **{f"step_{name}": value for name, value in step.items()},
            "missed": self.missed,
        }


_LONGEST_US = 1e18  # of a layer: thirty thousand years, which no table is made for


def answer(question: Question, subject: Subject | None = None) -> Answer:
    """Plans. ValueError for what makes no sense, or what cannot be calculated with."""
    check_phase(question)
    subject = subject or Subject.of(question)
    try:
        found = _answer(choose(question, subject), subject)
        results = [found.plan.layer.layer_us, *(rule.margin for _, rule in counts(found.plan))]
        results += [found.serving.tokens_per_s_per_device] if found.serving else []
    except (OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"these figures cannot be calculated with: {error.args[-1]}") from error
    if not all(map(math.isfinite, results)):
        raise ValueError("these figures cannot be calculated with: the result is no number")
    if found.plan.layer.layer_us > _LONGEST_US:
        raise ValueError(f"these figures cannot be calculated with: a layer takes {found.plan.layer.layer_us:.1g} us")
    return found


def _answer(choice: Choice, subject: Subject) -> Answer:
    question = choice.question
    if question.trains:
        return _training_answer(choice, subject)
    if question.has_workload:
        served = serve(deployment_of(question, subject))
        planned = plan(request_of(question, subject, tokens_at_once(served.deployment)))
        return Answer(choice, subject, planned, served.memory, served, served.smallest_ep, served.smallest_devices)
    held = holding(question, subject)
    planned, costs = plan(request_of(question, subject)), costs_of(held)
    room = replace(memory(costs, held), cache_gb=0.0)
    smallest = None if room.fits else smallest_ep(costs, held)
    return Answer(choice, subject, planned, room, None, smallest, smallest)


def _training_answer(choice: Choice, subject: Subject) -> Answer:
    question = choice.question
    found = training_of(question, subject)
    held, smallest = found.memory.memory, None
    if not held.fits:
        steps = ((ep, training_of(question.but(ep=ep, links=()), subject)) for ep in sizes(question, subject))
        smallest = next((ep for ep, step in steps if step.memory.memory.fits), None)
    return Answer(choice, subject, found.forward, held, None, smallest, smallest, found)


def tokens_at_once(d: Deployment) -> int:
    """Tokens that a rank takes through a layer at once: of a micro-batch, and of a chunk in prefill."""
    chunks = 1 if d.phase == "decode" else -(-d.new_tokens // (d.chunk * d.microbatches))
    return max(1, round(d.new_tokens / (d.microbatches * chunks)))


def counts(planned: Plan | TrainingPlan) -> list[tuple[str, Rule]]:
    """Every rule of a plan, or of a backward, by how it counts: paper, counted (scales, what leaves), achieved."""
    named = (("paper", planned.rules), ("counted", planned.counted), ("achieved", planned.achieved))
    return [(name, rule) for name, rules in named for rule in rules]


def rule_dict(rule: Rule) -> dict[str, Any]:
    return {
        "tier": rule.tier,
        "verdict": "hidden" if rule.hidden else "exposed",
        "link_gb_s": rule.gb_s,
        "tflops": rule.tflops,
        "f_remote": rule.f_remote,
        "f_dispatch": rule.f_remote if rule.f_dispatch is None else rule.f_dispatch,
        "hardware_flops_per_byte": rule.ratio,
        "threshold_flops_per_byte": rule.threshold,
        "margin": rule.margin,
        "required_link_gb_s": rule.required_gb_s,
    }


def finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: null in their place."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
