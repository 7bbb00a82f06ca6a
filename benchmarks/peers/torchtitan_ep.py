"""torchtitan's routed experts: its AllToAllTokenDispatcher around its GroupedExperts, called below the router.

Its default SPMD backend exchanges rows with dist.all_to_all, which gloo refuses where sizes differ; "partial_dtensor",
the other that this dispatcher knows, uses all_to_all_single. torchtitan imports the Triton kernels of
another dispatcher, one that needs a GPU, together with this one. Triton is a gigabyte, and nothing on this path calls
it: where it is not installed, a stand-in takes the place of those kernels.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.peers.peer import ExpertWeights
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.shape import MoEShape

if find_spec("triton") is None:
    sys.modules["torchtitan.distributed.minimal_async_ep.kernels"] = MagicMock()

from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher


class TorchTitan:
    """RoutedExperts on this rank's experts, its dispatcher wired to a mesh of all ranks."""

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        set_spmd_backend("partial_dtensor")
        own = weights.part(Placement(shape.num_experts, group.size).experts(group.rank))
        num_local = len(own.down)
        self.num_experts = shape.num_experts
        self.routed = RoutedExperts(
            RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(
                    dim=shape.hidden, hidden_dim=shape.intermediate, num_experts=num_local
                ),
                token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=shape.num_experts, top_k=shape.topk),
            )
        ).to(torch.bfloat16)
        gate, up = own.gate_up.chunk(2, dim=1)  # [e, I, H] each
        experts = self.routed.inner_experts
        for parameter, values in ((experts.w1_EFD, gate), (experts.w3_EFD, up), (experts.w2_EDF, own.down)):
            parameter.copy_(values)
        mesh = init_device_mesh("cpu", (group.size,), mesh_dim_names=("ep",))
        self.routed.token_dispatcher.wire_meshes(ep_mesh=mesh)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts)  # its MoE module counts above the experts
        out: Tensor = self.routed(hidden.unsqueeze(0), weights.unsqueeze(0), ids.unsqueeze(0), counts)
        return out.squeeze(0)
