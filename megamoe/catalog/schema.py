"""What a file of the catalog may say: figures with their source, devices, models and profiles.

    Hardware   what a device offers: peaks, memory, links, power, price
    Model      the sizes of a Mixture-of-Experts model
    Profile    what is reached of the peaks, and what is paid on top; fitted to measurements

Units end the names: tflops dense, gb and tb in powers of ten, gb_s gigabytes per second of one device, us, w, kw. A
link bandwidth says whether its figure counts one direction or both; `Figure.one_way` is the number to calculate with.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator
from typing_extensions import Self

Tag = Literal["measured", "vendor", "derived", "assumed"]
Way = Literal["one-way", "both"]
WeightFormat = Literal["bf16", "fp8", "mxfp4", "nvfp4", "int8"]
AttentionKind = Literal["gqa", "mla", "dsa", "sliding", "csa", "hca", "linear"]
MARKETS = ("neocloud", "hyperscaler", "rental")
LINKS = ("scaleup_gb_s", "p2p_gb_s", "nic_gb_s")
MOST = {"num_experts": 2**16, "layers": 10_000}  # a plan goes through them one by one


class Entry(BaseModel):
    """Base of everything in the catalog: frozen, and a key that it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)  # a plan builds the kinds that it reads


class Figure(Entry):
    """One number and where it comes from.

    measured: somebody timed it; vendor: the maker says so; derived: calculated from figures that are one of the two;
    assumed: no source was found, or a user put it there.
    """

    value: float
    tag: Tag
    source: str
    way: Way | None = None
    note: str = ""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"a figure is a number of 0 or more, not {self.value:g}")
        if not self.source.strip():
            raise ValueError("a figure needs a source")
        return self

    @property
    def one_way(self) -> float:
        """The value of one direction: half of a figure that counts both."""
        return self.value / 2 if self.way == "both" else self.value


class Hardware(Entry):
    """One kind of device and the machine it comes in; a figure that nobody gave is None.

    `announced` marks devices of which no measurement is published. In a machine whose devices are joined pair by pair,
    `scaleup_gb_s` is the sum over all pairs, and `p2p_gb_s` what one pair has. `joined_by: pcie` says that there is no
    scale-up link: the devices of a host reach each other over its PCIe bridge, of which `scaleup_gb_s` is a device's
    share. `sms` counts SMs or compute units, `sm_ghz` is the highest clock that they run at, `busy_rate` what large
    products reach against these two, by GB200's. `host_us`: of this machine's host, in place of the profile's; `ll_us`:
    what a journey by DeepEP's low-latency kernels takes on top of the profile's.

    What its attention kernel reaches in decode, as far as one was measured (else the profile's figures count):
    attention_efficiency         of the BF16 peak            attention_8bit_efficiency    of the 8-bit peak, where the
    attention_memory_efficiency  of the memory bandwidth     products of an 8-bit cache are 8-bit; none: it is unpacked
    """

    name: str
    title: str
    profile: str
    aliases: tuple[str, ...] = ()
    announced: bool = False
    joined_by: Literal["link", "pcie"] = "link"
    note: str = ""
    bf16_tflops: Figure | None = None
    fp8_tflops: Figure | None = None
    fp4_tflops: Figure | None = None
    int8_tflops: Figure | None = None
    sms: Figure | None = None
    sm_ghz: Figure | None = None
    busy_rate: Figure | None = None
    host_us: Figure | None = None
    ll_us: Figure | None = None
    memory_gb: Figure
    memory_tb_s: Figure
    scaleup_gb_s: Figure
    scaleup_domain: Figure
    p2p_gb_s: Figure | None = None
    nic_gb_s: Figure | None = None
    power_w: Figure | None = None
    power_kw_all_in: Figure | None = None
    usd_per_hour_hyperscaler: Figure | None = None
    usd_per_hour_neocloud: Figure | None = None
    usd_per_hour_rental: Figure | None = None
    attention_efficiency: Figure | None = None
    attention_8bit_efficiency: Figure | None = None
    attention_memory_efficiency: Figure | None = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        for key, figure in figures(self).items():
            link = key in LINKS
            if figure.value == 0:
                raise ValueError(f"{key} is 0; where there is nothing, leave the key out or set it to none")
            if link and figure.way is None:
                raise ValueError(f"{key} needs way: one-way or both")
            if not link and figure.way is not None:
                raise ValueError(f"{key} is no link and has no way")
            if key.endswith("_efficiency") and figure.value > 1:
                raise ValueError(f"{key} is a share of the peak, above 0 and at most 1, not {figure.value:g}")
        if self.sms and self.sms.value != int(self.sms.value):
            raise ValueError(f"sms counts SMs or compute units, {self.sms.value:g} is no whole number")
        if self.scaleup_domain.value != int(self.scaleup_domain.value):
            raise ValueError(f"scaleup_domain counts devices, {self.scaleup_domain.value:g} is no whole number")
        if not any((self.bf16_tflops, self.fp8_tflops, self.fp4_tflops, self.int8_tflops)):
            raise ValueError("no peak is given: one of bf16_tflops, fp8_tflops, fp4_tflops, int8_tflops is needed")
        return self

    @property
    def tier_names(self) -> dict[str, str]:
        """What its tiers of links are called: "scale-up" is the host bridge where PCIe is all there is."""
        return {"scale-up": "scale-up" if self.joined_by == "link" else "host bridge", "nic": "nic"}

    @property
    def formats(self) -> list[str]:
        """The formats that this device has a dense peak for, of bf16, fp8, fp4, int8."""
        return [fmt for fmt in ("bf16", "fp8", "fp4", "int8") if getattr(self, f"{fmt}_tflops") is not None]

    def tflops(self, fmt: str) -> float:
        """Dense peak of a format (bf16, fp8, fp4, int8) in TFLOP/s; ValueError names what the device has."""
        if fmt not in self.formats:
            has = ", ".join(f"{f} {self.tflops(f):g}" for f in self.formats)
            raise ValueError(f"{self.name} has no {fmt} peak; it has {has} TFLOP/s")
        figure: Figure = getattr(self, f"{fmt}_tflops")
        return figure.value

    @property
    def usd_per_hour(self) -> Figure | None:
        """Dollars per device-hour: the neocloud's price, else the hyperscaler's, else the rental's, else None."""
        prices = (getattr(self, f"usd_per_hour_{market}") for market in MARKETS)
        return next((price for price in prices if price is not None), None)


class Attention(Entry):
    """One kind of attention and how many layers have it; sizes that a kind does not have are None.

    gqa      heads, kv_heads, head_dim; v_head_dim where it differs; with index_*, a token attends index_topk others
    sliding  as gqa, of the last `window` tokens. With o_lora it is V4's: one key-value head, low-rank q and o
    mla      heads, q_lora (None: q is one matrix), kv_lora, rope_dim, qk_nope_dim, v_head_dim
    dsa      as mla, a token attending index_topk others; `index_shared`: those that an earlier layer chose
    csa      V4: one compressed entry per `ratio` tokens, index_topk of them attended; the last `window` tokens beside
    hca      V4: one compressed entry per `ratio` tokens, all attended; the last `window` tokens beside
    linear   a state of heads * head_dim * v_head_dim in place of a cache; kv_heads key heads (Mamba: groups)
    `output_gate`: the output is gated by a projection as wide as itself.
    """

    kind: AttentionKind
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rope_dim: PositiveInt | None = None
    q_lora: PositiveInt | None = None
    kv_lora: PositiveInt | None = None
    o_lora: PositiveInt | None = None
    o_groups: PositiveInt | None = None
    window: PositiveInt | None = None
    ratio: PositiveInt | None = None
    index_heads: PositiveInt | None = None
    index_dim: PositiveInt | None = None
    index_topk: PositiveInt | None = None
    v_head_dim: PositiveInt | None = None
    qk_nope_dim: PositiveInt | None = None
    index_shared: bool = False
    output_gate: bool = False

    @model_validator(mode="after")
    def _checked(self) -> Self:
        missing = [key for key in ATTENTION_SIZES[self.kind] if getattr(self, key) is None]
        if missing:
            raise ValueError(f"attention of kind {self.kind} needs {', '.join(missing)}")
        return self


_MLA = ("kv_lora", "rope_dim", "qk_nope_dim", "v_head_dim")
_INDEX = ("index_heads", "index_dim", "index_topk")
_V4 = ("head_dim", "rope_dim", "q_lora", "o_lora", "o_groups", "window", "ratio")
ATTENTION_SIZES: dict[str, tuple[str, ...]] = {
    "gqa": ("kv_heads", "head_dim"),
    "mla": _MLA,
    "dsa": (*_MLA, "q_lora", *_INDEX),
    "sliding": ("kv_heads", "head_dim", "window"),
    "csa": (*_V4, *_INDEX),
    "hca": _V4,
    "linear": ("kv_heads", "head_dim", "v_head_dim"),
}


class Model(Entry):
    """The sizes of one model. `source` and `tag` speak for all sizes but those named in `notes`.

    The first `dense_layers` layers have a plain MLP of `dense_intermediate`; of the others every `moe_every`-th has
    experts, the rest a plain MLP. `num_moe_layers` says it outright where blocks are attention or experts, not both.
    `routed_hidden` is the width that the routed experts see and that travels, where it is not `hidden`. `situ`: experts
    activate by SiTU, b tanh(gate / b) sigmoid(gate) c tanh(up / c), which takes longer than SwiGLU.
    """

    name: str
    title: str
    source: str
    tag: Tag
    aliases: tuple[str, ...] = ()
    announced: bool = False
    hidden: PositiveInt
    intermediate: PositiveInt
    layers: PositiveInt
    dense_layers: NonNegativeInt = 0
    dense_intermediate: PositiveInt | None = None
    num_moe_layers: PositiveInt | None = None
    moe_every: PositiveInt = 1
    num_experts: PositiveInt
    topk: PositiveInt
    shared_experts: NonNegativeInt = 0
    shared_intermediate: PositiveInt | None = None
    routed_hidden: PositiveInt | None = None
    gated: bool = True
    situ: bool = False
    vocab: PositiveInt
    tied_embeddings: bool = False
    mtp_layers: NonNegativeInt = 0
    max_positions: PositiveInt | None = None
    attention: tuple[Attention, ...]
    weight_format: WeightFormat = "bf16"
    dense_format: WeightFormat = "bf16"
    swiglu_limit: float | None = None
    routed_scaling_factor: float | None = None
    total_params_b: Figure | None = None
    active_params_b: Figure | None = None
    notes: dict[str, str] = {}

    @model_validator(mode="after")
    def _checked(self) -> Self:
        for key, most in MOST.items():
            if getattr(self, key) > most:
                raise ValueError(f"{key} {getattr(self, key)} is more than {most}, the most that can be planned")
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} is more than num_experts {self.num_experts}")
        if self.dense_layers >= self.layers:
            raise ValueError(f"dense_layers {self.dense_layers} leaves none of {self.layers} layers for experts")
        if self.num_moe_layers is not None and self.num_moe_layers > self.layers:
            raise ValueError(f"num_moe_layers {self.num_moe_layers} is more than layers {self.layers}")
        if self.dense_layers and self.dense_intermediate is None:
            raise ValueError(f"dense_layers {self.dense_layers} needs dense_intermediate")
        apart = self.num_moe_layers is not None and self.attention_layers + self.num_moe_layers <= self.layers
        if self.attention_layers != self.layers and not apart:
            has = f"the attention kinds have {self.attention_layers} layers together"
            raise ValueError(f"{has}, the model has {self.layers}")
        return self

    @property
    def attention_layers(self) -> int:
        """Layers that have attention: all of them, but where blocks are attention or experts."""
        return sum(attention.layers for attention in self.attention)

    @property
    def moe_layers(self) -> int:
        """Layers that have experts; MTP layers come on top."""
        if self.num_moe_layers is not None:
            return self.num_moe_layers
        return (self.layers - self.dense_layers) // self.moe_every

    @property
    def mlp_layers(self) -> int:
        """Layers that have a plain MLP of dense_intermediate and no experts."""
        if self.dense_intermediate is None:
            return 0
        blocks = 0 if self.attention_layers == self.layers else self.attention_layers
        return self.layers - self.moe_layers - blocks

    @property
    def shared_width(self) -> int:
        """The intermediate width of all shared experts together; 0 where there are none."""
        return self.shared_experts * (self.shared_intermediate or self.intermediate)

    @property
    def expert_hidden(self) -> int:
        """The width of a token as a routed expert sees it, and as it travels."""
        return self.routed_hidden or self.hidden


_NO_LESS = Figure(value=0.0, tag="assumed", source="links are the limit, as far as is known")


class Staged(Entry):
    """What separate kernels take, the same on every device that was measured; see planner/layer/staged.py.

    ll_*       DeepEP's low-latency dispatch and combine: a call, for every token of an SM, and for a journey between
               nodes (once, and once more for every doubling of them)
    normal_efficiency    DeepEP's normal kernels, of the scale-up link; their calls hide behind the host's launches
    normal_*_token_us, normal_*_sent_us    the least that their 20 SMs take for a token, and for one that a rank wants
    masked_us, contiguous_us     launches and the kernels between grouped products, in a graph and without one
    masked_expert_us             for every expert of the rank, with rows or without
    host_us    the least that a host takes to launch the latter; a device may have its own, which contiguous_us follows
    """

    ll_dispatch_us: Figure
    ll_dispatch_token_us: Figure
    ll_combine_us: Figure
    ll_combine_token_us: Figure
    ll_node_us: Figure
    normal_efficiency: Figure
    normal_dispatch_token_us: Figure = _NO_LESS
    normal_dispatch_sent_us: Figure = _NO_LESS
    normal_combine_token_us: Figure = _NO_LESS
    normal_combine_sent_us: Figure = _NO_LESS
    masked_us: Figure
    masked_expert_us: Figure
    contiguous_us: Figure
    host_us: Figure


class Profile(Staged):
    """What a kind of device reaches of its peaks and pays on top: planner/layer/cost.py. `fitted` names the data.

    feed_ps             an SM, bringing a byte of an operand to its tensor core
    scale_ps            the same of grouped products in a tile of one warp group, which scales sums between products
    epilogue_ps         an SM, one value of a tile's result: activation, quantisation, the way home
    sm_ghz              clock of the SMs at which these were fitted; a device of another takes them by the ratio
    sustained_rate      of grouped products in a step that goes on, against launches timed one by one
    pair_sms            SMs that multiply together in grouped products, and share the weights of a tile
    tile_rows           rows of an expert in the smallest tile      block_rows         and in the largest
    small_rows          mean rows of an expert up to which a call has the smallest tiles; none for half of one
    last_rows           what the rows of an expert's last tile are filled up to whole steps of
    swap_rows           mean rows of an expert up to which a kernel swaps its operands, so that those steps are 8
    memory_efficiency   of the memory bandwidth
    link_efficiency     of the scale-up link, in an all-to-all of up to 8 ranks; (8 / ranks)^link_congestion of it above
    fused_link_efficiency    the same of rows that a fused kernel carries
    link_incast         many ranks sending to one: (rows of the busiest / its own pairs)^link_incast times as long
    nic_efficiency      of the NIC, likewise
    exchange_us         a dispatch or combine of its own, in no kernel
    memory_overlap      p of the norm in which products and their memory add up within the fused kernel
    overlap             the same of both and the links
    fixed_us            a call of the kernel, whatever it does      barrier_us         for every doubling of ranks
    expert_us           for every expert of the rank: its counts, its place in the queue
    graph_us            a module's launches, in a captured graph    staging_us         its kernels around the layer's
    staging_bytes       read and written by them for every value of a token
    wave_us             for every wave
    slot_us             a slot of a token whose results come home in fewer bits than BF16, decoded before it is summed
    ll_dispatch_expert_us, ll_combine_expert_us     for every expert of the model, in DeepEP's low-latency kernels
    ll_dispatch_efficiency, ll_combine_efficiency   of the scale-up link, in DeepEP's low-latency kernels

    extends             another profile, whose figures it has where it names none of its own
    weight_formats, dispatch_formats    of a fused kernel that runs no other weights and tokens; empty for all

    Of the parts of a model beside the experts (planner/serving/):
    dense_efficiency    of the peak, in projections and MLPs
    attention_efficiency  of the BF16 peak, in attention cores
    dense_overlap       p of the norm in which compute and memory of a kernel add up
    kernel_us           for every launch that waits for the one before, in a captured graph
    attention_us        a call of the core of a dense latent (mla) in decode, beyond a launch
    attention_spill     1: values between the projections of a latent are written and read; 0: one operator keeps them
    """

    name: str
    title: str
    fitted: str
    extends: str | None = None
    weight_formats: tuple[WeightFormat, ...] = ()
    dispatch_formats: tuple[str, ...] = ()
    feed_ps: Figure
    epilogue_ps: Figure
    sm_ghz: Figure | None = None
    tile_rows: Figure
    block_rows: Figure
    small_rows: Figure | None = None
    last_rows: Figure
    swap_rows: Figure
    memory_efficiency: Figure
    link_efficiency: Figure
    fused_link_efficiency: Figure
    link_congestion: Figure
    link_incast: Figure
    nic_efficiency: Figure
    exchange_us: Figure
    memory_overlap: Figure
    overlap: Figure
    fixed_us: Figure
    expert_us: Figure
    barrier_us: Figure
    graph_us: Figure
    staging_us: Figure
    staging_bytes: Figure
    wave_us: Figure
    ll_dispatch_expert_us: Figure
    ll_combine_expert_us: Figure
    ll_dispatch_efficiency: Figure
    ll_combine_efficiency: Figure
    scale_ps: Figure = Figure(value=0.0, tag="assumed", source="scaled by the tensor cores or by warps of their own")
    sustained_rate: Figure = Figure(value=1.0, tag="assumed", source="power does not limit, as far as is known")
    pair_sms: Figure = Figure(value=1.0, tag="assumed", source="an SM multiplies by itself, as far as is known")
    slot_us: Figure = Figure(value=0.0, tag="assumed", source="hidden behind the slots' bytes, as far as is known")
    dense_efficiency: Figure = Figure(
        value=0.6,
        tag="assumed",
        source="large FP8 products reach 71-76 % of peak (ml-engineering, MAMF); smaller ones less",
    )
    attention_efficiency: Figure = Figure(
        value=0.6, tag="assumed", source="FlashMLA README: 660 of 989 TFLOP/s where compute limits, on H800"
    )
    dense_overlap: Figure = Figure(value=3.3, tag="assumed", source="one kernel of large products; not measured here")
    kernel_us: Figure = Figure(
        value=4.0,
        tag="assumed",
        source="launch in a captured graph, ramp up and drain, of a small kernel; not measured here",
    )
    attention_us: Figure = Figure(value=0.0, tag="assumed", source="no more than a launch, as far as is known")
    attention_spill: Figure = Figure(
        value=1.0,
        tag="assumed",
        source="norms, rope, quantisation and the products of a layer are kernels of their own",
    )

    @property
    def one_kernel(self) -> bool:
        """Whether it is of a kernel of its own, in place of all that a kind of device runs."""
        return bool(self.weight_formats)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        for key, figure in figures(self).items():
            if key.endswith("_efficiency") and not 0 < figure.value <= 1:
                raise ValueError(f"{key} is a share of the peak, above 0 and at most 1, not {figure.value:g}")
        if self.attention_spill.value not in (0, 1):
            raise ValueError(f"attention_spill is 0 or 1, not {self.attention_spill.value:g}")
        for key in ("memory_overlap", "overlap", "dense_overlap"):
            if getattr(self, key).value < 1:
                raise ValueError(f"{key} is 1 (nothing overlaps) or more, not {getattr(self, key).value:g}")
        return self


def figures(entry: Entry) -> dict[str, Figure]:
    """The figures of an entry by key, without those that are None, in the order of the schema."""
    values = ((key, getattr(entry, key)) for key in type(entry).model_fields)
    return {key: value for key, value in values if isinstance(value, Figure)}
