"""Runs the experts of a stock transformers model on the layer: over ranks, and on one.

Over ranks `from_pretrained(..., distributed_config=DistributedConfig(ep_size=N, ep_implementation="megamoe", ...))`;
on one rank `from_pretrained(..., experts_implementation="megamoe")`. Loading is transformers' own. At a module's first
call in eval mode its weights go over into the layer of this rank, and are gone from the module. Where the first call is
in train mode they stay the module's parameters, and train (training.md).
"""

# T tokens of this rank   H hidden   K experts per token

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megamoe.ambient import eager
from megamoe.model.experts import RoutedExperts
from megamoe.model.handover import NAME, hand_over, refuse_late_training, run_alone, structure_of
from megamoe.model.training.slices import gather_slices, take_slice
from megamoe.model.training.stock import TrainedExperts, owners_of
from megamoe.parallel.group import EPGroup


class MegaMoEExperts(EPImplementation):  # type: ignore[misc]
    """The layer as an expert-parallel implementation of transformers, one for each experts module.

    Ranks that share a batch (tp_size > 1) compute a slice of it each, and gather the results. ValueError, while the
    model is made, for experts that do not fit, see read_structure().
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.structure = experts, structure_of(experts)
        self.computed: RoutedExperts | TrainedExperts | None = None
        self._owners: list[Tensor] = []
        experts.register_forward_pre_hook(self._note_owners)

    @eager
    def _note_owners(self, experts: nn.Module, args: object) -> None:
        """The parameters as optimisers know them, for which transformers and FSDP stand others in during the call."""
        del args
        self._owners = owners_of(experts)

    @eager
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H]"""
        if self.tp_mesh.size() == 1:
            return self._compute(hidden_states, top_k_index, top_k_weights)
        group = self.tp_mesh.get_group()
        own = (take_slice(each, group) for each in (hidden_states, top_k_index, top_k_weights))
        return gather_slices(self._compute(*own), len(hidden_states), group)

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.computed is None:
            group = self._group(hidden_states)
            self._refuse_gradient(hidden_states)
            begin = TrainedExperts if self.experts.training else hand_over
            self.computed = begin(self.experts, self.structure, group, top_k_index.shape[-1])
        if isinstance(self.computed, TrainedExperts):
            return self.computed(hidden_states, top_k_index, top_k_weights, self._owners)
        refuse_late_training(self.experts, hidden_states)
        out: Tensor = self.computed(hidden_states, top_k_index, top_k_weights)
        return out

    def _refuse_gradient(self, hidden_states: Tensor) -> None:
        """ValueError on all ranks where one asks for a gradient in eval mode, before any weights are taken for it."""
        asked = not self.experts.training and hidden_states.requires_grad and torch.is_grad_enabled()
        asking = torch.tensor([int(asked)], device=hidden_states.device)
        dist.all_reduce(asking, dist.ReduceOp.MAX, self.ep_mesh.get_group())
        if asking.item():
            raise ValueError(
                f"hidden of {type(self.experts).__name__} in eval mode requires a gradient on "
                f"{'this' if asked else 'another'} rank, and the layer has no backward then: call the model under "
                "torch.no_grad(), or in train mode first"
            )

    def _group(self, hidden_states: Tensor) -> EPGroup:
        """One EPGroup for all layers of the model: they share buffers, and the link is measured once."""
        shared: EPGroup | None = getattr(self.ep_mesh, "_megamoe_group", None)
        if shared is None:
            gc.collect()  # ranks tell layers of one name apart by those that live: models that are gone must be
            group = self.ep_mesh.get_group()
            dist.barrier(group)  # ranks end loading at different times, and a layer's call waits for a minute alone
            shared = EPGroup.of(group, hidden_states.device)
            self.ep_mesh._megamoe_group = shared
        return shared


EPImplementationInterface.register(NAME, MegaMoEExperts)
ALL_EXPERTS_FUNCTIONS.register(NAME, run_alone)
