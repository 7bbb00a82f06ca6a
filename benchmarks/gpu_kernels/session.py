"""One run on a device: checks, ceilings, products, layers, as far as the time goes; no failure ends it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from benchmarks.gpu_kernels.checks import device_checks
from benchmarks.gpu_kernels.clock import Ceilings, Clock, first_line, measure_ceilings
from benchmarks.gpu_kernels.layer import LayerBench, layer_checks
from benchmarks.gpu_kernels.operands import Shape
from benchmarks.gpu_kernels.page import write
from benchmarks.gpu_kernels.products import PRODUCT_PARTS, Bench
from benchmarks.gpu_kernels.ranks import rank_checks
from benchmarks.gpu_kernels.results import PARTS, Check, Results, Row
from megamoe.kernels.chips import tuned
from megamoe.kernels.chips.targets import chip_of

# measures one number of rows per expert
Measure = Callable[[int], list[Row]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured. until: in time.monotonic(), after which nothing more is begun."""

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    parts: tuple[str, ...]
    repeats: int
    until: float
    page: Path | None

    def planned(self) -> list[Row]:
        """A row for everything, not run."""
        return [
            Row(part, shape.name, rows, what, shape.sizes.num_experts, rows * shape.sizes.num_experts)
            for shape in self.shapes
            for rows in self.rows
            for part in self.parts
            for what in PARTS[part]
        ]


@dataclass(frozen=True, slots=True)
class Session:
    asked: Asked
    clock: Clock
    results: Results

    def run(self) -> int:
        """Exit code: 1 where a check failed or something did not run."""
        self._name_device()
        try:
            self._check(device_checks(self.clock.device))
            ceilings = self.results.ceilings = measure_ceilings(self.clock)
            print(f"ceilings: {ceilings.tflop_s:.1f} TFLOP/s, {ceilings.gb_s:.0f} GB/s", flush=True)
            parts = tuple(part for part in PRODUCT_PARTS if part in self.asked.parts)
            if parts:
                self._measure(parts, lambda shape: products_of(shape, self.clock, ceilings, parts))
            if "layer" in self.asked.parts:
                self._check((*layer_checks(self.clock.device), *rank_checks(self.clock.device)))
                self._measure(("layer",), lambda shape: LayerBench.made(shape, self.clock, ceilings).measure)
        except Exception as error:  # noqa: BLE001  what was found before may not be lost
            self.results.check(Check("the run", False, first_line(error)))
        finally:
            self._write()
        return int(self.results.failed)

    def _name_device(self) -> None:
        results, device = self.results, self.clock.device
        results.device, results.chip = tuned.device_name(device), chip_of(device)
        results.torch, results.triton = torch.__version__, triton.__version__
        found = (tuned.FOLDER / tuned.file_name(results.device)).is_file()
        results.tiles = "found on this device" if found else "of its chip"

    def _check(self, checks: Iterable[tuple[str, Callable[[], Check]]]) -> None:
        for name, check in checks:
            try:
                self.results.check(check())
            except Exception as error:  # noqa: BLE001  a check that raises has failed, the others are worth having
                self.results.check(Check(name, False, first_line(error)))

    def _measure(self, parts: tuple[str, ...], make: Callable[[Shape], Measure]) -> None:
        """Every number of rows of every shape, whose weights are made when its turn comes and dropped after it."""
        for shape in self.asked.shapes:
            measure: Measure | None = None
            for rows in self.asked.rows:
                if time.monotonic() > self.asked.until:
                    print(f"no time left for {shape.name}, {rows} rows, {', '.join(parts)}", flush=True)
                    continue
                try:
                    measure = measure or make(shape)
                    for row in measure(rows):
                        self.results.put(row)
                except Exception as error:  # noqa: BLE001  a case that fails says so in its rows
                    self._fail(parts, shape, rows, first_line(error))
            del measure
            gc.collect()
            self._write()

    def _fail(self, parts: tuple[str, ...], shape: Shape, rows: int, problem: str) -> None:
        for row in list(self.results.rows.values()):
            if row.part in parts and (row.shape, row.rows_per_expert) == (shape.name, rows) and row.us is None:
                self.results.put(replace(row, problem=problem))

    def _write(self) -> None:
        if self.asked.page is not None:
            write(self.results, self.asked.repeats, self.asked.page)


def products_of(shape: Shape, clock: Clock, ceilings: Ceilings, parts: tuple[str, ...]) -> Measure:
    bench = Bench.made(shape, clock, ceilings)
    return lambda rows: bench.measure(rows, parts)
