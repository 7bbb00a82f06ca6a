"""transformers' expert parallelism: Qwen3-MoE's experts behind the all_to_all implementation, under its own plan.

Only the experts are built, so no router, attention or norm runs; the plan is the one that the configuration carries,
applied by the function that applies it to a whole model. Routing weights come in BF16, as Qwen3's router gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.peers.peer import ExpertWeights
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape

PREFIX = "layers.*.mlp."  # where the experts stand in a whole model


class Eager:
    """Its experts in the eager implementation: a loop over the experts that have rows."""

    implementation = "eager"
    dtype = torch.bfloat16

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.topk,
            experts_implementation=self.implementation,
        )
        assert config._experts_implementation == self.implementation
        block, experts = nn.Module(), Qwen3MoeExperts(config).to(self.dtype)
        experts.gate_up_proj.copy_(weights.gate_up)
        experts.down_proj.copy_(weights.down)
        block.experts = experts
        mesh = init_device_mesh("cpu", (group.size, 1), mesh_dim_names=("ep", "tp"))
        plan = {name.removeprefix(PREFIX): style for name, style in config.base_model_ep_plan.items()}
        apply_expert_parallelism(block, mesh["ep"], mesh["tp"], plan, ep_implementation="all_to_all")
        self.experts = block.get_submodule("experts")

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        hidden = hidden.to(self.dtype)
        out: Tensor = self.experts(hidden, ids, weights.to(hidden.dtype))
        return out


class GroupedMM(Eager):
    """Its experts as two grouped products."""

    implementation = "grouped_mm"


class EagerFP32(Eager):
    """In FP32, rows on the wire included: which CPUs without BF16 instructions are faster at."""

    dtype = torch.float32
