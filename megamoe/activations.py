"""What an expert does between its two products, as data: families of models differ in a handful of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

FUNCTIONS = ("silu", "gelu_tanh", "relu2")
CLAMPS = ("before", "after")


@dataclass(frozen=True, slots=True)
class Activation:
    """From Linear-1's result to Linear-2's input: f(gate) * (up + up_shift) * weight, or f(x) * weight without a gate.

    function   f: "silu" is x * sigmoid(alpha * x), "gelu_tanh" GELU in its tanh form, "relu2" max(x, 0)^2
    gated      whether Linear-1 has gate and up rows [2I, H]; False means one matrix [I, H]
    alpha      of silu; 1 for the plain one
    up_shift   added to up after its clamp
    limit      clamp L: gate to <= L and up to [-L, L]; None for no clamp
    clamp      "before": gate is clamped before f (DeepSeek-V4, gpt-oss); "after": f(gate) is clamped to <= L

    Raises ValueError for a function or clamp that is not listed, and numbers that are not finite.
    """

    function: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    up_shift: float = 0.0
    limit: float | None = None
    clamp: str = "before"

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {self.function!r}")
        if self.clamp not in CLAMPS:
            raise ValueError(f"clamp must be one of {', '.join(CLAMPS)}, got {self.clamp!r}")
        for name in ("alpha", "up_shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")

    @property
    def rows_per_output(self) -> int:
        """Rows of Linear-1's weight for each value that Linear-2 reads: 2 with a gate, 1 without."""
        return 2 if self.gated else 1

    def with_limit(self, limit: float | None) -> Activation:
        return replace(self, limit=limit)


SWIGLU = Activation()
