"""The sizes of one Mixture-of-Experts layer, and what its experts compute: frozen, checked once where they are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from megamoe.activations import SWIGLU, Activation, is_finite


@dataclass(frozen=True, slots=True)
class MoEShape:
    """Sizes of a Mixture-of-Experts layer.

    hidden         H, width of a token (`hidden_size`)
    intermediate   I, width inside one expert (`moe_intermediate_size`)
    num_experts    E, routed experts over all ranks
    topk           K, experts per token
    swiglu_limit   L, short for activation=SWIGLU.with_limit(L); None where the activation is another one
    activation     what an expert does between its products; None is SwiGLU
    bias           whether both products of an expert add a bias

    Raises ValueError for sizes that are not positive integers, topk > num_experts, a limit that is not a positive
    finite number, and a swiglu_limit beside an activation that is not SwiGLU with that limit. To change the limit of
    a shape with replace(), give activation=SWIGLU beside it.
    """

    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    swiglu_limit: float | None = None
    activation: Activation = field(default=SWIGLU, kw_only=True)
    bias: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("hidden", "intermediate", "num_experts", "topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} is larger than num_experts {self.num_experts}")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias must be True or False, got {self.bias!r}")
        self._settle_the_activation()

    def _settle_the_activation(self) -> None:
        """Has activation and swiglu_limit say the same, so that shapes are equal where they mean the same."""
        given, limit = self.activation or SWIGLU, self.swiglu_limit
        if not isinstance(given, Activation):
            raise ValueError(f"activation must be a megamoe.Activation, such as Activation('gelu_tanh'), got {given!r}")
        if limit is not None:
            if not (is_finite(limit) and limit > 0):
                raise ValueError(f"swiglu_limit must be a positive finite number or None, got {limit!r}")
            short = SWIGLU.with_limit(limit)
            if given not in (SWIGLU, short):
                raise ValueError(
                    f"swiglu_limit {limit} is short for the activation {str(short)!r}, and activation is "
                    f"{str(given)!r}: give one of them"
                )
            given = short
        object.__setattr__(self, "activation", given)
        object.__setattr__(self, "swiglu_limit", given.limit if given == SWIGLU.with_limit(given.limit) else None)

    @property
    def linear1_rows(self) -> int:
        """Rows of an expert's gate_up: 2I with a gate, I without."""
        return self.activation.rows_per_output * self.intermediate
