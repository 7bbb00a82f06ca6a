"""DeepSpeed's two expert-parallel layers: deepspeed.moe without token drops, and AutoEP, both with the router replaced.

Both score tokens inside of the layer, so their routers had to be replaced for the routing to be the given one.
deepspeed.moe: a TopKGate whose logits are not computed but set to log(weights) for the given experts and -inf for
the others; DeepSpeed's own topkgating then finds these experts and weights again, the capacity that drops no token,
and every token's place. AutoEP: its router's module, by one that returns what was given. The experts that
deepspeed.moe copies are this file's, because it leaves them to its user.
"""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; without it DeepSpeed looks for a GPU and warns

import deepspeed
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, RouterOutput
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate, topkgating
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from benchmarks.peers.peer import ExpertWeights
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.shape import MoEShape


def _start() -> None:
    """Has DeepSpeed use the default group that is there already.

    It would compile a shared-memory all-reduce first, which these layers never call; no op is said to be compatible.
    """
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


class SwiGLU(nn.Module):
    """One expert, gate and up in one product."""

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16))
        self.down = nn.Parameter(torch.empty(shape.hidden, shape.intermediate, dtype=torch.bfloat16))

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = linear(rows, self.gate_up).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.down)


class GivenGate(TopKGate):  # type: ignore[misc]
    """DeepSpeed's gate with the linear layer left out: routes are what route() was given."""

    logits: Tensor

    def route(self, ids: Tensor, weights: Tensor, num_experts: int) -> None:
        self.logits = torch.full((len(ids), num_experts), -torch.inf).scatter_(1, ids, weights.log())

    def forward(self, *_: object) -> object:
        return topkgating(self.logits, self.k, 1.0, 0, False, self.ep_group, sparse_routes=True)


class DeepSpeedMoE:
    """deepspeed.moe.layer.MoE with drop_tokens=False: every expert's rows are padded to the fullest expert's."""

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        _start()
        sizes = {"num_experts": shape.num_experts, "ep_size": group.size, "k": shape.topk}
        self.num_experts = shape.num_experts
        self.layer = MoE(shape.hidden, SwiGLU(shape), drop_tokens=False, **sizes)
        moe = self.layer.deepspeed_moe
        moe.gate = self.gate = GivenGate(shape.hidden, shape.num_experts, k=shape.topk, drop_tokens=False)
        self.layer.set_deepspeed_parallelism()
        own = weights.part(Placement(shape.num_experts, group.size).experts(group.rank))
        for expert, gate_up, down in zip(moe.experts.deepspeed_experts, own.gate_up, own.down, strict=True):
            expert.gate_up.copy_(gate_up)
            expert.down.copy_(down)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.gate.route(ids, weights, self.num_experts)
        out: Tensor = self.layer(hidden)[0]
        return out


class GivenRouter(nn.Module):
    """In the place of AutoEP's router: returns the routing it was given, with the counts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.given: tuple[Tensor, Tensor] | None = None

    def forward(self, *_: object) -> RouterOutput:
        assert self.given is not None
        ids, weights = self.given
        return RouterOutput(weights, ids, torch.bincount(ids.flatten(), minlength=self.num_experts))


class DeepSpeedAutoEP:
    """The layer that AutoEP makes of Qwen3-MoE's block, which it finds in a model of one layer.

    AutoEP.replace_moe_layer would put it into the model too, but that step does not know transformers 5.23.
    """

    def __init__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> None:
        _start()
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.intermediate,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.topk,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=8,
        )
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
        block = model.model.layers[0].mlp
        block.experts.gate_up_proj.copy_(weights.gate_up)
        block.experts.down_proj.copy_(weights.down)
        finder = AutoEP(model, AutoEPConfig(enabled=True, autoep_size=group.size, preset_model="qwen3_moe"))
        (found,) = finder.ep_parser()
        self.layer = AutoEPMoELayer(found, block, group.size, group.rank, finder.config)
        self.layer.set_deepspeed_parallelism()
        self.layer.router = self.router = GivenRouter(shape.num_experts)

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self.router.given = ids, weights
        given = self.layer(hidden.unsqueeze(0))
        out: Tensor = given[0] if isinstance(given, tuple) else given
        return out.squeeze(0)
