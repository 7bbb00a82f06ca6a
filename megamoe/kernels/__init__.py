"""Triton kernels of the layer, one file for each operation: `op`, and `op_torch` beside it, which is what it means.

Nothing here imports Triton until a kernel's module is imported, which `load` does by the operation's name. A module
that is named here has `builds(target)`: every way in which the layer may launch its kernels on that chip, for
`megamoe.kernels.ahead` to compile without the chip.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from megamoe.kernels.chips.targets import Build, Target

KERNELS = {
    "quantize": "megamoe.kernels.quantize",
    "widen": "megamoe.kernels.widen",
    "grouped_linear1": "megamoe.kernels.grouped_linear1",
    "grouped_linear2": "megamoe.kernels.grouped_linear2",
    "reduce_slots": "megamoe.kernels.reduce_slots",
    "route_slots": "megamoe.kernels.route_slots",
    "mega": "megamoe.kernels.mega.call",
}


class KernelModule(Protocol):
    """A module of the package that has kernels."""

    builds: Callable[[Target], list[Build]]


def load(name: str) -> KernelModule:
    """The module of an operation. ValueError where there is none of that name."""
    if name not in KERNELS:
        raise ValueError(f"no kernel is called {name!r}; there are {', '.join(KERNELS)}")
    return cast(KernelModule, importlib.import_module(KERNELS[name]))
