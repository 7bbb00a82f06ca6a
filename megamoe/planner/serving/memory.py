"""What a device holds: weights, cache, work space; and the smallest deployment that would fit where one does not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.catalog.parameters import expert_parameters
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.step import Costs
from megamoe.schedule.formats import value_bytes

PARTS = {  # of Memory, in words
    "experts_gb": "routed experts",
    "weights_gb": "other weights",
    "cache_gb": "cache",
    "activations_gb": "activations",
}
USABLE = 0.92  # of a device's memory: the rest is runtime, captured graphs, link buffers of the runtime, fragmentation


@dataclass(frozen=True, slots=True)
class Memory:
    """GB a device. capacity is what may be used of it."""

    experts_gb: float
    weights_gb: float  # attention, shared experts, MLPs, routers, embedding and head
    cache_gb: float
    activations_gb: float
    capacity_gb: float

    @property
    def total_gb(self) -> float:
        return self.experts_gb + self.weights_gb + self.cache_gb + self.activations_gb

    @property
    def fits(self) -> bool:
        return self.total_gb <= self.capacity_gb


def memory(costs: Costs, d: Deployment) -> Memory:
    """What one device of a deployment holds."""
    model = costs.model
    drafts = 1 if d.mtp else 0
    per_layer = -(-(model.num_experts + d.redundant) // d.ep) * expert_parameters(model)
    experts = (model.moe_layers + drafts) * per_layer * value_bytes(costs.formats.weight)
    return Memory(
        experts_gb=experts / 1e9,
        weights_gb=costs.number(("weights", d.attention_tp, d.head_split, drafts), lambda: _weights(costs, d)) / 1e9,
        cache_gb=d.batch_per_device
        * costs.number(("cache", d.context, d.attention_tp, drafts), lambda: _cache(costs, d))
        / 1e9,
        activations_gb=_activations(costs, d) / 1e9,
        capacity_gb=costs.device.memory_gb * USABLE,
    )


def smallest_ep(costs: Costs, d: Deployment) -> int | None:
    """The smallest EP size with which the same batch and context would fit; None where no EP size does."""
    slots = d.model.num_experts + d.redundant
    sizes = [ep for ep in range(1, slots + 1) if slots % ep == 0]
    return next((ep for ep in sizes if memory(costs, _with_ep(d, ep)).fits), None)


def largest_batch(costs: Costs, d: Deployment) -> int:
    """Sequences (decode) or prompts (prefill) that would fit on a device; 0 where not even one does."""
    now = memory(costs, replace(d, batch_per_device=1))
    room = now.capacity_gb - now.total_gb
    if room < 0:
        return 0
    two = memory(costs, replace(d, batch_per_device=2)).total_gb - now.total_gb
    batch = 1 + int(room / two)
    while batch > 1 and not memory(costs, replace(d, batch_per_device=batch)).fits:
        batch -= 1
    return batch


def _with_ep(d: Deployment, ep: int) -> Deployment:
    tp = d.attention_tp
    return replace(d, ep=ep, devices=ep * tp, head_split=min(d.head_split, ep * tp) if d.head_split else None)


def _weights(costs: Costs, d: Deployment) -> float:
    """Bytes of everything but routed experts: replicated, attention divided by tensor parallelism."""
    count, model = costs.count, costs.model
    kinds = [*costs.attention, *([costs.draft] if d.mtp else [])]
    wide = sum(cost.layers * cost.wide_weights for cost in kinds)
    narrow = sum(cost.layers * cost.weights for cost in kinds) - wide
    split = d.head_split or d.attention_tp
    others = count.shared + count.mlp
    if d.mtp:
        others += count.shared // model.moe_layers + 2 * model.hidden * model.hidden
    tables = count.embedding + count.head
    return (
        (narrow * costs.dense_bytes + 2 * wide) / d.attention_tp
        + others * costs.dense_bytes
        + (2 * count.router + 2 * tables / split)
    )


def _cache(costs: Costs, d: Deployment) -> float:
    """Bytes of one sequence's cache, as far as one device of its attention group holds it, times the group's size."""
    kinds = [*costs.attention, *([costs.draft] if d.mtp else [])]
    kv, keys = costs.formats.kv, costs.formats.index
    return sum(
        cost.layers * cost.cache_bytes(d.context, kv, keys) * d.attention_tp / min(d.attention_tp, cost.splits)
        for cost in kinds
    )


def _activations(costs: Costs, d: Deployment) -> float:
    """Bytes of the tokens under way: streams, queries and outputs of attention, rows there and back, logits."""
    model, expert = costs.model, costs.expert
    tokens = d.new_tokens if d.phase == "decode" else min(d.new_tokens, d.chunk)
    widest = max(cost.query_bytes for cost in costs.attention) / 2
    row = expert.dispatch_bytes + expert.combine_bytes
    per_token = 2 * (2 * costs.streams + 2) * model.hidden + widest + 2 * model.topk * row
    logits = (d.batch_per_device if d.phase == "prefill" else d.new_tokens) * model.vocab * 4
    return tokens * per_token + logits
