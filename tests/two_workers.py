"""How the suite is shared between pytest-xdist's workers: file by file, those that take longest first.

Files that start a Ray cluster stay together, since a machine has one at a time; so do those of which work was begun
beside the tests, and they come last, on the worker that began it.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

from xdist.scheduler import LoadScopeScheduling

RAY = ("cluster_ray", "ray_cluster", "demo", "launch", "generate_cli", "doctor")
BESIDE = ("kernels_", "gpu_kernels", "mega_kernel", "mega_layer")
LONG: tuple[str, ...] = ("ray", "cluster", "loading", "worker", "plugin", "generate_ranks", "lab_cli", "cpu_kernels")
LONG += ("products", "layer", "kernel_call", "training_loop", "spawn", "generate", "bench", "lab", "house")
BESIDE_SCOPE = "beside"
_WORKER, _FIRST = "PYTEST_XDIST_WORKER", "gw0"


def shared() -> bool:
    """Whether this process is one of several workers."""
    return _WORKER in os.environ


def begins_beside() -> bool:
    """Whether this process begins what runs beside the tests: it is the only one, or the first worker."""
    return os.environ.get(_WORKER, _FIRST) == _FIRST


def scope_of(nodeid: str) -> str:
    """What a test is kept together with.    "tests/test_demo.py::test_x[a]" -> "ray" """
    name = PurePath(nodeid.partition("::")[0]).stem.removeprefix("test_")
    if name in RAY:
        return "ray"
    return BESIDE_SCOPE if name.startswith(BESIDE) else name


def place_of(nodeid: str) -> int:
    """Tests run in the order of these numbers: long scopes first, what runs beside them last."""
    scope = scope_of(nodeid)
    if scope == BESIDE_SCOPE:
        return len(LONG) + 1
    return LONG.index(scope) if scope in LONG else len(LONG)


class ByScope(LoadScopeScheduling):  # type: ignore[misc]
    """Whole scopes, in the order in which they were collected."""

    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        first = any(each.gateway.id == _FIRST and not each.shutting_down for each in self.nodes)
        if first and node.gateway.id != _FIRST and list(self.workqueue) == [BESIDE_SCOPE]:
            node.shutdown()
            return
        super()._assign_work_unit(node)
