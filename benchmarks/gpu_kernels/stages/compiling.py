"""Compiles, side by side into one cache, what the chosen stages will launch: by launching it on no rows.

A launch knows all that a kernel is compiled for: types, strides, alignment, constants, the tile. Where no expert has
rows, the kernel itself has nothing to do.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu_kernels.findings import Check, Fact, Finding
from benchmarks.gpu_kernels.measure.checks import device_checks
from benchmarks.gpu_kernels.measure.clock import OnceClock
from benchmarks.gpu_kernels.measure.layer import inputs, layer
from benchmarks.gpu_kernels.measure.layer_checks import layer_checks
from benchmarks.gpu_kernels.measure.operands import FORMATS, Products, Rows, Weights, kind_of, unfused_linear1
from benchmarks.gpu_kernels.plan import DECODE, LAYER_ROWS, MIDDLE, PREFILL, SHAPES, Task
from benchmarks.gpu_kernels.stages.ranks import rank_checks
from benchmarks.gpu_kernels.stages.task import device_of, shape_for
from benchmarks.gpu_kernels.stages.tiles import candidates
from benchmarks.gpu_kernels.stages.workers import run_side_by_side
from megamoe.kernels.chips.tiles import Tile, tile_for
from megamoe.kernels.chips.tuned import table_of

_CHECKS = {"device-checks": device_checks, "layer-checks": layer_checks, "rank-checks": rank_checks}
_RANKS = ("one-rank", "two-processes")  # launch what rank-checks does
_JOB_S = 75.0


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to compile: what is "checks", "products", "tile" or "layer"; name is the stage's or the shape's."""

    what: str
    name: str
    weight_format: str = ""
    rows_per_expert: int = 0
    tile: Tile | None = None

    @property
    def label(self) -> str:
        tile = f"{self.tile.label} {self.tile.num_warps} warps {self.tile.num_stages} stages" if self.tile else ""
        return " ".join(filter(None, (self.what, self.name, self.weight_format, str(self.rows_per_expert or ""), tile)))


def compile_all(task: Task) -> Iterator[Finding]:
    """A fact of all that was compiled, with its seconds; a failed check for what was not, tiles on trial apart."""
    jobs = jobs_for(task.selected)
    compiled: dict[str, float | str] = {}
    count = len(os.sched_getaffinity(0))
    for done in run_side_by_side(partial(compile_one, task), jobs, count, _JOB_S, task.until - 1.0):
        compiled[done.job.label] = done.problem or done.seconds
        yield Fact("compiled", dict(compiled))
        if done.problem and done.job.what != "tile":
            yield Check(f"compiles: {done.job.label}", False, done.problem)


def jobs_for(selected: tuple[str, ...]) -> list[Job]:
    """In order of worth. The largest number of rows of a stage stands for the others: they have one tile."""
    jobs = [Job("checks", name) for name in _CHECKS if name in selected or (name == "rank-checks" and _ranks(selected))]
    for rows, family in ((DECODE, "decode"), (PREFILL, "prefill"), (MIDDLE, "middle")):
        shapes = [name for name in SHAPES if f"{family}-{name}" in selected]
        # a row alone is part of every check, and has the tile of the fewest rows
        numbers = sorted({max(rows), max(DECODE)})
        jobs += [Job("products", name, each, number) for number in numbers for name in shapes for each in FORMATS]
    if "tiles" in selected:
        tiles = [(rows, replace(tile, programs=1)) for rows, each in candidates().items() for tile in each]
        jobs += [Job("tile", "V4-Pro", "mxfp4", *each) for each in tiles]
    if "profiler" in selected or "tiles" in selected:
        jobs += [Job("products", "V4-Pro", "mxfp4", max(rows)) for rows in (DECODE, PREFILL)]
    if "layer" in selected:
        ends = max(DECODE), max(LAYER_ROWS)
        jobs += [Job("layer", name, each, number) for name in SHAPES for each in FORMATS for number in ends]
    return list(dict.fromkeys(jobs))


def _ranks(selected: tuple[str, ...]) -> bool:
    return any(name in selected for name in _RANKS)


def compile_one(task: Task, job: Job) -> None:
    """In a process that has the device to itself."""
    device = device_of(task)
    if job.what == "checks":
        for _, check in () if task.rehearsal else _CHECKS[job.name](device):
            check()
    elif job.what == "layer":
        sizes = shape_for(task, job.name).sizes
        num_tokens = 1 if task.rehearsal else max(1, job.rows_per_expert * sizes.num_experts // sizes.topk)
        layer(sizes, job.weight_format, device)(*inputs(sizes, num_tokens, device))
    else:
        _launch_on_nothing(task, job, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        gc.collect()
        torch.cuda.empty_cache()  # for the others


def _launch_on_nothing(task: Task, job: Job, device: torch.device) -> None:
    shape, kind = shape_for(task, job.name), kind_of(job.weight_format, device)
    rows = Rows.made(shape, 1, device)
    rows = replace(rows, tokens_per_expert=torch.zeros_like(rows.tokens_per_expert))
    weights = Weights.made(shape, kind, OnceClock(device))
    products = Products.made(rows, weights, shape.sizes.swiglu_limit, kind)
    tile = job.tile or tile_for(table_of(device), kind, job.rows_per_expert, 1)
    products.both(tile=tile)
    if job.weight_format == "mxfp4" and job.what == "products":
        unfused_linear1(products, tile)(0)
