"""Shapes of the catalog's models for the benchmark, whole or divided to fit a small machine."""

from __future__ import annotations

from megamoe.catalog import load_model
from megamoe.shape import MoEShape


def preset(text: str) -> MoEShape:
    """A model's shape, or a fraction of it: hidden, intermediate and experts divided, top-k kept.

    "deepseek-v4-flash/16" -> hidden 256, intermediate 128, 16 experts, top-6

    ValueError for a name that the catalog does not know, with the nearest ones, for experts without a gate, and for a
    divisor that does not divide.
    """
    name, _, fraction = text.partition("/")
    model = load_model(name)
    if not model.gated:
        raise ValueError(f"preset {text!r}: the experts of {model.name} have no gate, and this layer's have one")
    shape = MoEShape(model.expert_hidden, model.intermediate, model.num_experts, model.topk, model.swiglu_limit)
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
