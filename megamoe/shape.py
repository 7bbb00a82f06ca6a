"""The sizes of one Mixture-of-Experts layer: frozen, checked once where they are made."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoEShape:
    """Sizes of a gated Mixture-of-Experts layer.

    hidden         H, width of a token (`hidden_size`)
    intermediate   I, width inside one expert (`moe_intermediate_size`)
    num_experts    E, routed experts over all ranks
    topk           K, experts per token
    swiglu_limit   clamp L: gate to <= L and up to [-L, L] before the activation; None for no clamp

    Raises ValueError for sizes that are not positive integers, topk > num_experts, or a limit that is not
    a positive finite number.
    """

    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    swiglu_limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts", "topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} is larger than num_experts {self.num_experts}")
        limit = self.swiglu_limit
        if limit is not None and not (_is_number(limit) and math.isfinite(limit) and limit > 0):
            raise ValueError(f"swiglu_limit must be a positive finite number or None, got {limit!r}")


def _is_number(value: object) -> bool:
    """Whether it is a plain number that FP64 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
