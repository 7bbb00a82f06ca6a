"""One way to serve a model: how many devices, how they share it, what they hold and in which formats.

Attention is data-parallel (every device has its own sequences and all of the attention's weights) or tensor-parallel in
groups of `attention_tp`; routed experts are spread over `ep` devices, and devices / ep such groups serve side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megamoe.catalog import Hardware, Model, Profile
from megamoe.planner.layer.stacks import Stack, check_kernel, check_node_limited
from megamoe.planner.serving.attention import INDEX_FORMATS, KV_FORMATS
from megamoe.planner.serving.flops import index_format
from megamoe.schedule.formats import value_bytes

Phase = Literal["decode", "prefill"]

ACCEPT_RATE = 0.7  # of a drafted token, given that those before it were accepted: cann-recipes-infer, DeepSeek-V4, MTP1


@dataclass(frozen=True, slots=True)
class Deployment:
    """What `serve` needs to know. ValueError with the numbers for what makes no sense.

    batch_per_device   decode: sequences; prefill: prompts that a device takes in one step
    context            decode: tokens in the cache of a sequence, on average; prefill: tokens of a prompt
    cached             prefill: how many of them are in the cache already
    mtp, accept        tokens drafted in a step, and how many of those are accepted on average (None: ACCEPT_RATE each)
    redundant          copies of experts beside the model's
    microbatches       2: a batch in two halves, the links of each behind what the other computes meanwhile (step.py)
    head_split         devices that share embedding and output head (None: attention_tp)
    stack, two_batch   what runs the expert layers, and whether the staged stack runs them in two halves
    node_limited       a token goes once to each other scale-up domain; of the fused and the megamoe stack
    chunk              prefill: most tokens that a device takes through a layer at once
    None formats: the model's; index keys FP4 or FP8 as the model was made for; tokens travel in MXFP8 where the
    experts compute in 8 bits, else in BF16
    """

    model: Model
    hardware: Hardware
    profile: Profile
    devices: int
    ep: int
    batch_per_device: int
    context: int
    phase: Phase = "decode"
    attention_tp: int = 1
    cached: int = 0
    mtp: int = 0
    accept: float | None = None
    redundant: int = 0
    routing: str = "balanced"
    microbatches: int = 1
    head_split: int | None = None
    chunk: int = 16384
    weight_format: str | None = None
    dense_format: str | None = None
    kv_format: str = "fp8"
    index_format: str | None = None
    dispatch_format: str | None = None
    combine_format: str = "bf16"
    stack: Stack = "fused"
    two_batch: bool = False
    node_limited: bool = False

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_split()
        self._check_formats()
        if self.phase not in ("decode", "prefill"):
            raise ValueError(f"phase is decode or prefill, not {self.phase!r}")
        if not 0 <= self.cached < self.context:
            raise ValueError(f"cached {self.cached} tokens of a prompt of {self.context} leave none to compute")
        if self.mtp and not self.model.mtp_layers:
            raise ValueError(f"{self.model.name} has no MTP layer to draft {self.mtp} tokens with")
        if self.accept is not None and not 0 <= self.accept <= self.mtp:
            raise ValueError(
                f"accept is {self.accept:g} of {self.mtp} drafted tokens; it lies between 0 and {self.mtp}"
            )
        positions = self.model.max_positions
        if positions is not None and self.context > positions:
            raise ValueError(f"a context of {self.context} is longer than {self.model.name}'s {positions} positions")

    def _check_counts(self) -> None:
        for key in ("devices", "ep", "batch_per_device", "context", "attention_tp", "chunk"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be 1 or more")
        for key in ("cached", "mtp", "redundant"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be 0 or more")
        if self.microbatches not in (1, 2):
            raise ValueError(f"microbatches is {self.microbatches}; it is 1 or 2")
        if self.head_split is not None and not 1 <= self.head_split <= self.devices:
            raise ValueError(f"head_split {self.head_split} lies outside 1 .. {self.devices} devices")

    def _check_split(self) -> None:
        slots = self.model.num_experts + self.redundant
        if self.ep > slots:
            raise ValueError(f"EP{self.ep} is larger than the {slots} experts that there are to share")
        if self.devices % self.ep:
            raise ValueError(f"{self.devices} devices cannot be divided into groups of EP{self.ep}")
        if self.devices % self.attention_tp:
            raise ValueError(f"{self.devices} devices cannot be divided into attention groups of {self.attention_tp}")
        heads = min(attention.heads for attention in self.model.attention)
        if self.attention_tp > heads:
            raise ValueError(f"attention_tp {self.attention_tp} is more than the {heads} heads of {self.model.name}")
        domain = int(self.hardware.scaleup_domain.value)
        if self.attention_tp > domain:
            raise ValueError(f"attention_tp {self.attention_tp} leaves the scale-up domain of {domain} devices")

    def _check_formats(self) -> None:
        for name in (self.weight_format, self.dense_format, self.dispatch_format, self.combine_format):
            if name is not None:
                value_bytes(name)
        formats = self.formats
        check_node_limited(self.stack, self.node_limited)
        check_kernel(self.profile, self.stack, formats.weight, formats.dispatch)
        if self.kv_format not in KV_FORMATS:
            raise ValueError(f"kv_format {self.kv_format!r} is none of {', '.join(KV_FORMATS)}")
        if self.index_format is not None and self.index_format not in INDEX_FORMATS:
            raise ValueError(f"index_format {self.index_format!r} is none of {', '.join(INDEX_FORMATS)}")

    @property
    def new_tokens(self) -> int:
        """Tokens that a device takes through the model in a step: decoded and drafted, or those of its prompts."""
        if self.phase == "prefill":
            return self.batch_per_device * (self.context - self.cached)
        return self.batch_per_device * (1 + self.mtp)

    @property
    def accepted(self) -> float:
        """Tokens that a step yields for a sequence."""
        if self.accept is not None:
            return 1 + self.accept
        return 1 + sum(ACCEPT_RATE**draft for draft in range(1, self.mtp + 1))

    @property
    def formats(self) -> Formats:
        return Formats.of(self)


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a deployment, none left open."""

    weight: str
    dense: str
    kv: str
    index: str
    dispatch: str
    combine: str

    @classmethod
    def of(cls, d: Deployment) -> Formats:
        weight = d.weight_format or d.model.weight_format
        eight_bits = value_bytes(weight) < 2 and any(fmt in d.hardware.formats for fmt in ("fp8", "int8"))
        dispatch = d.dispatch_format or ("mxfp8" if eight_bits else "bf16")
        index = d.index_format or ("bf16" if d.kv_format == "bf16" else index_format(d.model))
        return cls(weight, d.dense_format or d.model.dense_format, d.kv_format, index, dispatch, d.combine_format)
