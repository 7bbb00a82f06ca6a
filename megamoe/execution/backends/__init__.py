"""Expert backends: how a kind of device packs tokens and computes experts. The device decides which one runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megamoe.execution.backends.backend import Backend
    from megamoe.execution.experts import Experts

BACKENDS = {
    "torch": ("megamoe.execution.backends.torch_backend", "TorchBackend"),
    "triton": ("megamoe.execution.backends.triton_backend", "TritonBackend"),  # imports Triton
}


def backend_of(experts: Experts) -> type[Backend]:
    """The backend of the device that holds the experts, imported when first asked for."""
    module, name = BACKENDS["triton" if experts.grouped else "torch"]
    backend: type[Backend] = getattr(import_module(module), name)
    return backend
