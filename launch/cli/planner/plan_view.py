"""A plan as tables in the terminal: figures to the right, units in the headings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from megamoe.catalog.wording import plural
from megamoe.launch.output import say, show

if TYPE_CHECKING:
    from megamoe.planner.answer import Answer
    from megamoe.planner.layer.plan import Plan
    from megamoe.planner.training.plan import TrainingPlan


def print_answer(found: Answer) -> None:
    """The verdict, then the rule, the layer, the memory and the serving."""
    say(found.verdict)
    if not found.fits:
        say(found.sentence)
    for missed in found.missed:
        say(f"MISSES  {missed}")
    _print_rules(found.plan)
    _print_layer(found)
    if found.training is not None:
        _show_rules(
            found.training, found.plan, "\nthe backward's rule: its FLOPs of a pair over its bytes there and home"
        )
        _print_times(found.training)
        _print_held(found.training)
    _print_memory(found)
    if found.serving is not None:
        _print_step(found)
        _print_serving(found)


def _show_rules(found: Plan | TrainingPlan, planned: Plan, title: str) -> None:
    from megamoe.planner.answer import counts

    if found.binding is None:
        return
    columns = {"tier": "", "count": "", **dict.fromkeys(("TFLOP/s", "GB/s", "C/B", "threshold"), ",.0f")}
    columns |= {"margin": ".2f", "needs": ",.0f", "verdict": ""}
    rows = []
    for name, rule in counts(found):
        figures = (rule.tflops, rule.gb_s, rule.ratio, rule.threshold, rule.margin, rule.required_gb_s)
        tier = planned.request.hardware.tier_names[rule.tier]
        rows.append((tier, name, *figures, "hidden" if rule.hidden else "exposed"))
    show(columns, rows, title)


def _print_rules(planned: Plan) -> None:
    from megamoe.planner.layer.rule import hides_tflops

    if planned.binding is None:
        return
    _show_rules(planned, planned, "\nthe rule: C/B and threshold in FLOPs/Byte, links in GB/s one way")
    tiers = planned.request.hardware.tier_names
    expert = planned.request.expert
    hides = hides_tflops(expert.intermediate, expert.gated)
    say(f"1 GB/s hides {hides:.1f} TFLOP/s by the paper's count, fp8 there and bf16 back")
    say("paper: no scales, every pair leaves; counted: scales, pairs that leave; achieved: rates of the profile")
    for rule, reached in zip(planned.rules, planned.achieved, strict=True):
        enough = reached.required_gb_s * rule.gb_s / reached.gb_s
        needed = f"{rule.required_gb_s:,.0f} GB/s, {enough:,.0f} as achieved"
        say(f"beyond {needed}, more {tiers[rule.tier]} bandwidth brings nothing")


def _print_layer(found: Answer) -> None:
    planned, layer = found.plan, found.plan.layer
    request = planned.request
    name = "" if request.stack == "fused" else f", {request.stack}"
    name += ", forward" if found.training is not None else ""
    title = f"\none layer{name}: {plural(request.tokens_per_rank, 'token')} a rank, {request.routing}, "
    title += f"{plural(layer.waves, 'wave')}, {layer.rows:,.0f} rows in {layer.experts_touched:.4g} experts"
    parts = (
        ("fixed: kernel, graph, staging", layer.fixed_us),
        ("  the kernel: a call, experts, barriers", layer.kernel_us),
        ("  the module's launches in a graph", layer.graph_us),
        ("  the module's staging", layer.stack_us),
        ("waves, first dispatch to last result", layer.core_us),
        ("  compute and memory, without links", layer.alone_us),
        ("  exposed", layer.exposed_us),
        ("slot sum", layer.sum_us),
        ("layer", layer.layer_us),
        None,
        ("alone: compute", layer.compute_us),
        ("alone: memory", layer.memory_us),
        ("alone: dispatch", layer.dispatch_us),
        ("alone: combine", layer.combine_us),
        ("played: head", layer.head_us),
        ("played: stalls, head included", layer.stalls_us),
        ("played: tail", layer.tail_us),
    )
    rows = [(part[0], part[1], 100 * part[1] / layer.layer_us) if part else () for part in parts]
    show({"part": "", "us": ",.1f", "% of layer": ",.1f"}, rows, title)
    if request.profile.one_kernel:
        say(f"profile {request.profile.name}: {request.profile.title}; fitted: {request.profile.fitted}")
    say(f"{100 * layer.hidden:.1f} % of the communication's {layer.communication_us:,.1f} us is hidden")


def _print_memory(found: Answer) -> None:
    from megamoe.planner.serving.memory import PARTS

    held = found.memory
    sizes = {name: getattr(held, part) for part, name in PARTS.items() if _shown(found, part)}
    sizes |= {"all": held.total_gb, "usable": held.capacity_gb}
    rows = [(name, gb, 100 * gb / held.capacity_gb) for name, gb in sizes.items()]
    without = "" if found.serving is not None else "; caches come with a workload"
    without = "; routed experts of all layers, nothing else of the model" if found.training is not None else without
    columns = {"part": "", "GB": ",.2f", "% of usable": ",.1f"}
    show(columns, rows, f"\nmemory of a device, 1 GB is 1e9 bytes{without}")


def _shown(found: Answer, part: str) -> bool:
    """Caches come with a workload, and training counts routed experts alone."""
    return found.serving is not None or part not in ("cache_gb", *(["weights_gb"] if found.training else []))


def _print_step(found: Answer) -> None:
    assert found.serving is not None
    step = found.serving.step
    parts = {name.removesuffix("_us"): us for name, us in asdict(step).items() if us} | {"step": step.total_us}
    rows = [(name, us / 1e3, 100 * us / step.total_us) for name, us in parts.items()]
    show({"part": "", "ms": ",.3f", "% of step": ",.1f"}, rows, "\na step of the whole model")


def _print_serving(found: Answer) -> None:
    served = found.serving
    assert served is not None
    d = served.deployment
    what = "sequences" if d.phase == "decode" else "prompts"
    title = f"\n{d.phase}: {plural(d.devices, 'device')}, EP{d.ep}, {d.batch_per_device} {what} a device, "
    title += f"{plural(d.context, 'token')}, "
    title += "attention DP" if d.attention_tp == 1 else f"attention TP{d.attention_tp}"
    title += (f", MTP{d.mtp}" if d.mtp else "") + (f", {d.microbatches} micro-batches" if d.microbatches > 1 else "")
    rate = served.tokens_per_s_per_device
    results = (
        ("tokens/s", "device", rate),
        ("tokens/s", "all devices", rate * d.devices),
        ("tokens/s", "user" if d.phase == "decode" else "prompt", served.tokens_per_s_per_user),
        ("ms", "per output token", served.tpot_ms),
        ("ms", "to the first token", served.ttft_ms),
        ("$", "per million tokens", served.usd_per_million_tokens),
        ("tokens/s", "megawatt", served.tokens_per_s_per_mw),
    )
    rows = [(name, value, unit) for unit, name, value in results if value]
    show({"for": "", "result": "~", "unit": ""}, rows, title)


def _print_times(found: TrainingPlan) -> None:
    back, step = found.backward, found.step_us
    parts = (
        ("forward", found.forward.layer.layer_us),
        ("backward", back.backward_us),
        ("  fixed: launches around the waves", back.fixed_us),
        ("  waves, first dispatch to the end", back.core_us),
        ("    compute and memory, without links", back.alone_us),
        ("    exposed", back.exposed_us),
        ("  slot sum", back.sum_us),
        ("step of the layer", step),
        None,
        ("alone: Linear-1 again", back.recompute_us),
        ("alone: data gradients", back.data_us),
        ("alone: weight gradients", back.weights_us),
        ("alone: dispatch", back.dispatch_us),
        ("alone: combine", back.combine_us),
    )
    rows = [(part[0], part[1], 100 * part[1] / step) if part else () for part in parts]
    title = f"\na training step of the layer: saved {found.saved}, gradients travel as {found.gradient_format}"
    show({"part": "", "us": ",.1f", "% of step": ",.1f"}, rows, title)
    say(f"{100 * back.hidden:.1f} % of the backward's {back.communication_us:,.1f} us of communication is hidden")
    say("assumed throughout: this package's backward has not run on a GPU")


def _print_held(found: TrainingPlan) -> None:
    held = found.memory
    rows = [
        ("master weights, FP32", held.masters_gb),
        ("their gradients, FP32", held.gradients_gb),
        ("AdamW's two moments, FP32", held.optimizer_gb),
        ("weights as both passes multiply by them", held.packed_gb),
        ("kept by the forward, all layers", held.kept_gb),
        ("rows and gradients of a call", held.in_flight_gb),
    ]
    show({"part": "", "GB": ",.2f"}, rows, "\nwhat training holds, of the routed experts")
