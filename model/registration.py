"""Has transformers know the layer as soon as both are imported, in either order, without importing it for its sake.

`import megamoe.model` costs nothing where transformers is not used. Its registries live in modules of its own, so ours
are imported right after those: at once where transformers has them already, else when it imports them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# transformers' module -> what it must have, and our module that registers there
REGISTRIES = {
    "transformers.distributed.expert_parallel": ("EPImplementationInterface", "megamoe.model.plugin"),
    "transformers.quantizers.auto": ("register_quantizer", "megamoe.model.quantizer"),
}
OLDEST = "5.23"


def register() -> None:
    """Registers now what can be, and the rest when transformers imports it. A second call changes nothing."""
    waiting = [name for name in REGISTRIES if name not in sys.modules]
    for name in REGISTRIES.keys() - waiting:
        _arrived(sys.modules[name])
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _arrived(module: ModuleType) -> None:
    needed, ours = REGISTRIES[module.__name__]
    if hasattr(module, needed):  # transformers before 5.23 has some of the modules without what is registered there
        importlib.import_module(ours)


def refuse_old() -> None:
    """ValueError that says what is missing, where transformers is not installed or too old."""
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"transformers is not installed: pip install 'transformers>={OLDEST}'") from None
    major, minor = (int(part) for part in found.split(".")[:2])
    if (major, minor) < tuple(int(part) for part in OLDEST.split(".")):
        raise ValueError(f"transformers {found} is too old: pip install 'transformers>={OLDEST}'")


class _Finder(MetaPathFinder):
    """Finds the modules of REGISTRIES where they are, and registers after each has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRIES:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                assert spec.loader is not None
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _arrived(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # what else a loader is asked for: sources, resources
