"""Every term of a training step: the backward's rule, its products, its links, and what the forward keeps."""

# T tokens of a rank   U tokens from other ranks   n rows   h hidden   d intermediate   B bytes of a token   P ranks

from __future__ import annotations

from megamoe.planner.layer.rule import Rule
from megamoe.planner.layer.stacks import sent_once
from megamoe.planner.layer_terms import g
from megamoe.planner.serving.flops import Term
from megamoe.planner.training.memory import received, token_bytes
from megamoe.planner.training.plan import TrainingPlan, backward_flops


def training_terms(found: TrainingPlan) -> list[Term]:
    """After the terms of the forward."""
    terms = []
    for name, rules in (("paper", found.rules), ("counted", found.counted), ("achieved", found.achieved)):
        for rule in rules:
            terms += _rule_terms(found, name, rule)
    return [*terms, *_time_terms(found), *_memory_terms(found)]


def _rule_terms(found: TrainingPlan, count: str, rule: Rule) -> list[Term]:
    request = found.forward.request
    name = f"backward, {count}, {request.hardware.tier_names[rule.tier]}"
    flops, d = backward_flops(request.expert.gated, found.saved), request.expert.intermediate
    per_value = flops * d / rule.threshold / rule.f_remote
    limit = f"{flops} x {d} / {g(per_value)} / {g(rule.f_remote)}"
    return [
        Term(f"{name}: threshold", f"{flops}d / (b_out + b_home) / f_remote", limit, rule.threshold, "FLOPs/Byte"),
        Term(f"{name}: C / B", "TFLOP/s / GB/s", f"{g(rule.tflops)} x 1000 / {g(rule.gb_s)}", rule.ratio, "FLOPs/Byte"),
        Term(f"{name}: margin", "threshold / (C / B)", f"{g(rule.threshold)} / {g(rule.ratio)}", rule.margin, ""),
    ]


def _time_terms(found: TrainingPlan) -> list[Term]:
    request, back = found.forward.request, found.backward
    once = sent_once(request.expert, request.ep)
    way = f"{g(back.rows)} rows, {found.gradient_format}"
    sent = f"{way}, {g(once)} a row"
    products = f"{g(back.recompute_us)} + {g(back.data_us)} + {g(back.weights_us)}"
    alone = f"{products} + {g(back.alone_us - back.recompute_us - back.data_us - back.weights_us)} of launches"
    whole = f"{g(back.fixed_us)} + {g(back.core_us)} + {g(back.sum_us)}"
    step = f"{g(found.forward.layer.layer_us)} + {g(back.backward_us)}"
    exposed = f"{back.core_us:.10g} - {back.alone_us:.10g}"
    again = "not computed again" if found.saved == "activations" else f"{g(back.rows)} rows"
    formula = "p-norm of tiles and memory, expert by expert"
    return [
        Term("backward: Linear-1 again", formula, again, back.recompute_us, "us"),
        Term("backward: data gradients", formula, f"{g(back.rows)} rows", back.data_us, "us"),
        Term("backward: weight gradients", f"{formula}; no link", f"{g(back.rows)} rows", back.weights_us, "us"),
        Term("backward: without links", "products + launches of the waves", alone, back.alone_us, "us"),
        Term(
            "backward: dispatch", "rows x tokens a row x bytes / link", sent, back.dispatch_us, "us"
        ),
        Term("backward: combine", "rows x bytes / link", way, back.combine_us, "us"),
        Term("backward: waves", "played, with links in the way of products", g(back.core_us), back.core_us, "us"),
        Term("backward: exposed", "waves - without links", exposed, back.exposed_us, "us"),
        Term("backward", "fixed + waves + slot sum", whole, back.backward_us, "us"),
        Term("step", "forward + backward", step, found.step_us, "us"),
    ]  # fmt: skip


def _memory_terms(found: TrainingPlan) -> list[Term]:
    request, held = found.forward.request, found.memory
    expert, rows = request.expert, found.forward.layer.rows
    tokens, said = request.tokens_per_rank, f"8 x {request.ep} x (1 + 2 x {expert.num_experts}) + 8"
    kept, formula = said, "8 P (1 + 2 E) + 8"
    if found.saved != "dispatch-again":
        formula = f"(T + U) B + 12 n + {formula}"
        both = f"({tokens} + {g(received(expert, request.ep, rows))}) x {token_bytes(expert)}"
        kept = f"{both} + 12 x {g(rows)} + {said}"
    if found.saved == "activations":
        width = 2 * expert.products[0][1]
        formula = f"({'4 d' if expert.gated else '2 d'} + 8) n + {formula}"
        kept = f"({width} + 8) x {g(rows)} + {kept}"
    layers = f"{request.model.moe_layers} x {g(held.kept_layer_gb)}"
    weights = "4 + 4 + 8 bytes a weight, and what both passes multiply by"
    parts = " + ".join(g(each) for each in (held.masters_gb, held.gradients_gb, held.optimizer_gb, held.packed_gb))
    return [
        Term("kept by a forward of the layer", formula, f"({kept}) / 10^9", held.kept_layer_gb, "GB"),
        Term("kept, all layers", "layers x kept", layers, held.kept_gb, "GB"),
        Term("weights, gradients, optimiser", weights, parts, held.memory.experts_gb, "GB"),
    ]
