"""One call of the layer in flight: its rows, its buffers and its transfers. The layer's forward says in what order."""

# T tokens of this rank   H hidden   P ranks   e experts of this rank   N rows this rank sends   B bytes of such a row
# R rows that a step computes

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.execution.ops import reduce_slots
from megamoe.kernels.cpu.library import Rows as RowsByExpert
from megamoe.parallel.group import EPGroup
from megamoe.parallel.recorder import CallNotes, Notes
from megamoe.parallel.streams import Stopwatch
from megamoe.parallel.transport.pairs import Label, Transfer, Transport
from megamoe.parallel.transport.watch import WatchedTransport
from megamoe.routing.messages import Array, Messages
from megamoe.routing.permutation import Route, by_expert
from megamoe.routing.waves import WavePlan
from megamoe.routing.wire import Wire
from megamoe.schedule.cost_model import CostModel
from megamoe.schedule.schedule import Step, schedule


@dataclass(slots=True)
class CallRecord:
    """What one call of the layer did on this rank. Seconds are host time; bytes are those that left this rank.

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
    counts_s: float = 0.0
    compute_s: float = 0.0
    waiting_s: float = 0.0
    total_s: float = 0.0

    @property
    def bytes_sent(self) -> int:
        """Dispatch and combine together."""
        return self.dispatch_bytes + self.combine_bytes

    def __add__(self, other: CallRecord) -> CallRecord:
        """Two calls as one: everything is summed, but tokens and waves keep the larger."""
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        summed |= {name: max(getattr(self, name), getattr(other, name)) for name in ("tokens", "waves")}
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
    cost_model: CostModel
    notes: Notes

    @property
    def transport(self) -> Transport | None:
        """The group's, watched while it is recorded."""
        transport, notes = self.group.transport, self.notes
        return WatchedTransport(transport, notes) if transport and isinstance(notes, CallNotes) else transport


@dataclass(frozen=True, slots=True)
class Rows:
    """What a step computes: rows by source and expert, R in all.

    places [R] int64: row of the inbox that holds the token; weights [R] float32; counts [S, e]: rows of each source for
    each of the experts
    """

    places: Tensor
    weights: Tensor
    counts: Array
    experts: range


class CallBase(ABC):
    """What all calls know: their parts, the counts, and the order of their steps.

    hidden [T, H] bfloat16; counts [P, E] int64: rows of every rank for every expert
    """

    def __init__(self, parts: Parts, route: Route, counts: Tensor, hidden: Tensor, record: CallRecord) -> None:
        self._name, self._experts, self._wire, self._plan = parts.name, parts.experts, parts.wire, parts.plan
        self._rank, self._transport, self._notes = parts.group.rank, parts.transport, parts.notes
        self._workspace, self._messages = parts.group.workspace, parts.messages
        self._route, self._record, self._num_tokens = route, record, len(hidden)
        ids = parts.experts.ids
        self._own = counts.numpy()[self._rank, ids.start : ids.stop]  # [e]
        self._arriving = counts.numpy()[:, ids.start : ids.stop].copy()  # [P, e]
        self._arriving[self._rank] = 0
        arriving = parts.messages.pairs[:, :, self._rank].sum(0).tolist()  # [W]
        self.steps = schedule(parts.plan.waves(self._rank), parts.cost_model.load(self._own.tolist(), arriving))
        self.stopwatch: Stopwatch | None = None
        self._dispatches: dict[int, Transfer] = {}
        self._combines: dict[int, Transfer] = {}
        self._note(hidden.shape[1])

    @abstractmethod
    def dispatch(self, wave: int) -> None:
        """Sends this rank's messages of the wave, and opens the way for what comes in and for what will come home."""

    @abstractmethod
    def compute(self, step: Step) -> None:
        """Runs the experts of a step on what has arrived of its wave and on the rank-local rows it takes."""

    @abstractmethod
    def combine(self, wave: int) -> None:
        """Sends the wave's results home."""

    @abstractmethod
    def reduce(self) -> Tensor:
        """Sums every token's slots once all results are home -> [T, H] bfloat16"""

    def _from_others(self, wave: int) -> Array:
        """[P, experts of this rank in the wave]: rows that other ranks send for each."""
        ids, first = self._plan.experts(self._rank, wave), self._experts.ids.start
        return self._arriving[:, ids.start - first : ids.stop - first]

    def _own_rows(self, experts: range) -> Array:
        first = self._experts.ids.start
        return self._own[experts.start - first : experts.stop - first]

    def _spread(self, local: range, experts: range) -> Array:
        """Rank-local rows as one more source of a wave's experts: those of `local`, none for the others -> [1, e]"""
        counts = np.zeros((1, len(experts)), np.int64)
        counts[0, local.start - experts.start : local.stop - experts.start] = self._own_rows(local)
        return counts

    def _note(self, hidden: int) -> None:
        record, waves = self._record, range(self._plan.num_waves)
        record.tokens, record.waves = self._num_tokens, len(waves)
        record.rows_local = int(self._own.sum())
        record.rows_sent = self._route.num_rows - record.rows_local
        record.rows_received = int(self._arriving.sum())
        record.dispatch_bytes = sum(sum(self._messages.rows(self._rank, wave)) for wave in waves) * self._wire.row_bytes
        record.combine_bytes = record.rows_received * 2 * hidden


class Call(CallBase):
    """One call in flight."""

    def __init__(self, parts: Parts, route: Route, counts: Tensor, hidden: Tensor, record: CallRecord) -> None:
        super().__init__(parts, route, counts, hidden, record)
        # this rank's own tokens, then what comes from others: all that its experts read
        inbox = (parts.messages.inbox_rows(self._rank, len(hidden)), parts.wire.row_bytes)
        self._inbox = self._workspace.take("inbox", inbox, hidden, torch.uint8)
        if parts.wire.in_place:
            self._tokens = parts.wire.tokens(self._inbox)
        else:
            self._tokens = self._workspace.take("tokens", (inbox[0], hidden.shape[1]), hidden)
        with record.timing("compute_s"):
            self._encoded = parts.wire.encode(hidden, self._inbox[: len(hidden)])  # [T, B]
        self._own_decoded = parts.wire.in_place
        self._results = self._workspace.take("results", (route.num_rows + 1, hidden.shape[1]), hidden)  # [N + 1, H]
        self._results[-1] = 0  # what a masked slot adds
        self._num_unique = 0
        self._computed: dict[int, Tensor] = {}

    def dispatch(self, wave: int) -> None:
        if self._transport is None or wave >= self._plan.num_waves:
            return
        incoming = self._messages.incoming(self._rank, wave)
        begin = int(self._messages.starts[self._rank, wave, 0])
        self._dispatches[wave] = self._transport.expect(
            self._inbox[begin : begin + sum(incoming)], incoming, Label(self._name, "dispatch", wave)
        )
        with self._record.timing("compute_s"):
            messages = self._packed(wave)
        self._dispatches[wave].send(messages, self._messages.rows(self._rank, wave))
        going_home = self._results[self._route.remote(wave)]
        sent = self._route.sent[wave]
        self._combines[wave] = self._transport.expect(going_home, sent, Label(self._name, "combine", wave))

    def _packed(self, wave: int) -> Tensor:
        """This rank's messages of the wave as they travel, by receiver -> [rows, B] uint8"""
        sizes, route = self._messages.rows(self._rank, wave), self._route
        messages = self._workspace.take(("sent", wave), (sum(sizes), self._wire.row_bytes), self._inbox)
        pair, row = route.remote(wave).start, 0
        for rank, size in enumerate(sizes):
            if not size:
                continue
            pairs = slice(pair, pair + int(self._messages.pairs[self._rank, wave, rank]))
            head = row + int(self._messages.heads[self._rank, wave, rank])
            self._wire.write_pairs(messages[row:head], route.places[pairs], route.weights[pairs])
            unique = route.unique[self._num_unique : self._num_unique + row + size - head]
            torch.index_select(self._encoded, 0, unique, out=messages[head : row + size])
            pair, row, self._num_unique = pairs.stop, row + size, self._num_unique + len(unique)
        return messages

    def compute(self, step: Step) -> None:
        local_rows = self._route.local(step.local, self._experts.ids.start)
        places, weights = [self._route.tokens[local_rows]], [self._route.weights[local_rows]]
        counts, experts = self._own_rows(step.local)[None], step.local
        num_arrived = 0
        if step.arrived and self._transport is not None:
            with self._record.timing("waiting_s"):
                self._dispatches[step.wave].wait()
            experts = self._plan.experts(self._rank, step.wave)
            counts = np.concatenate((self._from_others(step.wave), self._spread(step.local, experts)))
            num_arrived = self._open(step.wave, places, weights)
        with self._record.timing("compute_s"):
            # what a wave computes leaves from where it is, so each wave has a place of its own
            place: Hashable = ("going home", step.wave) if step.arrived else "kept"
            results = self._run(Rows(torch.cat(places), torch.cat(weights), counts, experts), place, step.wave)
            self._results[local_rows] = results[num_arrived:]
            if step.arrived:
                self._computed[step.wave] = results[:num_arrived]

    def _open(self, wave: int, places: list[Tensor], weights: list[Tensor]) -> int:
        """Reads a wave's messages: puts where its pairs' tokens are, and their weights, before what is there."""
        num_arrived, messages, rank, wire = 0, self._messages, self._rank, self._wire
        with self._record.timing("compute_s"):
            for sender, pairs in enumerate(messages.pairs[:, wave, rank].tolist()):
                if not pairs:
                    continue
                begin = int(messages.starts[rank, wave, sender])
                head = begin + int(messages.heads[sender, wave, rank])
                where, weight = wire.read_pairs(self._inbox[begin:head], pairs)
                places.insert(-1, where.to(torch.int64))
                weights.insert(-1, weight)
                num_arrived += pairs
                if not wire.in_place:
                    unique = slice(head, head + int(messages.unique[sender, wave, rank]))
                    wire.decode(self._inbox[unique], self._tokens[unique])
        return num_arrived

    def combine(self, wave: int) -> None:
        if self._transport is not None:
            rows = self._messages.pairs[:, wave, self._rank].tolist()
            self._combines[wave].send(self._computed[wave], rows)  # which stay until the call has ended

    def reduce(self) -> Tensor:
        with self._record.timing("waiting_s"):
            for transfer in self._combines.values():
                transfer.wait()
        with self._record.timing("compute_s"), self._notes.lane("reduce", rows=self._route.num_rows):
            out = reduce_slots(self._results, self._route.positions)
        with self._record.timing("waiting_s"):
            for transfer in (*self._dispatches.values(), *self._combines.values()):
                transfer.finish()
        return out

    def _run(self, rows: Rows, place: Hashable, wave: int) -> Tensor:
        """Results [R, H] bfloat16 in the rows' order, in the workspace's buffer called `place`."""
        if not len(rows.places):
            return self._results[:0]
        experts, workspace, lane, num_rows = self._experts, self._workspace, self._notes.lane, len(rows.places)
        order = torch.from_numpy(by_expert(rows.counts)).to(self._results.device)
        counts = torch.from_numpy(rows.counts.sum(0))
        with lane("linear-1", wave, num_rows):
            if not self._own_decoded:
                self._wire.decode(self._encoded, self._tokens[: self._num_tokens])
                self._own_decoded = True
            tokens = RowsByExpert(self._tokens, counts, rows.places.index_select(0, order))
            gate_up = experts.linear1(tokens, rows.experts, workspace)
        with lane("activation", wave, num_rows):
            weights = rows.weights.index_select(0, order)
            hidden = experts.activation(gate_up, weights, workspace)
        with lane("linear-2", wave, num_rows):
            out = workspace.take(place, (num_rows, self._results.shape[1]), self._results)
            return experts.linear2(RowsByExpert(hidden, counts), rows.experts, weights, out, order, workspace)
