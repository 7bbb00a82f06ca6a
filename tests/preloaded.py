"""What the fork server of the suite imports for the ranks of tests of real models: transformers takes three seconds."""

from __future__ import annotations

import gc

gc.disable()

import pytest  # noqa: E402, F401
from transformers import MixtralForCausalLM  # noqa: E402, F401

import megamoe.model.loading.load  # noqa: E402, F401

gc.freeze()
gc.enable()
