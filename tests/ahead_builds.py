"""All that ships, compiled for every chip by two processes beside the tests; who asks for a result waits for it."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor

from megamoe.kernels import KERNELS
from megamoe.kernels.ahead import Resources, compile_ahead
from megamoe.kernels.chips.targets import TARGETS, target


def resources_of(operation: str, chip: str) -> list[Resources]:
    return [each.resources for each in compile_ahead(operation, target(chip))]


class AheadBuilds:
    """Begun when made. The compilers have the time that the tests wait, and all of it once a test waits for them."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(19,))
        self._underway: dict[tuple[str, str], Future[list[Resources]]] = {
            (operation, chip.name): self._pool.submit(resources_of, operation, chip.name)
            for chip in TARGETS
            for operation in KERNELS
        }

    def result(self, operation: str, chip: str) -> list[Resources]:
        return self._underway[operation, chip].result(timeout=240)

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
