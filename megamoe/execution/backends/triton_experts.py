"""The experts of a rank on a device that has Triton kernels: both products on rows that are not moved for them."""

# H hidden   I intermediate   n rows, sorted by expert

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from megamoe.execution.backends.backend import RowsByExpert
from megamoe.execution.experts import Experts
from megamoe.execution.ops import grouped_linear1, grouped_linear2, quantize
from megamoe.formats import BLOCK, MXFP8
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.layout import Wide
from megamoe.kernels.quantize import Filling
from megamoe.parallel.workspace import Workspace

Operand: TypeAlias = MXFP8 | Wide | Tensor


def linear1(experts: Experts, x: Operand, rows: RowsByExpert, workspace: Workspace, oversubscription: int) -> Operand:
    """Linear-1 and the activation of rows of x, which is as take_operand() has it. oversubscription as in Grouped."""
    size = (len(rows.destinations), experts.shape.intermediate)
    activated = take_operand(experts, workspace, "activated", size, rows.weights)
    weight = experts.stack("gate_up", rows.experts)
    bias = experts.bias("gate_up", rows.experts) if experts.shape.bias else None
    grouped = Grouped(x, weight, rows.tokens_per_expert, rows.sources.contiguous(), oversubscription, bias=bias)
    grouped_linear1(grouped, rows.weights, experts.shape.activation, activated)
    return activated


def linear2(
    experts: Experts,
    x: Operand,
    rows: RowsByExpert,
    results: Tensor | MXFP8,
    workspace: Workspace,
    oversubscription: int,
) -> None:
    """Linear-2 of x, what linear1() returned, into results [., H], bfloat16 or rounded from that to MXFP8."""
    weight, goes = experts.stack("down", rows.experts), rows.destinations
    bias = experts.bias("down", rows.experts) if experts.shape.bias else None
    grouped = Grouped(x, weight, rows.tokens_per_expert, oversubscription=oversubscription, bias=bias)
    if isinstance(results, Tensor):
        grouped_linear2(grouped, goes, results, rows.weights)
        return
    computed = workspace.take("linear-2", (len(goes), experts.shape.hidden), rows.weights, torch.bfloat16)
    grouped_linear2(grouped, torch.arange(len(goes), device=goes.device), computed, rows.weights)
    quantize(computed, Filling.scattered(goes, len(results.values)), results)


def take_operand(experts: Experts, workspace: Workspace, name: str, shape: tuple[int, int], like: Tensor) -> Operand:
    """What the experts' products read, of that shape, in the workspace's buffers of that name.

    bfloat16 for BF16 weights; for MXFP4 weights MXFP8, or Wide where the chip multiplies no MXFP8
    """
    if not experts.packed:
        return workspace.take(name, shape, like, torch.bfloat16)
    return take_mxfp8(workspace, name, shape, like, wide=reads_wide(like.device))


def take_mxfp8(workspace: Workspace, name: str, shape: tuple[int, int], like: Tensor, *, wide: bool) -> MXFP8 | Wide:
    """MXFP8 of that shape, or the same widened, in the workspace's buffers of that name."""
    if wide:
        return Wide(workspace.take(name, shape, like, torch.bfloat16))
    values = workspace.take(name, shape, like, torch.uint8).view(torch.float8_e4m3fn)
    return MXFP8(values, workspace.take((name, "scales"), (shape[0], shape[1] // BLOCK), like, torch.uint8))
