"""GPUs that have Triton kernels: everything is queued, all messages are packed at once, each token read once.

Linear-1 reads each row where it arrived and ends in the activation; Linear-2 writes each row where it leaves from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.execution.backends.backend import Backend, CallBuffers, RowsByExpert
from megamoe.execution.backends.triton_experts import Operand, linear1, linear2, take_operand
from megamoe.execution.experts import Experts
from megamoe.execution.ops import quantize, widen
from megamoe.formats import MXFP8
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.layout import Wide
from megamoe.kernels.quantize import Filling
from megamoe.parallel.workspace import Workspace
from megamoe.routing.wire import Wire

# A message's kernel finds no room on a GPU that is full of programs until one has ended: while others send, each does a
# quarter of the work that it would do alone. A guess until it is measured.
OVERSUBSCRIPTION = 4


class TritonBackend(Backend):
    """Converts what arrived to what Linear-1 reads, unless that is the wire's rows as they are."""

    packs_each_wave = False
    counts_on_device = True

    def __init__(self, experts: Experts, wire: Wire, workspace: Workspace, buffers: CallBuffers) -> None:
        super().__init__(experts, wire, workspace, buffers)
        inbox = buffers.inbox
        self._converts = False
        if wire.in_place:
            self._x: Operand = wire.tokens(inbox)
        elif experts.packed and wire.dispatch_format == "mxfp8" and not reads_wide(inbox.device):
            self._x = wire.mxfp8(inbox)
        else:
            self._converts = True
            self._x = take_operand(experts, workspace, "tokens", (len(inbox), wire.hidden), inbox)

    def pack(self, hidden: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        assert rows is not None
        buffers, wire = self._buffers, self._wire
        if wire.dispatch_format == "mxfp8":
            every = torch.arange(len(hidden), device=hidden.device)
            filled = torch.cat((every + buffers.own.start, rows))
            filling = Filling.at(torch.cat((every, tokens)), filled, len(hidden), len(buffers.rows))
            quantize(hidden, filling, wire.mxfp8(buffers.rows))
        else:
            as_tokens = wire.tokens(buffers.rows)
            as_tokens[buffers.own] = hidden
            as_tokens.index_copy_(0, rows, hidden.index_select(0, tokens))

    def read(self, rows: slice) -> None:
        if not self._converts or rows.start == rows.stop:
            return
        arrived, wire, x = self._buffers.rows[rows], self._wire, self._x
        part = slice(rows.start - self._buffers.own.start, rows.stop - self._buffers.own.start)
        if isinstance(x, Tensor):
            wire.decode(arrived, x[part])
            return
        out = MXFP8(x.values[part], x.scales[part]) if isinstance(x, MXFP8) else Wide(x.values[part])
        if wire.dispatch_format == "bf16":
            quantize(wire.tokens(arrived), None, out)
        else:
            assert isinstance(out, Wide)
            widen(wire.mxfp8(arrived), out)

    def grouped_linear1(self, rows: RowsByExpert) -> Operand:
        return linear1(self._experts, self._x, rows, self._workspace, OVERSUBSCRIPTION)

    def grouped_linear2(self, activated: Operand, rows: RowsByExpert, results: Tensor | MXFP8) -> None:
        linear2(self._experts, activated, rows, results, self._workspace, OVERSUBSCRIPTION)
