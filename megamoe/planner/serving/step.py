"""The pieces of one step of a model on one device: each as FLOPs, bytes and launches, and the microseconds they take.

A piece takes the p-norm of its compute and its memory time (p: the profile's overlap, as in the layer model) and
`kernel_us` for every launch that waits for the one before. Routed experts are the layer model's.
"""

# T tokens a device takes through a layer   S sequences of a device   h hidden   n tokens in a sequence's cache

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from megamoe.catalog import Hardware, Model, Parameters, Profile, load_profile, parameters
from megamoe.planner.layer.cost import LayerTime
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.stacks import Stack, stack_time
from megamoe.planner.serving.attention import DENSE_KINDS, AttentionCost, attention_cost, draft_attention
from megamoe.planner.serving.deployment import Deployment, Formats
from megamoe.planner.serving.flops import attention_costs
from megamoe.schedule.formats import value_bytes

V4_STREAMS = 4  # residual streams that mHC carries (V4 report 2.2, hc_mult of its config.json)
ROUTER_KERNELS, MHC_KERNELS, HEAD_KERNELS, MLP_KERNELS = 3, 2, 4, 4  # norm, gate, top-k; mix in, out; norm to sample
DRAFT_KERNELS = 3  # two norms and the projection that joins hidden state and embedding


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a step, `times` times. us is of one of them; part groups pieces in `Step`."""

    name: str
    part: str
    times: int
    us: float
    flops: float
    nbytes: float
    compute_us: float
    memory_us: float
    kernels: int
    hidden_us: float = 0.0  # of one: what runs behind something else and does not count
    call_us: float = 0.0  # of one, in `us`: what a call takes beyond a launch

    @property
    def total_us(self) -> float:
        return self.times * (self.us - self.hidden_us)

    def hiding(self, hidden_us: float) -> Piece:
        """The same with so much of it behind something else. dataclasses.replace() takes ten times as long."""
        return Piece(
            self.name, self.part, self.times, self.us, self.flops, self.nbytes, self.compute_us, self.memory_us,
            self.kernels, hidden_us, self.call_us,
        ) if hidden_us else self  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeCore:
    """What the attention kernel of a device reaches in decode: TFLOP/s, and bytes of the cache in a microsecond.

    tflops where it multiplies in BF16, as kernels do that unpack an 8-bit cache or whose entries are chosen;
    eight_bit_tflops where the products of a dense 8-bit cache are 8-bit too, None where no kernel is known that does so
    """

    tflops: float
    eight_bit_tflops: float | None
    bytes_us: float

    @classmethod
    def of(cls, hardware: Hardware, tflops: float, bytes_us: float) -> DecodeCore:
        """By the device's own figures; where it has none, by the profile's: tflops and bytes_us."""
        own, eight, memory = (
            hardware.attention_efficiency,
            hardware.attention_8bit_efficiency,
            hardware.attention_memory_efficiency,
        )
        return cls(
            _peak(hardware, 2.0) * own.value if own else tflops,
            _peak(hardware, 1.0) * eight.value if eight else None,
            hardware.memory_tb_s.value * 1e6 * memory.value if memory else bytes_us,
        )


class Costs:
    """A model on a device in given formats: everything about a step that batch, context and split do not change."""

    def __init__(self, model: Model, hardware: Hardware, profile: Profile, formats: Formats) -> None:
        self.model, self.formats = model, formats
        self.expert = Expert.of(
            model,
            weight_format=formats.weight,
            dispatch_format=formats.dispatch,
            combine_format=formats.combine,
        )
        self.device = Device.of(hardware, profile, compute_format(hardware, formats.weight, formats.dispatch))
        self.attention = attention_costs(model)
        self.draft = _draft(model)
        self.count: Parameters = parameters(model)
        self.streams = V4_STREAMS if any(a.kind in ("csa", "hca") for a in model.attention) else 1
        self.dense_bytes = value_bytes(formats.dense)
        dense, attention = profile.dense_efficiency.value, profile.attention_efficiency.value
        self.dense_tflops = _peak(hardware, self.dense_bytes) * dense
        self.wide_tflops = _peak(hardware, 2.0) * dense
        self.core_tflops = _peak(hardware, 2.0) * attention
        self.index_tflops = _peak(hardware, {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5}[formats.index]) * attention
        around = load_profile(profile.extends) if profile.one_kernel and profile.extends else profile
        self.bytes_us = self.device.memory_bytes_s * around.memory_efficiency.value / 1e6
        self.decode_core = DecodeCore.of(hardware, self.core_tflops, self.bytes_us)
        self.kernel_us = profile.kernel_us.value
        self.attention_us = profile.attention_us.value
        self.spill = profile.attention_spill.value
        self.power = profile.dense_overlap.value
        self.profile = profile
        self.own_device = Device.of(hardware, profile, "bf16") if "bf16" in hardware.formats else self.device
        self._layers: dict[tuple[int, float, str, int, Stack, bool, bool], LayerTime] = {}
        self._pieces: dict[Hashable, tuple[Piece, ...]] = {}
        self._numbers: dict[Hashable, float] = {}

    def layer(self, d: Deployment, tokens: float) -> LayerTime:
        """The layer model's answer for so many tokens of a rank, asked once."""
        key = (d.ep, tokens, d.routing, d.redundant, d.stack, d.two_batch, d.node_limited)
        found = self._layers.get(key)
        if found is None:
            found = stack_time(
                d.stack,
                self.expert,
                self.own_device if d.stack == "megamoe" else self.device,
                self.profile,
                ep=d.ep,
                tokens_per_rank=tokens,
                routing=d.routing,
                redundant=d.redundant,
                two_batch=d.two_batch,
                node_limited=d.node_limited,
            )
            self._layers[key] = found
        return found

    def kept(self, key: Hashable, make: Callable[[], list[Piece]]) -> tuple[Piece, ...]:
        """What make() finds, asked once for a key: most pieces of a step are the same for every EP size."""
        found = self._pieces.get(key)
        if found is None:
            found = self._pieces[key] = tuple(make())
        return found

    def number(self, key: Hashable, make: Callable[[], float]) -> float:
        """Likewise, of one number."""
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = make()
        return found

    def piece(
        self, name: str, part: str, times: int, flops: float, compute_us: float, nbytes: float, kernels: int
    ) -> Piece:
        memory_us = nbytes / self.bytes_us
        us = self.both_us(compute_us, memory_us) + kernels * self.kernel_us
        return Piece(name, part, times, us, flops, nbytes, compute_us, memory_us, kernels)

    def core_piece(self, cost: AttentionCost, part: str, times: int, flops: float, nbytes: float) -> Piece:
        """The core of one layer's attention in decode, by what this device's kernel reaches."""
        core = self.decode_core
        eight_bits = core.eight_bit_tflops if self.formats.kv != "bf16" and cost.kind in DENSE_KINDS else None
        compute_us = flops * 1e-6 / (eight_bits or core.tflops)
        memory_us = nbytes / core.bytes_us
        call_us = self.attention_us if cost.kind in DENSE_KINDS else 0.0
        us = self.both_us(compute_us, memory_us) + call_us
        return Piece(f"{cost.kind} core", part, times, us, flops, nbytes, compute_us, memory_us, 0, call_us=call_us)

    def both_us(self, compute_us: float, memory_us: float) -> float:
        """Of a kernel's products and its bytes: their p-norm."""
        if compute_us > 0 < memory_us:
            return float((compute_us**self.power + memory_us**self.power) ** (1 / self.power))
        return compute_us + memory_us


def step_pieces(costs: Costs, d: Deployment) -> list[Piece]:
    """One step of a device: a decode step with its drafts, or a prefill step of all its prompts."""
    halves = d.microbatches
    chunks = 1 if d.phase == "decode" else -(-d.new_tokens // (d.chunk * halves))
    times = halves * chunks
    tokens, sequences = d.new_tokens / times, d.batch_per_device / times
    pieces = [*_all_attention(costs, d, tokens, sequences, times), *_layers(costs, d, tokens, times)]
    pieces += _head(costs, d, d.batch_per_device if d.phase == "prefill" else d.new_tokens)
    if d.mtp:
        pieces += _drafts(costs, d, tokens, sequences, times)
    return pieces


def least_us(costs: Costs, d: Deployment) -> float:
    """What a step takes at least, whatever its EP size: attention of all layers and the head."""
    times = d.microbatches * (1 if d.phase == "decode" else -(-d.new_tokens // (d.chunk * d.microbatches)))
    rows = d.batch_per_device if d.phase == "prefill" else d.new_tokens
    key = ("least", *_shared_key(d), d.head_split, d.new_tokens, d.batch_per_device, times)

    def make() -> float:
        attention = _all_attention(costs, d, d.new_tokens / times, d.batch_per_device / times, times)
        return sum(piece.total_us for piece in (*attention, *_head(costs, d, rows)))

    return costs.number(key, make)


def attention_pieces(costs: Costs, d: Deployment) -> list[Piece]:
    """Attention of the first kind's layers in a decode step, with its projections."""
    return _attention(costs, d, costs.attention[0], d.new_tokens, d.batch_per_device, 1)


def _all_attention(costs: Costs, d: Deployment, tokens: float, sequences: float, times: int) -> tuple[Piece, ...]:
    """Of all layers."""

    def make() -> list[Piece]:
        return [piece for cost in costs.attention for piece in _attention(costs, d, cost, tokens, sequences, times)]

    return costs.kept(("attention", *_shared_key(d), tokens, sequences, times), make)


def _shared_key(d: Deployment) -> tuple[Hashable, ...]:
    """What attention follows from, beside its tokens."""
    return d.phase, d.context, d.cached, d.attention_tp


def _attention(
    costs: Costs,
    d: Deployment,
    cost: AttentionCost,
    tokens: float,
    sequences: float,
    times: int,
    part: str = "attention",
) -> list[Piece]:
    layers, tp = cost.layers * times, d.attention_tp
    into = "projections" if part == "attention" else part
    core, index, core_bytes, index_bytes = _work(costs, d, cost, tokens, sequences)
    # a latent that all heads share is read by every device of a tensor-parallel group
    copies = tp / min(tp, cost.splits)
    moved = core_bytes * copies + tokens * cost.query_bytes
    pieces = _projections(costs, d, cost, tokens, layers, into)
    if d.phase == "decode":
        pieces.append(costs.core_piece(cost, part, layers, core, moved))
    elif cost.unfolded:
        # queries in before, results out after: the tables of prefill say that they do not overlap with the products
        moved = sequences * cost.prefill_value_bytes(d.cached, d.context)
        pieces.append(costs.piece(f"{cost.kind} core", part, layers, core, core * 1e-6 / costs.core_tflops, 0.0, 0))
        pieces.append(costs.piece(f"{cost.kind} core's values", part, layers, 0.0, 0.0, moved, 0))
    else:
        compute = core * 1e-6 / costs.core_tflops
        pieces.append(costs.piece(f"{cost.kind} core", part, layers, core, compute, moved, 0))
    if index:
        pieces.append(
            costs.piece(
                f"{cost.kind} index", part, layers, index, index * 1e-6 / costs.index_tflops, index_bytes * copies, 0
            )
        )
    if tp > 1:
        pieces.append(_gather(costs, tokens, tp, layers, part))
    return pieces


def _projections(
    costs: Costs, d: Deployment, cost: AttentionCost, tokens: float, layers: int, part: str
) -> list[Piece]:
    """The projections of one layer and the kernels between them; where one operator runs all, as one product."""
    tp, io = d.attention_tp, costs.model.hidden * 2
    products = cost.products if d.phase == "decode" else cost.prefill_products
    if not products or not costs.spill:
        narrow = cost.weights - cost.wide_weights
        nbytes = (narrow * costs.dense_bytes + 2 * cost.wide_weights) / tp + tokens * 2 * io
        compute = 2e-6 * tokens * (narrow / costs.dense_tflops + cost.wide_weights / costs.wide_tflops)
        name, flops = f"{cost.kind} projections", 2 * tokens * cost.weights
        return [costs.piece(name, part, layers, flops, compute, nbytes, cost.kernels)]
    pieces, wide = [], cost.wide_weights  # those of an index, which go down with the first
    for product in products:
        narrow = product.weights - wide
        nbytes = (narrow * costs.dense_bytes + 2 * wide) / tp + tokens * 2 * product.values
        compute = 2e-6 * tokens * (narrow / costs.dense_tflops + wide / costs.wide_tflops)
        name, flops = f"{cost.kind} {product.name}", 2 * tokens * product.weights
        pieces.append(costs.piece(name, part, layers, flops, compute, nbytes, 0))
        wide = 0
    between = tokens * (cost.pass_bytes if d.phase == "decode" else cost.prefill_pass_bytes)
    return [*pieces, costs.piece(f"{cost.kind} passes", part, layers, 0.0, 0.0, between, cost.kernels)]


def _work(
    costs: Costs, d: Deployment, cost: AttentionCost, tokens: float, sequences: float
) -> tuple[float, float, float, float]:
    """FLOPs of core and index, and the cached bytes that each reads, in one layer."""
    kv, keys = costs.formats.kv, cost.index_entry_bytes(costs.formats.index)
    if d.phase == "prefill":
        core = cost.prefill_core_flops(d.cached, d.context)
        index = cost.prefill_index_flops(d.cached, d.context)
        read = cost.prefill_read_bytes(d.cached, d.context, kv)
        scored = index / 128 / cost.index_pair_flops * keys if index else 0.0  # keys read once for 128 queries
        return sequences * core, sequences * index, sequences * read, sequences * scored
    read = cost.read_bytes(d.context, kv, round(tokens / sequences))
    scored = cost.indexed(d.context) * keys
    return (
        tokens * cost.core_flops(d.context),
        tokens * cost.index_flops(d.context),
        sequences * read,
        sequences * scored,
    )


def _gather(costs: Costs, tokens: float, tp: int, times: int, part: str) -> Piece:
    """Tokens of a tensor-parallel group gathered before attention and its partial sums scattered after, in BF16."""
    nbytes = 2 * (tp - 1) * tokens * costs.model.hidden * 2
    us = nbytes / costs.device.link_bytes_s(tp) * 1e6
    kernels = 2
    return Piece("tensor-parallel links", part, times, us + kernels * costs.kernel_us, 0.0, nbytes, 0.0, us, kernels)


def _layers(costs: Costs, d: Deployment, tokens: float, times: int) -> list[Piece]:
    """What follows attention: residual streams, plain MLPs, router, shared and routed experts."""

    def make() -> list[Piece]:
        model = costs.model
        sublayers = model.attention_layers + model.moe_layers + model.mlp_layers
        pieces = [_residual(costs, tokens, "projections", sublayers * times)]
        if model.mlp_layers:
            weights = costs.count.mlp // model.mlp_layers
            pieces.append(_dense(costs, "MLP", "projections", model.mlp_layers * times, tokens, weights, MLP_KERNELS))
        return pieces

    experts = _experts(costs, d, tokens, costs.model.moe_layers, times, "experts")
    return [*costs.kept(("layers", tokens, times), make), *experts]


def _experts(costs: Costs, d: Deployment, tokens: float, layers: int, times: int, part: str) -> list[Piece]:
    layer = costs.layer(d, tokens)
    router, *shared = costs.kept(
        ("experts", tokens, layers, times, part), lambda: _router_and_shared(costs, tokens, layers, times, part)
    )
    exposed = layer.exposed_us
    if d.microbatches == 1:
        # on a stream of its own: it does not wait for links, and fills what the routed experts wait for
        shared = [piece.hiding(min(piece.us, exposed)) for piece in shared]
    hidden = 0.0
    if d.microbatches > 1:
        beside, cut = _beside(costs, d, tokens) + router.us, d.phase == "decode"
        waits = waits_us(layer, beside, sum(piece.us for piece in shared), cut=cut)
        hidden = exposed - min(exposed, waits)
    routed = Piece(
        "routed experts", part, layers * times, layer.layer_us, layer.rows * costs.expert.flops,
        layer.experts_touched * costs.expert.weight_bytes, layer.compute_us, layer.memory_us, 0, hidden,
    )  # fmt: skip
    return [router, *shared, routed]


def waits_us(layer: LayerTime, attention: float, shared: float, *, cut: bool) -> float:
    """How long compute waits for links in a layer of one micro-batch, where another's compute is all that is beside it.

    Compute alternates between the halves. Whole (a prefill, in SGLang and as DeepSeek describes its own): a dispatch
    hides behind the other half's attention, a combine behind its experts. cut (a decode): attention is two stages of
    five, and both hide behind attention, but nothing behind experts, whose results the other half waits for; the cut is
    where it is best. Shared experts lie beside the combine. Nor is a layer shorter than its links.
        attention 300, shared 20, experts 100, links 140 and 280: 160 whole, 100 cut
    """
    late = max(0.0, layer.exposed_us - layer.communication_us) / 2  # latency of an exchange
    there, back = layer.dispatch_us + late, layer.combine_us + late
    experts = layer.layer_us - layer.exposed_us
    if cut:
        return max(0.0, there + back - attention - shared)
    apart = max(0.0, there - attention) + max(0.0, back - experts - shared)
    return max(apart, there + back - attention - shared - experts)


def _router_and_shared(costs: Costs, tokens: float, layers: int, times: int, part: str) -> list[Piece]:
    """The router, and the shared experts if there are any."""
    model, count = costs.model, costs.count
    router = count.router // model.moe_layers
    kernels = ROUTER_KERNELS + (MHC_KERNELS if costs.streams > 1 else 0)
    compute = 2e-6 * tokens * router / costs.wide_tflops
    pieces = [costs.piece("router", part, layers * times, 2 * tokens * router, compute, 2 * router, kernels)]
    if count.shared:
        into = "shared" if part == "experts" else part
        each = count.shared // model.moe_layers
        pieces.append(_dense(costs, "shared experts", into, layers * times, tokens, each, 0))
    return pieces


def _beside(costs: Costs, d: Deployment, tokens: float) -> float:
    """Attention of a mean layer, of one micro-batch."""
    pieces = _all_attention(costs, d, tokens, d.batch_per_device * tokens / d.new_tokens, 1)
    return sum(piece.total_us for piece in pieces) / sum(cost.layers for cost in costs.attention)


def _residual(costs: Costs, tokens: float, part: str, times: int) -> Piece:
    """Of one sublayer, BF16: streams read, mixed and written. One stream: sublayer and residual in, both out."""
    values = 4 if costs.streams == 1 else 3 * costs.streams + 2
    return costs.piece("residual streams", part, times, 0.0, 0.0, tokens * values * costs.model.hidden * 2, 0)


def _dense(costs: Costs, name: str, part: str, times: int, tokens: float, weights: int, kernels: int) -> Piece:
    flops = 2 * tokens * weights
    nbytes = weights * costs.dense_bytes + tokens * costs.model.hidden * 4
    return costs.piece(name, part, times, flops, flops * 1e-6 / costs.dense_tflops, nbytes, kernels)


def _head(costs: Costs, d: Deployment, tokens: float, part: str = "head", times: int = 1) -> tuple[Piece, ...]:
    """The output head, in BF16, divided over the devices that share it, which then see each other's tokens."""
    split = d.head_split or d.attention_tp

    def make() -> list[Piece]:
        weights = costs.model.vocab * costs.model.hidden
        flops = 2 * tokens * weights
        nbytes = 2 * weights / split + tokens * costs.model.vocab * 4
        return [costs.piece("output head", part, times, flops, flops * 1e-6 / costs.wide_tflops, nbytes, HEAD_KERNELS)]

    return costs.kept(("head", split, tokens, part, times), make)


def _drafts(costs: Costs, d: Deployment, tokens: float, sequences: float, times: int) -> list[Piece]:
    """MTP: the first draft of a step sees every token that the model saw, each further one a token a sequence."""
    pieces = _draft_pieces(costs, d, tokens, sequences, times)
    if d.phase == "decode" and d.mtp > 1:
        pieces += _draft_pieces(costs, d, sequences, sequences, times * (d.mtp - 1))
    return pieces


def _draft_pieces(costs: Costs, d: Deployment, tokens: float, sequences: float, times: int) -> list[Piece]:
    def make() -> list[Piece]:
        join = 2 * costs.model.hidden * costs.model.hidden
        pieces = [_dense(costs, "draft projection", "mtp", times, tokens, join, DRAFT_KERNELS)]
        pieces += _attention(costs, d, costs.draft, tokens, sequences, times, "mtp")
        return [*pieces, _residual(costs, tokens, "mtp", 2 * times)]

    kept = costs.kept(("draft", *_shared_key(d), tokens, sequences, times), make)
    return [*kept, *_experts(costs, d, tokens, 1, times, "mtp"), *_head(costs, d, sequences, "mtp", times)]


def _draft(model: Model) -> AttentionCost:
    own = next((attention for attention in model.attention if attention.kind != "linear"), model.attention[0])
    return attention_cost(draft_attention(own), model.hidden)


def _peak(hardware: Hardware, nbytes: float) -> float:
    """TFLOP/s for values of so many bytes: the next wider format that the device has, else half of a narrower one."""
    order = ["bf16"] if nbytes >= 2 else ["fp8", "int8", "bf16"] if nbytes >= 1 else ["fp4", "fp8", "int8", "bf16"]
    for fmt in order:
        if fmt in hardware.formats:
            return hardware.tflops(fmt)
    narrower = next(fmt for fmt in ("fp8", "int8", "fp4") if fmt in hardware.formats)
    return hardware.tflops(narrower) / (4 if narrower == "fp4" else 2)
