"""Both products of one shape and number of rows: checked, then timed beside BF16, torch's grouped_mm and no fusion."""

# M tokens   R rows, sorted by expert   e experts of this rank   H hidden   I intermediate

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_kernels.checks import Exact, Outcome, check_products, products_error
from benchmarks.gpu_kernels.clock import Ceilings, Clock, Run
from benchmarks.gpu_kernels.operands import (
    FORMATS,
    Products,
    Rows,
    Shape,
    Weights,
    grouped_mm,
    kind_of,
    num_bytes,
    unfused_linear1,
)
from benchmarks.gpu_kernels.results import PARTS, Row, Work, compared

PRODUCT_PARTS = tuple(part for part in PARTS if part != "layer")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all numbers of rows of one shape share."""

    shape: Shape
    clock: Clock
    ceilings: Ceilings
    weights: dict[str, Weights]
    exact: dict[str, Exact]

    @classmethod
    def made(cls, shape: Shape, clock: Clock, ceilings: Ceilings) -> Bench:
        weights = {name: Weights.made(shape, name, clock) for name in FORMATS}
        return cls(shape, clock, ceilings, weights, {name: Exact(each) for name, each in weights.items()})

    def measure(self, rows_per_expert: int, wanted: Sequence[str]) -> list[Row]:
        """A row for all that the wanted parts compare."""
        case = Case.made(self, rows_per_expert)
        outcomes = case.check()
        return [row for part in PRODUCT_PARTS if part in wanted for row in case.measure(part, outcomes)]


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
            row = planned[what]
            done = self.work(part, what)
            planned[what] = (
                replace(row, problem=times) if isinstance(times, str) else done.of(row, times, self.bench.ceilings)
            )
        return [compared(row, list(planned.values())) for row in planned.values()]

    def row(self, part: str, what: str, outcomes: dict[tuple[str, str], Outcome]) -> Row:
        """Not timed yet, with what its check found."""
        of = [outcomes[each, what] for each in ("linear1", "linear2") if part in (each, "both") and what != "unfused"]
        errors = [outcome.error for outcome in of if outcome.error is not None]
        problems = [outcome.problem for outcome in of if outcome.problem]
        row = Row(part, self.shape.name, self.rows_per_expert, what, self.shape.sizes.num_experts, self.rows.num_rows)
        return replace(row, error=max(errors, default=None), problem="; ".join(problems) or None)

    def work(self, part: str, what: str) -> Work:
        """Our kernels read x once a token, grouped_mm once a row, for which it was gathered."""
        products = self.products["mxfp4" if what in ("mxfp4", "unfused") else "bf16"]
        by_torch = what == "grouped_mm"
        sizes, rows = self.shape.sizes, self.rows.num_rows
        first_x = self.gathered if by_torch else products.x
        first_out = 2 * rows * 2 * sizes.intermediate if by_torch else num_bytes(products.hidden)
        flops, moved = 0, 0
        if part in ("linear1", "both"):
            flops += 2 * rows * 2 * sizes.intermediate * sizes.hidden
            moved += num_bytes(products.first[0].weight) + num_bytes(first_x) + first_out
        if part in ("linear2", "both"):
            flops += 2 * rows * sizes.hidden * sizes.intermediate
            moved += num_bytes(products.second[0].weight) + num_bytes(products.hidden) + num_bytes(products.out)
        return Work(flops, moved)


def free_bytes(device: torch.device) -> int:
    """Bytes that are left on the device; on the host more than is ever asked for."""
    if device.type == "cpu":
        return 1 << 40
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
