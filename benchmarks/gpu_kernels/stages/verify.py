"""Checks before anything is timed: the kernels against the host, the layer, ranks in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from benchmarks.gpu_kernels.findings import Check, Finding
from benchmarks.gpu_kernels.measure.checks import device_checks
from benchmarks.gpu_kernels.measure.layer_checks import layer_checks
from benchmarks.gpu_kernels.plan import Task
from benchmarks.gpu_kernels.process import first_line
from benchmarks.gpu_kernels.stages.ranks import rank_checks
from benchmarks.gpu_kernels.stages.task import device_of


def device(task: Task) -> Iterator[Finding]:
    yield from run_all(device_checks(device_of(task)))


def layer(task: Task) -> Iterator[Finding]:
    yield from run_all(layer_checks(device_of(task)))


def ranks(task: Task) -> Iterator[Finding]:
    yield from run_all(rank_checks(device_of(task)))


def run_all(checks: Iterable[tuple[str, Callable[[], Check]]]) -> Iterator[Check]:
    """A check that raises has failed; the others are worth having."""
    for name, check in checks:
        try:
            yield check()
        except Exception as error:  # noqa: BLE001
            yield Check(name, False, first_line(error))
