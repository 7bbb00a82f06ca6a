"""Decode of DeepSeek-V4 on 16 Ascend 950DT as two editions of one guide have it, and what the planner says to both.

The rows of April are those of published.py and stay as they were published; those of 2026-08-07 stand beside them.
Nothing was fitted to the latter.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from megamoe.planner.serving.serving import serve
from megamoe.planner.validation.published import RESULTS, Result

K = 1024
# model, sequences of all chips, MTP, context -> ms per token, tokens per second and chip
AUGUST: dict[tuple[str, int, int, int], tuple[float, float]] = {
    ("deepseek-v4-flash", 16, 3, 8 * K): (6.55, 152.79),
    ("deepseek-v4-flash", 256, 3, 8 * K): (8.78, 1821.75),
    ("deepseek-v4-flash", 1536, 1, 8 * K): (16.46, 5830.65),
    ("deepseek-v4-flash", 256, 3, 128 * K): (9.66, 1655.64),
    ("deepseek-v4-flash", 768, 1, 128 * K): (10.50, 4569.64),
    ("deepseek-v4-flash", 16, 3, 1024 * K): (8.04, 124.36),
    ("deepseek-v4-pro", 16, 3, 8 * K): (17.64, 56.7),
    ("deepseek-v4-pro", 64, 3, 8 * K): (19.03, 210.16),
    ("deepseek-v4-pro", 128, 3, 8 * K): (20.61, 388.23),
    ("deepseek-v4-pro", 16, 3, 128 * K): (19.46, 51.38),
}


@dataclass(frozen=True, slots=True)
class Edition:
    """One row of August's guide: milliseconds per token in both editions."""

    what: str
    april_ms: float
    august_ms: float
    planned_ms: float

    @property
    def august_pct(self) -> float:
        """100 x (planned / published - 1) of the tokens per second."""
        return 100 * (self.august_ms / self.planned_ms - 1)

    @property
    def april_pct(self) -> float:
        return 100 * (self.april_ms / self.planned_ms - 1)


def guides() -> list[Edition]:
    """Every row of August's guide beside April's and the planner's."""
    april = {_key(result): result for result in RESULTS if result.hardware == "ascend-950dt"}
    found = []
    for key, (august_ms, _) in AUGUST.items():
        result = april[key]
        planned = serve(result.deployment()).tpot_ms
        assert planned is not None
        batch = result.conditions["batch_per_device"]
        found.append(Edition(result.what, 1e3 * batch / result.tokens_per_s_per_device, august_ms, planned))
    return found


def _key(result: Result) -> tuple[str, int, int, int]:
    given = result.conditions
    return result.model, given["batch_per_device"] * given["devices"], given["mtp"], given["context"]


def median_of(found: list[Edition], error: Literal["april_pct", "august_pct"]) -> float:
    """Percent, whatever the sign."""
    return median(abs(float(getattr(each, error))) for each in found)
