"""A format of weights is one object: what it says of itself; a new one takes its file and a line of the table."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from megamoe import MegaMoE, MoEShape
from megamoe.formats import MXFP4, WEIGHT_FORMATS, CastWeights, WeightFormat, dequantize_mxfp4, quantize_mxfp4

SHAPE = MoEShape(hidden=96, intermediate=64, num_experts=6, topk=2, swiglu_limit=10.0)
FORMATS = pytest.mark.parametrize("weight_format", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@FORMATS
def test_what_a_format_takes_is_held_as_it_says_and_comes_back(weight_format: WeightFormat) -> None:
    given = randn(72, 64)
    for weight in (given, quantize_mxfp4(given)):
        weight_format.refuse(weight)
        taken = weight_format.take(weight)
        parts = weight_format.split(taken)
        held = {key: (tuple(part.shape), part.dtype) for key, part in parts.items()}
        assert held == weight_format.parts(72, 64)
        dense = weight_format.dense(weight_format.join(parts))
        out = torch.empty(72, 64, dtype=torch.bfloat16)
        assert torch.equal(weight_format.dense(taken, out), dense)
        assert dense.dtype == torch.bfloat16
        assert torch.equal(weight_format.dense(weight_format.take(dense)), dense), "what it gives it takes without loss"
        if isinstance(weight, MXFP4):
            assert torch.equal(dense, dequantize_mxfp4(weight))


def test_what_has_no_code_is_refused_alike_before_and_while_it_is_taken() -> None:
    weight = randn(64, 32)
    weight[3, 5] = torch.nan
    beyond = randn(64, 32).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(3.4e38))  # of FP32, not of BF16
    cases = [("mxfp4", weight), ("bf16", weight), ("bf16", weight.mT), ("bf16", beyond), ("mxfp4", beyond)]
    for name, given in cases:
        finite = given is beyond and name == "mxfp4"
        said = "the largest weight 3.4e+38 is above" if finite else "1 of 2048 weights are NaN or infinite"
        for method in (WEIGHT_FORMATS[name].refuse, WEIGHT_FORMATS[name].take):
            with pytest.raises(ValueError, match=re.escape(said)):
                method(given)


class E5M2Weights(CastWeights):
    """All that a new format with a dtype of torch has to say."""

    name: ClassVar[str] = "e5m2"
    dtype: ClassVar[torch.dtype] = torch.float8_e5m2


@pytest.mark.parametrize("keep_dequantized", [False, True])
def test_a_new_format_takes_its_object_and_a_line_of_the_table(
    keep_dequantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WEIGHT_FORMATS, "e5m2", E5M2Weights())
    gate_up, down = randn(6, 128, 96) / 10, randn(6, 96, 64, seed=1) / 8
    layer = MegaMoE(SHAPE, weight_format="e5m2", dispatch_format="bf16", keep_dequantized=keep_dequantized)
    layer.load_experts(gate_up, down)
    kept = 3 * 6 * 96 * 64 * 2 if keep_dequantized else 0
    assert layer.memory_bytes == 3 * 6 * 96 * 64 + kept, "a byte a value"
    again = MegaMoE(SHAPE, weight_format="e5m2", dispatch_format="bf16")
    again.load_state_dict(layer.state_dict())
    plain = MegaMoE(SHAPE, weight_format="bf16", dispatch_format="bf16")
    plain.load_experts(*(each.to(torch.float8_e5m2).to(torch.bfloat16) for each in (gate_up, down)))
    batch = randn(17, 96, seed=2), torch.arange(34).view(17, 2) % 6, torch.rand(17, 2)
    out = layer(*batch)
    assert torch.equal(again(*batch), out)
    assert float((out.double() - plain(*batch).double()).norm() / plain(*batch).double().norm()) < 5e-3
    with pytest.raises(ValueError, match="arithmetic 'fma' is of kernels that do not read these weights"):
        MegaMoE(SHAPE, weight_format="e5m2", arithmetic="fma")
    with pytest.raises(ValueError, match="weight_format must be one of mxfp4, bf16, e5m2, got 'e4m3'"):
        MegaMoE(SHAPE, weight_format="e4m3")
