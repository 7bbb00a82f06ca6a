"""The routed experts of a layer, as sizes and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.catalog import Model
from megamoe.planner.layer.rule import GATED_FLOPS, PLAIN_FLOPS
from megamoe.schedule.formats import element_bytes, value_bytes


@dataclass(frozen=True, slots=True)
class Expert:
    """The routed experts of a layer. hidden is the width that they see and that travels; situ as in catalog.Model."""

    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    gated: bool = True
    weight_format: str = "mxfp4"
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    situ: bool = False

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        weight_format: str | None = None,
        dispatch_format: str = "mxfp8",
        combine_format: str = "bf16",
    ) -> Expert:
        """A catalog model's; weights in its own format unless one is given."""
        return cls(
            model.expert_hidden,
            model.intermediate,
            model.num_experts,
            model.topk,
            model.gated,
            weight_format or model.weight_format,
            dispatch_format,
            combine_format,
            model.situ,
        )

    @property
    def flops(self) -> int:
        """Of one token-expert pair."""
        return (GATED_FLOPS if self.gated else PLAIN_FLOPS) * self.hidden * self.intermediate

    @property
    def weight_bytes(self) -> float:
        """Of one expert, scales included."""
        products = 3 if self.gated else 2
        return products * self.hidden * self.intermediate * value_bytes(self.weight_format)

    @property
    def weight_element_bytes(self) -> float:
        """Of one weight without its scale."""
        return element_bytes(self.weight_format)

    @property
    def dispatch_bytes(self) -> float:
        """Of one row on its way to an expert."""
        return self.hidden * value_bytes(self.dispatch_format)

    @property
    def combine_bytes(self) -> float:
        """Of one row on its way home."""
        return self.hidden * value_bytes(self.combine_format)

    @property
    def row_bytes(self) -> float:
        """That one row reads and writes beside the weights: itself, what is between the products, its result."""
        between = 2 * self.intermediate * value_bytes(self.dispatch_format)
        return self.dispatch_bytes + between + 2 * self.hidden

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """K and N of the two products: hidden to gate and up (or to the intermediate alone), and back."""
        first = (2 if self.gated else 1) * self.intermediate
        return (self.hidden, first), (self.intermediate, self.hidden)
