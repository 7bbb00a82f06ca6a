"""Operations of the layer: SiLU as a table, and rows whose bits depend on nothing but themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megamoe import formats
from megamoe.ops import (
    PREPARED_ROWS,
    activate,
    can_prepare,
    is_prepared,
    linear,
    linear_any_rows,
    matmul_dtype,
    prepare,
    row_multiple,
    silu_table,
    swiglu,
)
from megamoe.reference import relative_error, round_mxfp8

CPU = torch.device("cpu")
ROWS = (1, 2, 3, 7, 8, 9, 31, 33, 65, 257)
THREADS = (1, 2, 4)
SIZES = [
    (64, 96),
    (33, 32),
    (3, 50),
    (8, 64),
    (9, 57),
    (72, 100),
    (256, 192),
    (8, 2880),
    (24, 7168),
]  # N outputs, K inputs
LIMITS = [None, 10.0, 1.0, 0.3]


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def every_bf16() -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


# ---- SiLU and the activation ----


@pytest.mark.parametrize("limit", LIMITS)
def test_silu_table_is_silu_in_float64_rounded_once_for_every_bf16(limit: float | None) -> None:
    gate = every_bf16().double()
    if limit is not None:
        gate = torch.where(gate > limit, torch.tensor(limit, dtype=torch.float64), gate)
    expected = torch.nn.functional.silu(gate).float()
    table = silu_table(limit, CPU)
    assert table.dtype == torch.float32
    assert torch.equal(table.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(table[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    # x / (1 + e^-x), written out
    formula = (gate / (1 + (-gate).exp())).float()
    ordinary = every_bf16().float().abs().lt(80)
    assert torch.allclose(table[ordinary], formula[ordinary], rtol=2e-7, atol=0)


def test_silu_of_nan_infinities_and_zeros_is_what_the_formula_gives() -> None:
    table = silu_table(None, CPU)
    for value, expected in ((0.0, 0.0), (float("inf"), float("inf")), (1.0, 0.73105858), (-1.0, -0.26894142)):
        code = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.uint16))
        assert float(table[code]) == pytest.approx(expected, rel=1e-7)
    assert float(silu_table(10.0, CPU)[0x7F80]) == pytest.approx(10 / (1 + 2.718281828459045**-10), rel=1e-7)
    nan = int(torch.tensor(float("nan"), dtype=torch.bfloat16).view(torch.uint16))
    assert silu_table(10.0, CPU)[nan].isnan()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_swiglu_is_the_plain_formula(limit: float | None, num_rows: int) -> None:
    gate_up = randn(num_rows, 2 * 96, scale=6).to(torch.bfloat16)
    weights = randn(num_rows, seed=1)
    gate, up = gate_up[:, :96].double(), gate_up[:, 96:].float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    expected = (gate * torch.sigmoid(gate)).float() * up * weights[:, None]
    before = gate_up.clone()
    got = swiglu(gate_up, weights, limit, silu_table(limit, CPU))
    assert got.dtype == torch.float32
    assert got.shape == (num_rows, 96)
    assert torch.allclose(got, expected, rtol=3e-7, atol=0)
    assert torch.equal(gate_up, before)  # the input is not written to


def test_the_clamp_bounds_the_gate_above_only_and_up_on_both_sides() -> None:
    gate = torch.tensor([100.0, -8.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 100.0, -100.0])
    got = swiglu(torch.cat((gate, up)).to(torch.bfloat16)[None], torch.ones(1), 2.0, silu_table(2.0, CPU))[0]
    expected = torch.nn.functional.silu(torch.tensor([2.0, -8.0, 1.0, 1.0])) * torch.tensor([1.0, 1.0, 2.0, -2.0])
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantized", [True, False], ids=["mxfp8", "bf16"])
@pytest.mark.parametrize("limit", [None, 3.0])
def test_activation_is_the_same_in_any_chunks(
    quantized: bool, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, weights = randn(300, 2 * 64, scale=3).to(torch.bfloat16), randn(300, seed=1)
    table = silu_table(limit, CPU)
    whole = swiglu(gate_up, weights, limit, table)
    expected = round_mxfp8(whole) if quantized else whole.to(torch.bfloat16)
    for rows_at_once in (1, 7, 128, 1000):
        monkeypatch.setattr(formats, "_VALUES_AT_ONCE", rows_at_once * 64)
        assert torch.equal(activate(gate_up, weights, limit, table, quantized=quantized), expected)
    for num_rows in (0, 1, 127, 128, 129):
        got = activate(gate_up[:num_rows], weights[:num_rows], limit, table, quantized=quantized)
        assert torch.equal(got, expected[:num_rows])


@pytest.mark.parametrize("threads", THREADS)
def test_activation_does_not_depend_on_threads(threads: int) -> None:
    gate_up, weights, table = randn(257, 2 * 96, scale=3).to(torch.bfloat16), randn(257, seed=1), silu_table(5.0, CPU)
    expected = activate(gate_up, weights, 5.0, table, quantized=True)
    torch.set_num_threads(threads)
    assert torch.equal(activate(gate_up, weights, 5.0, table, quantized=True), expected)


# ---- matrix products ----


def padded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """linear() with rows padded by rubbish that must not matter, where linear_any_rows() would choose the dtype"""
    multiple = PREPARED_ROWS if is_prepared(weight) else row_multiple(CPU)
    padded = torch.full((-(-len(x) // multiple) * multiple, x.shape[1]), 7.0, dtype=torch.bfloat16)
    padded[: len(x)] = x
    return linear(padded, weight, torch.empty(len(padded), weight.shape[0], dtype=torch.bfloat16))[: len(x)]


def cancelling(n: int, k: int) -> tuple[Tensor, Tensor]:
    """x [257, K] and weight [N, K] whose products sum to zero but for rounding.

    What is left is the rounding of the sum, so another order of it shows in BF16 too, where ordinary numbers hide it.
    """
    order = torch.randperm(k, generator=torch.Generator().manual_seed(3))
    a, b, rest = randn(257, k // 2), randn(n, k // 2, seed=1) * 2.0 ** (torch.arange(k // 2) % 12), k % 2
    x, weight = torch.cat((a, a, torch.zeros(257, rest)), 1), torch.cat((b, -b, torch.zeros(n, rest)), 1)
    return x[:, order].to(torch.bfloat16), weight[:, order].to(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def weight_kinds() -> list[str]:
    """FP32 always; BF16, as it is and prepared, where the CPU has instructions for it: without, nothing is promised"""
    return ["float32", "bfloat16", "prepared"] if matmul_dtype(CPU) == torch.bfloat16 else ["float32"]


def of_kind(weight: Tensor, kind: str) -> Tensor:
    return prepare(weight) if kind == "prepared" else weight.to(getattr(torch, kind))


@pytest.mark.parametrize("kind", weight_kinds())
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_has_the_same_bits_for_any_number_of_rows_place_and_threads(n: int, k: int, kind: str) -> None:
    x, weight = cancelling(n, k)
    weight = of_kind(weight, kind)
    expected = padded_linear(x, weight)
    assert expected.count_nonzero() > expected.numel() / 4
    order = torch.randperm(257, generator=torch.Generator().manual_seed(2))
    for threads in THREADS:
        torch.set_num_threads(threads)
        for num_rows in ROWS:
            assert same_bits(padded_linear(x[:num_rows], weight), expected[:num_rows]), (threads, num_rows)
            moved = order[:num_rows]
            assert same_bits(padded_linear(x[moved], weight), expected[moved]), (threads, num_rows)


@pytest.mark.parametrize("kind", weight_kinds())
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_row_has_the_same_bits_wherever_its_operands_lie_in_memory(n: int, k: int, kind: str) -> None:
    x, weight = cancelling(n, k)
    expected = padded_linear(x, of_kind(weight, kind))[:16]
    for offset in (1, 2, 5, 16):
        buffers = [torch.zeros(t.numel() + offset, dtype=t.dtype) for t in (x[:16], weight, expected)]
        moved_x, moved_weight, out = (
            buffer[offset:].view(like.shape) for buffer, like in zip(buffers, (x[:16], weight, expected), strict=True)
        )
        moved_x.copy_(x[:16]), moved_weight.copy_(weight)
        assert same_bits(linear(moved_x, of_kind(moved_weight, kind), out), expected), offset


@pytest.mark.skipif(not can_prepare(CPU), reason="no BF16 instructions")
def test_a_prepared_weight_takes_as_much_room_and_gives_back_what_it_was() -> None:
    weight = randn(64, 96).to(torch.bfloat16)
    prepared = prepare(weight)
    assert is_prepared(prepared)
    assert (prepared.shape, prepared.numel(), prepared.dtype) == (weight.shape, weight.numel(), weight.dtype)
    assert same_bits(prepared.to_dense(), weight)
    rows = torch.zeros(PREPARED_ROWS, 2 * 96 + 4, dtype=torch.bfloat16)  # rows that are cut from wider ones
    rows[:, :96] = randn(PREPARED_ROWS, 96, seed=1)
    assert same_bits(padded_linear(rows[:, :96], prepared), padded_linear(rows[:, :96].contiguous(), prepared))


def test_another_order_of_the_sum_would_show() -> None:
    x, weight = cancelling(64, 96)
    backwards = padded_linear(x.flip(1), weight.flip(1).float())
    assert (backwards != padded_linear(x, weight.float())).float().mean() > 0.25


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear_any_rows_gives_the_bits_of_the_whole_for_any_part(n: int, k: int) -> None:
    x, weight = cancelling(n, k)
    expected = linear_any_rows(x, weight)
    assert same_bits(expected, padded_linear(x, weight.to(matmul_dtype(CPU))))
    for threads in THREADS:
        torch.set_num_threads(threads)
        for num_rows in ROWS:
            assert same_bits(linear_any_rows(x[257 - num_rows :], weight), expected[257 - num_rows :])


def test_linear_of_no_rows_is_no_rows() -> None:
    assert linear_any_rows(torch.zeros(0, 64, dtype=torch.bfloat16), torch.zeros(5, 64)).shape == (0, 5)


@pytest.mark.parametrize("beside", [0.0, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", weight_kinds())
def test_a_row_does_not_see_the_values_beside_it(kind: str, beside: float) -> None:
    x, weight = randn(33, 160).to(torch.bfloat16), of_kind(randn(48, 160, seed=1).to(torch.bfloat16), kind)
    expected = padded_linear(x, weight)[5]
    x[:5], x[6:] = beside, beside
    assert same_bits(padded_linear(x, weight)[5], expected)


@pytest.mark.parametrize("kind", weight_kinds())
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_linear_sums_in_float32_and_rounds_once(n: int, k: int, kind: str) -> None:
    x, weight = randn(65, k).to(torch.bfloat16), (randn(n, k, seed=1) / k**0.5).to(torch.bfloat16)
    exact = x.double() @ weight.double().T
    got = padded_linear(x, of_kind(weight, kind))
    assert got.dtype == torch.bfloat16
    assert relative_error(got, exact) < 2**-8
    # a value that is not within rounding of the exact one was not summed in FP32
    assert (got.double() - exact).abs().le(exact.abs() * 2**-8 + 1e-4).all()


def test_products_of_small_integers_are_exact() -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, (rows, 64), generator=rng).to(torch.bfloat16) for rows in (9, 5))
    exact = (x.double() @ weight.double().T).to(torch.bfloat16)
    assert torch.equal(linear_any_rows(x, weight), exact)
    assert torch.equal(padded_linear(x, weight.float()), exact)


@pytest.mark.parametrize("threads", THREADS)
def test_two_rows_a_thread_and_at_least_eight_are_padded_to(threads: int) -> None:
    torch.set_num_threads(threads)
    multiple = row_multiple(CPU)
    assert multiple >= max(8, 2 * threads)
    assert multiple & (multiple - 1) == 0


def test_linear_refuses_rows_that_are_not_padded() -> None:
    with pytest.raises(AssertionError):
        linear(torch.zeros(3, 32, dtype=torch.bfloat16), torch.zeros(4, 32), torch.zeros(3, 4, dtype=torch.bfloat16))
