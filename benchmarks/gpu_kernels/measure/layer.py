"""The whole layer on one rank, the same in torch alone, and what both are given."""

# T tokens   H hidden   I intermediate   E experts   K experts per token

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_kernels.measure.operands import grouped_mm, random_bf16, random_mxfp4
from megamoe import EPGroup, MegaMoE, MoEShape
from megamoe.formats import MXFP4

DISPATCH_FORMATS = {"mxfp4": "mxfp8", "bf16": "bf16"}  # by the format of the weights
CHECKED = MoEShape(hidden=256, intermediate=128, num_experts=8, topk=2, swiglu_limit=10.0)
Inputs = tuple[Tensor, Tensor, Tensor]
Call = Callable[..., Tensor]


def inputs(sizes: MoEShape, num_tokens: int, device: torch.device, seed: int = 0) -> Inputs:
    """hidden [T, H] bfloat16, topk_ids [T, K] int64 in turns over all experts, topk_weights [T, K] float32"""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_tokens, sizes.hidden, device=device, generator=generator).to(torch.bfloat16)
    ids = torch.arange(num_tokens * sizes.topk, device=device).view(num_tokens, sizes.topk) % sizes.num_experts
    return hidden, ids, torch.rand(num_tokens, sizes.topk, device=device, generator=generator) + 0.25


def weights(sizes: MoEShape, weight_format: str, device: torch.device) -> tuple[MXFP4 | Tensor, MXFP4 | Tensor]:
    """gate_up [E, 2I, H], gate rows first, and down [E, H, I]"""
    make = random_mxfp4 if weight_format == "mxfp4" else random_bf16
    return (
        make((sizes.num_experts, 2 * sizes.intermediate, sizes.hidden), 0, device),
        make((sizes.num_experts, sizes.hidden, sizes.intermediate), 1, device),
    )


def layer(
    sizes: MoEShape, weight_format: str, device: torch.device, group: EPGroup | None = None, *, waves: int = 1
) -> MegaMoE:
    made = empty_layer(sizes, weight_format, device, group, waves=waves)
    made.load_experts(*weights(sizes, weight_format, device))
    return made


def empty_layer(
    sizes: MoEShape, weight_format: str, device: torch.device, group: EPGroup | None = None, *, waves: int = 1
) -> MegaMoE:
    wire = DISPATCH_FORMATS[weight_format]
    return MegaMoE(sizes, group, weight_format=weight_format, dispatch_format=wire, waves=waves, device=device)


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """The layer of torch's own operations in BF16: sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum."""

    gate_up: Tensor
    down: Tensor
    limit: float | None

    def __call__(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As MegaMoE takes and gives it; no slot may be masked."""
        experts, order = topk_ids.flatten().sort(stable=True)
        tokens = order // topk_ids.shape[1]
        ids = torch.arange(len(self.gate_up), device=hidden.device)
        ends = torch.searchsorted(experts, ids, right=True).to(torch.int32)
        gate, up = grouped_mm(hidden[tokens], self.gate_up, ends).chunk(2, -1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, self.down, ends)
        weighted = rows * topk_weights.flatten()[order].unsqueeze(1)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return out.index_add_(0, tokens, weighted).to(torch.bfloat16)


def torch_layer(sizes: MoEShape, device: torch.device) -> TorchLayer:
    gate_up, down = weights(sizes, "bf16", device)
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    return TorchLayer(gate_up, down, sizes.swiglu_limit)
