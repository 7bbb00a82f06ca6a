"""The kernels that move rows, interpreted, against their torch twins and the layer's own operations: bitwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megamoe.execution import ops
from megamoe.formats import BLOCK, MXFP8, dequantize_mxfp8, quantize_mxfp8
from tests.interpreter import interpreted

pytest.importorskip("triton")

from megamoe.kernels.layout import Wide, in_memory_order, in_sum_order
from megamoe.kernels.quantize import FEW, MANY, Filling, quantize, quantize_torch
from megamoe.kernels.reduce_slots import reduce_slots, reduce_slots_torch
from megamoe.kernels.widen import widen, widen_torch

MANY_TOKENS = 65  # from 64 on tokens are cut by the other tile
WIDTHS = [32, 96, 2048, 2880]  # one block, three, the larger tile, gpt-oss's width: a tile and a part of one


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal bfloat16 over 12 binades"""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 2 ** (12 * torch.rand(shape, generator=generator) - 8)).bfloat16()


def draw_index(num_rows: int, low: int, high: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, (num_rows,), generator=torch.Generator().manual_seed(seed))


def wire(num_rows: int, hidden: int) -> Tensor:
    """[R, B] uint8: rows as on the wire, filled with what nobody wrote"""
    return torch.full((num_rows, -(-(hidden + hidden // BLOCK) // 4) * 4), 0xA5, dtype=torch.uint8)


def columns(rows: Tensor, hidden: int) -> MXFP8:
    return MXFP8(rows[:, :hidden].view(torch.float8_e4m3fn), rows[:, hidden : hidden + hidden // BLOCK])


def on_the_wire(tokens: Tensor, index: Tensor) -> Tensor:
    """What quantize() writes, [R, B] uint8; its twin must have written the same."""
    num_tokens, hidden = tokens.shape
    by_kernel, by_twin = wire(len(index), hidden), wire(len(index), hidden)
    filling = Filling.of(index, num_tokens)
    quantize(tokens, filling, columns(by_kernel, hidden))
    quantize_torch(tokens, filling, columns(by_twin, hidden))
    assert torch.equal(by_kernel, by_twin)
    return by_kernel


@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 96), (1, 2880), (5, 96), (MANY_TOKENS, 96)])
@interpreted
def test_without_a_filling_a_token_is_in_its_own_row_and_widened_it_has_the_same_values(
    num_tokens: int, hidden: int
) -> None:
    tokens = draw(num_tokens, hidden)
    tokens[:1, 40] = torch.inf
    filled = on_the_wire(tokens, torch.arange(num_tokens))
    for operation, spread in ((quantize, widen), (quantize_torch, widen_torch)):
        rows = wire(num_tokens, hidden)
        operation(tokens, None, columns(rows, hidden))
        assert torch.equal(rows, filled)
        at_once, after = (Wide(torch.full((num_tokens, hidden), 7.0).bfloat16()) for _ in range(2))
        operation(tokens, None, at_once)
        spread(columns(rows, hidden), after)
        assert same_bits(at_once.values.nan_to_num(3e38), after.values.nan_to_num(3e38))
        plain = in_memory_order(at_once.values)
        assert same_bits(plain.nan_to_num(3e38), dequantize_mxfp8(columns(rows, hidden)).nan_to_num(3e38))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


# ---- which rows a token fills ----


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 12])
def test_every_row_is_listed_once_under_its_token(num_tokens: int, num_rows: int) -> None:
    index = draw_index(num_rows, -1, num_tokens)
    filling = Filling.of(index, num_tokens)
    assert filling.starts is not None
    starts, rows = filling.starts.tolist(), filling.rows.tolist()
    assert len(starts) == num_tokens + 2
    assert sorted(rows) == list(range(num_rows))
    for token in range(num_tokens + 1):
        held = token if token < num_tokens else -1
        expected = [row for row, each in enumerate(index.tolist()) if each == held]
        assert rows[starts[token] : starts[token + 1]] == expected
    assert filling.tokens.tolist() == [int(index[row]) % (num_tokens + 1) for row in rows]


# ---- quantize ----


@pytest.mark.parametrize("num_tokens", [1, 5, MANY_TOKENS])
@pytest.mark.parametrize("hidden", WIDTHS)
@interpreted
def test_rows_are_their_tokens_rounded_whatever_the_shape(num_tokens: int, hidden: int) -> None:
    tokens, index = draw(num_tokens, hidden), draw_index(2 * num_tokens + 1, -1, num_tokens)
    written, expected = on_the_wire(tokens, index), wire(len(index), hidden)
    rounded = quantize_mxfp8(torch.where(index.unsqueeze(1) < 0, 0.0, tokens[index]))
    expected[:, :hidden] = rounded.values.view(torch.uint8)
    expected[:, hidden : hidden + hidden // BLOCK] = rounded.scales
    assert torch.equal(written, expected)


@pytest.mark.parametrize("index", [[], [-1], [-1] * 9, [3] * 9, [0, 1, 2, 3], [3, -1, 0, -1, -1, 3]], ids=str)
@interpreted
def test_rows_may_be_none_all_padding_all_of_one_token_or_in_any_order(index: list[int]) -> None:
    written = on_the_wire(draw(4, 64), torch.tensor(index, dtype=torch.int64))
    padding = written[[row for row, token in enumerate(index) if token < 0]]
    assert (padding[:, :64] == 0).all()
    assert (padding[:, 64:66] == 105).all()  # 2^-22, the contract's least scale
    assert (written[:, 66:] == 0xA5).all()


@interpreted
def test_without_a_token_all_rows_are_padding() -> None:
    on_the_wire(draw(0, 64), torch.tensor([-1, -1]))


@pytest.mark.parametrize("num_tokens", [0, 2])
@interpreted
def test_rows_that_are_not_listed_stay_as_they_are(num_tokens: int) -> None:
    held = [(4, 0), (1, 1), (6, 0)] if num_tokens else []
    rows, tokens = torch.tensor(held, dtype=torch.int64).view(-1, 2).T
    filling = Filling.at(tokens, rows, num_tokens, 7)
    for operation in (quantize, quantize_torch):
        written = wire(7, 64)
        operation(draw(num_tokens, 64), filling, columns(written, 64))
        touched = (written[:, :66] != 0xA5).any(1)
        assert sorted(touched.nonzero().flatten().tolist()) == sorted(rows.tolist())
        assert torch.equal(written[rows], on_the_wire(draw(num_tokens, 64), tokens))


@pytest.mark.parametrize("blocks", [FEW.blocks, MANY.blocks])
@interpreted
def test_every_bf16_value_is_rounded_as_on_the_cpu(blocks: int) -> None:
    # all of one block's values share their upper byte, so the block's scale suits them; beside 1.0 most underflow
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    finite = every[every.isfinite().all(1)]
    ones = torch.where(torch.arange(256) % BLOCK == 0, 1.0, finite.float()).bfloat16()
    num_tokens = 1 if blocks == FEW.blocks else MANY_TOKENS
    tokens = torch.cat((finite, ones)).view(-1, BLOCK)
    tokens = tokens[: len(tokens) // num_tokens * num_tokens].view(num_tokens, -1)
    on_the_wire(tokens, torch.arange(num_tokens))


@interpreted
def test_values_between_two_codes_go_to_the_even_one_at_every_scale() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (codes[:-1] + codes[1:]) / 2
    block = torch.zeros(126, BLOCK)
    block[:, 0], block[:, 1], block[:, 2] = 448.0, midpoints, -midpoints
    scales = torch.tensor([2.0**power for power in (-22, -3, 0, 5, 119)])
    tokens = (block * scales.view(-1, 1, 1)).reshape(len(scales), -1).bfloat16()
    assert torch.equal(tokens.float().view(len(scales), 126, BLOCK), block * scales.view(-1, 1, 1))
    on_the_wire(tokens, torch.arange(len(scales)))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81], ids=hex)
@interpreted
def test_a_block_with_a_nan_or_an_infinity_is_nan_and_its_neighbours_are_not(bits: int) -> None:
    tokens, rows = draw(2, 96), wire(2, 96)
    tokens.view(torch.int16)[1, 40] = bits - 65536 if bits >= 32768 else bits
    quantize(tokens, Filling.of(torch.arange(2), 2), columns(rows, 96))
    got, expected = (dequantize_mxfp8(each, torch.float32) for each in (columns(rows, 96), quantize_mxfp8(tokens)))
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert int(got.isnan().sum()) == BLOCK
    assert rows[1, 97] == 255


@interpreted
def test_a_token_alone_is_rounded_to_the_bits_that_it_has_among_many() -> None:
    tokens, last = draw(MANY_TOKENS, 96), MANY_TOKENS - 1
    together = on_the_wire(tokens, torch.arange(last, -1, -1))
    for token in (0, 23, last):
        assert torch.equal(on_the_wire(tokens[token : token + 1], torch.tensor([0]))[0], together[last - token])


@interpreted
def test_tokens_may_be_columns_of_a_wider_buffer() -> None:
    buffer = draw(5, 200)
    index = torch.arange(5)
    assert torch.equal(on_the_wire(buffer[:, 8:104], index), on_the_wire(buffer[:, 8:104].contiguous(), index))


@interpreted
def test_an_output_of_other_rows_or_width_is_refused_with_both_sizes() -> None:
    for each in (quantize, quantize_torch):
        with pytest.raises(ValueError, match=r"out must have \[2, 64\] values, got \[3, 64\]"):
            each(draw(2, 64), Filling.of(torch.arange(2), 2), columns(wire(3, 64), 64))


# ---- reduce_slots ----


def home(num_rows: int, hidden: int, seed: int = 1) -> Tensor:
    """[N + 1, H] bfloat16: rows that came home, and the one of zeros"""
    return torch.cat((draw(num_rows, hidden, seed=seed), torch.zeros(1, hidden, dtype=torch.bfloat16)))


@pytest.mark.parametrize("num_slots", [1, 6])
@pytest.mark.parametrize("num_tokens", [1, MANY_TOKENS])
@pytest.mark.parametrize("hidden", [7, 96, 2880])
@interpreted
def test_slots_are_summed_as_on_the_cpu_whatever_the_shape(hidden: int, num_tokens: int, num_slots: int) -> None:
    rows = home(num_tokens * num_slots, hidden)
    positions = draw_index(num_tokens * num_slots, 0, len(rows)).view(num_tokens, num_slots)
    summed = reduce_slots(rows, positions)
    assert summed.shape == (num_tokens, hidden)
    assert same_bits(summed, reduce_slots_torch(rows, positions))
    assert same_bits(summed, ops.reduce_slots(rows, positions))


@interpreted
def test_the_order_of_the_slots_shows_in_the_bits_and_is_ascending() -> None:
    rows = torch.tensor([[2.0**24], [1.0], [-(2.0**24)], [0.0]]).bfloat16()
    assert reduce_slots(rows, torch.tensor([[0, 1, 2], [0, 2, 1]])).tolist() == [[0.0], [1.0]]


@interpreted
def test_masked_slots_add_nothing_and_are_not_read() -> None:
    rows, positions = home(3, 64), torch.tensor([[3, 1, 3], [3, 3, 3], [3, 3, 0]])
    expected = reduce_slots_torch(rows, positions)
    rows[3] = float("nan")
    assert same_bits(reduce_slots(rows, positions), expected)
    assert same_bits(expected[1], torch.zeros(64).bfloat16())


@interpreted
def test_sums_between_two_bf16_values_go_to_the_even_one() -> None:
    # 1 + m * 2^-7 has BF16's last bit worth 2^-7; a half of that lies between two
    steps = torch.arange(128)
    rows = torch.cat((1 + steps / 128, torch.tensor([2.0**-8, 0.0]))).bfloat16().unsqueeze(1)
    for sign in (1, -1):
        summed = reduce_slots(rows * sign, torch.stack((steps, torch.full((128,), 128)), 1)).flatten()
        expected = sign * (1 + (steps + steps % 2) / 128)
        assert torch.equal(summed.float(), expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@interpreted
def test_what_is_not_a_number_stays_in_its_column(value: float) -> None:
    rows, positions = home(2, 33), torch.tensor([[0, 1]])
    rows[1, 7] = value
    summed, expected = reduce_slots(rows, positions), reduce_slots_torch(rows, positions)
    assert torch.equal(summed.isnan(), expected.isnan())
    assert torch.equal(summed.nan_to_num(), expected.nan_to_num())


@interpreted
def test_sums_of_the_largest_values_overflow_as_on_the_cpu() -> None:
    largest = torch.finfo(torch.bfloat16).max
    rows = torch.tensor([[largest, -largest, largest]] * 2 + [[0.0, 0.0, 2.0**119]] + [[0.0] * 3]).bfloat16()
    positions = torch.tensor([[0, 1], [0, 2], [0, 3]])
    assert same_bits(reduce_slots(rows, positions), reduce_slots_torch(rows, positions))


@interpreted
def test_a_token_alone_is_summed_to_the_bits_that_it_has_among_many() -> None:
    num_rows = MANY_TOKENS * 6
    rows = home(num_rows, 96)
    positions = torch.randperm(num_rows, generator=torch.Generator().manual_seed(3)).view(MANY_TOKENS, 6)
    together = reduce_slots(rows, positions)
    assert all(same_bits(reduce_slots(rows, positions[t : t + 1])[0], together[t]) for t in (0, 23, MANY_TOKENS - 1))


@interpreted
def test_without_a_token_there_is_nothing_to_sum() -> None:
    assert reduce_slots(home(2, 32), torch.empty(0, 6, dtype=torch.int64)).shape == (0, 32)


@pytest.mark.parametrize("num_slots", [1, 6])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 2880), (5, 96), (MANY_TOKENS, 96), (MANY_TOKENS, 2080)])
@interpreted
def test_results_that_come_home_as_mxfp8_are_summed_as_their_values(
    num_tokens: int, hidden: int, num_slots: int
) -> None:
    num_rows = num_tokens + num_slots  # fewer than there are slots: many read the same
    computed = home(num_rows - 1, hidden)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(2))
    by_kernel, by_twin, by_layer = (wire(num_rows, hidden) for _ in range(3))
    filling = Filling.scattered(order, num_rows)
    quantize(computed, filling, columns(by_kernel, hidden))
    quantize_torch(computed, filling, columns(by_twin, hidden))
    ops.encode_rows(computed, order, columns(by_layer, hidden))
    assert torch.equal(by_kernel, by_twin)
    assert torch.equal(by_kernel, by_layer)
    by_kernel[-1] = 0xFF  # as a masked slot, it is not read
    rows = columns(by_kernel, hidden)
    positions = draw_index(num_tokens * num_slots, 0, num_rows).view(num_tokens, num_slots)
    summed = reduce_slots(rows, positions)
    by_twin[-1] = 0
    assert same_bits(summed, reduce_slots_torch(columns(by_twin, hidden), positions))
    assert same_bits(summed, ops.reduce_slots(columns(by_twin, hidden), positions))


@interpreted
def test_every_code_and_scale_that_rounding_gives_is_summed_to_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(144, 1)
    codes[:, 127::128] = 0  # E4M3's NaN comes with a scale that is one, and the interpreter takes it for 480
    scales = torch.cat((torch.arange(105, 248), torch.tensor([255]))).to(torch.uint8).repeat_interleave(8).view(-1, 8)
    rows = torch.cat((torch.cat((codes, scales), 1), torch.zeros(1, 264, dtype=torch.uint8)))
    positions = torch.arange(144).unsqueeze(1)
    summed = reduce_slots(columns(rows, 256), positions)
    expected = dequantize_mxfp8(columns(rows[:144], 256)) + 0.0  # a sum that starts from zero is never -0
    assert torch.equal(summed.isnan(), expected.isnan())
    assert same_bits(summed.nan_to_num(3e38), expected.nan_to_num(3e38))


# ---- widen ----


def test_the_order_of_the_sum_is_what_is_said_of_it() -> None:
    assert in_sum_order(torch.arange(64))[32:42].tolist() == [32, 36, 40, 44, 48, 52, 56, 60, 33, 37]
    assert torch.equal(in_memory_order(in_sum_order(torch.arange(96))), torch.arange(96))
    for place in (0, 5, 13, 31):
        word, half, register = place // 8, place % 8 // 4, place % 4
        assert int(in_sum_order(torch.arange(32))[8 * register + 2 * word + half]) == place


@interpreted
def test_every_code_with_every_scale_that_bf16_holds_is_widened_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(137, 1)
    codes[codes & 0x7F == 0x7F] = 0  # NaN, which stands only beside scale 255, and which the interpreter takes for 480
    scales = torch.arange(110, 247, dtype=torch.uint8).unsqueeze(1).repeat(1, 8)
    scales[-1] = 255
    x = MXFP8(codes.view(torch.float8_e4m3fn), scales)
    out, twin = (Wide(torch.empty(137, 256, dtype=torch.bfloat16)) for _ in range(2))
    widen(x, out)
    widen_torch(x, twin)
    assert bool(out.values[-1].isnan().all())
    for each in (out, twin):
        assert same_bits(in_memory_order(each.values).nan_to_num(3e38), dequantize_mxfp8(x).nan_to_num(3e38))
