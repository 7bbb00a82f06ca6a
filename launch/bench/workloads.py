"""What the layers of the probes have in common: how many experts, and weights that take no time to make."""

# H hidden   I intermediate   E experts of all ranks

from __future__ import annotations

from typing import Any

import torch

from megamoe.formats import MXFP4
from megamoe.shape import MoEShape

TOPK, EXPERTS_PER_RANK = 2, 4


def make_weights(shape: MoEShape, *, packed: bool) -> tuple[Any, Any]:
    """One expert's random weights for all experts, as a layer takes them, without making a copy of each."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for outputs, inputs in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        if packed:
            values = torch.randint(0, 256, (1, outputs, inputs // 2), generator=generator, dtype=torch.uint8)
            scales = torch.full((1, outputs, inputs // 32), 121, dtype=torch.uint8)
            found.append(MXFP4(*(each.expand(shape.num_experts, -1, -1) for each in (values, scales))))
        else:
            value = torch.randn(1, outputs, inputs, generator=generator) / inputs**0.5
            found.append(value.to(torch.bfloat16).expand(shape.num_experts, -1, -1))
    return found[0], found[1]
