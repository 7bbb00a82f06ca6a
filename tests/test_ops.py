"""Operations of the layer in torch: SiLU as a table, and rows whose bits depend on nothing but themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megamoe.activations import SWIGLU
from megamoe.execution.ops import activate
from megamoe.formats import blocks
from megamoe.kernels.cpu.library import using
from megamoe.kernels.gating import Tables, activate_fp32, tables_of
from megamoe.reference import round_mxfp8

CPU = torch.device("cpu")
THREADS = (1, 2, 4)
LIMITS = [None, 10.0, 1.0, 0.3]


@pytest.fixture(autouse=True)
def torch_bodies_and_threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    with using(None):
        yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def swiglu(limit: float | None) -> Tables:
    return tables_of(SWIGLU.with_limit(limit), CPU)


def every_bf16() -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


# ---- SiLU and the activation ----


@pytest.mark.parametrize("limit", LIMITS)
def test_silu_table_is_silu_in_float64_rounded_once_for_every_bf16(limit: float | None) -> None:
    gate = every_bf16().double()
    if limit is not None:
        gate = torch.where(gate > limit, torch.tensor(limit, dtype=torch.float64), gate)
    expected = torch.nn.functional.silu(gate).float()
    table = swiglu(limit).gate
    assert table.dtype == torch.float32
    assert torch.equal(table.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(table[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    # x / (1 + e^-x), written out
    formula = (gate / (1 + (-gate).exp())).float()
    ordinary = every_bf16().float().abs().lt(80)
    assert torch.allclose(table[ordinary], formula[ordinary], rtol=2e-7, atol=0)


def test_silu_of_nan_infinities_and_zeros_is_what_the_formula_gives() -> None:
    table = swiglu(None).gate
    for value, expected in ((0.0, 0.0), (float("inf"), float("inf")), (1.0, 0.73105858), (-1.0, -0.26894142)):
        code = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.uint16))
        assert float(table[code]) == pytest.approx(expected, rel=1e-7)
    assert float(swiglu(10.0).gate[0x7F80]) == pytest.approx(10 / (1 + 2.718281828459045**-10), rel=1e-7)
    nan = int(torch.tensor(float("nan"), dtype=torch.bfloat16).view(torch.uint16))
    assert swiglu(10.0).gate[nan].isnan()


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
    got = activate_fp32(gate_up, weights, swiglu(limit))
    assert got.dtype == torch.float32
    assert got.shape == (num_rows, 96)
    assert torch.allclose(got, expected, rtol=3e-7, atol=0)
    assert torch.equal(gate_up, before)  # the input is not written to


def test_the_clamp_bounds_the_gate_above_only_and_up_on_both_sides() -> None:
    gate = torch.tensor([100.0, -8.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 100.0, -100.0])
    got = activate_fp32(torch.cat((gate, up)).to(torch.bfloat16)[None], torch.ones(1), swiglu(2.0))[0]
    expected = torch.nn.functional.silu(torch.tensor([2.0, -8.0, 1.0, 1.0])) * torch.tensor([1.0, 1.0, 2.0, -2.0])
    assert torch.allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantized", [True, False], ids=["mxfp8", "bf16"])
@pytest.mark.parametrize("limit", [None, 3.0])
def test_activation_is_the_same_in_any_chunks(
    quantized: bool, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate_up, weights = randn(300, 2 * 64, scale=3).to(torch.bfloat16), randn(300, seed=1)
    tables = swiglu(limit)
    whole = activate_fp32(gate_up, weights, tables)
    expected = round_mxfp8(whole) if quantized else whole.to(torch.bfloat16)
    for rows_at_once in (1, 7, 128, 1000):
        monkeypatch.setattr(blocks, "_VALUES_AT_ONCE", rows_at_once * 64)
        assert torch.equal(activate(gate_up, weights, tables, quantized=quantized), expected)
    for num_rows in (0, 1, 127, 128, 129):
        got = activate(gate_up[:num_rows], weights[:num_rows], tables, quantized=quantized)
        assert torch.equal(got, expected[:num_rows])


@pytest.mark.parametrize("threads", THREADS)
def test_activation_does_not_depend_on_threads(threads: int) -> None:
    gate_up, weights, tables = randn(257, 2 * 96, scale=3).to(torch.bfloat16), randn(257, seed=1), swiglu(5.0)
    expected = activate(gate_up, weights, tables, quantized=True)
    torch.set_num_threads(threads)
    assert torch.equal(activate(gate_up, weights, tables, quantized=True), expected)
