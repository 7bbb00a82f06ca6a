"""Shapes of published models for the benchmark, whole or divided to fit a small machine.

Figures from the models' published config.json files.
"""

from __future__ import annotations

from difflib import get_close_matches

from megamoe.shape import MoEShape

PRESETS = {
    "deepseek-v3": MoEShape(7168, 2048, 256, 8),
    "deepseek-v4-flash": MoEShape(4096, 2048, 256, 6, 10.0),
    "deepseek-v4-pro": MoEShape(7168, 3072, 384, 6, 10.0),
    "kimi-k2": MoEShape(7168, 2048, 384, 8),
    "mixtral-8x7b": MoEShape(4096, 14336, 8, 2),
    "qwen3-30b-a3b": MoEShape(2048, 768, 128, 8),
    "qwen3-235b-a22b": MoEShape(4096, 1536, 128, 8),
}


def preset(text: str) -> MoEShape:
    """A model's shape, or a fraction of it: hidden, intermediate and experts divided, top-k kept.

    "deepseek-v4-flash/16" -> hidden 256, intermediate 128, 16 experts, top-6

    ValueError for a name that is not known, with the nearest ones, and for a divisor that does not divide.
    """
    name, _, fraction = text.partition("/")
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=3, cutoff=0.3) or sorted(PRESETS)
        raise ValueError(f"no preset is called {name!r}; the nearest are {', '.join(near)}")
    shape = PRESETS[name]
    if not fraction:
        return shape
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate, "num_experts": shape.num_experts}
    if not fraction.isdigit() or int(fraction) < 1:
        raise ValueError(f"preset {text!r}: {fraction!r} is not a positive whole number to divide by")
    wrong = [f"{key} {size}" for key, size in sizes.items() if size % int(fraction)]
    if wrong:
        raise ValueError(f"preset {text!r}: {fraction} does not divide {', '.join(wrong)}")
    hidden, intermediate, num_experts = (size // int(fraction) for size in sizes.values())
    if num_experts < shape.topk:
        raise ValueError(f"preset {text!r} leaves {num_experts} experts, fewer than its top-{shape.topk}")
    return MoEShape(hidden, intermediate, num_experts, shape.topk, shape.swiglu_limit)
