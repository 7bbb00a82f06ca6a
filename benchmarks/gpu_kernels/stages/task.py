"""What stages make of their task: the device, a clock, shapes and rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_kernels.findings import Fact, Finding
from benchmarks.gpu_kernels.measure.clock import Clock, clock_of
from benchmarks.gpu_kernels.measure.shapes import Shape, rows_of, shape_of
from benchmarks.gpu_kernels.plan import Task

REPEATS = 9


def device_of(task: Task) -> torch.device:
    """Made current; in a rehearsal Triton's interpreter is made to sum each row alone, as a GPU's tiles do."""
    device = torch.device(task.device)
    if task.rehearsal:
        from tests.interpreter import interpret

        interpret()
    else:
        torch.cuda.set_device(device)
    return device


def touch(task: Task) -> Iterator[Finding]:
    """Finds out whether this process has the device."""
    yield Fact("sum", int(torch.ones(3, device=torch.device(task.device)).sum()))


def clock_for(task: Task) -> Clock:
    return clock_of(device_of(task), REPEATS)


def shape_for(task: Task, name: str) -> Shape:
    return shape_of(name, rehearsal=task.rehearsal)


def rows_for(task: Task) -> tuple[int, ...]:
    return rows_of(tuple(task.arguments["rows"]), rehearsal=task.rehearsal)
