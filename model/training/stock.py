"""The experts of a stock transformers model that train where it has their weights, under whatever trains the model."""

# T tokens of this rank   H hidden   I intermediate   K experts per token   e experts that the module holds

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from megamoe.layer import MegaMoE
from megamoe.model.experts import RoutedExperts
from megamoe.model.packed import PackedExperts
from megamoe.model.private import sharded_parameters
from megamoe.model.structure import Structure
from megamoe.parallel.group import EPGroup
from megamoe.training.distributed.given import GivenMoE
from megamoe.training.steps import refuse_parametrized


class _GivenExperts(RoutedExperts):
    layer_type: ClassVar[type[MegaMoE]] = GivenMoE
    layer: GivenMoE


class TrainedExperts:
    """Computes a module's experts, and takes gradients to its parameters, wherever a framework has them.

    Optimisers, FSDP, state dicts and save_pretrained() go on as with transformers' own experts. The layer's packed
    copies are made anew where a parameter was changed. Its formats are those of inference: BF16, or with MXFP4, where
    the module asks for it, quantisation-aware training.

    ValueError for experts that are packed, which have no master weights, and for weights in FP16.
    """

    def __init__(self, experts: nn.Module, structure: Structure, group: EPGroup | None, topk: int) -> None:
        if isinstance(experts, PackedExperts):
            raise ValueError(
                f"{type(experts).__name__} are packed as the checkpoint has them and cannot be trained: load the model "
                "with weights in BF16 or FP32, and with quantization_config=PackedExpertsConfig() for FP4 training"
            )
        self.experts, self.structure = experts, structure
        vars(experts)["trained"] = self  # no submodule: no state dict of the model has anything of it
        self.routed = _GivenExperts(
            structure,
            topk,
            group,
            weight_format=str(getattr(experts, "weight_format", "bf16")),
            name=type(experts).__name__,
            device=next(experts.parameters(recurse=False)).device,
        )

    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, owners: list[Tensor] | None = None
    ) -> Tensor:
        """[T, H], [T, K] int64, [T, K] -> [T, H], by the weights that the module has at the moment.

        owners: its parameters as optimisers know them, where others stand in for them at the moment
        """
        with self.routed.layer.given(self._masters(), owners_of(self.experts) if owners is None else owners):
            out: Tensor = self.routed(hidden_states, top_k_index, top_k_weights)
        return out

    def _masters(self) -> list[Tensor]:
        """The module's weights as the layer has them, outputs first and gates before ups, through autograd.

        ValueError where one is calculated from parameters that owners_of() does not know.
        """
        refuse_parametrized(self.experts)
        first, down = self.structure.first, "down_proj"
        found: list[Tensor] = [getattr(self.experts, name) for name in (first, down)]
        if self.structure.is_transposed:
            found = [weight.mT for weight in found]
        found += [getattr(self.experts, f"{name}_bias") for name in (first, down) if self.structure.has_bias]
        if self.structure.is_interleaved:
            for index in range(0, len(found), 2):
                found[index] = torch.cat((found[index][:, 0::2], found[index][:, 1::2]), 1)
        return found


def owners_of(experts: nn.Module) -> list[Tensor]:
    """The module's parameters as optimisers know them: FSDP stands others in for these around a call."""
    return sharded_parameters(experts) or list(experts.parameters(recurse=False))
