"""Against transformers' own DeepSeek-V4 experts and routers, with the same weights dequantised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)

from megamoe.formats import dequantize_mxfp4, quantize_mxfp4
from megamoe.layer import MegaMoE
from megamoe.model.router import Router
from megamoe.reference import relative_error
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_weights

SHAPE = MoEShape(hidden=512, intermediate=256, num_experts=8, topk=3, swiglu_limit=10.0)


def config() -> DeepseekV4Config:
    return DeepseekV4Config(
        hidden_size=SHAPE.hidden,
        moe_intermediate_size=SHAPE.intermediate,
        n_routed_experts=SHAPE.num_experts,
        num_experts_per_tok=SHAPE.topk,
        swiglu_limit=SHAPE.swiglu_limit,
        routed_scaling_factor=1.5,
        vocab_size=100,
    )


def transformers_experts(gate_up: Tensor, down: Tensor) -> DeepseekV4Experts:
    experts = DeepseekV4Experts(config()).to(torch.bfloat16)
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up)
        experts.down_proj.copy_(down)
    return experts


@pytest.mark.parametrize(
    ("weight_format", "dispatch_format", "bound"),
    [("mxfp4", "mxfp8", 0.06), ("bf16", "mxfp8", 0.05), ("bf16", "bf16", 0.006)],
)
def test_experts_agree_with_transformers_up_to_rounding(
    weight_format: str, dispatch_format: str, bound: float, record_property: Callable[[str, object], None]
) -> None:
    """transformers keeps activations in BF16 and weighs after Linear-2; MXFP8 activations round by up to 2^-4 each."""
    packed = [quantize_mxfp4(weights) for weights in make_weights(SHAPE)]
    gate_up, down = (dequantize_mxfp4(q) for q in packed)
    batch = make_batch(SHAPE, 200, mask=False)
    layer = MegaMoE(SHAPE, weight_format=weight_format, dispatch_format=dispatch_format)
    layer.load_experts(packed[0], packed[1])
    with torch.no_grad():
        expected = transformers_experts(gate_up, down)(batch.hidden, batch.ids, batch.weights)
    error = relative_error(layer(batch.hidden, batch.ids, batch.weights), expected)
    print(f"{weight_format} weights, {dispatch_format} wire: relative error {error:.5f}")  # noqa: T201
    record_property("relative_error", error)
    assert error < bound
    assert error > 0


def test_routers_agree_with_transformers() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, SHAPE.hidden, generator=rng).to(torch.bfloat16)
    weight = (torch.randn(SHAPE.num_experts, SHAPE.hidden, generator=rng) / 20).to(torch.bfloat16)
    bias = torch.randn(SHAPE.num_experts, generator=rng)
    token_ids = torch.randint(0, 100, (40,), generator=rng)
    table = torch.randint(0, SHAPE.num_experts, (100, SHAPE.topk), generator=rng)
    scored, hashed = DeepseekV4TopKRouter(config()), DeepseekV4HashRouter(config())
    with torch.no_grad():
        scored.weight.copy_(weight)
        hashed.weight.copy_(weight)
    scored.e_score_correction_bias.copy_(bias)
    hashed.tid2eid.copy_(table)
    wide = hidden.to(torch.float32)  # transformers scores in the dtype it is given
    for ours, theirs in (
        (Router(weight, SHAPE.topk, 1.5, bias=bias), scored(wide)),
        (Router(weight, SHAPE.topk, 1.5, table=table), hashed(wide, token_ids)),
    ):
        ids, weights = ours(hidden, token_ids)
        _, their_weights, their_ids = theirs
        dense, their_dense = torch.zeros(40, SHAPE.num_experts), torch.zeros(40, SHAPE.num_experts)
        dense.scatter_add_(1, ids, weights)
        their_dense.scatter_add_(1, their_ids, their_weights.detach())
        assert torch.allclose(dense, their_dense, rtol=1e-5, atol=1e-6)
