"""One call of the layer in flight: its rows, its buffers and its transfers. The layer's forward says in what order."""

# T tokens of this rank   H hidden   P ranks   E experts in all

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamoe.execution.backends import backend_of
from megamoe.execution.backends.backend import CallBuffers, RowsByExpert
from megamoe.execution.experts import Experts
from megamoe.execution.fetching import Fetching
from megamoe.execution.journeys import CallParts, CallRecord, Journeys
from megamoe.execution.ops import reduce_slots
from megamoe.parallel.streams import Stopwatch
from megamoe.parallel.transport.landings import Landings
from megamoe.parallel.workspace import Workspace
from megamoe.routing.permutation import Route
from megamoe.routing.row_plan import RankRows, RowPlan, StepRows, plan_rows
from megamoe.routing.segments import expand_all
from megamoe.routing.wire import Wire, pair_records, read_records
from megamoe.schedule.cost_model import CostModel
from megamoe.schedule.schedule import Step, schedule


@dataclass(frozen=True, slots=True)
class Parts(CallParts):
    """The same for a forward."""

    experts: Experts
    wire: Wire
    cost_model: CostModel
    nodes: tuple[int, ...] = ()

    def fetching(self, plan: RowPlan, rows: Tensor) -> Fetching | None:
        """Of a call whose tokens go to another host once, else None."""
        if not self.messages.node_limited:
            return None
        landings: Landings = self.group.transport.landings(self.name)  # type: ignore[union-attr]
        return Fetching(landings, self.nodes, self.group.rank, self.messages, plan, rows)


class Call(Journeys):
    """One call in flight, on any device: its expert backend packs and computes, its transport moves messages.

    hidden [T, H] bfloat16
    parts       what it was made of
    destinations   [n] int64: row of the results of each row, in the order of steps
    steps       this rank's order of compute
    stopwatch   the GPU's time that the call computes, known once the call has ended; None elsewhere
    """

    def __init__(self, parts: Parts, route: Route, hidden: Tensor, record: CallRecord) -> None:
        super().__init__(parts, record, parts.group.streams_of(hidden.device))
        self.parts, self._route = parts, route
        self.stopwatch = Stopwatch(hidden.device) if hidden.device.type == "cuda" else None
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
        self._note(parts, num_tokens, route.num_rows, int(rows.own.sum()), (wire.row_bytes, wire.result_bytes))

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

    def _pack_wave(self, wave: int) -> None:
        if not self._backend.packs_each_wave:
            return
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

    def reduce(self) -> Tensor:
        """Sums every token's slots once all results are home -> [T, H] bfloat16"""
        self._wait_home()
        with self._computing(), self._notes.lane("reduce", rows=self._route.num_rows):
            out = reduce_slots(self._wire.results(self._results[self._plan.reduced]), self._route.positions)
        self._finish()
        return out

    def _computing(self) -> AbstractContextManager[None]:
        return self.stopwatch or self._record.timing("compute_s")
