"""One call of the layer in flight: its rows, its buffers and its transfers. The layer's forward says in what order."""

# T tokens of this rank   H hidden   P ranks   E experts in all

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from megamoe.execution.backends import backend_of
from megamoe.execution.backends.backend import CallBuffers, RowsByExpert
from megamoe.execution.experts import Experts
from megamoe.execution.fetching import Fetching
from megamoe.execution.ops import reduce_slots
from megamoe.parallel.group import EPGroup
from megamoe.parallel.recorder import Notes
from megamoe.parallel.streams import Stopwatch
from megamoe.parallel.transport.landings import Landings
from megamoe.parallel.transport.pairs import Label, Transfer
from megamoe.parallel.workspace import Workspace
from megamoe.routing.agreement import Agreement
from megamoe.routing.messages import Messages
from megamoe.routing.permutation import Route
from megamoe.routing.row_plan import RankRows, RowPlan, StepRows, plan_rows
from megamoe.routing.segments import expand_all
from megamoe.routing.waves import WavePlan
from megamoe.routing.wire import Wire, pair_records, read_records
from megamoe.schedule.cost_model import CostModel
from megamoe.schedule.schedule import Step, schedule


@dataclass(slots=True)
class CallRecord:
    """What one call of the layer did on this rank. Seconds are host time; bytes are those that left this rank.

    far_bytes are those for ranks that it shares no memory with; tokens_fetched counts tokens from other hosts that it
    read from a rank of its own, on which they landed.
    small: all ranks brought few tokens, so that one exchange carried them, and there was one wave: see small_call.py

    Where a GPU's kernels compute, compute_s is the GPU's time, known once the next call has begun, and a rank alone
    notes its tokens and nothing else.
    """

    tokens: int = 0
    waves: int = 0
    rows_local: int = 0
    rows_sent: int = 0
    rows_received: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    far_bytes: int = 0
    tokens_fetched: int = 0
    counts_s: float = 0.0
    compute_s: float = 0.0
    waiting_s: float = 0.0
    total_s: float = 0.0
    small: bool = False

    @property
    def bytes_sent(self) -> int:
        """Dispatch and combine together."""
        return self.dispatch_bytes + self.combine_bytes

    def __add__(self, other: CallRecord) -> CallRecord:
        """Two calls as one: everything is summed, but tokens and waves keep the larger."""
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        summed |= {name: max(getattr(self, name), getattr(other, name)) for name in ("tokens", "waves", "small")}
        return CallRecord(**summed)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - begun)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a call needs of its layer."""

    name: str
    group: EPGroup
    experts: Experts
    wire: Wire
    plan: WavePlan
    messages: Messages
    agreed: Agreement
    cost_model: CostModel
    notes: Notes
    nodes: tuple[int, ...] = ()

    def fetching(self, plan: RowPlan, rows: Tensor) -> Fetching | None:
        """Of a call whose tokens go to another host once, else None."""
        if not self.messages.node_limited:
            return None
        landings: Landings = self.group.transport.landings(self.name)  # type: ignore[union-attr]
        return Fetching(landings, self.nodes, self.group.rank, self.messages, plan, rows)


class Call:
    """One call in flight, on any device: its expert backend packs and computes, its transport moves messages.

    A rank alone has no transport: nothing is dispatched, nothing arrives, and its own rows are all there are.
    hidden [T, H] bfloat16
    parts       what it was made of
    destinations   [n] int64: row of the results of each row, in the order of steps
    steps       this rank's order of compute
    stopwatch   the GPU's time that the call computes, known once the call has ended; None elsewhere
    """

    def __init__(self, parts: Parts, route: Route, hidden: Tensor, record: CallRecord) -> None:
        self.parts = parts
        self._name, self._rank, self._messages = parts.name, parts.group.rank, parts.messages
        self._transport, self._notes = parts.group.watched(parts.notes), parts.notes
        self._route, self._record = route, record
        self._streams = parts.group.streams_of(hidden.device)
        self.stopwatch = Stopwatch(hidden.device) if hidden.device.type == "cuda" else None
        self._dispatches: dict[int, Transfer] = {}
        self._combines: dict[int, Transfer] = {}
        wire, workspace, num_tokens = parts.wire, parts.group.workspace, len(hidden)
        rows = RankRows.of(parts.agreed.counts.numpy(), self._rank, parts.experts.ids)
        with self._computing():
            load = parts.cost_model.load(rows.own.tolist(), parts.messages.pairs[:, :, self._rank].sum(0).tolist())
            self.steps = schedule(parts.plan.waves(self._rank), load)
            self._plan = plan_rows(parts.plan, self._rank, self.steps, rows, parts.messages, wire, num_tokens)
            self._work = dict(zip(self.steps, self._plan.steps, strict=True))
            self._rows = workspace.take("rows", (self._plan.num_rows, wire.row_bytes), hidden, torch.uint8)
            self._records = self._rows.view(torch.int32).view(-1, 2)
            self._fetching = parts.fetching(self._plan, self._rows)
            size, dtype = wire.result_rows(self._plan.num_results)
            self._results, self._wire = workspace.take("results", size, hidden, dtype), wire
            self._results[-1].zero_()  # what a masked slot adds
            buffers = CallBuffers(self._rows, self._plan.own)
            self._backend = backend_of(parts.experts)(parts.experts, wire, workspace, buffers)
            self._pack(hidden, workspace)
        self._streams.hand_over()
        self._unread: slice | None = self._plan.own
        self._note(parts, rows, hidden)

    def _pack(self, hidden: Tensor, workspace: Workspace) -> None:
        """Copies the row plan to the device, writes all pair records, encodes tokens into inbox and messages."""
        plan, route, backend = self._plan, self._route, self._backend
        segments = [plan.computed, plan.records] + [plan.unique] * (not backend.packs_each_wave)
        counts = [np.concatenate([step.counts for step in plan.steps])] * backend.counts_on_device
        expanded, copied = expand_all(segments, counts, hidden.device, workspace, "row plan")
        self._sources, self.destinations = expanded[0]  # [2, n of all steps]
        self._tokens_per_expert = copied[0].to(torch.int32) if copied else None
        self._records.index_copy_(0, expanded[1], pair_records(route.token_rows, route.weights))
        if self._fetching is not None:
            self._records.index_copy_(0, torch.from_numpy(plan.fetch_records.expand()), route.fetches)
        backend.pack(hidden, route.unique, None if backend.packs_each_wave else expanded[2])

    def dispatch(self, wave: int) -> None:
        """Sends this rank's messages of the wave, and opens the way for what comes in and for what will come home."""
        if self._transport is None or wave >= len(self._plan.sent):
            return
        plan, streams = self._plan, self._streams
        with streams.messages():
            incoming = self._messages.incoming(self._rank, wave)
            arriving = self._rows[plan.arriving[wave]]
            self._dispatches[wave] = self._transport.expect(arriving, incoming, Label(self._name, "dispatch", wave))
            if self._fetching is not None:
                self._fetching.expect(wave)
        if self._backend.packs_each_wave:
            self._pack_wave(wave)
        with streams.messages():
            rows, starts = self._messages.rows(self._rank, wave), plan.inboxes[wave].tolist()
            self._dispatches[wave].send(self._rows[plan.sent[wave]], rows, starts)
            if self._fetching is not None:
                self._fetching.send(wave)
            coming_home, sent = self._results[plan.coming_home[wave]], self._messages.pairs[self._rank, wave].tolist()
            self._combines[wave] = self._transport.expect(coming_home, sent, Label(self._name, "combine", wave))

    def _pack_wave(self, wave: int) -> None:
        with self._computing():
            for unique, rows in self._plan.messages(wave):
                self._backend.pack_message(self._route.unique[unique], rows)
        self._streams.hand_over()

    def compute(self, step: Step) -> None:
        """Runs the experts of a step on what has arrived of its wave and on the rank-local rows it takes."""
        work, lane, backend = self._work[step], self._notes.lane, self._backend
        arrived = step.arrived and self._transport is not None
        if arrived:
            with self._record.timing("waiting_s"):
                self._dispatches[step.wave].wait()
                if self._fetching is not None:
                    self._fetching.fetch(step.wave)
        num_rows = work.rows.stop - work.rows.start
        if not num_rows:
            return
        with self._computing():
            with lane("linear-1", step.wave, num_rows):
                rows = self._read(work, self._plan.incoming(step.wave) if arrived else None)
                hidden = backend.grouped_linear1(rows)
            with lane("activation", step.wave, num_rows):
                hidden = backend.activate(hidden, rows)
            with lane("linear-2", step.wave, num_rows):
                backend.grouped_linear2(hidden, rows, self._wire.results(self._results))

    def _read(self, work: StepRows, arrived: slice | None) -> RowsByExpert:
        """Rows of a step, once the tokens among which they are have been decoded: this rank's own in the first step."""
        for tokens in (self._unread, arrived):
            if tokens is not None:
                self._backend.read(tokens)
        self._unread = None
        token_rows, weights = read_records(self._records.index_select(0, self._sources[work.rows]))
        on_device = self._tokens_per_expert
        return RowsByExpert(
            experts=work.experts,
            tokens_per_expert=torch.from_numpy(work.counts) if on_device is None else on_device[work.places],
            sources=token_rows,
            weights=weights,
            destinations=self.destinations[work.rows],
        )

    def combine(self, wave: int) -> None:
        """Sends the wave's results home, from where they stay until the call has ended."""
        if self._transport is None:
            return
        self._streams.hand_over()
        with self._streams.messages():
            rows = self._messages.pairs[:, wave, self._rank].tolist()
            starts = self._plan.homes[wave].tolist()
            self._combines[wave].send(self._results[self._plan.going_home[wave]], rows, starts)

    def reduce(self) -> Tensor:
        """Sums every token's slots once all results are home -> [T, H] bfloat16"""
        with self._record.timing("waiting_s"):
            for transfer in self._combines.values():
                transfer.wait()
        with self._computing(), self._notes.lane("reduce", rows=self._route.num_rows):
            out = reduce_slots(self._wire.results(self._results[self._plan.reduced]), self._route.positions)
        with self._record.timing("waiting_s"):
            for transfer in (*self._dispatches.values(), *self._combines.values()):
                transfer.finish()
            if self._fetching is not None:
                self._fetching.finish()
        return out

    def _computing(self) -> AbstractContextManager[None]:
        return self.stopwatch or self._record.timing("compute_s")

    def _note(self, parts: Parts, rows: RankRows, hidden: Tensor) -> None:
        record, plan = self._record, self._plan
        record.tokens, record.waves = len(hidden), parts.plan.num_waves
        record.rows_local = int(rows.own.sum())
        record.rows_sent = self._route.num_rows - record.rows_local
        record.rows_received = plan.going_home[-1].stop
        record.dispatch_bytes = plan.sent[-1].stop * parts.wire.row_bytes
        record.combine_bytes = record.rows_received * parts.wire.result_bytes
        messages, rank, far = parts.messages, self._rank, parts.group.far
        record.far_bytes = int((messages.heads + messages.unique)[rank][:, far].sum()) * parts.wire.row_bytes
        record.far_bytes += int(messages.pairs[far, :, rank].sum()) * parts.wire.result_bytes
        record.tokens_fetched = int(messages.fetched[:, :, rank].sum())
