"""What tests of the grouped products share: operands, what is done with them, and what it should be in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe.activations import SWIGLU, Activation
from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp4, dequantize_mxfp8, quantize_mxfp4, quantize_mxfp8
from megamoe.kernels.chips.tiles import Tile
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear1 import grouped_linear1, grouped_linear1_torch
from megamoe.kernels.grouped_linear2 import grouped_linear2, grouped_linear2_torch
from megamoe.kernels.layout import Prepacked, Wide, in_memory_order, in_sum_order
from megamoe.reference import activated_fp32

LIMIT = 10.0
V4 = SWIGLU.with_limit(LIMIT)
UNTOUCHED = 77.0  # what an output holds before
# ways to multiply: by the chip's scaled instruction, as BF16 with rows widened before, and weights that are BF16 anyway
WAYS = dict.fromkeys(("scaled", "wide", "bf16"), Tile(16, 128, 128))
MX = ("scaled", "wide")
every_way = pytest.mark.parametrize("way", WAYS)
both_mx = pytest.mark.parametrize("way", MX)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int) -> Tensor:
    """-2 to 2, whole: products whose FP32 sums are the same in any order, and exact in both formats"""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def grouped(x: Tensor, weight: Tensor, counts: list[int], way: str, bias: Tensor | None = None) -> Grouped:
    """x [R, K] and weight [e, N, K] float32, rounded to the formats of the way"""
    tokens_per_expert = torch.tensor(counts, dtype=torch.int32)
    if way in MX:
        rows, weights = rows_for(way, quantize_mxfp8(x)), weights_for(way, quantize_mxfp4(weight))
        return Grouped(rows, weights, tokens_per_expert, bias=bias)
    return Grouped(x.bfloat16(), weight.bfloat16(), tokens_per_expert, bias=bias)


def rows_for(way: str, x: MXFP8) -> MXFP8 | Wide:
    return Wide(in_sum_order(dequantize_mxfp8(x))) if way == "wide" else x


def weights_for(way: str, weight: MXFP4) -> MXFP4 | Prepacked:
    return Prepacked.of(weight) if way == "wide" else weight


def drawn(counts: list[int], depth: int, columns: int, way: str, *, bias: bool = False) -> Grouped:
    x, weight = normal(sum(counts), depth, seed=0) * 2, normal(len(counts), columns, depth, seed=1) * 0.1
    return grouped(x, weight, counts, way, normal(len(counts), columns, seed=2) * 2 if bias else None)


def products_fp64(product: Grouped, weights: Tensor | None = None) -> Tensor:
    """[R, N] float64, with the bias, if there is one, times weights [R], if there are any"""
    x, weight = product.x, product.weight
    rows = torch.split(as_fp64(x), product.tokens_per_expert.tolist())
    plain = weight.plain() if isinstance(weight, Prepacked) else weight
    matrices = dequantize_mxfp4(plain, torch.float64) if isinstance(plain, MXFP4) else plain.double()
    products = torch.cat([piece @ each.T for piece, each in zip(rows, matrices, strict=True)])
    if product.bias is None:
        return products
    bias = product.bias.double().repeat_interleave(product.tokens_per_expert.long(), 0)
    return products + (bias if weights is None else bias * weights.double().unsqueeze(1))


def as_fp64(out: MXFP8 | Wide | Tensor) -> Tensor:
    if isinstance(out, MXFP8):
        return dequantize_mxfp8(out, torch.float64)
    return in_memory_order(out.values).double() if isinstance(out, Wide) else out.double()


def as_bytes(out: MXFP8 | Wide | Tensor) -> Tensor:
    """[R, B] uint8: values and, where there are any, scales of each row"""
    if isinstance(out, MXFP8):
        return torch.cat((out.values.view(torch.uint8), out.scales), 1)
    return (out.values if isinstance(out, Wide) else out).view(torch.uint8)


# ---- Linear-2 ----


def linear2(product: Grouped, index: Tensor | None = None, *, twin: bool = False, **options: Any) -> Tensor:
    """[R, H] bfloat16, UNTOUCHED where no row went"""
    out = torch.full((product.num_rows, product.num_columns), UNTOUCHED, dtype=torch.bfloat16)
    index = torch.arange(product.num_rows) if index is None else index
    weights = None if product.bias is None else weights_of(product)
    (grouped_linear2_torch if twin else grouped_linear2)(product, index, out, weights, **options)
    return out


# ---- Linear-1 ----


def linear1(
    product: Grouped, activation: Activation = V4, weights: Tensor | None = None, *, twin: bool = False, **options: Any
) -> MXFP8 | Wide | Tensor:
    """[R, I], what nobody wrote as in empty_hidden()"""
    out = empty_hidden(product, activation)
    weights = weights_of(product) if weights is None else weights
    (grouped_linear1_torch if twin else grouped_linear1)(product, weights, activation, out, **options)
    return out


def empty_hidden(product: Grouped, activation: Activation = V4) -> MXFP8 | Wide | Tensor:
    rows, columns = product.num_rows, product.num_columns // activation.rows_per_output
    untouched = torch.full((rows, columns), UNTOUCHED, dtype=torch.bfloat16)
    if product.kind != "mxfp4":
        return untouched if product.kind == "bf16" else Wide(untouched)
    values = torch.full((rows, columns), 0x55, dtype=torch.uint8)
    return MXFP8(values.view(torch.float8_e4m3fn), torch.full((rows, columns // 32), 0xA5, dtype=torch.uint8))


def weights_of(product: Grouped) -> Tensor:
    """[R] float32, 0.25 to 1.25"""
    return torch.rand(product.num_rows, generator=torch.Generator().manual_seed(6)) + 0.25


def linear1_fp64(product: Grouped, activation: Activation = V4) -> Tensor:
    """[R, I] float64, rounded where the contract rounds"""
    rounded = products_fp64(product).bfloat16()
    turned = torch.cat((rounded[:, 0::2], rounded[:, 1::2]), 1) if activation.gated else rounded
    activated = activated_fp32(turned, weights_of(product).unsqueeze(1), activation)
    return as_fp64(quantize_mxfp8(activated) if product.kind != "bf16" else activated.bfloat16())
