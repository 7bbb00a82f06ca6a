"""Every term of a plan: what it is called, its formula, the formula with its numbers, and what comes out.

The numbers are arithmetic that can be done again: x multiplies, ^ raises to a power, log2 and ceil are what they are.
"""

# T tokens of a rank   h hidden   d intermediate   n rows of an expert   P ranks (EP)

from __future__ import annotations

from megamoe.planner.answer import Answer
from megamoe.planner.layer.cost import Device, Expert
from megamoe.planner.layer.plan import Plan
from megamoe.planner.layer.rule import GATED_FLOPS, PLAIN_FLOPS, Rule, tiers
from megamoe.planner.layer.traffic import traffic
from megamoe.planner.links import Links
from megamoe.planner.serving.flops import Term
from megamoe.planner.serving.serving import explain as explain_serving
from megamoe.schedule.formats import value_bytes


def explain(found: Answer) -> list[Term]:
    """The rule, the traffic, the layer, and with a workload memory and serving."""
    slowest = [_slowest_term(Links.parse(text)) for text in found.question.links]
    terms = [*slowest, *rule_terms(found.plan), *traffic_terms(found.plan), *layer_terms(found.plan)]
    if found.serving is not None:
        own_layer = found.question.tokens_per_rank is None
        served = explain_serving(found.serving.deployment)
        terms += [term for term in served if not (own_layer and term.name.startswith("routed: "))]
    return terms


def _slowest_term(links: Links) -> Term:
    name = f"slowest {links.tier} link, rank {links.slowest}"
    return Term(name, "least of the ranks' rates", f"min({links.words})", min(links.gb_s), "GB/s")


def _g(value: float) -> str:
    """Seven digits, as one would type them: 1234567.8 -> 1234568    0.1 -> 0.1"""
    text = f"{value:.7g}"
    return f"{value:.0f}" if "e+" in text and value < 1e16 else text


def rule_terms(planned: Plan) -> list[Term]:
    terms = []
    for name, rules in (("paper", planned.rules), ("counted", planned.counted), ("achieved", planned.achieved)):
        for rule in rules:
            terms += _tier_terms(planned, name, rule)
    return terms


def _tier_terms(planned: Plan, count: str, rule: Rule) -> list[Term]:
    """Threshold, C / B, margin and what is needed, of one tier by one count."""
    request, name = planned.request, f"{count}, {planned.request.hardware.tier_names[rule.tier]}"
    expert = request.expert
    flops = GATED_FLOPS if expert.gated else PLAIN_FLOPS
    # the paper counts bytes of values alone; what is left of the threshold then is the bytes of both journeys
    per_value = flops * expert.intermediate / rule.threshold / rule.f_remote
    back = value_bytes(expert.combine_format)
    there = per_value - back
    limit = f"{flops} x {expert.intermediate} / ({_g(there)} + {_g(back)}) / {_g(rule.f_remote)}"
    rates = f"{_g(rule.tflops)} x 1000 / {_g(rule.gb_s)}"
    needed = f"{_g(rule.tflops)} x 1000 / {_g(rule.threshold)}"
    formula = f"{flops}d / (b_dispatch + b_combine) / f_remote"
    return [
        Term(f"{name}: threshold", formula, limit, rule.threshold, "FLOPs/Byte"),
        Term(f"{name}: C / B", "TFLOP/s / GB/s", rates, rule.ratio, "FLOPs/Byte"),
        Term(f"{name}: margin", "threshold / (C / B)", f"{_g(rule.threshold)} / {_g(rule.ratio)}", rule.margin, ""),
        Term(f"{name}: needed", "TFLOP/s / threshold", needed, rule.required_gb_s, "GB/s"),
    ]


def traffic_terms(planned: Plan) -> list[Term]:
    request = planned.request
    sent, expert = traffic(request), request.expert
    whole = f"{expert.topk} x {expert.hidden} x ({_g(expert.dispatch_bytes / expert.hidden)} + "
    whole += f"{_g(expert.combine_bytes / expert.hidden)})"
    terms = [
        Term(
            "a token's bytes across devices", "k h (b_dispatch + b_combine) (1 - 1/P)",
            f"{whole} x (1 - 1 / {sent.ep})", sent.across_devices_bytes, "bytes",
        )
    ]  # fmt: skip
    if sent.domains > 1:
        terms.append(
            Term(
                "a token's bytes across domains", "k h (b_dispatch + b_combine) (1 - G/P)",
                f"{whole} x (1 - {sent.domain} / {sent.ep})", sent.across_domains_bytes, "bytes",
            )
        )  # fmt: skip
    return terms


# ---- the layer ----


def layer_terms(planned: Plan) -> list[Term]:
    """In the order in which they add up to layer_us. With skewed routing, times of single experts are means."""
    layer = planned.layer
    terms = _row_terms(planned)
    if layer.experts_touched:
        terms += [*_work_terms(planned), *_link_terms(planned), *_wave_terms(planned)]
    terms += _fixed_terms(planned)
    parts = f"{_g(layer.fixed_us)} + {_g(layer.core_us)} + {_g(layer.sum_us)}"
    return [*terms, Term("layer", "fixed + waves + slot sum", parts, layer.layer_us, "us")]


def _row_terms(planned: Plan) -> list[Term]:
    request, layer, expert = planned.request, planned.layer, planned.request.expert
    if request.routing == "balanced":
        numbers = f"{request.tokens_per_rank} x {expert.topk}"
        if abs(layer.rows - request.tokens_per_rank * expert.topk) > 1e-6 * layer.rows:
            numbers = f"{_g(layer.experts_touched)} x {_g(layer.rows / layer.experts_touched)}"
        formula = "T k" if " x " + str(expert.topk) in numbers else "experts that have rows x rows of each"
    else:
        formula, numbers = f"busiest of {request.ep} ranks, {request.routing}", _g(layer.rows)
    rows = Term("rows of the busiest rank", formula, numbers, layer.rows, "rows")
    slots = request.model.num_experts + request.redundant
    local = -(-slots // request.ep)
    touched = f"experts of a rank that have rows, of ceil({slots} / {request.ep}) = {local}"
    return [rows, Term("experts whose weights are read", touched, _g(layer.experts_touched), layer.experts_touched, "")]


def _work_terms(planned: Plan) -> list[Term]:
    request, layer = planned.request, planned.layer
    expert, device = request.expert, request.device
    products = GATED_FLOPS if expert.gated else PLAIN_FLOPS
    count, reached = layer.experts_touched, device.tflops * device.compute_efficiency
    padded = _padded(planned, expert, device)
    flops = f"{_g(count)} x {products} x {expert.hidden} x {expert.intermediate} x {padded}"
    read = f"({_g(count)} x {_g(expert.weight_bytes)} + {_g(layer.rows)} x {_g(expert.row_bytes)})"
    tb_s = device.memory_bytes_s / 1e12
    power = _g(device.overlap)
    alone = f"({_g(layer.compute_us)}^{power} + {_g(layer.memory_us)}^{power})^(1 / {power})"
    balanced = request.routing == "balanced"
    return [
        Term(
            "compute", f"experts x {products}hd ceil(n / tile) tile / (peak x efficiency)",
            f"{flops} / ({_g(device.tflops)} x 10^12 x {_g(device.compute_efficiency)}) x 10^6", layer.compute_us, "us",
        ),
        Term(
            "memory", "(weights read + rows) / (TB/s x efficiency)",
            f"{read} / ({_g(tb_s)} x 10^12 x {_g(device.memory_efficiency)}) x 10^6", layer.memory_us, "us",
        ),
        Term(
            "both, without links", "sum over experts of (compute^p + memory^p)^(1/p)",
            alone if balanced else _g(layer.alone_us), layer.alone_us, "us",
        ),
        Term(
            "rate reached", "peak x efficiency",
            f"{_g(device.tflops)} x {_g(device.compute_efficiency)}", reached, "TFLOP/s",
        ),
    ]  # fmt: skip


def _padded(planned: Plan, expert: Expert, device: Device) -> str:
    """Rows of an expert in whole tiles; with skewed routing the mean that the compute time amounts to."""
    layer = planned.layer
    if planned.request.routing == "balanced":
        rows = layer.rows / layer.experts_touched
        return f"ceil({_g(rows)} / {device.tile_rows}) x {device.tile_rows}"
    peak = device.tflops * device.compute_efficiency
    return _g(layer.compute_us * peak * 1e6 / expert.flops / layer.experts_touched)


def _link_terms(planned: Plan) -> list[Term]:
    """Both journeys over the tier that is slowest for them."""
    request, layer = planned.request, planned.layer
    expert, device = request.expert, request.device
    inside = min(request.ep, device.scaleup_domain)
    found = tiers(request.ep, device.scaleup_gb_s, device.scaleup_domain, device.nic_gb_s)
    if not found:
        return []
    rates = {"scale-up": device.link_bytes_s(inside) / 1e9, "nic": device.nic_bytes_s / 1e9}
    slowest = max(found, key=lambda tier: tier.f_remote / rates[tier.name])
    there, back = expert.dispatch_bytes, expert.combine_bytes
    own = request.tokens_per_rank * expert.topk
    fuller = max(layer.rows * there + own * back, layer.rows * back + own * there) / layer.rows / (there + back)
    if slowest.name == "nic":
        rate = f"{_g(device.nic_gb_s or 0)} x {_g(device.nic_efficiency)}"
    else:
        crowd = min(1.0, (8 / inside) ** device.link_congestion)
        rate = f"{_g(device.scaleup_gb_s)} x {_g(device.link_efficiency)} x {_g(crowd)}"
    shared = f"{_g(slowest.f_remote)} x {_g(fuller)} / ({rate} x 1000)"
    formula = "rows x bytes x f_remote x fuller way / (GB/s x efficiency x congestion)"
    terms = [
        Term(
            f"link, {request.hardware.tier_names[slowest.name]}: {name}",
            formula,
            f"{_g(layer.rows)} x {_g(each)} x {shared}",
            us,
            "us",
        )
        for name, each, us in (("dispatch", there, layer.dispatch_us), ("combine", back, layer.combine_us))
    ]
    both = f"{_g(layer.dispatch_us)} + {_g(layer.combine_us)}"
    return [*terms, Term("communication", "dispatch + combine", both, layer.communication_us, "us")]


def _wave_terms(planned: Plan) -> list[Term]:
    """The schedule as it was played: what the rank computes, what it waits for, what is left at the end."""
    request, layer, device = planned.request, planned.layer, planned.request.device
    exchange = 2 * device.exchange_us if request.ep > device.scaleup_domain else 0.0
    busy = layer.core_us - layer.stalls_us - layer.tail_us - exchange
    if request.routing == "balanced":
        p, waves = _g(device.overlap), layer.waves
        numbers = (
            f"({_g(layer.alone_us)}^{p} + {_g(layer.communication_us)}^{p})^(1 / {p}) + {waves} x {_g(device.wave_us)}"
        )
    else:
        numbers = _g(busy)
    parts = f"{_g(busy)} + {_g(layer.stalls_us)} + {_g(layer.tail_us)}" + (f" + {_g(exchange)}" if exchange else "")
    exposed = f"{_g(layer.core_us)} - {_g(layer.alone_us)}"
    formula = "sum over experts of (alone^p + link^p)^(1/p) + waves x wave_us"
    stalls, tail = "played: compute that waits for rows, head included", "played: last results under way"
    terms = [
        Term("waves: busy", formula, numbers, busy, "us"),
        Term("waves: stalls", stalls, _g(layer.stalls_us), layer.stalls_us, "us"),
        Term("waves: tail", tail, _g(layer.tail_us), layer.tail_us, "us"),
    ]
    if exchange:
        between = "2 x exchange_us, between domains"
        terms.append(Term("waves: exchange", between, f"2 x {_g(device.exchange_us)}", exchange, "us"))
    whole = "busy + stalls + tail" + (" + exchange" if exchange else "")
    return [
        *terms,
        Term("waves", whole, parts, layer.core_us, "us"),
        Term("exposed", "waves - both without links", exposed, layer.exposed_us, "us"),
    ]


def _fixed_terms(planned: Plan) -> list[Term]:
    request, layer = planned.request, planned.layer
    expert, device = request.expert, request.device
    tb_s = f"({_g(device.memory_bytes_s / 1e12)} x 10^12 x {_g(device.memory_efficiency)}) x 10^6"
    values = f"{request.tokens_per_rank} x {expert.hidden}"
    staged = f"{values} x (2 + {_g(value_bytes(expert.dispatch_format))} + 4) / {tb_s}"
    fixed = f"{_g(device.fixed_us)} + {_g(device.barrier_us)} x log2({request.ep}) + {_g(device.staging_us)} + {staged}"
    slots = f"{values} x ({expert.topk} x {_g(value_bytes(expert.combine_format))} + 2) / {tb_s}"
    return [
        Term("fixed", "kernel + barriers + staging + tokens read and written", fixed, layer.fixed_us, "us"),
        Term("slot sum", "T h (k b_combine + 2) / (TB/s x efficiency)", slots, layer.sum_us, "us"),
    ]
