"""A training step as tables in the terminal: the backward's rule, its parts, what training holds in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megamoe.launch.output import say, show

if TYPE_CHECKING:
    from megamoe.planner.training.plan import TrainingPlan


def print_training(found: TrainingPlan) -> None:
    """After the forward's rule and layer."""
    _print_rules(found)
    _print_times(found)
    _print_memory(found)


def _print_rules(found: TrainingPlan) -> None:
    from megamoe.planner.answer import counts

    if found.binding is None:
        return
    tiers = found.forward.request.hardware.tier_names
    columns = {"tier": "", "count": "", **dict.fromkeys(("TFLOP/s", "GB/s", "C/B", "threshold"), ",.0f")}
    columns |= {"margin": ".2f", "needs": ",.0f", "verdict": ""}
    rows = []
    for name, rule in counts(found):
        figures = (rule.tflops, rule.gb_s, rule.ratio, rule.threshold, rule.margin, rule.required_gb_s)
        rows.append((tiers[rule.tier], name, *figures, "hidden" if rule.hidden else "exposed"))
    show(columns, rows, "\nthe backward's rule: its FLOPs of a pair over its bytes there and home")


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


def _print_memory(found: TrainingPlan) -> None:
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
