"""Runs the experts of a stock transformers model on the layer: over ranks, and on one.

Over ranks `from_pretrained(..., distributed_config=DistributedConfig(ep_size=N, ep_implementation="megamoe", ...))`;
on one rank `from_pretrained(..., experts_implementation="megamoe")`. Loading is transformers' own. At a module's first
call its weights go over into the layer of this rank, and are gone from the module.
"""

# T tokens of this rank   H hidden   K experts per token

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megamoe.model.experts import RoutedExperts
from megamoe.model.handover import hand_over, run_alone, structure_of
from megamoe.parallel.group import EPGroup

NAME = "megamoe"


class MegaMoEExperts(EPImplementation):  # type: ignore[misc]
    """The layer as an expert-parallel implementation of transformers, one for each experts module.

    Ranks that share a batch (tp_size > 1) compute a slice of it each, and gather the results. ValueError, while the
    model is made, for experts that do not fit, see read_structure().
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts, self.structure = experts, structure_of(experts)
        self.routed: RoutedExperts | None = None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index [T, K] int64, top_k_weights [T, K] -> [T, H]"""
        if self.routed is None:
            self.routed = hand_over(self.experts, self.structure, self._group(hidden_states), top_k_index.shape[-1])
        if self.tp_mesh.size() == 1:
            out: Tensor = self.routed(hidden_states, top_k_index, top_k_weights)
            return out
        # a slice for each rank, of equal size but for the last ones, which may be shorter or empty
        size = -(-len(hidden_states) // self.tp_mesh.size())
        start = self.tp_mesh.get_local_rank() * size
        rows = slice(start, start + size)
        own = self.routed(hidden_states[rows], top_k_index[rows], top_k_weights[rows])
        slices = own.new_zeros(self.tp_mesh.size() * size, own.shape[1])
        filled = own.new_zeros(size, own.shape[1])
        filled[: len(own)] = own
        if size:
            dist.all_gather_into_tensor(slices, filled, group=self.tp_mesh.get_group())
        whole: Tensor = slices[: len(hidden_states)]
        return whole

    def _group(self, hidden_states: Tensor) -> EPGroup:
        """One EPGroup for all layers of the model: they share buffers, and the link is measured once."""
        shared: EPGroup | None = getattr(self.ep_mesh, "_megamoe_group", None)
        if shared is None:
            group = self.ep_mesh.get_group()
            dist.barrier(group)  # ranks end loading at different times, and a layer's call waits for a minute alone
            shared = EPGroup.of(group, hidden_states.device)
            self.ep_mesh._megamoe_group = shared
        return shared


EPImplementationInterface.register(NAME, MegaMoEExperts)
ALL_EXPERTS_FUNCTIONS.register(NAME, run_alone)
