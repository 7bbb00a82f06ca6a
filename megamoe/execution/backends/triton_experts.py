"""The experts of a rank on a device that has Triton kernels: both products on rows that are not moved for them."""

# H hidden   I intermediate   M rows of x   n rows, sorted by expert

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.execution.ops import grouped_linear1, grouped_linear2
from megamoe.formats import BLOCK, MXFP8
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.grouped import Grouped
from megamoe.kernels.layout import Wide
from megamoe.parallel.workspace import Workspace

Operand: TypeAlias = MXFP8 | Wide | Tensor


@dataclass(frozen=True, slots=True)
class RowsByExpert:
    """Rows sorted by expert, without being moved for it.

    x                   [M, H] as take_operand() has it
    tokens_per_expert   [experts] int32, n in all; rows beyond are nobody's
    source              [n] int32, in which row of x each row is
    weights             [n] float32
    goes                [n] int64, which row of the results each row becomes
    """

    x: Operand
    tokens_per_expert: Tensor
    source: Tensor
    weights: Tensor
    goes: Tensor


def run_experts(
    experts: Experts,
    ids: range,
    rows: RowsByExpert,
    results: Tensor,
    workspace: Workspace,
    *,
    oversubscription: int = 1,
) -> None:
    """Both products of the experts `ids`, into rows of results [., H] bfloat16. turns as in Grouped."""
    counts, size = rows.tokens_per_expert, (len(rows.goes), experts.shape.intermediate)
    hidden = take_operand(experts, workspace, "activated", size, results)
    biases = {name: experts.bias(name, ids) if experts.shape.bias else None for name in ("gate_up", "down")}
    first = Grouped(
        rows.x, experts.stack("gate_up", ids), counts, rows.source, oversubscription, bias=biases["gate_up"]
    )
    grouped_linear1(first, rows.weights, experts.shape.activation, hidden)
    second = Grouped(hidden, experts.stack("down", ids), counts, oversubscription=oversubscription, bias=biases["down"])
    grouped_linear2(second, rows.goes, results, rows.weights)


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
