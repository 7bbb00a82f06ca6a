"""What ranks need that load a model of transformers, imported once by the fork server: it takes seconds."""

from __future__ import annotations

import gc

gc.disable()

from transformers import PreTrainedModel  # noqa: E402, F401

import megamoe.model.generation.engine  # noqa: E402
import megamoe.model.loading.load  # noqa: E402, F401

gc.freeze()
gc.enable()
