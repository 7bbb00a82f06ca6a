"""This project's layer as it is used, waves chosen by itself, in the three formats that the table shows."""

from __future__ import annotations

from benchmarks.peers.peer import ExpertWeights
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape


def make(group: EPGroup, shape: MoEShape, weights: ExpertWeights, weight_format: str, wire: str) -> MegaMoE:
    """The layer with these formats of weights and of rows on the wire."""
    name = f"{weight_format} {wire}"
    layer = MegaMoE(shape, group, weight_format=weight_format, dispatch_format=wire, waves="auto", name=name)
    layer.load_experts(weights.gate_up, weights.down)
    return layer
