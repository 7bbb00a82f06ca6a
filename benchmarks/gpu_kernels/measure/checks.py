"""What must hold before anything is timed: FP64 within the bound, all codes, a row's bits in any run and company."""

# R rows, sorted by expert   e experts   H hidden   I intermediate   K what is summed over   n rows that are looked at

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu_kernels.findings import BOUND, Check
from benchmarks.gpu_kernels.measure.operands import (
    Operand,
    Plain,
    Products,
    Rows,
    Weights,
    empty_operand,
    kind_of,
    parts,
    tokens_as,
    weight_as,
)
from megamoe.activations import SWIGLU
from megamoe.formats import (
    MXFP4,
    MXFP8,
    dequantize_mxfp4,
    dequantize_mxfp8,
    pack_e2m1,
    quantize_mxfp8,
)
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.grouped_linear1 import grouped_linear1
from megamoe.kernels.grouped_linear2 import grouped_linear2, grouped_linear2_torch
from megamoe.kernels.layout import Wide, in_memory_order, in_sum_order
from megamoe.reference import relative_error

CPU = torch.device("cpu")
_ROWS_LOOKED_AT = 32  # at either end of an expert


def as_bytes(operand: Operand) -> Tensor:
    """[R, B] uint8: values and, where there are any, scales of each row"""
    return torch.cat([each.view(torch.uint8) for each in parts(operand)], 1)


# ---- against FP64, on the host ----


def on_host(operand: Plain | Operand) -> Plain | Operand:
    if isinstance(operand, MXFP4):
        return MXFP4(operand.packed.to(CPU), operand.scales.to(CPU))
    if isinstance(operand, MXFP8):
        values = operand.values.view(torch.uint8).to(CPU).view(torch.float8_e4m3fn)
        return MXFP8(values, operand.scales.to(CPU))
    return Wide(operand.values.to(CPU)) if isinstance(operand, Wide) else operand.to(CPU)


def as_fp64(operand: Plain | Operand) -> Tensor:
    """On the host, exactly, in the order of memory."""
    here = on_host(operand)
    if isinstance(here, MXFP4):
        return dequantize_mxfp4(here, torch.float64)
    if isinstance(here, MXFP8):
        return dequantize_mxfp8(here, torch.float64)
    return (in_memory_order(here.values) if isinstance(here, Wide) else here).double()


def taken(operand: Operand, rows: Tensor) -> Operand:
    if isinstance(operand, MXFP8):
        values = operand.values.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return MXFP8(values, operand.scales[rows])
    return Wide(operand.values[rows]) if isinstance(operand, Wide) else operand[rows]


def expert_of(weight: Plain, expert: int) -> Plain:
    return MXFP4(weight.packed[expert], weight.scales[expert]) if isinstance(weight, MXFP4) else weight[expert]


@dataclass(frozen=True, slots=True)
class Exact:
    """The first and the last expert's weights in FP64, made when first needed and kept for all numbers of rows."""

    weights: Weights
    _kept: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def weight(self, name: str, expert: int) -> Tensor:
        """name gate_up or down -> [N, K] float64"""
        if (name, expert) not in self._kept:
            self._kept[name, expert] = as_fp64(expert_of(self.weights.plain[name], expert))
        return self._kept[name, expert]

    def products(self, name: str, x: Operand, places: Tensor, rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows that are looked at and their products [n, N] float64, an expert after the other.

        places [R]: in which row of x each row is
        """
        experts = len(rows.tokens_per_expert)
        each = rows.num_rows // experts
        for expert in sorted({0, experts - 1}):
            ends = sorted({*range(min(each, _ROWS_LOOKED_AT)), *range(max(0, each - _ROWS_LOOKED_AT), each)})
            chosen = torch.tensor(ends, device=places.device) + expert * each
            yield chosen, as_fp64(taken(x, places[chosen])) @ self.weight(name, expert).T


def linear1_error(products: Products, exact: Exact, rows: Rows) -> float:
    """Of what hidden holds, the exact product rounded where the contract rounds."""
    found, wanted = [], []
    for chosen, product in exact.products("gate_up", products.x, rows.source.long(), rows):
        found.append(as_fp64(taken(products.hidden, chosen)))
        wanted.append(activated(product, rows.weights[chosen], products.limit, products.kind != "bf16"))
    return relative_error(torch.cat(found), torch.cat(wanted))


def activated(product: Tensor, weights: Tensor, limit: float | None, mx: bool) -> Tensor:
    """product [n, 2I] float64, gate and up in turns -> [n, I] float64, rounded where the contract rounds"""
    rounded = product.to(torch.bfloat16).double()
    gate, up = rounded[:, 0::2], rounded[:, 1::2]
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    hidden = torch.nn.functional.silu(gate) * up * weights.to(CPU).double().unsqueeze(1)
    return as_fp64(quantize_mxfp8(hidden.float()) if mx else hidden.to(torch.bfloat16))


def products_error(name: str, x: Operand, places: Tensor, out: Tensor, exact: Exact, rows: Rows) -> float:
    """Of out [R, N] bfloat16 against the exact products."""
    pairs = [(out[chosen].to(CPU), product) for chosen, product in exact.products(name, x, places, rows)]
    return relative_error(torch.cat([found for found, _ in pairs]), torch.cat([wanted for _, wanted in pairs]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found of one product: its error, None where that is no number, and what is wrong, if anything."""

    error: float | None
    problem: str | None = None

    @classmethod
    def of(cls, error: float, same: dict[str, bool]) -> Outcome:
        """same: whether the bits are, by what was changed"""
        wrong = [] if error < BOUND else [f"error {error:.3g} against FP64, not below {BOUND:g}"]
        wrong += [f"other bits {what}" for what, equal in same.items() if not equal]
        return cls(error if math.isfinite(error) else None, f"FAILED: {'; '.join(wrong)}" if wrong else None)


def check_products(products: Products, exact: Exact, rows: Rows) -> dict[str, Outcome]:
    """Both products on outputs that held NaNs: linear1, linear2."""
    products.poison()
    products.both()
    first, second = as_bytes(products.hidden), as_bytes(products.out)
    errors = (
        linear1_error(products, exact, rows),
        products_error("down", products.hidden, products.index, products.out, exact, rows),
    )
    alone = row_alone(products, rows, row := rows.num_rows - 1)
    products.poison()
    products.both()
    same = [
        {"in another run": torch.equal(as_bytes(products.hidden), first), "alone": torch.equal(alone[0], first[row])},
        {"in another run": torch.equal(as_bytes(products.out), second), "alone": torch.equal(alone[1], second[row])},
    ]
    return {
        name: Outcome.of(*each)
        for name, each in zip(("linear1", "linear2"), zip(errors, same, strict=True), strict=True)
    }


def row_alone(products: Products, rows: Rows, row: int) -> tuple[Tensor, Tensor]:
    """Bytes that a row gets from both products when there is no other row."""
    each, device = rows.num_rows // len(rows.tokens_per_expert), products.out.device
    counts = torch.zeros_like(rows.tokens_per_expert)
    counts[row // each] = 1
    first, second = products.first[0], products.second[0]
    hidden = empty_operand(products.kind, 1, first.num_columns // 2, device)
    alone = Grouped(products.x, first.weight, counts, rows.source[row : row + 1].clone())
    grouped_linear1(alone, rows.weights[row : row + 1].clone(), SWIGLU.with_limit(products.limit), hidden)
    out = torch.empty(1, second.num_columns, dtype=torch.bfloat16, device=device)
    grouped_linear2(Grouped(hidden, second.weight, counts), torch.zeros(1, dtype=torch.int64, device=device), out)
    return as_bytes(hidden)[0], as_bytes(out)[0]


# ---- once for a device ----


def device_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    kind = kind_of("mxfp4", device)
    yield "all codes", lambda: check_codes(kind, device)
    yield "rounding", lambda: check_rounding(kind, device)


# scales of x and of the weights, an expert each; the last of x is NaN's
_SCALES = ((127, 127), (120, 131), (150, 105), (105, 140), (255, 127))


def all_codes() -> Grouped:
    """Every E4M3 code by every E2M1 code under every pair of scales, each product alone in its sum; on the host.

    x [5 * 256, 64]: row r holds code r in places 0 and 37. w [5, 32, 64]: row n holds code n % 16 in place 0 or 37.
    The codes of NaN, which rounding gives to no block but those with scale 255, stand in such alone.
    """
    experts, codes = len(_SCALES), torch.arange(256, dtype=torch.uint8)
    values = torch.zeros(experts, 256, 64, dtype=torch.uint8)
    values[..., 0], values[..., 37] = codes, codes
    values[:-1] = torch.where(values[:-1] & 0x7F == 0x7F, 0x7E, values[:-1])
    weight = torch.zeros(32, 64, dtype=torch.uint8)
    weight[:16, 0], weight[16:, 37] = codes[:16], codes[:16]
    x_scales, w_scales = (torch.tensor(each, dtype=torch.uint8) for each in zip(*_SCALES, strict=True))
    return Grouped(
        MXFP8(values.flatten(0, 1).view(torch.float8_e4m3fn), x_scales.repeat_interleave(256)[:, None].repeat(1, 2)),
        MXFP4(pack_e2m1(weight).repeat(experts, 1, 1), w_scales[:, None, None].repeat(1, 32, 2)),
        torch.full((experts,), 256, dtype=torch.int32),
    )


def check_codes(kind: str, device: torch.device) -> Check:
    """The kernel of a kind, mxfp4 or wide, against what it means, computed on the host."""
    product = all_codes()
    index = torch.arange(product.num_rows)
    wanted, out = (torch.empty(product.num_rows, 32, dtype=torch.bfloat16) for _ in range(2))
    grouped_linear2_torch(product, index, wanted)
    out = out.to(device)
    grouped_linear2(on_device(product, kind, device), index.to(device), out)
    different = (out.to(CPU) != wanted) & ~(out.to(CPU).isnan() & wanted.isnan())
    name = f"all {16 * 256} pairs of E2M1 and E4M3 codes under {len(_SCALES)} pairs of scales"
    return Check(name, not bool(different.any()), f"{int(different.sum())} of {out.numel()} products differ")


def on_device(product: Grouped, kind: str, device: torch.device) -> Grouped:
    """A product of MXFP8 that is on the host, as one of a kind on the device."""
    assert isinstance(product.x, MXFP8)
    assert isinstance(product.weight, MXFP4)
    x: Operand = Wide(in_sum_order(dequantize_mxfp8(product.x)).to(device))
    if kind == "mxfp4":
        values = product.x.values.view(torch.uint8).to(device).view(torch.float8_e4m3fn)
        x = MXFP8(values, product.x.scales.to(device))
    weight = MXFP4(product.weight.packed.to(device), product.weight.scales.to(device))
    return Grouped(x, weight_as(kind, weight), product.tokens_per_expert.to(device))


def check_rounding(kind: str, device: torch.device) -> Check:
    """Tokens of sizes from 2^-60 to 2^60, zeros and NaN, rounded on the device and by formats on the host."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(65, 256, generator=generator) * torch.linspace(-60, 60, 65).exp2()[:, None]
    tokens[3], tokens[7, 40], tokens[9, 200] = 0, torch.nan, torch.inf
    tokens = tokens.to(torch.bfloat16)
    found, wanted = as_fp64(tokens_as(kind, tokens.to(device))), as_fp64(quantize_mxfp8(tokens))
    different = (found != wanted) & ~(found.isnan() & wanted.isnan())
    return Check("tokens rounded as on the host", not bool(different.any()), f"{int(different.sum())} values differ")
