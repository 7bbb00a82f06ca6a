"""All that is used of Ray that Ray calls private, each with the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import state
from ray._private import worker as ray_worker


def free_by_node() -> Mapping[str, Mapping[str, float]]:
    """Node id -> resource -> how many are free. In public Ray tells of all nodes together, and of each by its dashboard
    alone. Empty where this process is a client (ray://), which has no way to ask.
    """
    return {} if ray.util.client.ray.is_connected() else state.available_resources_per_node()


def of_own_cluster(place: Path) -> dict[str, Any]:
    """What ray.init() is given to keep all that a cluster writes in one directory, so that it can be removed, and its
    workers' right to the CPU that of any process: by default they have niceness 15, and any two processes that compute
    keep them from starting for minutes. In public there are environment variables, which this process's children would
    inherit."""
    return {"_temp_dir": str(place), "_system_config": {"worker_niceness": 0}}


@contextmanager
def logs_on_stderr() -> Iterator[None]:
    """Has Ray write to stderr what it writes: it has no such setting, and puts its own notes on the driver's stdout."""
    before = ray_worker.print_worker_logs

    def write(lines: Any, _: Any, ignore_prefix: bool = False) -> None:
        before(lines, sys.stderr, ignore_prefix)

    ray_worker.print_worker_logs = write
    try:
        yield
    finally:
        ray_worker.print_worker_logs = before
