"""What a question leaves open: EP size, batch, tensor parallelism of attention, micro-batches; and how many devices.

Question, Subject -> choose -> Choice (the question with nothing open that matters, and what was tried)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megamoe.catalog.wording import plural
from megamoe.planner.layer.plan import TOKENS_PER_RANK, PlanRequest
from megamoe.planner.question import TRAINING, Question, Subject, check_load
from megamoe.planner.search.search import (
    ATTENTION_TP,
    DECODE_BATCHES,
    PREFILL_BATCHES,
    Space,
    Targets,
    deployments,
)
from megamoe.planner.search.search import pareto_front as front_of
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.memory import memory
from megamoe.planner.serving.serving import Serving, costs_of, measure

if TYPE_CHECKING:
    from megamoe.planner.training.plan import TrainingPlan

CONTEXT = 4096  # tokens of a sequence where a workload does not say
WORTH = 0.01  # more devices in a group are taken for no less gain than this


@dataclass(frozen=True, slots=True)
class Choice:
    """The question with what was picked for it, why in words, how many were tried, and what no other beats."""

    question: Question
    picked: tuple[str, ...] = ()
    tried: int = 0
    why: str = ""
    front: tuple[Serving, ...] = ()
    fitting: tuple[Serving, ...] = ()


def choose(question: Question, subject: Subject) -> Choice:
    """Fills in what is missing. ValueError where nothing that was tried meets the targets, with what comes nearest."""
    _check_targets(question)
    if question.trains:
        return _training_choice(question, subject) if question.ep is None else Choice(question)
    if not question.has_workload:
        return _layer_choice(question, subject) if question.ep is None else Choice(question)
    filled = question.but(phase=question.phase or "decode", context=question.context or _context(subject))
    if filled.ep is None or filled.batch is None:
        return explore(filled, subject)
    return Choice(_counted(filled, subject))


def _check_targets(question: Question) -> None:
    prefill = question.phase == "prefill"
    if question.tpot_ms is not None and prefill:
        raise ValueError("tpot_ms is a target of decode, ttft_ms one of prefill: give --phase decode, or ttft_ms")
    if question.ttft_ms is not None and not prefill:
        raise ValueError("ttft_ms is a target of prefill, tpot_ms one of decode: give --phase prefill, or tpot_ms")


def _context(subject: Subject) -> int:
    return min(CONTEXT, subject.model.max_positions or CONTEXT)


def request_of(question: Question, subject: Subject, tokens: int | None = None) -> PlanRequest:
    """The layer that a question is about; its EP size is known."""
    assert question.ep is not None
    return PlanRequest(
        subject.model,
        subject.hardware,
        subject.profile,
        question.ep,
        tokens_per_rank=tokens or TOKENS_PER_RANK if question.tokens_per_rank is None else question.tokens_per_rank,
        waves=question.waves,
        **(_as_asked(question) | _trained(question, subject)),
    )


def _trained(question: Question, subject: Subject) -> dict[str, Any]:
    """Weights of a format that does not train are trained in BF16, unless the format was asked for."""
    if not question.trains or question.weight_format:
        return {}
    from megamoe.planner.training.plan import WEIGHT_FORMATS

    return {} if subject.model.weight_format in WEIGHT_FORMATS else {"weight_format": "bf16"}


def _as_asked(question: Question) -> dict[str, Any]:
    """Of the layer, what a question says as it is meant."""
    formats = ("weight_format", "dispatch_format", "combine_format")
    keys = ("routing", "redundant", *formats, "stack", "two_batch", "node_limited")
    return {key: getattr(question, key) for key in keys}


def deployment_of(question: Question, subject: Subject) -> Deployment:
    """The deployment of a question that leaves neither EP size nor batch nor context open."""
    assert question.ep is not None
    assert question.batch is not None
    assert question.context is not None
    tp = 1 if question.attention_tp is None else question.attention_tp
    return Deployment(
        subject.model,
        subject.hardware,
        subject.profile,
        devices=math.lcm(question.ep, tp) if question.devices is None else question.devices,
        ep=question.ep,
        batch_per_device=question.batch,
        context=question.context,
        phase="prefill" if question.phase == "prefill" else "decode",
        attention_tp=tp,
        cached=question.cached or 0,
        mtp=question.mtp or 0,
        accept=question.accept,
        microbatches=1 if question.microbatches is None else question.microbatches,
        head_split=question.head_split,
        dense_format=question.dense_format,
        kv_format=question.kv_format,
        index_format=question.index_format,
        **(_as_asked(question) | ({} if question.chunk is None else {"chunk": question.chunk})),
    )


# ---- a layer ----


def holding(question: Question, subject: Subject) -> Deployment:
    """A layer's tokens as prompts that are there at once: what a device holds beside caches of a workload."""
    request = request_of(question, subject)
    context = min(request.tokens_per_rank, subject.model.max_positions or request.tokens_per_rank)
    batch = -(-request.tokens_per_rank // context)
    return deployment_of(question.but(phase="prefill", batch=batch, context=context), subject)


def _layer_choice(question: Question, subject: Subject) -> Choice:
    """The EP size that serves most; of a layer alone it would be the smallest that fits, without room for caches."""
    context = _context(subject)
    found = explore(question.but(phase="decode", context=context), subject)
    why = f"{found.why}, in decode at {context} tokens of context"
    return replace(found, question=question.but(ep=found.question.ep), picked=("ep",), why=why)


def sizes(question: Question, subject: Subject) -> list[int]:
    """EP sizes that share the experts evenly and whose links are known, smallest first."""
    experts, hardware = subject.model.num_experts + question.redundant, subject.hardware
    most = experts if hardware.nic_gb_s else min(experts, int(hardware.scaleup_domain.value))
    return [ep for ep in range(1, most + 1) if experts % ep == 0]


def training_of(question: Question, subject: Subject) -> TrainingPlan:
    """The step of a question that trains; its EP size is known."""
    from megamoe.planner.training.plan import plan_training  # other plans start sooner without

    options = {key: getattr(question, key) for key in TRAINING if getattr(question, key) is not None}
    return plan_training(request_of(question, subject), **options)


def _training_choice(question: Question, subject: Subject) -> Choice:
    """The shortest step of the EP sizes that fit, the smaller of two that hardly differ; else the least memory."""
    tried = [(ep, training_of(question.but(ep=ep), subject)) for ep in sizes(question, subject)]
    fitting = [(ep, found) for ep, found in tried if found.memory.memory.fits]
    if fitting:
        least = min(found.step_us for _, found in fitting)
        ep = next(ep for ep, found in fitting if found.step_us <= least * (1 + WORTH))
        why = f"the shortest step of {plural(len(tried), 'EP size')}"
    else:
        ep = min(tried, key=lambda each: each[1].memory.memory.total_gb)[0]
        why = f"none of {plural(len(tried), 'EP size')} fits, this needs least memory"
    return Choice(question.but(ep=ep), ("ep",), len(tried), why)


# ---- a deployment ----


def explore(question: Question, subject: Subject) -> Choice:
    """The most tokens per second and device of all that fit and meet the targets."""
    space = _space(question, subject)
    base = deployment_of(question.but(ep=1, batch=1, devices=1, attention_tp=1, microbatches=1), subject)
    targets = Targets(tpot_ms=question.tpot_ms, ttft_ms=question.ttft_ms)
    fitting, tried, least = _measured(base, space, question.devices)
    if not tried and question.ep is not None:
        raise ValueError(f"{question.devices} devices cannot be divided into groups of EP{question.ep}")
    if not tried:
        raise ValueError(
            f"no EP size of {subject.model.name} divides {question.devices} devices in attention groups of "
            f"{' or '.join(map(str, space.attention_tps))}"
        )
    meeting = [served for served in fitting if targets.missed(served) is None]
    if fitting and not meeting:
        raise ValueError(_nothing_meets(question, fitting, tried))
    best = _best(meeting).deployment if meeting else least
    filled = question.but(
        **{key: getattr(best, key) for key in ("ep", "attention_tp", "microbatches")}, batch=best.batch_per_device
    )
    picked = tuple(key for key in ("ep", "batch", "attention_tp", "microbatches") if getattr(question, key) is None)
    deployments = plural(tried, "deployment")
    why = f"the best of {deployments}" if meeting else f"none of {deployments} fits, this needs least memory"
    return Choice(_counted(filled, subject), picked, tried, why, front_of(fitting), tuple(fitting))


def _measured(base: Deployment, space: Space, devices: int | None) -> tuple[list[Serving], int, Deployment]:
    """All that fit, how many there are, and the one that needs least memory."""
    fitting, tried, least = [], 0, (math.inf, base)
    for costs, deployment in deployments(base, space, devices):
        tried += 1
        held = memory(costs, deployment)
        if held.total_gb < least[0]:
            least = held.total_gb, deployment
        if held.fits:
            fitting.append(measure(costs, deployment, held))
    return fitting, tried, least[1]


def _space(question: Question, subject: Subject) -> Space:
    """What is open is tried, what is given is not."""
    domain = int(subject.hardware.scaleup_domain.value)
    batches = DECODE_BATCHES if question.phase == "decode" else PREFILL_BATCHES
    return Space(
        eps=tuple(sizes(question, subject)) if question.ep is None else (question.ep,),
        attention_tps=_open(question.attention_tp, tuple(tp for tp in ATTENTION_TP if tp <= domain)),
        batches=_open(question.batch, batches),
        mtps=(question.mtp or 0,),
        microbatches=_open(question.microbatches, (1, 2)),
        weight_formats=(question.weight_format,),
        kv_formats=(question.kv_format,),
        dispatch_formats=(question.dispatch_format,),
        combine_formats=(question.combine_format,),
    )


def _open(given: int | None, tried: tuple[int, ...]) -> tuple[int, ...]:
    return tried if given is None else (given,)


def _best(meeting: list[Serving]) -> Serving:
    """The highest rate, but not for more devices in a group than it is worth."""
    most = max(served.tokens_per_s_per_device for served in meeting)
    close = [served for served in meeting if served.tokens_per_s_per_device >= most * (1 - WORTH)]
    return min(close, key=lambda served: (_group(served.deployment), -served.tokens_per_s_per_device))


def _group(d: Deployment) -> int:
    return math.lcm(d.ep, d.attention_tp)


def _nothing_meets(question: Question, fitting: list[Serving], tried: int) -> str:
    fastest = max(fitting, key=lambda served: served.tokens_per_s_per_user)
    key = "tpot_ms" if question.phase == "decode" else "ttft_ms"
    d = fastest.deployment
    return (
        f"none of {tried} deployments reaches {key} {getattr(question, key):g}; the fastest has "
        f"{getattr(fastest, key):.2f} ms, with EP{d.ep}, batch {d.batch_per_device}, attention_tp {d.attention_tp}"
    )


def _counted(question: Question, subject: Subject) -> Question:
    """With as many devices as the target rate needs, in whole groups; else those of one group."""
    if question.devices is not None:
        return question
    group = deployment_of(question, subject)
    if question.target_tps is None:
        return question.but(devices=group.devices)
    costs = costs_of(group)
    rate = measure(costs, group, memory(costs, group)).tokens_per_s_per_device
    check_load("target_tps", question.target_tps, rate, group.devices)
    groups = max(1, math.ceil(question.target_tps / rate / group.devices))
    return question.but(devices=groups * group.devices)
