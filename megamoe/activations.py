"""What an expert does between its two products, as data: families of models differ in a handful of numbers."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

FUNCTIONS = ("silu", "gelu_tanh", "relu2")
CLAMPS = ("before", "after", "tanh")


@dataclass(frozen=True, slots=True)
class Activation:
    """From Linear-1's result to Linear-2's input: f(gate) * (up + up_shift) * weight, or f(x) * weight without a gate.

    function   f: "silu" is x * sigmoid(alpha * x), "gelu_tanh" GELU in its tanh form, 0.5 x (1 + tanh z)
               = x * sigmoid(2z) of z = sqrt(2 / pi) (x + 0.044715 x^3), "relu2" max(x, 0)^2
    gated      whether Linear-1 has gate and up rows [2I, H]; False means one matrix [I, H]
    alpha      of silu; 1 for the plain one
    up_shift   added to up after its clamp
    limit      L, of gate and up; None for no clamp
    clamp      how L bounds them. "before": gate to <= L before f, up to [-L, L] (DeepSeek-V4, gpt-oss).
               "after": f(gate) to <= L, up to [-L, L] (Step-3). "tanh": silu's linear factor and up become
               L * tanh(. / L), and its sigmoid sees the gate as it is (Inkling 2)
    up_limit   up's own L where it is not the gate's

    Raises ValueError for a function or clamp that is not listed, numbers that are not finite, limits that are not
    positive, and what has no meaning for the function: alpha without silu, "tanh" without silu or a limit, up_limit
    without a limit, anything of up without a gate.
    """

    function: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    up_shift: float = 0.0
    limit: float | None = None
    clamp: str = "before"
    up_limit: float | None = None

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {self.function!r}")
        if self.clamp not in CLAMPS:
            raise ValueError(f"clamp must be one of {', '.join(CLAMPS)}, got {self.clamp!r}")
        if not isinstance(self.gated, bool):
            raise ValueError(f"gated must be True or False, got {self.gated!r}")
        for name in ("alpha", "up_shift"):
            value = getattr(self, name)
            if not is_finite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        for name in ("limit", "up_limit"):
            value = getattr(self, name)
            if value is not None and not (is_finite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number or None, got {value!r}")
        self._refuse_what_has_no_meaning()

    def _refuse_what_has_no_meaning(self) -> None:
        if self.alpha != 1 and self.function != "silu":
            raise ValueError(f"alpha {self.alpha} is of silu; {self.function} has none: leave it out")
        if self.clamp == "tanh" and (self.function != "silu" or self.limit is None):
            raise ValueError(f'clamp "tanh" needs silu and a limit, got {self.function} and limit {self.limit}')
        if self.up_limit is not None and self.limit is None:
            raise ValueError(f"up_limit {self.up_limit} needs a limit of the gate: give limit too")
        if not self.gated and (self.up_shift or self.up_limit is not None):
            found = f"up_shift {self.up_shift} and up_limit {self.up_limit}"
            raise ValueError(f"without a gate there is no up, got {found}: leave them out")

    @property
    def rows_per_output(self) -> int:
        """Rows of Linear-1's weight for each value that Linear-2 reads: 2 with a gate, 1 without."""
        return 2 if self.gated else 1

    @property
    def limit_of_up(self) -> float | None:
        """up_limit, or limit where up has none of its own."""
        return self.limit if self.up_limit is None else self.up_limit

    def with_limit(self, limit: float | None) -> Activation:
        """The same with another L; None takes its clamp away."""
        return replace(self, limit=limit)

    def __str__(self) -> str:
        """In words that no other activation has.    'silu', 'silu clamp before 7.0 alpha 1.702 up + 1.0'"""
        words = [self.function] if self.gated else [self.function, "ungated"]
        if self.limit is not None:
            words.append(f"clamp {self.clamp} {float(self.limit)}")
            if self.limit_of_up not in (None, self.limit):
                words.append(f"and {float(self.limit_of_up)}")
        if self.alpha != 1:
            words.append(f"alpha {float(self.alpha)}")
        if self.up_shift:
            words.append(f"up + {float(self.up_shift)}")
        return " ".join(words)


def is_finite(value: object) -> bool:
    """Whether it is a plain number, finite in FP64."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max and math.isfinite(value)


SWIGLU = Activation()
