"""Calls of few tokens on a CPU: one exchange carries pages and tokens, results are summed from where they were made.

Where all ranks share a host's memory and every rank brings few tokens, a rank writes its slots and its encoded tokens
behind its page, where all ranks read them. Each computes the rows of its own experts in one step and leaves the results
in its own memory; a token's home rank sums its slots from there. A call waits twice: for pages, and for results.
What is done with rows is done by kernels/cpu/routing.cpp, in the oracle's arithmetic. A rank alone computes in the same
way, without an exchange.
"""

# T tokens of this rank   K experts per token   S slots of all ranks   H hidden   n rows of this rank's experts

from __future__ import annotations

import ctypes
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.execution.pipeline import CallRecord
from megamoe.execution.products import KernelProducts
from megamoe.formats import SCALES, VALUES
from megamoe.kernels.cpu.library import Library
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.recorder import CallNotes, Notes, now_ns
from megamoe.parallel.symmetric import PLACE_BYTES, Place
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label
from megamoe.routing.agreement import PAGE_BYTES, Part, SmallAgreement
from megamoe.routing.messages import ranks_of
from megamoe.routing.wire import Wire

MAX_TOKENS = 256  # of a rank: above, encoding them all before any is sent costs more than waves do
_BEHIND = -(-PAGE_BYTES // 64) * 64  # where slots begin, behind the page
_STAGES = ("linear-1", "activation", "linear-2")
_RESULTS = "results"
# hidden [T, H] bfloat16, topk_ids [T, K] int64, topk_weights [T, K] float32, each contiguous
Input = tuple[Tensor, Tensor, Tensor]


def library_of(experts: Experts, waves: object, combine_format: str) -> Library | None:
    """The kernels by which a layer makes calls of few tokens; None for a layer that makes none.

    waves as the layer was given them: a number is obeyed, and such a call has one wave.
    """
    products = experts.products
    if waves != "auto" or combine_format != "bf16" or experts.grouped or not isinstance(products, KernelProducts):
        return None
    return products.library


class SmallCalls:
    """A layer's calls of few tokens: bring() before the exchange of pages, compute() after it."""

    def __init__(self, name: str, group: EPGroup, experts: Experts, library: Library) -> None:
        self._group, self._experts, self._library = group, experts, library
        self._label = Label(name, "combine", 0)
        shape, size, activation = experts.shape, group.size, experts.shape.activation
        self._rank_of = ranks_of(Placement(shape.num_experts, size), experts.device)
        self._pairs = np.zeros((2, shape.num_experts), np.int32)
        self._tokens, self._owed = (ctypes.c_int64 * size)(), (ctypes.c_int64 * (2 * size))()
        self._num_bytes = 0  # of a token and its slots
        self._brought, self._results = (ctypes.c_void_p * size)(), (ctypes.c_void_p * size)()
        few = self._few = _FewTokens()
        few.ranks, few.rank, few.topk, few.num_experts = size, group.rank, shape.topk, shape.num_experts
        few.first, few.experts = experts.ids.start, len(experts.ids)
        few.width, few.inner = shape.hidden, shape.intermediate
        few.gated, few.quantized = activation.gated, experts.format.activations == "mxfp8"
        few.table = experts.tables.gate.data_ptr()
        few.up_table = None if experts.tables.up is None else experts.tables.up.data_ptr()
        few.limit = float("inf") if activation.limit_of_up is None else activation.limit_of_up
        few.shift = activation.up_shift
        few.rank_of, few.pairs = self._rank_of.data_ptr(), self._pairs.ctypes.data
        few.tokens, few.owed = ctypes.addressof(self._tokens), ctypes.addressof(self._owed)
        few.brought, few.results = ctypes.addressof(self._brought), ctypes.addressof(self._results)
        for name_of, matrix in (("gate_up", few.gate_up), ("down", few.down)):
            matrix.outputs = experts.matrices[name_of].outputs

    def most_tokens(self, wire: Wire) -> int:
        """That a rank may bring: as many as there is room for behind a page, and MAX_TOKENS."""
        return min(MAX_TOKENS, (PLACE_BYTES - _BEHIND - 64) // self._token_bytes(wire))

    def bring(self, given: Input, wire: Wire, place: Place | None, row_s: float) -> Part | None:
        """Writes slots and tokens behind the page in place, or for a rank alone into its workspace -> its Part.

        None where an id or a weight is wrong. given must stay until the call has ended.
        """
        few, (hidden, ids, weights) = self._few, given
        few.row_bytes, few.mxfp8, few.rounds = wire.row_bytes, wire.dispatch_format == "mxfp8", wire.round_on_arrival
        self._num_bytes = self._token_bytes(wire)
        few.threads, num_tokens = torch.get_num_threads(), len(hidden)
        if place is None:
            num_bytes = 64 + num_tokens * self._token_bytes(wire)
            begin = self._group.workspace.take("brought", (num_bytes,), hidden, torch.uint8).data_ptr()
        else:
            begin = place.address + _BEHIND
        self._tokens[few.rank], self._brought[few.rank] = num_tokens, begin
        few.hidden, few.ids, few.topk_weights = hidden.data_ptr(), ids.data_ptr(), weights.data_ptr()
        if not self._library.few_tokens("bring", few):
            return None
        return Part(num_tokens, self._pairs, row_s, small=True)

    def compute(self, hidden: Tensor, agreed: SmallAgreement, sent_ns: int, notes: Notes, record: CallRecord) -> Tensor:
        """The call from where all pages are there -> [T, H] bfloat16

        hidden: what bring() was given; sent_ns: when this rank began to send its page.
        """
        arrived_ns, few, begun = now_ns(), self._few, perf_counter()
        self._lay_out(agreed, hidden)
        self._library.few_tokens("route", few)
        self._take(few.num_rows, sum(agreed.tokens), hidden)
        notes.work(_STAGES[0], 0)
        computed_ns = now_ns()
        if few.num_rows:
            self._library.few_tokens("compute", few)
        waited = perf_counter()
        combined_ns = now_ns(), self._exchange_results()
        ended = perf_counter()
        with notes.lane("reduce", rows=sum(self._owed[: few.ranks])):
            out = torch.empty_like(hidden)
            few.out = out.data_ptr()
            self._library.few_tokens("reduce", few)
        record.compute_s += waited - begun + perf_counter() - ended
        record.waiting_s += ended - waited
        self._note(record)
        if isinstance(notes, CallNotes):
            self._note_lanes(notes, computed_ns)
            self._note_flights(notes, (sent_ns, arrived_ns), combined_ns)
        return out

    def _lay_out(self, agreed: SmallAgreement, like: Tensor) -> None:
        """Where all ranks' slots and tokens are, and room for what follows from them."""
        few, slots = self._few, sum(agreed.tokens) * self._few.topk
        for rank, place in enumerate(agreed.places):
            self._tokens[rank], self._brought[rank] = agreed.tokens[rank], place.address + _BEHIND
        sizes = (8 * few.experts, 8 * slots, 8 * slots, 4 * slots, sum(agreed.tokens))
        begin = self._group.workspace.take("small rows", (sum(sizes),), like, torch.uint8).data_ptr()
        few.counts, few.sources, few.goes = begin, begin + sizes[0], begin + sizes[0] + sizes[1]
        few.weights, few.wanted = few.goes + sizes[2], few.goes + sizes[2] + sizes[3]
        own = self._group.workspace.take(_RESULTS, (slots, few.width), like).data_ptr()
        transport = self._group.transport
        if isinstance(transport, HostTransport):
            for rank, address in enumerate(transport.regions(_RESULTS)):
                self._results[rank] = address
            assert self._results[few.rank] == own, "results lie where no other rank can read them"
        else:
            self._results[0] = own
        self._point_at_weights()

    def _point_at_weights(self) -> None:
        """Anew for every call: loading into another group moves them."""
        few = self._few
        for name, matrix in (("gate_up", few.gate_up), ("down", few.down)):
            held = self._experts.held(name)
            values, scales = held.stacks[VALUES], held.stacks.get(SCALES) if held.matrix.packed else None
            matrix.values, matrix.value_bytes = values.data_ptr(), values.stride(0) * values.element_size()
            matrix.scales, matrix.scale_bytes = (None, 0) if scales is None else (scales.data_ptr(), scales.stride(0))
            matrix.bias = self._experts.bias(name, self._experts.ids).data_ptr() if self._experts.shape.bias else None

    def _take(self, num_rows: int, num_tokens: int, like: Tensor) -> None:
        """Buffers of n rows."""
        few, workspace, shape = self._few, self._group.workspace, self._experts.shape
        few.x = workspace.take("tokens", (num_tokens, shape.hidden), like).data_ptr()
        few.linear1 = workspace.take("gate_up", (num_rows, shape.linear1_rows), like).data_ptr()
        few.activated = workspace.take("hidden", (num_rows, shape.intermediate), like).data_ptr()
        if shape.bias:
            widest = max(shape.linear1_rows, shape.hidden)
            few.sums = workspace.take("sums", (num_rows, widest), like, torch.float32).data_ptr()

    def _exchange_results(self) -> int:
        """Says that this rank's results are there, and waits for those of ranks that have some of its slots -> when."""
        transport, size = self._group.transport, self._few.ranks
        if not isinstance(transport, HostTransport):
            return 0
        transport.signal(_RESULTS, [peer for peer in transport.host.near if self._owed[size + peer]])
        for peer in transport.host.near:
            if self._owed[peer]:
                transport.await_signal(_RESULTS, peer, self._label)
        return now_ns()

    # ---- what is noted of a call ----

    def _note(self, record: CallRecord) -> None:
        few = self._few
        record.tokens, record.waves = self._tokens[few.rank], 1
        record.rows_local = self._owed[few.rank]
        record.rows_sent = sum(self._owed[: few.ranks]) - record.rows_local
        record.rows_received = few.num_rows - record.rows_local
        record.dispatch_bytes = (few.ranks - 1) * record.tokens * self._num_bytes
        record.combine_bytes = record.rows_received * 2 * few.width

    def _token_bytes(self, wire: Wire) -> int:
        """Of a token and its slots."""
        return wire.row_bytes + 8 * self._experts.shape.topk

    def _note_lanes(self, notes: CallNotes, begin_ns: int) -> None:
        for lane, took_ns in zip(_STAGES, self._few.stage_ns, strict=True):
            if self._few.num_rows:
                notes.span(lane, 0, begin_ns, begin_ns + took_ns, self._few.num_rows)
            begin_ns += took_ns

    def _note_flights(self, notes: CallNotes, dispatched_ns: tuple[int, int], combined_ns: tuple[int, int]) -> None:
        few = self._few
        if few.ranks == 1:
            return
        others = [rank != few.rank for rank in range(few.ranks)]
        tokens = tuple(each * other for each, other in zip(self._tokens, others, strict=True))
        rows = tuple(each * other for each, other in zip(self._owed[: few.ranks], others, strict=True))
        dispatch = notes.flight("dispatch", 0, tokens, self._num_bytes)
        dispatch.sent_ns, dispatch.arrived_ns = dispatched_ns
        combine = notes.flight("combine", 0, rows, 2 * few.width)
        combine.sent_ns, combine.arrived_ns = combined_ns


_Pointer, _Long, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    """A matrix of this rank's experts, as megamoe_products() takes it."""

    _fields_ = (
        *[(name, _Pointer) for name in ("values", "scales")],
        *[(name, _Long) for name in ("value_bytes", "scale_bytes", "outputs")],
        ("bias", _Pointer),
    )


class _FewTokens(ctypes.Structure):
    """megamoe_few of kernels/cpu/routing.cpp, field by field."""

    _fields_ = (
        *[(name, _Long) for name in ("ranks", "rank", "topk", "num_experts", "first", "experts")],
        *[(name, _Long) for name in ("width", "inner", "row_bytes", "mxfp8", "rounds")],
        *[(name, _Matrix) for name in ("gate_up", "down")],
        *[(name, _Long) for name in ("gated", "quantized")],
        *[(name, _Pointer) for name in ("table", "up_table")],
        *[(name, _Float) for name in ("limit", "shift")],
        *[(name, _Pointer) for name in ("rank_of", "brought", "tokens", "results", "owed")],
        *[(name, _Long) for name in ("threads", "num_rows")],
        *[(name, _Pointer) for name in ("hidden", "ids", "topk_weights", "pairs", "counts", "sources", "goes")],
        *[(name, _Pointer) for name in ("weights", "wanted", "x", "linear1", "activated", "out", "sums")],
        ("stage_ns", _Long * len(_STAGES)),
    )
