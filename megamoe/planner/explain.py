"""Every term of a plan: what it is called, its formula, the formula with its numbers, and what comes out.

The numbers are arithmetic that can be done again: x multiplies, ^ raises to a power, log2 and ceil are what they are.
"""

# T tokens of a rank   h hidden   d intermediate   n rows of an expert   P ranks (EP)

from __future__ import annotations

from megamoe.planner.answer import Answer
from megamoe.planner.layer.plan import Plan
from megamoe.planner.layer.rule import GATED_FLOPS, PLAIN_FLOPS, Rule
from megamoe.planner.layer.traffic import traffic
from megamoe.planner.layer_terms import g, layer_terms
from megamoe.planner.links import Links
from megamoe.planner.serving.flops import Term
from megamoe.planner.serving.serving import explain as explain_serving
from megamoe.planner.training.terms import training_terms
from megamoe.schedule.formats import value_bytes


def explain(found: Answer) -> list[Term]:
    """The rule, the traffic, the layer, and with a workload memory and serving."""
    slowest = [_slowest_term(Links.parse(text)) for text in found.question.links]
    terms = [*slowest, *rule_terms(found.plan), *traffic_terms(found.plan), *layer_terms(found.plan)]
    if found.training is not None:
        terms += training_terms(found.training)
    if found.serving is not None:
        own_layer = found.question.tokens_per_rank is None
        served = explain_serving(found.serving.deployment)
        terms += [term for term in served if not (own_layer and term.name.startswith("routed: "))]
    return terms


def _slowest_term(links: Links) -> Term:
    name = f"slowest {links.tier} link, rank {links.slowest}"
    return Term(name, "least of the ranks' rates", f"min({links.words})", min(links.gb_s), "GB/s")


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
    there, formula = per_value - back, f"{flops}d / (b_dispatch + b_combine) / f_remote"
    limit = f"{flops} x {expert.intermediate} / ({g(there)} + {g(back)}) / {g(rule.f_remote)}"
    if rule.f_dispatch is not None:  # node-limited: fewer tokens cross than results
        there *= rule.f_remote / rule.f_dispatch
        formula = f"{flops}d / (b_dispatch f_dispatch + b_combine f_remote)"
        sent = f"{g(there)} x {g(rule.f_dispatch)} + {g(back)} x {g(rule.f_remote)}"
        limit = f"{flops} x {expert.intermediate} / ({sent})"
    rates = f"{g(rule.tflops)} x 1000 / {g(rule.gb_s)}"
    needed = f"{g(rule.tflops)} x 1000 / {g(rule.threshold)}"
    return [
        Term(f"{name}: threshold", formula, limit, rule.threshold, "FLOPs/Byte"),
        Term(f"{name}: C / B", "TFLOP/s / GB/s", rates, rule.ratio, "FLOPs/Byte"),
        Term(f"{name}: margin", "threshold / (C / B)", f"{g(rule.threshold)} / {g(rule.ratio)}", rule.margin, ""),
        Term(f"{name}: needed", "TFLOP/s / threshold", needed, rule.required_gb_s, "GB/s"),
    ]


def traffic_terms(planned: Plan) -> list[Term]:
    request = planned.request
    sent, expert = traffic(request), request.expert
    whole = f"{expert.topk} x {expert.hidden} x ({g(expert.dispatch_bytes / expert.hidden)} + "
    whole += f"{g(expert.combine_bytes / expert.hidden)})"
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
                f"{whole} x (1 - {sent.fewest} / {sent.ep})", sent.across_domains_bytes, "bytes",
            )
        )  # fmt: skip
        there, back = f"{g(expert.dispatch_bytes)}", f"{expert.topk} x {g(expert.combine_bytes)}"
        terms.append(
            Term(
                "a token's bytes, node-limited", "(P/G - 1) found h b_dispatch + k h b_combine (1 - G/P)",
                f"({sent.ep} / {sent.fewest} - 1) x {g(sent.found_in_domain)} x {there} + "
                f"{back} x (1 - {sent.fewest} / {sent.ep})", sent.node_limited_bytes, "bytes",
            )
        )  # fmt: skip
    return terms
