"""FLOPs and cached bytes of one decoded token, term by term, and how a model compares with an older one.

`efficiency` answers the figures of the DeepSeek-V4 report (abstract and section 1): at one million tokens of context,
against V3.2, V4-Pro needs 27 % of the FLOPs of a token and 10 % of the cache, V4-Flash 10 % and 7 %. The report counts
"equivalent FP8 FLOPs" and says no more about how; `WORK` is the reading taken here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megamoe.catalog import Model, parameters
from megamoe.planner.serving.attention import AttentionCost, attention_cost
from megamoe.schedule.formats import value_bytes

# FP8 work of one FLOP in each format: time on a device whose peak doubles as bits halve. FP4 weights against FP8
# activations run at the FP8 peak (V4 report, section 1); the index of V4 multiplies FP4 with FP4 (2.3.4).
WORK = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
ASSUMPTIONS = (
    "one FLOP costs 2, 1 or 0.5 FP8 FLOPs in BF16, FP8, FP4; FP4 weights against FP8 activations cost 1",
    "attention cores compute in BF16 (FlashMLA's and V4's reference kernels unpack the 8-bit cache first)",
    "the index computes in FP4 in V4 (report 2.3.4) and in FP8 in V3.2",
    "router, compressors, head weights of the index and the output head are BF16, other projections FP8",
    "caches: 8-bit with BF16 rope dims in both, index keys FP4 in V4 and FP8 in V3.2, all with their scales",
    "no embedding, MTP layer, norm, softmax, rope, top-k or mHC: no matrix product, or not part of the main model",
)


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a result: the formula, the same with its numbers, and what comes out."""

    name: str
    formula: str
    numbers: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Efficiency:
    """A model against a baseline at a context: shares of one, and the terms of both."""

    model: str
    baseline: str
    context: int
    flops_share: float
    cache_share: float
    flops: tuple[Term, ...]
    baseline_flops: tuple[Term, ...]
    cache: tuple[Term, ...]
    baseline_cache: tuple[Term, ...]
    assumptions: tuple[str, ...] = ASSUMPTIONS


def efficiency(model: Model, baseline: Model, context: int = 1 << 20) -> Efficiency:
    """FLOPs of one token (FP8 equivalents) and cache of one sequence, as shares of the baseline's.

    deepseek-v4-pro against deepseek-v3.2 at 1048576 tokens -> 0.27 and 0.10 in the V4 report
    """
    if context < 1:
        raise ValueError(f"context is {context} tokens; it must be 1 or more")
    flops, baseline_flops = flops_terms(model, context), flops_terms(baseline, context)
    cache, baseline_cache = cache_terms(model, context), cache_terms(baseline, context)
    return Efficiency(
        model.name, baseline.name, context, _sum(flops) / _sum(baseline_flops), _sum(cache) / _sum(baseline_cache),
        tuple(flops), tuple(baseline_flops), tuple(cache), tuple(baseline_cache),
    )  # fmt: skip


def attention_costs(model: Model) -> list[AttentionCost]:
    """The cost record of every kind of attention that a model has."""
    return [attention_cost(attention, model.hidden) for attention in model.attention]


def index_format(model: Model) -> str:
    """How a model's index keys are kept: V4 was trained for FP4 (report 5.2.1), V3.2 uses FP8."""
    return "fp4" if any(attention.kind == "csa" for attention in model.attention) else "fp8"


def flops_terms(model: Model, context: int) -> list[Term]:
    """GFLOP of one decoded token at a context, in FP8 equivalents, term by term."""
    count = parameters(model)
    costs = attention_costs(model)
    wide = sum(cost.layers * cost.wide_weights for cost in costs)
    head = count.head or count.embedding
    return [
        _linear("routed experts", count.routed_active, _compute_format(model.weight_format)),
        _linear("shared experts and MLPs", count.shared + count.mlp, _compute_format(model.dense_format)),
        _linear("attention projections", count.attention - wide, _compute_format(model.dense_format)),
        _linear("compressors, index weights, router, head", wide + count.router + head, "bf16"),
        *(_core(cost, context) for cost in costs),
        *(_index(cost, context, index_format(model)) for cost in costs if cost.index_pair_flops),
    ]


def cache_terms(model: Model, context: int, kv_format: str = "fp8") -> list[Term]:
    """GB of cache of one sequence at a context, kind by kind."""
    terms = []
    for cost in attention_costs(model):
        keys = index_format(model)
        size = cost.cache_bytes(context, kv_format, keys)
        numbers = f"{cost.layers} x ({cost.stored(context)} x {cost.entry_bytes(kv_format)}"
        numbers += f" + {cost.indexed(context)} x {cost.index_entry_bytes(keys)} + {cost.state_bytes})"
        formula = "layers x (entries x bytes + index keys x bytes + state)"
        terms.append(Term(f"{cost.kind} cache", formula, numbers, cost.layers * size / 1e9, "GB"))
    return terms


def _compute_format(weight_format: str) -> str:
    return "bf16" if value_bytes(weight_format) == 2 else "fp8"


def _linear(name: str, weights: int, fmt: str) -> Term:
    numbers = f"2 x {weights / 1e9:.3f} G x {WORK[fmt]:g} ({fmt})"
    return Term(name, "2 x parameters x work", numbers, 2 * weights * WORK[fmt] / 1e9, "GFLOP")


def _core(cost: AttentionCost, context: int) -> Term:
    numbers = f"{cost.layers} x {cost.entries(context)} x {cost.pair_flops} x {WORK['bf16']:g} (bf16)"
    value = cost.layers * cost.core_flops(context) * WORK["bf16"] / 1e9
    return Term(f"{cost.kind} core", "layers x entries x FLOPs of a pair x work", numbers, value, "GFLOP")


def _index(cost: AttentionCost, context: int, fmt: str) -> Term:
    numbers = f"{cost.layers} x {cost.indexed(context)} x {cost.index_pair_flops} x {WORK[fmt]:g} ({fmt})"
    value = cost.layers * cost.index_flops(context) * WORK[fmt] / 1e9
    return Term(f"{cost.kind} index", "layers x keys x FLOPs of a pair x work", numbers, value, "GFLOP")


def _sum(terms: Iterable[Term]) -> float:
    return sum(term.value for term in terms)
