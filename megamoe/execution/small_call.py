"""Calls of few tokens on a CPU: one exchange carries pages and tokens, results are summed from where they were made.

Where every rank brings few tokens, a rank writes its slots and its encoded tokens behind its page: ranks that share its
memory read them there, others get page and tokens as one message. Each computes the rows of its own experts in one step
and leaves the results in its own memory, in the order of the ranks that they are for; a token's home rank sums its
slots from there, or from the one message that brought them. A call waits twice: for pages, and for results.
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
from megamoe.execution.journeys import CallRecord
from megamoe.execution.products import KernelProducts
from megamoe.formats import SCALES, VALUES
from megamoe.kernels.cpu.library import Library
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.recorder import CallNotes, Notes, now_ns
from megamoe.parallel.symmetric import PLACE_BYTES, Place, SymmetricMemory
from megamoe.parallel.transport.heads import MESSAGE_BYTES
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label, PairTransfer
from megamoe.routing.agreement import PAGE_BYTES, Part, SmallAgreement
from megamoe.routing.landing import Order, order_of
from megamoe.routing.messages import ranks_of
from megamoe.routing.wire import Wire

MAX_TOKENS = 256  # of a rank: above, encoding them all before any is sent costs more than waves do
_SENT_BYTES = 128 * 1024  # to all ranks of other hosts, who may not want them all: more would cost what is saved
_BEHIND = -(-PAGE_BYTES // 64) * 64  # where slots begin, behind the page
_STAGES = ("linear-1", "activation", "linear-2")
_RESULTS, _FAR_RESULTS = "results", "results of other hosts"
_ALIGNED = 64  # bytes, where a cache line begins
_CPU = torch.empty(0)
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
        self._name, self._group, self._experts, self._library = name, group, experts, library
        self._label, self._most, self._token_bytes = Label(name, "combine", 0), 0, 0
        self._wire: Wire | None = None
        self._memory: SymmetricMemory | None = None
        shape, size = experts.shape, group.size
        self._placement = Placement(shape.num_experts, size)
        self._rank_of = ranks_of(self._placement, experts.device)
        self._pairs = np.zeros((3, shape.num_experts), np.int32)
        self._counts = self._pairs[:2]
        self._order: Order | None = None
        self._tokens, self._owed = (ctypes.c_int64 * size)(), (ctypes.c_int64 * (2 * size))()
        self._starts = (ctypes.c_int64 * size)()
        self._brought, self._results = (ctypes.c_void_p * size)(), (ctypes.c_void_p * size)()
        few = self._few = _FewTokens()
        assert library.few_bytes() == ctypes.sizeof(few), "megamoe_few of routing.cpp and _FewTokens differ"
        self._address = ctypes.addressof(few)
        few.ranks, few.rank, few.topk, few.num_experts = size, group.rank, shape.topk, shape.num_experts
        few.first, few.experts = experts.ids.start, len(experts.ids)
        few.width, few.inner = shape.hidden, shape.intermediate
        few.rank_of, few.pairs = self._rank_of.data_ptr(), self._pairs.ctypes.data
        few.tokens, few.owed = ctypes.addressof(self._tokens), ctypes.addressof(self._owed)
        few.brought, few.results = ctypes.addressof(self._brought), ctypes.addressof(self._results)
        few.starts = ctypes.addressof(self._starts)
        self._point_at_experts()

    def __reduce__(self) -> tuple[type[SmallCalls], tuple[str, EPGroup, Experts, Library]]:
        """A copy points at what was copied."""
        return type(self), (self._name, self._group, self._experts, self._library)

    def _point_at_experts(self) -> None:
        """Once for the same experts, whose weights are loaded in place; another group has other SmallCalls."""
        few, experts, activation = self._few, self._experts, self._experts.shape.activation
        few.gated, few.quantized = activation.gated, experts.format.activations == "mxfp8"
        few.table = experts.tables.gate.data_ptr()
        few.up_table = None if experts.tables.up is None else experts.tables.up.data_ptr()
        few.limit = float("inf") if activation.limit_of_up is None else activation.limit_of_up
        few.shift = activation.up_shift
        for name, matrix in (("gate_up", few.gate_up), ("down", few.down)):
            held = experts.held(name)
            values, scales = held.stacks[VALUES], held.stacks[SCALES] if held.matrix.packed else None
            matrix.values, matrix.value_bytes = values.data_ptr(), values.stride(0) * values.element_size()
            matrix.scales, matrix.scale_bytes = (None, 0) if scales is None else (scales.data_ptr(), scales.stride(0))
            matrix.bias = experts.bias(name, experts.ids).data_ptr() if experts.shape.bias else None
            matrix.outputs = held.matrix.outputs

    @property
    def _far(self) -> list[int]:
        """Ranks of other hosts."""
        transport = self._group.transport
        return transport.host.far if isinstance(transport, HostTransport) else []

    def takes(self, num_tokens: int, wire: Wire, experts: Experts) -> bool:
        """Whether so many tokens of a rank are few: there is room for them behind a page, and they are MAX_TOKENS.

        Asked once the transport has found out who shares this rank's memory. experts: the layer's, which may be another
        layer's since the last call.
        """
        if experts is not self._experts:
            self._experts = experts
            self._point_at_experts()
        if wire is not self._wire:
            few, self._wire = self._few, wire
            few.row_bytes, few.mxfp8, few.rounds = (
                wire.row_bytes,
                wire.dispatch_format == "mxfp8",
                wire.round_on_arrival,
            )
            self._token_bytes = wire.row_bytes + 8 * self._experts.shape.topk
            nodes = self._group.nodes(self._name)
            if nodes:
                self._counts, self._order = self._pairs, order_of(self._placement, nodes, self._group.rank)
                few.place_of, few.column_of = self._order.places.data_ptr(), self._order.columns.data_ptr()
                few.expert_at = self._order.experts.data_ptr()
            room = min(MESSAGE_BYTES, _BEHIND + _SENT_BYTES // len(self._far)) if self._far else PLACE_BYTES
            self._most = min(MAX_TOKENS, (room - _BEHIND - _ALIGNED) // self._token_bytes)
        return num_tokens <= self._most

    def bring(self, given: Input, place: Place | None, row_s: float) -> Part | None:
        """Writes slots and tokens behind the page in place, or for a rank alone into its workspace -> its Part.

        None where an id or a weight is wrong. given, of which takes() was asked, must stay until the call has ended.
        """
        few, (hidden, ids, weights), num_tokens = self._few, given, len(given[0])
        if place is None:
            begin = self._group.workspace.address("brought", _ALIGNED + num_tokens * self._token_bytes)
        else:
            begin = place.address + _BEHIND
        few.threads = torch.get_num_threads()
        self._tokens[self._group.rank], self._brought[self._group.rank] = num_tokens, begin
        few.hidden, few.ids, few.topk_weights = hidden.data_ptr(), ids.data_ptr(), weights.data_ptr()
        if not self._library.few_tokens("bring", self._address):
            return None
        rows = _aligned(8 * num_tokens * few.topk)
        return Part(num_tokens, self._counts, row_s, small=True, message=_BEHIND + rows + num_tokens * few.row_bytes)

    def compute(self, hidden: Tensor, agreed: SmallAgreement, sent_ns: int, notes: Notes, record: CallRecord) -> Tensor:
        """The call from where all pages are there -> [T, H] bfloat16

        hidden: what bring() was given; sent_ns: when this rank began to send its page.
        """
        arrived_ns, few, library, begun = now_ns(), self._few, self._library, perf_counter()
        self._lay_out(agreed)
        library.few_tokens("route", self._address)
        num_rows = few.num_rows
        self._make_room(num_rows, sum(agreed.tokens))
        incoming = self._expect_results()
        notes.work(_STAGES[0], 0)
        computed_ns = now_ns()
        if num_rows:
            self.run_experts()
        waited = perf_counter()
        combined_ns = now_ns(), self._exchange_results(incoming)
        ended = perf_counter()
        owed = self._owed[: few.ranks]
        with notes.lane("reduce", rows=sum(owed)):
            out = torch.empty_like(hidden)
            few.out = out.data_ptr()
            library.few_tokens("reduce", self._address)
        record.compute_s += waited - begun + perf_counter() - ended
        record.waiting_s += ended - waited
        self._note(record, num_rows, owed)
        if isinstance(notes, CallNotes):
            self._note_lanes(notes, computed_ns)
            self._note_flights(notes, (sent_ns, arrived_ns), combined_ns)
        return out

    def _lay_out(self, agreed: SmallAgreement) -> None:
        """Where all ranks' slots and tokens are, and room for what follows from them."""
        few, workspace, num_tokens = self._few, self._group.workspace, sum(agreed.tokens)
        for rank, place in enumerate(agreed.places):
            self._tokens[rank], self._brought[rank] = agreed.tokens[rank], place.address + _BEHIND
        slots = num_tokens * few.topk
        counts = workspace.address("small rows", 8 * few.experts + 28 * slots + num_tokens)
        few.counts, few.sources = counts, counts + 8 * few.experts
        few.goes = few.sources + 8 * slots
        few.places = few.goes + 8 * slots
        few.weights = few.places + 8 * slots
        few.wanted = few.weights + 4 * slots

    def _make_room(self, num_rows: int, num_tokens: int) -> None:
        """Buffers of n rows, and of all tokens; where the ranks of this host have their results."""
        few, matrices = self._few, self._experts.matrices
        outputs, inner = matrices["gate_up"].outputs, matrices["down"].inputs
        tokens, linear1, activated = (
            _aligned(2 * each) for each in (num_tokens * few.width, num_rows * outputs, num_rows * inner)
        )
        sums = 4 * num_rows * max(outputs, few.width) if few.down.bias else 0
        few.x = self._group.workspace.address("small call", tokens + linear1 + activated + sums)
        few.linear1 = few.x + tokens
        few.activated = few.linear1 + linear1
        few.sums = few.activated + activated
        transport, num_bytes = self._group.transport, 2 * num_rows * few.width
        if not isinstance(transport, HostTransport) or transport.host.memory is None:
            self._results[few.rank] = self._group.workspace.address(_RESULTS, num_bytes)
            return
        assert num_bytes <= len(transport.host.regions[_RESULTS]), "larger than this machine's memory"
        if self._memory is not transport.host.memory:
            self._memory = transport.host.memory
            for rank, address in transport.regions(_RESULTS).items():
                self._results[rank] = address

    def run_experts(self) -> None:
        """Both products and the activation of all rows that were routed."""
        self._library.few_tokens("compute", self._address)

    def _expect_results(self) -> PairTransfer | None:
        """Opens the way of results from and to other hosts, if there are any; theirs come to a buffer of this rank."""
        transport, far = self._group.transport, self._far
        if not far or not isinstance(transport, HostTransport):
            return None
        owed, width = self._owed[: self._group.size], self._few.width
        buffer = self._group.workspace.take(_FAR_RESULTS, (sum(owed), width), _CPU, torch.bfloat16)
        for peer in far:
            self._results[peer] = buffer.data_ptr() + 2 * width * sum(owed[:peer])
            self._starts[peer] = 0
        return transport.pairs.expect(buffer, owed, self._label, far)

    def _exchange_results(self, incoming: PairTransfer | None) -> int:
        """Says that this rank's results are there, and waits for those of ranks that have some of its slots -> when."""
        transport, size = self._group.transport, self._group.size
        if not isinstance(transport, HostTransport):
            return 0
        near, owed = transport.host.near, self._owed
        if incoming is not None:
            results = self._group.workspace.take(_RESULTS, (self._few.num_rows, self._few.width), _CPU, torch.bfloat16)
            incoming.send(results, owed[size:])
        if near:
            transport.signal(_RESULTS, [peer for peer in near if owed[size + peer]])
        for peer in near:
            if owed[peer]:
                transport.await_signal(_RESULTS, peer, self._label)
        if incoming is not None:
            incoming.wait()
            incoming.finish()
        return now_ns()

    # ---- what is noted of a call ----

    def _note(self, record: CallRecord, num_rows: int, owed: list[int]) -> None:
        rank, size = self._group.rank, self._group.size
        record.tokens, record.waves, record.rows_local = self._tokens[rank], 1, owed[rank]
        record.rows_sent, record.rows_received = sum(owed) - owed[rank], num_rows - owed[rank]
        record.small = True
        record.dispatch_bytes = (size - 1) * record.tokens * self._token_bytes
        record.combine_bytes = record.rows_received * 2 * self._few.width
        far = self._far
        record.far_bytes = len(far) * record.tokens * self._token_bytes
        record.far_bytes += 2 * self._few.width * sum(self._owed[size + peer] for peer in far)

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
        dispatch = notes.flight("dispatch", 0, tokens, self._token_bytes)
        dispatch.sent_ns, dispatch.arrived_ns = dispatched_ns
        combine = notes.flight("combine", 0, rows, 2 * few.width)
        combine.sent_ns, combine.arrived_ns = combined_ns


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED


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
        *[(name, _Pointer) for name in ("rank_of", "place_of", "column_of", "expert_at")],
        *[(name, _Pointer) for name in ("brought", "tokens", "results", "owed", "starts")],
        *[(name, _Long) for name in ("threads", "num_rows")],
        *[(name, _Pointer) for name in ("hidden", "ids", "topk_weights", "pairs", "counts", "sources", "goes")],
        *[(name, _Pointer) for name in ("places", "weights", "wanted", "x", "linear1", "activated", "out", "sums")],
        ("stage_ns", _Long * len(_STAGES)),
    )
