"""CPUs, whose products are our kernels in C++, and devices without kernels of ours, where torch multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from megamoe.execution.backends.backend import Backend, CallBuffers, RowsByExpert
from megamoe.execution.experts import Experts
from megamoe.execution.ops import encode_rows
from megamoe.formats import MXFP8
from megamoe.kernels.cpu.library import Rows
from megamoe.parallel.workspace import Workspace
from megamoe.routing.wire import Wire


class TorchBackend(Backend):
    """Decodes what arrived to BF16, unless the wire's rows are the experts' tokens as they are."""

    packs_each_wave = True
    counts_on_device = False

    def __init__(self, experts: Experts, wire: Wire, workspace: Workspace, buffers: CallBuffers) -> None:
        super().__init__(experts, wire, workspace, buffers)
        inbox = buffers.inbox
        if wire.in_place:
            self._tokens = wire.tokens(inbox)
        else:
            self._tokens = workspace.take("tokens", (len(inbox), wire.hidden), inbox, torch.bfloat16)

    def pack(self, hidden: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        del tokens, rows
        self._wire.encode(hidden, self._buffers.rows[self._buffers.own])

    def pack_message(self, tokens: Tensor, rows: slice) -> None:
        torch.index_select(self._buffers.inbox, 0, tokens, out=self._buffers.rows[rows])

    def read(self, rows: slice) -> None:
        if not self._wire.in_place:
            first = self._buffers.own.start
            self._wire.decode(self._buffers.rows[rows], self._tokens[rows.start - first : rows.stop - first])

    def grouped_linear1(self, rows: RowsByExpert) -> Tensor:
        tokens = Rows(self._tokens, rows.tokens_per_expert, rows.sources.to(torch.int64))
        return self._experts.linear1(tokens, rows.experts, self._workspace)

    def activate(self, linear1: Tensor, rows: RowsByExpert) -> Tensor:
        return self._experts.activation(linear1, rows.weights, self._workspace)

    def grouped_linear2(self, activated: Tensor, rows: RowsByExpert, results: Tensor | MXFP8) -> None:
        by_expert, experts, goes = Rows(activated, rows.tokens_per_expert), self._experts, rows.destinations
        if isinstance(results, Tensor):
            experts.linear2(by_expert, rows.experts, rows.weights, results, goes, self._workspace)
            return
        size = (len(goes), experts.shape.hidden)
        computed = self._workspace.take("linear-2", size, rows.weights, torch.bfloat16)
        experts.linear2(by_expert, rows.experts, rows.weights, computed, None, self._workspace)
        encode_rows(computed, goes, results)
