"""A call of the layer of a rank that is alone, on a device that has Triton kernels: counts never leave the device.

Nothing here waits, and sizes follow from T alone, so a CUDA graph can be captured of it and played again for other
tokens and another routing. Wrong ids or weights therefore raise in a later call: see `Findings`.
"""

# T tokens   H hidden   K experts per token, so T * K slots

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.execution.backends.backend import RowsByExpert
from megamoe.execution.backends.triton_experts import Operand, linear1, linear2, take_mxfp8
from megamoe.execution.experts import Experts
from megamoe.execution.ops import quantize, reduce_slots, route_slots
from megamoe.formats import dequantize_mxfp8
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.layout import Wide
from megamoe.parallel.workspace import Workspace
from megamoe.routing.wire import Wire


class Alone:
    """The calls of one layer, and what the device found wrong in them."""

    def __init__(self, experts: Experts, combine_format: str) -> None:
        self._experts, self._findings = experts, Findings(experts.device)
        self._wire = Wire("bf16", experts.shape.hidden, False, combine_format)

    def refuse(self, layer: str) -> None:
        """ValueError where values of an earlier call were wrong, once, as far as the device has come."""
        if self._findings.take():
            num_experts = self._experts.shape.num_experts
            raise ValueError(
                f"an earlier call of layer {layer!r} had topk_ids outside of [0, {num_experts}) that were not -1, or "
                "topk_weights that were not finite; tokens with such ids became NaN"
            )

    def compute(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, workspace: Workspace, *, rounds: bool
    ) -> Tensor:
        """hidden [T, H] bfloat16, topk_ids [T, K] int64 (-1 masks), topk_weights [T, K] float32 -> [T, H] bfloat16.

        rounds   BF16 experts whose tokens an mxfp8 wire rounds. A token with an id that there is not becomes NaN.
        """
        experts, num_slots = self._experts, topk_ids.numel()
        slots = route_slots(topk_ids, topk_weights, experts.shape.num_experts)
        # a slot's result lies in the slot's row; then a row for ids that there are not, and one for masked slots
        size, dtype = self._wire.result_rows(num_slots + 2)
        held = workspace.take("results", size, hidden, dtype)
        held[num_slots].fill_(torch.nan if dtype.is_floating_point else 255)
        held[num_slots + 1].zero_()
        results = self._wire.results(held)
        if num_slots:
            x = _read_as(experts, hidden, workspace, rounds=rounds)
            rows = RowsByExpert(
                experts=experts.ids,
                tokens_per_expert=slots.tokens_per_expert,
                sources=slots.source,
                weights=slots.weights,
                destinations=slots.order,
            )
            linear2(experts, linear1(experts, x, rows, workspace, 1), rows, results, workspace, 1)
        self._findings.note(slots.wrong)
        return reduce_slots(results, slots.positions)


def _read_as(experts: Experts, hidden: Tensor, workspace: Workspace, *, rounds: bool) -> Operand:
    """The tokens as Linear-1 reads them."""
    if not experts.packed and not rounds:
        return hidden
    wide = experts.packed and reads_wide(hidden.device)
    rounded = take_mxfp8(workspace, "tokens", (hidden.shape[0], hidden.shape[1]), hidden, wide=wide)
    quantize(hidden, None, rounded)
    return rounded if experts.packed or isinstance(rounded, Wide) else dequantize_mxfp8(rounded)


class Findings:
    """Wrong values that the device found in earlier calls; the host reads them at its next call and does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._here = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._there = torch.zeros(1, dtype=torch.int64, device=device)

    def note(self, wrong: Tensor) -> None:
        """wrong [1] int64 on the device: 1 where a value of this call was wrong."""
        self._there.bitwise_or_(wrong)
        self._here.copy_(self._there, non_blocking=True)

    def take(self) -> bool:
        """Whether anything was found since the last call of this, as far as the device has come.

        If so, waits for the device: a copy that is still queued would report the same again. While a graph is captured
        nothing can be waited for, and it is reported again.
        """
        found = bool(self._here.item())
        if found and not (self._there.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._here.copy_(self._there.zero_())
        return found
