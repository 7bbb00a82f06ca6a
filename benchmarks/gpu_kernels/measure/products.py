"""Both products of one shape and number of rows: checked, then timed beside BF16, torch's grouped_mm and no fusion."""

# M tokens   R rows, sorted by expert   e experts of this rank   H hidden   I intermediate

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_kernels.findings import PARTS, Row, Work, compared
from benchmarks.gpu_kernels.measure.checks import Exact, Outcome, check_products, products_error
from benchmarks.gpu_kernels.measure.clock import Clock, Run, Times
from benchmarks.gpu_kernels.measure.operands import (
    FORMATS,
    Products,
    Rows,
    Weights,
    grouped_mm,
    grouped_mm_note,
    kind_of,
    num_bytes,
    parts,
    unfused_linear1,
)
from benchmarks.gpu_kernels.measure.shapes import Shape

PRODUCT_PARTS = tuple(part for part in PARTS if part != "layer")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all numbers of rows of one shape share. note: what is to be said of grouped_mm."""

    shape: Shape
    clock: Clock
    note: str | None
    weights: dict[str, Weights]
    exact: dict[str, Exact]

    @classmethod
    def made(cls, shape: Shape, clock: Clock) -> Bench:
        weights = {name: Weights.made(shape, kind_of(name, clock.device), clock) for name in FORMATS}
        exact = {name: Exact(each) for name, each in weights.items()}
        return cls(shape, clock, grouped_mm_note(clock.device), weights, exact)

    def measure(self, rows_per_expert: int) -> Iterator[Row]:
        """A row for all that the parts compare, part after part."""
        case = Case.made(self, rows_per_expert)
        outcomes = case.check()
        for part in PRODUCT_PARTS:
            yield from case.measure(part, outcomes)


@dataclass(frozen=True, slots=True)
class Case:
    """One number of rows: operands by format, and the same rows as torch's grouped_mm takes them.

    gathered   [R, H] bfloat16 rows in their order
    ends       [e] int32, where each expert's rows end
    """

    bench: Bench
    shape: Shape
    rows_per_expert: int
    rows: Rows
    products: dict[str, Products]
    gathered: Tensor
    ends: Tensor

    @classmethod
    def made(cls, bench: Bench, rows_per_expert: int) -> Case:
        shape = bench.shape.fitting(rows_per_expert, free_bytes(bench.clock.device))
        rows = Rows.made(shape, rows_per_expert, bench.clock.device)
        sizes, device = shape.sizes, bench.clock.device
        products = {
            name: Products.made(rows, each.of_experts(sizes.num_experts), sizes.swiglu_limit, kind_of(name, device))
            for name, each in bench.weights.items()
        }
        ends = rows.tokens_per_expert.cumsum(0).to(torch.int32)
        return cls(bench, shape, rows_per_expert, rows, products, rows.tokens[rows.source.long()], ends)

    def grouped_mm(self, name: str, turn: int = 0) -> Tensor:
        """gate_up: [R, H] -> [R, 2I]; down: [R, I] -> [R, H]. The activation is not torch's to do here."""
        bf16 = self.products["bf16"]
        grouped = bf16.first if name == "gate_up" else bf16.second
        x, weight = self.gathered if name == "gate_up" else bf16.hidden, grouped[turn % len(grouped)].weight
        assert isinstance(x, Tensor)
        assert isinstance(weight, Tensor)
        return grouped_mm(x, weight, self.ends)

    def check(self) -> dict[tuple[str, str], Outcome]:
        """By part and what is compared. grouped_mm is checked too, so that it is known to do the same work."""
        exact = self.bench.exact
        found = {
            (part, name): outcome
            for name, products in self.products.items()
            for part, outcome in check_products(products, exact[name], self.rows).items()
        }
        bf16 = self.products["bf16"]
        for part, name, x in (("linear1", "gate_up", self.gathered), ("linear2", "down", bf16.hidden)):
            out = self.grouped_mm(name)
            error = products_error(name, x, bf16.index, out, exact["bf16"], self.rows)
            found[part, "grouped_mm"] = Outcome.of(error, {})
        return found

    def runs(self, part: str) -> dict[str, Run]:
        """What a part compares, as PARTS names it."""
        mx, bf16 = self.products["mxfp4"], self.products["bf16"]
        if part == "both":
            torch_run: Run = lambda turn: (self.grouped_mm("gate_up", turn), self.grouped_mm("down", turn))  # noqa: E731
        else:
            name = "gate_up" if part == "linear1" else "down"
            torch_run = lambda turn: self.grouped_mm(name, turn)  # noqa: E731
        runs: dict[str, Run] = {"mxfp4": getattr(mx, part), "bf16": getattr(bf16, part), "grouped_mm": torch_run}
        return {**runs, "unfused": unfused_linear1(mx)} if part == "linear1" else runs

    def measure(self, part: str, outcomes: dict[tuple[str, str], Outcome]) -> list[Row]:
        """What did not pass its check is not timed."""
        planned = {what: self.row(part, what, outcomes) for what in PARTS[part]}
        sound = {what: run for what, run in self.runs(part).items() if planned[what].problem is None}
        for what, times in self.bench.clock.compare(sound).items():
            planned[what] = timed(planned[what], times, self.work(part, what))
        return [compared(row, list(planned.values())) for row in planned.values()]

    def row(self, part: str, what: str, outcomes: dict[tuple[str, str], Outcome]) -> Row:
        """Not timed yet, with what its check found."""
        of = [outcomes[each, what] for each in ("linear1", "linear2") if part in (each, "both") and what != "unfused"]
        errors = [outcome.error for outcome in of if outcome.error is not None]
        problems = [outcome.problem for outcome in of if outcome.problem]
        row = Row(part, self.shape.name, self.rows_per_expert, what, self.shape.sizes.num_experts, self.rows.num_rows)
        note = self.bench.note if what == "grouped_mm" else None
        return replace(row, error=max(errors, default=None), note=note, problem="; ".join(problems) or None)

    def work(self, part: str, what: str) -> Work:
        """Our kernels read x once a token, grouped_mm once a row, for which it was gathered."""
        weight_format = "mxfp4" if what in ("mxfp4", "unfused") else "bf16"
        products = self.products[weight_format]
        by_torch = what == "grouped_mm"
        sizes, rows = self.shape.sizes, self.rows.num_rows
        first_x = self.gathered if by_torch else products.x
        first_out = 2 * rows * 2 * sizes.intermediate if by_torch else num_bytes(products.hidden)
        flops, moved = 0, 0
        if part in ("linear1", "both"):
            flops += 2 * rows * 2 * sizes.intermediate * sizes.hidden
            moved += self._weight_bytes("gate_up", weight_format) + num_bytes(first_x) + first_out
        if part in ("linear2", "both"):
            flops += 2 * rows * sizes.hidden * sizes.intermediate
            moved += self._weight_bytes("down", weight_format) + num_bytes(products.hidden) + num_bytes(products.out)
        return Work(flops, moved)

    def _weight_bytes(self, name: str, weight_format: str) -> int:
        """As the format has them: what a layout fills up with is no work."""
        plain = self.bench.weights[weight_format].plain[name]
        return num_bytes(plain) * self.shape.sizes.num_experts // len(parts(plain)[0])


def timed(row: Row, times: Times | str, work: Work) -> Row:
    """The row with its times, or with what kept it from having any."""
    if isinstance(times, str):
        return replace(row, problem=times)
    notes = [each for each in (row.note, "bound by the host" if times.by_host else None) if each]
    measured = replace(row, us=times.us, us_min=times.us_min, us_max=times.us_max, note="; ".join(notes) or None)
    return replace(measured, flops=work.flops, num_bytes=work.num_bytes)


def free_bytes(device: torch.device) -> int:
    """Bytes that are left on the device; on the host more than is ever asked for."""
    if device.type == "cpu":
        return 1 << 40
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
