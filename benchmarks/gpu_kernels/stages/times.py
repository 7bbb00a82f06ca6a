"""Times of the products and of the layer, between two measurements of what the device can do at most."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator

import torch

from benchmarks.gpu_kernels.findings import PARTS, Ceilings, Finding, Row
from benchmarks.gpu_kernels.measure.clock import MIB, Clock
from benchmarks.gpu_kernels.measure.layer_times import LayerBench
from benchmarks.gpu_kernels.measure.products import PRODUCT_PARTS, Bench
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import first_line
from benchmarks.gpu_kernels.stages.task import clock_for, rows_for, shape_for


def products(task: Task) -> Iterator[Finding]:
    """Both products of one shape, each number of rows checked and then timed."""
    clock, shape = clock_for(task), shape_for(task, task.arguments["shape"])
    yield measure_ceilings(clock, "before")
    bench = Bench.made(shape, clock)
    for rows in rows_for(task):
        yield from measured(bench.measure, PRODUCT_PARTS, shape.name, rows)
    del bench
    _let_go()
    yield measure_ceilings(clock, "after")


def layer(task: Task) -> Iterator[Finding]:
    """The layer of each shape."""
    clock = clock_for(task)
    yield measure_ceilings(clock, "before")
    for name in task.arguments["shapes"]:
        shape = shape_for(task, name)
        bench = LayerBench.made(shape, clock)
        for rows in rows_for(task):
            yield from measured(bench.measure, ("layer",), shape.name, rows)
        del bench
        _let_go()
    yield measure_ceilings(clock, "after")


def measured(
    measure: Callable[[int], Iterable[Row]], parts: tuple[str, ...], shape: str, rows_per_expert: int
) -> Iterator[Row]:
    """The rows of a case; one that raises has a row that says so for all that it did not come to."""
    found = set()
    try:
        for row in measure(rows_per_expert):
            found.add(row.key)
            yield row
    except Exception as error:  # noqa: BLE001
        planned = [Row(part, shape, rows_per_expert, what, 0, 0) for part in parts for what in PARTS[part]]
        for row in planned:
            if row.key not in found:
                yield Row(row.part, shape, rows_per_expert, row.what, 0, 0, problem=first_line(error))


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def measure_ceilings(clock: Clock, when: str) -> Ceilings:
    """A matmul of 8192^3 and a copy of 1 GiB of random values: zeros toggle fewer bits and let the chip clock higher.

    RuntimeError where one does not run.
    """
    device = clock.device
    size, num_bytes = (8192, 1024 * MIB) if device.type != "cpu" else (64, MIB)
    left, right, product = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(3))
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = clock.compare(
        {"matmul": lambda _: torch.mm(left, right, out=product), "copy": lambda _: target.copy_(source)}
    )
    matmul, copy = times["matmul"], times["copy"]
    if isinstance(matmul, str) or isinstance(copy, str):
        raise RuntimeError(f"no ceilings: {matmul if isinstance(matmul, str) else copy}")
    return Ceilings(when, 2 * size**3 / matmul.us * 1e-6, 2 * num_bytes / copy.us * 1e-3)
