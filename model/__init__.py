"""Models that use the layer: transformers' own with their experts on it, routers, checkpoints, blocks.

Importing it makes transformers know the layer, see registration.py. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megamoe.model.registration import register

if TYPE_CHECKING:
    from megamoe.model.experts import RoutedExperts
    from megamoe.model.loading.load import load, load_tokenizer, regroup
    from megamoe.model.quantizer import PackedExpertsConfig, packed_config
    from megamoe.model.structure import Structure, read_structure

_EXPORTS = {
    "PackedExpertsConfig": "megamoe.model.quantizer",
    "RoutedExperts": "megamoe.model.experts",
    "Structure": "megamoe.model.structure",
    "load": "megamoe.model.loading.load",
    "load_tokenizer": "megamoe.model.loading.load",
    "packed_config": "megamoe.model.quantizer",
    "read_structure": "megamoe.model.structure",
    "regroup": "megamoe.model.loading.load",
}

__all__ = [
    "PackedExpertsConfig",
    "RoutedExperts",
    "Structure",
    "load",
    "load_tokenizer",
    "packed_config",
    "read_structure",
    "regroup",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megamoe.model' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


register()
