"""An answer as the data of a report: what the page shows, in the page's own words."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime, timezone

from megamoe import __version__
from megamoe.catalog import figures
from megamoe.catalog.wording import plural
from megamoe.planner.answer import Answer
from megamoe.planner.explain import explain
from megamoe.planner.layer.tiles import reached_tflops
from megamoe.planner.question import Question
from megamoe.planner.report.data import (
    MemoryBar,
    MemoryPart,
    ParetoPoint,
    ReportData,
    Roofline,
    RooflineTier,
    Sensitivity,
    Source,
    Span,
    Tile,
    Timeline,
)
from megamoe.planner.search.choose import explore
from megamoe.planner.search.sensitivity import result_of, sensitivity
from megamoe.planner.serving.memory import PARTS, USABLE
from megamoe.planner.serving.serving import Serving
from megamoe.planner.training.spans import step_timeline

LANES = {"dispatch": "dispatch", "compute": "linear", "combine": "combine"}
UNITS = {
    "tflops": "TFLOP/s",
    "gb": "GB",
    "tb_s": "TB/s",
    "gb_s": "GB/s",
    "us": "us",
    "w": "W",
    "kw_all_in": "kW",
    "gflops": "GFLOP/s",
    "ns": "ns",
    "params_b": "billion",
}


def page(found: Answer, command: str = "") -> ReportData:
    """Everything that a page can show. Without a workload the Pareto front is that of decode at some context."""
    request = found.plan.request
    of, _, unit = result_of(found)
    return ReportData(
        title=f"{request.model.name} on {request.hardware.name}, EP{request.ep}",
        verdict="HIDDEN" if found.hidden else "EXPOSED",
        sentence=found.sentence.partition("  ")[2],
        tiles=tiles(found),
        warnings=warnings(found),
        timeline=timeline(found),
        roofline=roofline(found),
        pareto=None if found.training else pareto(found),
        memory=(memory(found),),
        sensitivities=tuple(Sensitivity(each.key, each.low, each.high, each.base, unit) for each in sensitivity(found)),
        sensitivity_of=of,
        terms=tuple(explain(found)),
        sources=sources(found),
        assumptions=assumptions(found),
        version=f"megamoe {__version__}",
        command=command,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def tiles(found: Answer) -> tuple[Tile, ...]:
    layer, rule, served, held = found.plan.layer, found.binding, found.serving, found.memory
    tokens = f"{plural(found.plan.request.tokens_per_rank, 'token')} a rank, {plural(layer.waves, 'wave')}"
    shown = [Tile("layer", layer.layer_us, "us", tokens)]
    if found.training is not None:
        shown = [Tile("step", found.training.step_us, "us", f"forward and backward of a layer, {tokens}")]
        shown.append(Tile("backward", found.training.backward.backward_us, "us", f"saved {found.training.saved}"))
    if rule is not None:
        shown.append(Tile("margin", rule.margin, "", f"threshold over C/B, {rule.tier}"))
        shown.append(Tile("link needed", rule.required_gb_s, "GB/s", f"has {rule.gb_s:g} one way"))
        shown.append(_exposed(found))
    if served is not None:
        d = served.deployment
        shown.append(Tile("rate of a device", served.tokens_per_s_per_device, "tokens/s", f"{d.devices} devices"))
        if served.tpot_ms is not None:
            shown.append(
                Tile("time per output token", served.tpot_ms, "ms", f"{d.batch_per_device} sequences a device")
            )
        if served.ttft_ms is not None:
            shown.append(Tile("time to first token", served.ttft_ms, "ms", f"{d.batch_per_device} prompts a step"))
        price = d.hardware.usd_per_hour
        if served.usd_per_million_tokens is not None and price is not None:
            hour = f"at {price.value:g} $ per device-hour"
            shown.append(Tile("cost", served.usd_per_million_tokens, "$ per M tokens", hour))
    shown.append(Tile("memory", held.total_gb, "GB", f"of {held.capacity_gb:.1f} GB usable"))
    return tuple(shown)


def _exposed(found: Answer) -> Tile:
    """Of the layer, or of both passes of a step."""
    exposed, links = found.plan.layer.exposed_us, found.plan.layer.communication_us
    if found.training is not None:
        exposed, links = found.training.exposed_us, links + found.training.backward.communication_us
    hidden = max(0.0, 1 - exposed / links) if links else 1.0
    return Tile("exposed", exposed, "us", f"{100 * hidden:.1f} % of communication hidden")


def warnings(found: Answer) -> tuple[str, ...]:
    said = [] if found.fits else [found.verdict]
    said += [f"Misses a target: {missed}." for missed in found.missed]
    for thing in (found.subject.hardware, found.subject.model):
        said += [f"{thing.name} is announced: its figures are nobody's measurement."] * thing.announced
    return tuple(said)


def timeline(found: Answer) -> Timeline:
    """What is paid before the waves, the waves as played, the sum of the slots."""
    layer, device = found.plan.layer, found.plan.request.device
    exchange = 2 * device.exchange_us if found.plan.request.ep > device.scaleup_domain else 0.0
    played = layer.played
    start = layer.fixed_us + exchange
    spans = [Span("fixed", "kernel, barriers, staging", 0.0, layer.fixed_us, "fixed")]
    if exchange:
        spans.append(Span("fixed", "exchange between domains", layer.fixed_us, start, "fixed"))
    clock = 0.0
    for span in played.spans:
        lane = LANES[span.lane]
        if lane == "linear":
            if span.start > clock + 1e-9:
                spans.append(Span(lane, f"wave {span.wave + 1} waits", start + clock, start + span.start, "stall"))
            clock = span.end
        if span.end > span.start:
            spans.append(Span(lane, f"wave {span.wave + 1}", start + span.start, start + span.end))
    end = start + played.total
    spans.append(Span("tail", "slot sum", end, end + layer.sum_us))
    forward = Timeline(tuple(spans), end + layer.sum_us, start + played.head, layer.sum_us + played.tail)
    return step_timeline(forward, found.training) if found.training else forward


def roofline(found: Answer) -> Roofline | None:
    """The plan stands at its FLOPs per byte of what leaves, and at the rate of its products over the whole layer."""
    planned, layer = found.plan, found.plan.layer
    rule = planned.binding
    if rule is None:
        return None
    expert, device = planned.request.expert, planned.request.device
    counted = planned.counted[planned.rules.index(rule)]
    plain = rule.f_remote == 1 and expert.combine_format == "bf16" and expert.gated
    return Roofline(
        tiers=tuple(RooflineTier(each.tier, each.gb_s) for each in planned.rules),
        peak_tflops=device.tflops,
        achieved_tflops=reached_tflops(expert, device),
        threshold_flops_per_byte=rule.threshold,
        plan_flops_per_byte=counted.threshold,
        plan_tflops=layer.rows * expert.flops / layer.layer_us / 1e6,
        threshold_name="2d"
        if plain and expert.dispatch_format in ("fp8", "mxfp8")
        else f"threshold of the {rule.tier}",
    )


def pareto(found: Answer) -> tuple[ParetoPoint, ...]:
    """All deployments that fit, of every EP size and batch, and the one that was planned."""
    open_keys = dict.fromkeys(
        ("ep", "batch", "attention_tp", "microbatches", "tpot_ms", "ttft_ms", "target_tps", "devices")
    )
    question = found.question.but(**{**open_keys, **_workload(found)})
    explored = explore(question, found.subject)
    front = set(map(id, explored.front))
    points = [_point(served, id(served) in front) for served in explored.fitting]
    if found.serving is not None and found.fits:
        own = _point(found.serving, False)
        points = [point for point in points if (point.x, point.y) != (own.x, own.y)]
        points.append(ParetoPoint(own.x, own.y, own.label, False, True))
    return tuple(points)


def _workload(found: Answer) -> dict[str, object]:
    question: Question = found.question
    positions = found.subject.model.max_positions
    context = question.context or (min(4096, positions) if positions else 4096)
    return {"phase": question.phase or "decode", "context": context}


def _point(served: Serving, on_front: bool) -> ParetoPoint:
    d = served.deployment
    label = f"EP{d.ep}, batch {d.batch_per_device}, " + (
        f"attention TP{d.attention_tp}" if d.attention_tp > 1 else "attention DP"
    )
    label += f", MTP{d.mtp}" if d.mtp else ""
    label += ", 2 micro-batches" if d.microbatches > 1 else ""
    return ParetoPoint(served.tokens_per_s_per_user, served.tokens_per_s_per_device, label, on_front)


def memory(found: Answer) -> MemoryBar:
    held = asdict(found.memory)
    parts = tuple(MemoryPart(name, held[key]) for key, name in PARTS.items() if held[key])
    name = f"{found.subject.hardware.name}, {100 * USABLE:.0f} % of {found.subject.hardware.memory_gb.value:g} GB"
    return MemoryBar(name, found.memory.capacity_gb, parts)


def sources(found: Answer) -> tuple[Source, ...]:
    """The hardware's figures, the profile's, and what the model's sizes come from."""
    subject = found.subject
    model = subject.model
    said = [
        Source(f"model.{key}", getattr(model, key), "", model.tag, model.notes.get(key, model.source))
        for key in ("hidden", "intermediate", "num_experts", "topk")
    ]
    for thing, name in ((subject.hardware, "hardware"), (subject.profile, "profile")):
        for key, figure in figures(thing).items():
            way = f" {figure.way}" if figure.way else ""
            text = f"{figure.source}; {figure.note}" if figure.note else figure.source
            said.append(Source(f"{name}.{key}", figure.value, unit_of(key) + way, figure.tag, text))
    return tuple(said)


def unit_of(key: str) -> str:
    """The unit that ends a name.    "scaleup_gb_s" -> GB/s    "fp8_tflops" -> TFLOP/s    "tile_rows" -> "" """
    if key.startswith("usd_per_hour"):
        return "$/h"
    return next(
        (unit for end, unit in sorted(UNITS.items(), key=lambda each: -len(each[0])) if key.endswith(f"_{end}")), ""
    )


def assumptions(found: Answer) -> tuple[str, ...]:
    request, question = found.plan.request, found.question
    routing = {
        "balanced": "Routing is balanced: every expert has as many rows.",
        "uniform": "Every token chooses its experts at random.",
    }.get(
        request.routing, f"Routing is {request.routing}: some rank is busiest, and the layer takes as long as it does."
    )
    said = [
        routing,
        "Bandwidths are one way; both directions of a link carry data at once.",
        f"What is reached of the peaks is the profile {request.profile.name}: {request.profile.fitted}.",
        f"Tokens travel as {request.dispatch_format}, results as {request.combine_format}; products run at the "
        f"{request.compute_format} rate.",
        f"{100 * USABLE:.0f} % of the memory can be used; the rest is the runtime's.",
    ]
    workload = _workload(found)
    if found.training is not None:
        said.append("A training step is this package's, whose backward has not run on a GPU: assumed throughout.")
        said.append("Memory is that of the routed experts of all layers; the rest of the model is not counted.")
    elif found.serving is None:
        said.append(
            f"The Pareto front is that of decode at {workload['context']} tokens of context; no workload was given."
        )
    if found.choice.why:
        said.append(f"Picked by the planner: {', '.join(found.choice.picked)}; {found.choice.why}.")
    said += [f"Set by hand: {setting}." for setting in question.settings]
    assert all(math.isfinite(value) for value in (found.plan.layer.layer_us, found.memory.total_gb))
    return tuple(said)
