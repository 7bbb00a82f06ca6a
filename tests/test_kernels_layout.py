"""Prepacked weights: every code comes back, lies where the decoder takes it, and one multiplication gives its value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megamoe import MoEShape
from megamoe.execution.experts import Experts
from megamoe.formats import E2M1_MAGNITUDES, MXFP4, dequantize_mxfp4, pack_e2m1, quantize_mxfp4
from megamoe.kernels.layout import (
    LARGEST_SMALL_SCALE,
    Prepacked,
    Wide,
    gather_codes,
    in_sum_order,
    prepack,
    prepacked_shapes,
    spread_codes,
    unprepack,
)
from tests.test_kernel_call import as_with_kernels

pytest.importorskip("triton")

from megamoe.kernels.chips.tiles import LARGE_SCALES, TABLES, Tile
from megamoe.kernels.grouped import Grouped

CPU = torch.device("cpu")
E2M1_VALUES = torch.tensor([*E2M1_MAGNITUDES, *(-each for each in E2M1_MAGNITUDES)], dtype=torch.float64)


def as_int32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def drawn(*size: int, largest_scale: int = 140) -> MXFP4:
    """Any codes and scales up to that, [..., N, K]."""
    generator = torch.Generator().manual_seed(sum(size))
    packed = torch.randint(0, 256, (*size[:-1], size[-1] // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, largest_scale + 1, (*size[:-1], size[-1] // 32), dtype=torch.uint8, generator=generator)
    scales.view(-1)[-1] = largest_scale
    return MXFP4(packed, scales)


def test_the_worked_example_of_a_word_comes_out() -> None:
    word = torch.tensor([3 | 9 << 20], dtype=torch.int32)
    assert spread_codes(word).tolist() == [0x000000C0 | 1 << 19 | 1 << 28]


def test_every_code_in_every_place_comes_back() -> None:
    words = torch.tensor([as_int32(code << 4 * place) for place in range(8) for code in range(16)], dtype=torch.int32)
    spread = spread_codes(words)
    assert torch.equal(gather_codes(spread), words)
    bits = [{bit for bit in range(32) if int(each) >> bit & 1} for each in spread_codes(words[15::16])]
    assert sorted(bit for each in bits for bit in each) == list(range(32)), "no two codes share a bit"


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (2880, 2880), (96, 32), (192, 160), (64, 96)])
def test_weights_of_any_size_come_back_and_what_fills_up_is_zero(outputs: int, inputs: int) -> None:
    weight = drawn(2, outputs, inputs)
    words, scales = prepack(weight)
    assert [tuple(each.shape[1:]) for each in (words, scales)] == list(prepacked_shapes(outputs, inputs))
    back = unprepack(words, scales, outputs, inputs)
    assert torch.equal(back.packed, weight.packed)
    assert torch.equal(back.scales, weight.scales)
    filled = MXFP4(torch.full_like(weight.packed, 0xFF), torch.full_like(weight.scales, 0xFF))
    words, scales = prepack(filled)
    assert int((words != 0).sum()) == 2 * outputs * inputs // 8
    assert int((scales != 0).sum()) == 2 * outputs * inputs // 32


def test_a_piece_is_64_outputs_by_128_of_k_without_a_gap() -> None:
    weight = drawn(1, 192, 384)
    words, scales = prepack(weight)
    plain = spread_codes(weight.packed.view(torch.int32))
    assert torch.equal(words[0, 2, 1], plain[0, 128:192, 16:32])
    assert torch.equal(scales[0, 2, 1], weight.scales[0, 128:192, 4:8])


def pairs_of(words: Tensor) -> list[Tensor]:
    """What the decoder makes of words: for each register, two BF16 of every word."""
    both, mantissas, signs = as_int32(0x81C081C0), 0x01C001C0, as_int32(0x80008000)
    pairs = (
        words & both,
        (words << 3) & both,
        ((words << 6) & mantissas) | ((words << 2) & signs),
        ((words >> 3) & mantissas) | ((words << 1) & signs),
    )
    return [each.unsqueeze(-1).view(torch.bfloat16) for each in pairs]


def test_one_multiplication_is_exact_for_every_code_and_small_scale() -> None:
    """The factor of a pair as the decoder makes it, with one multiply and one add."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    exponents = torch.arange(0, LARGEST_SMALL_SCALE + 1, dtype=torch.int32)
    factors = (exponents * 0x00800080 + 126 * 0x00800080).unsqueeze(-1).view(torch.bfloat16)
    assert factors.tolist() == [[2.0 ** (int(e) - 1)] * 2 for e in exponents]
    words = spread_codes(pack_e2m1(codes).view(torch.int32))
    pairs = torch.stack(pairs_of(words), 1).double()  # [word, register, half]
    in_order = in_sum_order(E2M1_VALUES[codes.long()]).view(4, 4, 2).transpose(0, 1)
    assert torch.equal(pairs * 2.0**126, in_order), "each is 2^-126 of its value, in the order of the sum"
    products = pairs.to(torch.bfloat16)[..., None] * factors[:, 0]
    exact = in_order[..., None] * torch.exp2(exponents.double() - 127)
    assert torch.equal(products.double(), exact)


def test_weights_know_whether_one_multiplication_is_exact() -> None:
    small, large = (Prepacked.of(drawn(2, 64, 128, largest_scale=scale)) for scale in (128, 129))
    assert (small.small_scales, large.small_scales) == (True, False)
    assert tuple(small.shape) == (2, 64, 128)
    assert small[1:].small_scales
    assert torch.equal(small[1:].plain().packed, small.plain().packed[1:])


@pytest.mark.parametrize(("largest_scale", "small"), [(128, True), (129, False)])
def test_scales_decide_how_a_product_is_launched(largest_scale: int, small: bool) -> None:
    """By the device's table and one multiplication, or by the one tile that takes two."""
    launches: list[dict[str, Any]] = []
    rows, counts = Wide(torch.zeros(2, 128).bfloat16()), torch.tensor([2], dtype=torch.int32)
    product = Grouped(rows, Prepacked.of(drawn(1, 64, 128, largest_scale=largest_scale)), counts)
    product.run({(3,): lambda **options: launches.append(options)}, {}, None, 3)
    tile = TABLES["cpu"]["wide"][-1][1] if small else LARGE_SCALES
    assert [(each["SMALL_SCALES"], {**each, **tile.launch} == each) for each in launches] == [(small, True)]
    assert tile != LARGE_SCALES or not small
    with pytest.raises(ValueError, match="tiles for prepacked weights have a depth that 128 divides, got 16x64x64"):
        product.run(None, {}, Tile(16, 64, 64), 3)


def test_experts_take_two_multiplications_as_long_as_one_of_them_needs_it() -> None:
    shape = MoEShape(hidden=64, intermediate=32, num_experts=4, topk=1)
    with as_with_kernels():
        experts = Experts(shape, range(4), weight_format="mxfp4", device=CPU)
    small = (quantize_mxfp4(torch.randn(64, 64)), quantize_mxfp4(torch.randn(64, 32)))
    large = (small[0], drawn(64, 32, largest_scale=129))

    def fits() -> list[bool]:
        stacks = [experts.stack(name, range(2)) for name in ("gate_up", "down")]
        assert all(isinstance(each, Prepacked) for each in stacks)
        return [each.small_scales for each in stacks if isinstance(each, Prepacked)]

    for expert in range(4):
        experts.load(expert, *small)
    assert fits() == [True, True]
    experts.load(3, *large)
    assert fits() == [False, False]
    experts.regroup(range(3, 4))
    experts.regroup(range(4))
    assert fits() == [False, False], "the kept expert's scales are still as large"
    experts.load(3, *small)
    assert fits() == [True, True]
    down = experts.stack("down", range(3, 4))
    assert isinstance(down, Prepacked)
    assert torch.equal(dequantize_mxfp4(down.plain())[0], dequantize_mxfp4(small[1]))
