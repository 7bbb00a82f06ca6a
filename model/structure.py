"""What an experts module of transformers is: sizes and layout of its weights, its activation, confirmed by numbers."""

# E experts   H hidden   I intermediate   K experts per token

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megamoe.activations import SWIGLU, Activation
from megamoe.model.probe import check_forward, fit_activation
from megamoe.shape import MoEShape


@dataclass(frozen=True, slots=True)
class Structure:
    """Sizes, layout and activation of a module's routed experts.

    is_transposed    weights are [inputs, outputs], so x @ w, and not [outputs, inputs]
    is_interleaved   Linear-1's rows are gate0, up0, gate1, up1, ... and not all gates first
    has_bias         both products have a bias, [E, outputs]
    """

    hidden: int
    intermediate: int
    num_experts: int
    activation: Activation = SWIGLU
    is_transposed: bool = False
    is_interleaved: bool = False
    has_bias: bool = False

    def shape(self, topk: int) -> MoEShape:
        """The layer's MoEShape for topk experts a token. ValueError as MoEShape raises it."""
        return MoEShape(
            self.hidden, self.intermediate, self.num_experts, topk, activation=self.activation, bias=self.has_bias
        )

    @property
    def first(self) -> str:
        """The name of Linear-1's weight in the module."""
        return "gate_up_proj" if self.activation.gated else "up_proj"


def read_structure(experts: nn.Module) -> Structure:
    """Structure of an experts module of transformers: gate_up_proj or up_proj and down_proj, with three dimensions.

    Sizes come from the weights, which may be on the meta device or DTensors of the global shape; layout from the flags
    has_gate, has_bias, is_transposed and is_concatenated, where the module has them. The activation is asked with
    numbers, and so is the whole forward, on small weights. ValueError names the module's class and what does not fit:
    another activation, weights that the layer has no place for, shapes that contradict the flags.
    """
    try:
        return _read(experts)
    except ValueError as refusal:
        raise ValueError(f"{type(experts).__name__} does not fit the layer: {refusal}") from refusal


def _read(experts: nn.Module) -> Structure:
    gated = bool(getattr(experts, "has_gate", hasattr(experts, "gate_up_proj")))
    bias = bool(getattr(experts, "has_bias", hasattr(experts, "down_proj_bias")))
    transposed = bool(getattr(experts, "is_transposed", False))
    interleaved = gated and not bool(getattr(experts, "is_concatenated", True))
    first = "gate_up_proj" if gated else "up_proj"
    names = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if bias else set())
    held: dict[str, Tensor] = {**dict(experts.named_parameters()), **dict(experts.named_buffers())}
    missing, extra = sorted(names - held.keys()), sorted(held.keys() - names)
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}, only {', '.join(sorted(held)) or 'nothing'}")
    if extra:
        raise ValueError(f"it has weights that the layer has no place for: {', '.join(extra)}")
    shapes = {name: tuple(held[name].shape) for name in names}
    if any(len(shapes[name]) != 3 for name in (first, "down_proj")):
        raise ValueError(f"its weights are {shapes[first]} and {shapes['down_proj']}, expected three dimensions each")
    num_experts, *sizes = shapes["down_proj"]
    inner, hidden = sizes if transposed else reversed(sizes)
    rows = inner * (2 if gated else 1)
    expected: dict[str, tuple[int, ...]] = {
        first: (num_experts, hidden, rows) if transposed else (num_experts, rows, hidden)
    }
    if bias:
        expected |= {f"{first}_bias": (num_experts, rows), "down_proj_bias": (num_experts, hidden)}
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name} is {list(shapes[name])}, expected {list(shape)} beside down_proj {list(shapes['down_proj'])}"
            )
    activation = fit_activation(experts, gated=gated, interleaved=interleaved)
    check_forward(experts, activation, transposed=transposed, interleaved=interleaved, bias=bias)
    return Structure(hidden, inner, num_experts, activation, transposed, interleaved, bias)
