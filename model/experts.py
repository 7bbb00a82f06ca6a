"""Routed experts with the signature that transformers calls, around one MegaMoE layer."""

# T tokens of this rank   H hidden   I intermediate   K experts per token   E experts in all

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.ambient import undisturbed
from megamoe.formats import MXFP4
from megamoe.formats.given import GivenWeight
from megamoe.layer import MegaMoE
from megamoe.model.structure import Structure
from megamoe.parallel.group import EPGroup

Matrix = Tensor | MXFP4


class RoutedExperts(nn.Module):
    """A layer that takes tokens, ids and weights as transformers' experts do, and weights as its checkpoints have them.

    structure        what the experts are, see read_structure()
    topk             K, experts per token
    group            torch ProcessGroup or EPGroup; None is one rank
    weight_format    "bf16" or "mxfp4"
    dispatch_format  of MegaMoE; by default "mxfp8" with mxfp4 weights, where it costs no bit, and "bf16" otherwise
    name, device     of MegaMoE, as are other options, which are handed on

    ValueError as MegaMoE raises it.
    """

    layer_type: ClassVar[type[MegaMoE]] = MegaMoE

    def __init__(
        self,
        structure: Structure,
        topk: int,
        group: EPGroup | dist.ProcessGroup | None = None,
        *,
        weight_format: str = "bf16",
        dispatch_format: str | None = None,
        name: str = "experts",
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.structure = structure
        self.layer = self.layer_type(
            structure.shape(topk),
            group,
            weight_format=weight_format,
            dispatch_format=dispatch_format or ("mxfp8" if weight_format == "mxfp4" else "bf16"),
            name=name,
            device=device,
            **options,
        )

    def load(
        self,
        expert: int,
        first: GivenWeight,
        down: GivenWeight,
        first_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Takes one expert's weights, by global id, in the checkpoint's orientation and order of rows.

        first       Linear-1: [2I, H] with a gate, [I, H] without; [H, 2I] where the structure is transposed
        down        Linear-2: [H, I], or [I, H] where it is transposed
        first_bias  [2I] or [I], down_bias [H]; where the structure has biases

        Weights are float tensors, MXFP4, or pairs (packed, scales); the last two have one row for each output, whatever
        is_transposed says, since they are packed along inputs. ValueError as MegaMoE.load_expert() raises it.
        """
        self.layer.load_expert(expert, *self._arranged(first, down, first_bias), down_bias)

    def put(
        self,
        expert: int,
        first: GivenWeight,
        down: GivenWeight,
        first_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """load() for whoever has the group's turn already, perhaps in another thread."""
        with undisturbed(self.layer.device):
            self.layer.experts.load(expert, *self._arranged(first, down, first_bias), down_bias)

    def _arranged(
        self, first: GivenWeight, down: GivenWeight, first_bias: Tensor | None
    ) -> tuple[Matrix, Matrix, Tensor | None]:
        """Outputs first, gates before ups."""
        first, down = (self._outputs_first(weight) for weight in (first, down))
        if not self.structure.is_interleaved:
            return first, down, first_bias
        return _of_rows(first, _gates_first), down, None if first_bias is None else _gates_first(first_bias)

    def _outputs_first(self, weight: GivenWeight) -> Matrix:
        if isinstance(weight, tuple):
            weight = MXFP4.from_bytes(*weight)
        if isinstance(weight, MXFP4) or not self.structure.is_transposed:
            return weight
        return weight.mT

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H] in the dtype of hidden_states.

        Ids outside of [0, E) are slots without an expert and add nothing: transformers marks experts of other ranks by
        E or more, and padding by -1. All ranks of the group must call. Errors as MegaMoE.forward() has them.
        """
        known = (top_k_index >= 0) & (top_k_index < self.structure.num_experts)
        ids = top_k_index.to(torch.int64).masked_fill(~known, -1)
        hidden = hidden_states if hidden_states.dtype == torch.float32 else hidden_states.to(torch.bfloat16)
        out: Tensor = self.layer(hidden, ids, top_k_weights.to(torch.float32))
        return out.to(hidden_states.dtype)

    def idle(self) -> None:
        """A call with no tokens, for a rank that has nothing to compute while the others of its group call."""
        shape, device = self.layer.shape, self.layer.device
        self.layer(
            torch.empty(0, shape.hidden, dtype=torch.bfloat16, device=device),
            torch.empty(0, shape.topk, dtype=torch.int64, device=device),
            torch.empty(0, shape.topk, dtype=torch.float32, device=device),
        )


def _gates_first(rows: Tensor) -> Tensor:
    """gate0, up0, gate1, up1 -> gate0, gate1, up0, up1"""
    return torch.cat((rows[0::2], rows[1::2]))


def _of_rows(weight: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    if isinstance(weight, MXFP4):
        return MXFP4(change(weight.packed), change(weight.scales))
    return change(weight)
