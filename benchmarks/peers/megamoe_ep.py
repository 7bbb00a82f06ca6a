"""This project's layer as it is used, waves chosen by itself, in the three formats that the table shows."""

from __future__ import annotations

from benchmarks.peers.peer import ExpertWeights
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape


def bf16_rows(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> MegaMoE:
    """BF16 weights and BF16 rows: the same bytes and the same arithmetic as the peers."""
    return _layer(group, shape, weights, "bf16", "bf16")


def bf16(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> MegaMoE:
    """BF16 weights, rows sent as MXFP8."""
    return _layer(group, shape, weights, "bf16", "mxfp8")


def mxfp4(group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> MegaMoE:
    """MXFP4 weights, rows sent as MXFP8 and activations rounded to MXFP8 between the two products."""
    return _layer(group, shape, weights, "mxfp4", "mxfp8")


def _layer(group: EPGroup, shape: MoEShape, weights: ExpertWeights, weight_format: str, wire: str) -> MegaMoE:
    name = f"{weight_format} {wire}"
    layer = MegaMoE(shape, group, weight_format=weight_format, dispatch_format=wire, waves="auto", name=name)
    layer.load_experts(weights.gate_up, weights.down)
    return layer
