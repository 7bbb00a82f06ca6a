"""One call of the layer in flight: its rows, its buffers and its transfers. The layer's forward says in what order."""

# T tokens of this rank   H hidden   P ranks   e experts of this rank   N rows this rank sends   B bytes of such a row
# R rows that arrive in a wave   n rows that are computed, padding included

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megamoe.experts import Experts
from megamoe.ops import reduce_slots
from megamoe.pace import Pace
from megamoe.parallel.group import EPGroup
from megamoe.parallel.recorder import CallNotes, Notes
from megamoe.parallel.transport import Label, Transfer, Transport
from megamoe.parallel.watch import WatchedTransport
from megamoe.rows import Route, arrange
from megamoe.waves import Step, WavePlan, schedule
from megamoe.wire import Wire


@dataclass(slots=True)
class CallRecord:
    """What one call of the layer did on this rank. Seconds are host time; bytes are those that left this rank."""

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
    pace: Pace
    notes: Notes

    @property
    def transport(self) -> Transport | None:
        """The group's, watched while it is recorded."""
        transport, notes = self.group.transport, self.notes
        return WatchedTransport(transport, notes) if transport and isinstance(notes, CallNotes) else transport


class Call:
    """One call in flight. hidden [T, H] bfloat16; counts [P, E] int64: rows of every rank for every expert."""

    def __init__(
        self, parts: Parts, plan: WavePlan, route: Route, counts: Tensor, hidden: Tensor, record: CallRecord
    ) -> None:
        self._name, self._experts, self._wire = parts.name, parts.experts, parts.wire
        self._rank, self._transport, self._notes = parts.group.rank, parts.transport, parts.notes
        self._workspace = parts.group.workspace
        self._plan, self._route, self._record = plan, route, record
        ids = parts.experts.ids
        self._own = counts[self._rank, ids.start : ids.stop]  # [e]
        self._arriving = counts[:, ids.start : ids.stop].clone()  # [P, e]
        self._arriving[self._rank] = 0
        arriving = [int(self._from_others(wave).sum()) for wave in range(plan.num_waves)]
        self.steps = schedule(plan, self._rank, parts.pace.load(self._own.tolist(), arriving))
        with record.timing("compute_s"):
            encoded = self._workspace.take("encoded", (len(hidden), parts.wire.row_bytes), hidden, torch.uint8)
            self._encoded = parts.wire.encode(hidden, encoded)  # [T, B]
        self._results = self._workspace.take("results", (route.num_rows + 1, hidden.shape[1]), hidden)  # [N + 1, H]
        self._results[-1] = 0  # what a masked slot adds
        self._local = {step.wave: step.local for step in self.steps if step.arrived}
        self._arrived: dict[int, Tensor] = {}
        self._computed: dict[int, Tensor] = {}
        self._dispatches: dict[int, Transfer] = {}
        self._combines: dict[int, Transfer] = {}
        self._note(len(hidden), hidden.shape[1])

    def _from_others(self, wave: int) -> Tensor:
        """[P, experts of this rank in the wave]: rows that other ranks send for each."""
        ids, first = self._plan.experts(self._rank, wave), self._experts.ids.start
        return self._arriving[:, ids.start - first : ids.stop - first]

    def _note(self, num_tokens: int, hidden: int) -> None:
        record = self._record
        record.tokens, record.waves = num_tokens, self._plan.num_waves
        record.rows_local = int(self._own.sum())
        record.rows_sent = self._route.num_rows - record.rows_local
        record.rows_received = int(self._arriving.sum())
        record.dispatch_bytes = record.rows_sent * self._wire.row_bytes
        record.combine_bytes = record.rows_received * 2 * hidden

    def dispatch(self, wave: int) -> None:
        """Sends this rank's rows of the wave, and opens the way for what comes in and for what will come home."""
        if self._transport is None or wave >= self._plan.num_waves:
            return
        sent, received = self._route.sent[wave], self._from_others(wave).sum(1).tolist()
        going_home = self._results[self._route.remote(wave)]
        num_local = int(self._own_rows(self._local[wave]).sum())
        arrived = self._buffer(("arrived", wave), sum(received) + num_local)  # [R + local, B]
        self._dispatches[wave] = self._transport.expect(
            arrived[: sum(received)], received, Label(self._name, "dispatch", wave)
        )
        self._combines[wave] = self._transport.expect(going_home, sent, Label(self._name, "combine", wave))
        with self._record.timing("compute_s"):
            remote = self._route.remote(wave)
            rows = self._buffer(("sent", wave), remote.stop - remote.start, pad=False)
            self._rows(remote, rows)
        self._dispatches[wave].send(rows, sent)
        self._arrived[wave] = arrived

    def compute(self, step: Step) -> None:
        """Runs the experts of a step on what has arrived of its wave and on the rank-local rows it takes."""
        local_rows = self._route.local(step.local, self._experts.ids.start)
        num_local = local_rows.stop - local_rows.start
        counts, experts = self._own_rows(step.local).unsqueeze(0), step.local
        if step.arrived and self._transport is not None:
            with self._record.timing("waiting_s"):
                self._dispatches[step.wave].wait()
            rows = self._arrived.pop(step.wave)
            experts = self._plan.experts(self._rank, step.wave)
            counts = torch.cat((self._from_others(step.wave), self._spread(step.local, experts)))
        else:
            rows = self._buffer("local", num_local)
        num_arrived = int(counts.sum()) - num_local
        with self._record.timing("compute_s"):
            if num_local:
                self._rows(local_rows, rows[num_arrived : num_arrived + num_local])
            # what a wave computes leaves from where it is, so each wave has a place of its own
            place: Hashable = ("going home", step.wave) if step.arrived else "kept"
            results = self._run(rows, counts, experts, place, step.wave)
            self._results[local_rows] = results[num_arrived:]
            if step.arrived:
                self._computed[step.wave] = results[:num_arrived]

    def combine(self, wave: int) -> None:
        """Sends the wave's results home."""
        if self._transport is not None:
            rows = self._from_others(wave).sum(1).tolist()
            self._combines[wave].send(self._computed[wave], rows)  # which stay until the call has ended

    def reduce(self) -> Tensor:
        """Sums every token's slots once all results are home -> [T, H] bfloat16"""
        with self._record.timing("waiting_s"):
            for transfer in self._combines.values():
                transfer.wait()
        with self._record.timing("compute_s"), self._notes.lane("reduce", rows=self._route.num_rows):
            out = reduce_slots(self._results, self._route.positions)
        with self._record.timing("waiting_s"):
            for transfer in (*self._dispatches.values(), *self._combines.values()):
                transfer.finish()
        return out

    def _rows(self, part: slice, out: Tensor) -> None:
        """A part of the route's rows as they travel, into out [rows, B] uint8"""
        torch.index_select(self._encoded, 0, self._route.tokens[part], out=out)
        self._wire.address(out, self._route.weights[part])

    def _buffer(self, name: Hashable, num_rows: int, *, pad: bool = True) -> Tensor:
        """Room for rows as they travel, and for the padding of their last expert -> [num_rows + padding, B] uint8"""
        multiple = self._experts.row_multiple if pad else 1
        shape = (-(-num_rows // multiple) * multiple, self._wire.row_bytes)
        rows = self._workspace.take(name, shape, self._encoded)
        rows[num_rows:] = 0
        return rows

    def _run(self, rows: Tensor, counts: Tensor, experts: range, place: Hashable, wave: int) -> Tensor:
        """rows [R + padding, B] uint8 by source, counts [S, experts] -> results [R, H] bfloat16 in the same order.

        They stand in the workspace's buffer called `place`.
        """
        if not len(rows):
            return self._results[:0]
        take, results, lane = self._workspace.take, self._results, self._notes.lane
        arranged = arrange(counts, self._experts.row_multiple, rows.device)
        groups = self._experts.groups(experts, arranged.padded_rows)
        shape, num_rows = (len(arranged.gather), results.shape[1]), len(arranged.back)
        with lane("linear-1", wave, num_rows):
            if not arranged.in_place:
                gathered = take("gathered", (shape[0], rows.shape[1]), rows)
                rows = torch.index_select(rows, 0, arranged.gather, out=gathered)
            wire = self._wire
            tokens = wire.tokens(rows) if wire.in_place else wire.decode(rows, take("tokens", shape, results))
            weights = wire.weights(rows)
            gate_up = self._experts.linear1(tokens, groups, self._workspace)
        with lane("activation", wave, num_rows):
            hidden = self._experts.activation(gate_up, weights, self._workspace)
        with lane("linear-2", wave, num_rows):
            out = self._experts.linear2(hidden, groups, place if arranged.in_place else "computed", self._workspace)
            if arranged.in_place:
                return out[:num_rows]
            return torch.index_select(out, 0, arranged.back, out=take(place, (num_rows, shape[1]), results))

    def _own_rows(self, experts: range) -> Tensor:
        first = self._experts.ids.start
        return self._own[experts.start - first : experts.stop - first]

    def _spread(self, local: range, experts: range) -> Tensor:
        """Rank-local rows as one more source of a wave's experts: those of `local`, none for the others -> [1, e]"""
        counts = torch.zeros(1, len(experts), dtype=torch.int64)
        counts[0, local.start - experts.start : local.stop - experts.start] = self._own_rows(local)
        return counts
