"""A whole model that serves: memory, time of a step, tokens per second, cost; and every term of it on request.

    serve(Deployment) -> Serving       explain(Deployment) -> list[Term]

A decode step takes every sequence one token further, or as many as are accepted of those drafted; a prefill step takes
the prompts of a device to their first token. Devices wait for each other in every layer, so all steps are as long as
this one. Nothing of a scheduler, a network front or a queue is in these numbers: they are what the devices can do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.catalog.wording import plural
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.flops import Term
from megamoe.planner.serving.memory import Memory, largest_batch, memory, smallest_ep
from megamoe.planner.serving.step import Costs, Piece, step_pieces

PARTS = ("projections", "attention", "experts", "shared", "head", "mtp")


@dataclass(frozen=True, slots=True)
class Step:
    """Microseconds of one step. projections: all dense products and residual streams beside shared experts."""

    projections_us: float
    attention_us: float  # cores and indexes
    experts_us: float  # routers, and routed experts with their links
    shared_us: float  # shared experts, as far as they do not run while the routed ones wait
    head_us: float
    mtp_us: float

    @property
    def total_us(self) -> float:
        parts = self.projections_us + self.attention_us + self.experts_us + self.shared_us
        return parts + self.head_us + self.mtp_us


@dataclass(frozen=True, slots=True)
class Serving:
    """What a deployment does. tokens: output tokens in decode, prompt tokens (without cached ones) in prefill.

    smallest_ep, smallest_devices, largest_batch are set only where it does not fit: what would, everything else as it
    is; None where nothing of that kind would.
    """

    deployment: Deployment
    memory: Memory
    step: Step
    tpot_ms: float | None
    ttft_ms: float | None
    tokens_per_s_per_device: float
    tokens_per_s_per_user: float
    usd_per_million_tokens: float | None
    tokens_per_s_per_mw: float | None
    smallest_ep: int | None = None
    largest_batch: int | None = None

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def smallest_devices(self) -> int | None:
        return None if self.smallest_ep is None else self.smallest_ep * self.deployment.attention_tp


def costs_of(d: Deployment) -> Costs:
    """The part of a deployment's costs that `search` keeps between deployments."""
    return Costs(d.model, d.hardware, d.profile, d.formats)


def serve(d: Deployment, costs: Costs | None = None) -> Serving:
    """Memory, step and rates of a deployment. costs: those of another one with the same model, device and formats."""
    costs = costs or costs_of(d)
    held = memory(costs, d)
    served = measure(costs, d, held)
    if held.fits:
        return served
    return replace(served, smallest_ep=smallest_ep(costs, d), largest_batch=largest_batch(costs, d))


def measure(costs: Costs, d: Deployment, held: Memory) -> Serving:
    """Step and rates of a deployment whose memory is known; what `serve` does without advice on what would fit."""
    step = _step(step_pieces(costs, d))
    seconds = step.total_us / 1e6
    if d.phase == "decode":
        user, tpot, ttft = d.accepted / seconds, 1e3 * seconds / d.accepted, None
        tokens = d.batch_per_device * d.accepted
    else:
        user, tpot, ttft = (d.context - d.cached) / seconds, None, 1e3 * seconds
        tokens = d.new_tokens
    rate = tokens / seconds
    return Serving(d, held, step, tpot, ttft, rate, user, *_money(d, rate))


def _step(pieces: list[Piece]) -> Step:
    totals = dict.fromkeys(PARTS, 0.0)
    for piece in pieces:
        totals[piece.part] += piece.total_us
    return Step(*totals.values())


def _money(d: Deployment, rate: float) -> tuple[float | None, float | None]:
    """Dollars per million tokens; tokens per second of a megawatt, all-in power where it is known, else the chip's."""
    price, all_in, chip = d.hardware.usd_per_hour, d.hardware.power_kw_all_in, d.hardware.power_w
    kw = all_in.value if all_in else chip.value / 1e3 if chip else None
    usd = None if price is None else price.value / 3600 / rate * 1e6
    return usd, None if kw is None else rate / kw * 1e3


def explain(d: Deployment) -> list[Term]:
    """Every term of `serve(d)`, in the order in which they add up."""
    costs = costs_of(d)
    pieces = step_pieces(costs, d)
    served = serve(d, costs)
    terms = [*_batch_terms(d), *_memory_terms(costs, d, served.memory), *_layer_terms(costs, d)]
    terms += [_piece_term(costs, piece) for piece in pieces]
    return terms + _result_terms(d, served)


def _batch_terms(d: Deployment) -> list[Term]:
    if d.phase == "prefill":
        numbers = f"{d.batch_per_device} x ({d.context} - {d.cached})"
        return [Term("tokens of a rank and step", "prompts x (context - cached)", numbers, d.new_tokens, "tokens")]
    numbers = f"{d.batch_per_device} x (1 + {d.mtp})"
    accepted = f"1 + {d.accept:g}" if d.accept is not None else "1 + 0.7 + 0.7^2 + ... of the drafted"
    return [
        Term("tokens of a rank and step", "sequences x (1 + drafted)", numbers, d.new_tokens, "tokens"),
        Term("tokens a step yields a sequence", "1 + accepted", accepted, d.accepted, "tokens"),
    ]


def _memory_terms(costs: Costs, d: Deployment, held: Memory) -> list[Term]:
    model, expert = costs.model, costs.expert
    local = -(-(model.num_experts + d.redundant) // d.ep)
    layers = model.moe_layers + (1 if d.mtp else 0)
    experts = f"{layers} x {local} x {expert.weight_bytes / 1e6:.2f} MB ({expert.weight_format})"
    cache = " + ".join(
        f"{cost.layers} x {cost.cache_bytes(d.context, costs.formats.kv, costs.formats.index) / 1e6:.3f} MB {cost.kind}"
        for cost in costs.attention
    )
    split = d.head_split or d.attention_tp
    weights = f"attention / {d.attention_tp}, shared experts, MLPs, routers, embedding and head / {split}"
    caches = f"{d.batch_per_device} x ({cache})"
    return [
        Term("memory: experts", "layers x experts of a device x bytes", experts, held.experts_gb, "GB"),
        Term("memory: other weights", "parameters x bytes", weights, held.weights_gb, "GB"),
        Term("memory: cache", "sequences x layers x bytes of a sequence", caches, held.cache_gb, "GB"),
        Term("memory: activations", "tokens x bytes", f"{d.new_tokens} tokens", held.activations_gb, "GB"),
        Term("memory: total", "of usable", f"of {held.capacity_gb:.1f} GB", held.total_gb, "GB"),
    ]


def _layer_terms(costs: Costs, d: Deployment) -> list[Term]:
    times = (
        next(piece.times for piece in step_pieces(costs, d) if piece.name == "routed experts") // costs.model.moe_layers
    )
    tokens = d.new_tokens / times
    layer = costs.layer(d, tokens)
    rows = f"EP{d.ep}, {tokens:g} tokens a rank, top-{costs.expert.topk}, {d.routing}"
    touched = f"{layer.experts_touched:g} x {costs.expert.weight_bytes / 1e6:.2f} MB"
    link = f"{costs.expert.dispatch_format} there, {costs.expert.combine_format} back"
    return [
        Term("routed: rows of the busiest rank", "tokens x top-k", rows, layer.rows, "rows"),
        Term("routed: weights read", "experts touched x bytes", touched, layer.memory_us, "us"),
        Term("routed: products", "rows x 6hd / rate", f"{layer.rows:g} rows", layer.compute_us, "us"),
        Term("routed: links", "rows x bytes / rate", link, layer.communication_us, "us"),
        Term("routed: links that show", "core - alone", plural(layer.waves, "wave"), layer.exposed_us, "us"),
        Term("routed: fixed", "kernel + barriers + staging", "", layer.fixed_us, "us"),
    ]


def _piece_term(costs: Costs, piece: Piece) -> Term:
    if piece.name == "routed experts":
        formula, numbers = "layers x layer model", f"{piece.times} x {piece.us:.1f} us"
    else:
        formula = "times x (p-norm(FLOPs / rate, bytes / rate) + launches x kernel_us), p = overlap"
        numbers = f"{piece.times} x (p-norm({piece.flops / 1e9:.3g} GFLOP in {piece.compute_us:.1f} us, "
        numbers += f"{piece.nbytes / 1e6:.3g} MB in {piece.memory_us:.1f} us) + {piece.kernels} x {costs.kernel_us:g})"
    if piece.call_us:
        formula, numbers = f"{formula} + attention_us", f"{numbers} + {piece.times} x {piece.call_us:g}"
    if piece.hidden_us:
        formula, numbers = f"{formula} - hidden", f"{numbers} - {piece.times} x {piece.hidden_us:.1f} hidden"
    return Term(f"{piece.part}: {piece.name}", formula, numbers, piece.total_us / 1e3, "ms")


def _result_terms(d: Deployment, served: Serving) -> list[Term]:
    step = served.step
    parts = " + ".join(f"{getattr(step, f'{part}_us'):.0f}" for part in PARTS)
    total = step.total_us / 1e3
    terms = [Term("step", " + ".join(PARTS), f"{parts} us", total, "ms")]
    if served.tpot_ms is not None:
        terms.append(Term("TPOT", "step / accepted", f"{total:.3f} / {d.accepted:.2f}", served.tpot_ms, "ms"))
        numbers = f"{d.batch_per_device} x {d.accepted:.2f} / {total:.3f} ms"
    else:
        terms.append(Term("TTFT", "step", f"{total:.3f}", total, "ms"))
        numbers = f"{d.new_tokens} / {total:.3f} ms"
    rate = served.tokens_per_s_per_device
    return [*terms, Term("tokens per second and device", "tokens / step", numbers, rate, "tokens/s")]
