"""What a device holds of the routed experts while a model trains, and what a forward keeps for its backward.

Of this package's training layer (docs/training.md); attention and the rest of a model are not among it, nor its
gradients and optimiser.
"""

# T tokens of a rank   U tokens that come from other ranks   n rows of a rank   B bytes of a token on the wire
# E experts   e experts of a rank   P ranks   h hidden   d intermediate   W waves

from __future__ import annotations

from dataclasses import dataclass

from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.stacks import sent_once
from megamoe.planner.serving.memory import USABLE, Memory
from megamoe.schedule.backward import Saved
from megamoe.schedule.formats import value_bytes

MASTER_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 4, 8  # of a weight: FP32 both, AdamW's two moments
TRANSPOSED_BYTES = 2  # of a weight, BF16, for data gradients


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """GB of a device, of all layers that have experts but for in_flight, which layers share.

    kept_layer_gb   what one layer's forward keeps        in_flight   rows, gradients and intermediate results of a call
    """

    masters_gb: float
    gradients_gb: float
    optimizer_gb: float
    packed_gb: float
    kept_gb: float
    in_flight_gb: float
    kept_layer_gb: float
    capacity_gb: float

    @property
    def memory(self) -> Memory:
        """As a plan has it: weights and what belongs to them as experts, the rest as activations."""
        experts = self.masters_gb + self.gradients_gb + self.optimizer_gb + self.packed_gb
        return Memory(experts, 0.0, 0.0, self.kept_gb + self.in_flight_gb, self.capacity_gb)


def training_memory(
    expert: Expert,
    memory_gb: float,
    *,
    layers: int,
    slots: int,
    ep: int,
    tokens: float,
    rows: float,
    waves: int,
    saved: Saved,
    gradient_format: str,
) -> TrainingMemory:
    """slots: experts and their copies; rows: n of the rank that has most."""
    (h, first), (d, _) = expert.products
    weights = layers * -(-slots // ep) * (first * h + h * d)
    packed = value_bytes("bf16" if expert.weight_format == "bf16" else "mxfp4") + TRANSPOSED_BYTES
    kept = kept_bytes(expert, ep=ep, tokens=tokens, rows=rows, saved=saved)
    gradient = h * value_bytes(gradient_format)
    again = token_bytes(expert) if saved == "dispatch-again" else 0
    arriving = received(expert, ep, rows)
    flying = (tokens + arriving) * (gradient + again) + (rows + tokens * expert.topk) * (gradient + 16)
    between = 2 * (first + d) * rows + 4 * d * rows / waves
    return TrainingMemory(
        masters_gb=weights * MASTER_BYTES / 1e9,
        gradients_gb=weights * GRADIENT_BYTES / 1e9,
        optimizer_gb=weights * OPTIMIZER_BYTES / 1e9,
        packed_gb=weights * packed / 1e9,
        kept_gb=layers * kept / 1e9,
        in_flight_gb=(flying + between) / 1e9,
        kept_layer_gb=kept / 1e9,
        capacity_gb=memory_gb * USABLE,
    )


def kept_bytes(expert: Expert, *, ep: int, tokens: float, rows: float, saved: Saved) -> float:
    """What the forward of a layer keeps, beside the layer's inputs: the table of docs/training.md.

    V4-Pro, 4096 tokens on each of 64 ranks, saved "tokens": 0.20 GB
    """
    said = 8 * ep * (1 + 2 * expert.num_experts) + 8
    if saved == "dispatch-again":
        return said
    kept = (tokens + received(expert, ep, rows)) * token_bytes(expert) + 12 * rows
    if saved == "activations":
        kept += (2 * expert.products[0][1] + 8) * rows
    return said + kept


def received(expert: Expert, ep: int, rows: float) -> float:
    """U: tokens that come from other ranks for so many rows, each once."""
    return rows * (1 - 1 / ep) * sent_once(expert, ep)


def token_bytes(expert: Expert) -> int:
    """B, up to a multiple of 16."""
    return -(-round(expert.dispatch_bytes) // 16) * 16
