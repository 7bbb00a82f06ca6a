"""One call of the layer in flight on a device that has Triton kernels: as `pipeline.Call`, with other means.

The host knows the counts and no more: it queues everything and waits for nothing. All messages are packed at once, each
token read once and put into every row that it fills. Rows are not gathered for the experts, nor put in order after
them: Linear-1 reads each where it arrived, and Linear-2 writes each where it leaves from. Where that is follows from
the counts, and is told to the device as segments.
"""

# T tokens of this rank   H hidden   P ranks   W waves   N rows this rank sends   B bytes of such a row
# G rows that others send here, and get back   n rows of a step, by expert   J segments

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamoe.execution.backends.triton_experts import Operand, RowsByExpert, run_experts, take_operand
from megamoe.execution.ops import quantize, reduce_slots, widen
from megamoe.execution.pipeline import CallBase, CallRecord, Parts
from megamoe.formats import MXFP8
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.layout import Wide
from megamoe.kernels.quantize import Filling
from megamoe.parallel.streams import Stopwatch
from megamoe.parallel.transport.pairs import Label
from megamoe.routing.messages import Array
from megamoe.routing.permutation import Route
from megamoe.routing.segments import begins, spell_out, to_device
from megamoe.schedule.schedule import Step

WORD_BYTES = 8  # of a word, in which what is said of a pair lies
# A message's kernel finds no room on a GPU that is full of programs until one has ended: while others send, each does a
# quarter of the work that it would do alone. A guess until it is measured.
_OVERSUBSCRIPTION = 4


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes: its rows among those of all steps, its experts, and their places in tokens_per_expert."""

    rows: slice
    experts: range
    counts: slice


@dataclass(frozen=True, slots=True)
class Segments:
    """Rows in the order in which all steps compute them: by step, then expert, then source.

    lengths [J]       rows of each segment, which has one expert and one source
    firsts [2, J]     of a segment's first row: the word where it is told of, and the row of the results that it becomes
    """

    lengths: Array
    firsts: Array

    @property
    def offsets(self) -> Array:
        return self.firsts - begins(self.lengths)


class KernelCall(CallBase):
    """One call in flight.

    rows      [., B] uint8 in one piece: the messages that this rank sends, by wave and receiver; an index of its own
              pairs, as a message has one; its inbox, which begins with its own tokens
    results   [G + N + 1, H] bfloat16: what goes home, by wave and sender; what has come home or never left
    """

    def __init__(self, parts: Parts, route: Route, counts: Tensor, hidden: Tensor, record: CallRecord) -> None:
        super().__init__(parts, route, counts, hidden, record)
        assert self._transport is not None, "a rank alone has no call in flight"
        self.stopwatch = self._watch = Stopwatch(hidden.device)
        self._device, self._streams = hidden.device, parts.group.streams_of(hidden.device)
        take, wire, messages, rank = self._workspace.take, self._wire, self._messages, self._rank
        sizes = messages.heads[rank] + messages.unique[rank]  # [W, P]
        self._message_starts = begins(sizes.ravel()).reshape(sizes.shape)
        self._num_sent = int(sizes.sum())
        own_head = -(-wire.PAIR_BYTES * int(self._own.sum()) // wire.row_bytes)
        self._base = self._num_sent + own_head
        inbox = messages.inbox_rows(rank, len(hidden))
        self._rows = take("rows", (self._base + inbox, wire.row_bytes), hidden, torch.uint8)
        self._inbox = self._rows[self._base :]
        self._words = self._rows.view(torch.int64).flatten()
        self._wave_rows = messages.pairs[:, :, rank].sum(0)  # [W]
        self._wave_starts = begins(self._wave_rows)
        self._num_home = int(self._wave_rows.sum())
        self._results = take("home and away", (self._num_home + route.num_rows + 1, hidden.shape[1]), hidden)
        self._results[-1].zero_()  # what a masked slot adds
        self._converts = False
        self._x = self._read_as(hidden)
        with self._watch:
            self._plan_and_pack(hidden)
        self._streams.hand_over()

    def _read_as(self, hidden: Tensor) -> Operand:
        """The inbox as Linear-1 reads it: as it is, or converted after arrival into a buffer of its own."""
        wire = self._wire
        if wire.in_place:
            return wire.tokens(self._inbox)
        if self._experts.packed and wire.dispatch_format == "mxfp8" and not reads_wide(self._device):
            return wire.mxfp8(self._inbox)
        self._converts = True
        return take_operand(self._experts, self._workspace, "tokens", (len(self._inbox), hidden.shape[1]), hidden)

    # ---- before anything is sent ----

    def _plan_and_pack(self, hidden: Tensor) -> None:
        """Tells the device where rows are and go, and fills the messages and this rank's part of the inbox."""
        messages, rank, route = self._messages, self._rank, self._route
        self._works, segments = self._plan_steps()
        words = self._wire.row_bytes // WORD_BYTES
        pairs = np.append(messages.pairs[rank].ravel(), self._own.sum())
        told_at = np.append(self._message_starts.ravel(), self._num_sent) * words
        unique = messages.unique[rank].ravel()
        lie_at = (self._message_starts + messages.heads[rank]).ravel()
        counts = [self._counts(step).sum(0) for step in self.steps]
        arrays = (segments.lengths, segments.offsets, np.concatenate(counts), pairs, told_at - begins(pairs), unique)
        told = to_device((*arrays, lie_at - begins(unique)), self._device, self._workspace, "segments")
        num_rows = int(segments.lengths.sum())
        self._told, self._goes = spell_out(told[0], told[1], num_rows)  # [2, n of all steps]
        self._tokens_per_expert = told[2].to(torch.int32)
        own = route.tokens[route.local_starts[0] :].to(torch.int32)
        said = torch.stack((torch.cat((route.places, own)), route.weights.view(torch.int32)), 1)
        self._words.index_copy_(0, spell_out(told[3], told[4], route.num_rows), said.view(torch.int64).flatten())
        self._pack(hidden, spell_out(told[5], told[6], len(route.unique)))

    def _plan_steps(self) -> tuple[dict[Step, Work], Segments]:
        """Which rows each step computes, and the segments of all of them."""
        works, lengths, firsts = {}, [], []
        row = count = 0
        for step in self.steps:
            counts, experts = self._counts(step), self._experts_of(step)
            lengths.append(counts.T.ravel())
            firsts.append(np.stack([each.T.ravel() for each in self._firsts(step, counts)]))
            num_rows = int(counts.sum())
            works[step] = Work(slice(row, row + num_rows), experts, slice(count, count + len(experts)))
            row, count = row + num_rows, count + len(experts)
        return works, Segments(np.concatenate(lengths), np.concatenate(firsts, 1))

    def _experts_of(self, step: Step) -> range:
        return self._plan.experts(self._rank, step.wave) if step.arrived else step.local

    def _counts(self, step: Step) -> Array:
        """[P + 1, experts of the step]: rows of each other rank, if the step takes what arrived; then this rank's."""
        if not step.arrived:
            return self._own_rows(step.local)[None]
        return np.concatenate((self._from_others(step.wave), self._spread(step.local, self._experts_of(step))))

    def _firsts(self, step: Step, counts: Array) -> tuple[Array, Array]:
        """Of the rows of each source and expert, like counts: the first one's word, and its row of the results."""
        words, route, wave = self._wire.row_bytes // WORD_BYTES, self._route, step.wave
        ids, first = self._experts_of(step), self._experts.ids.start
        starts = np.asarray(route.local_starts[ids.start - first : ids.stop - first], np.int64)[None]
        told, goes = self._num_sent * words + starts - route.local_starts[0], self._num_home + starts
        if step.arrived:
            arrived = counts[:-1]
            heads = self._base + self._messages.starts[self._rank, wave]  # [P]
            within = arrived.cumsum(1) - arrived
            told = np.concatenate((heads[:, None] * words + within, told))
            place = self._wave_starts[wave] + begins(arrived.ravel()).reshape(arrived.shape)
            goes = np.concatenate((place, goes))
        return told, goes

    def _pack(self, hidden: Tensor, rows: Tensor) -> None:
        """Puts every token into the inbox and into the rows [unique] of the messages that it travels in."""
        own = slice(self._base, self._base + len(hidden))
        if self._wire.dispatch_format == "mxfp8":
            count = torch.arange(len(hidden), device=self._device)
            tokens, places = torch.cat((count, self._route.unique)), torch.cat((count + self._base, rows))
            filling = Filling.at(tokens, places, len(hidden), len(self._rows))
            quantize(hidden, filling, self._wire.mxfp8(self._rows))
        else:
            as_tokens = self._wire.tokens(self._rows)
            as_tokens[own] = hidden
            as_tokens.index_copy_(0, rows, hidden.index_select(0, self._route.unique))
        self._convert(slice(0, len(hidden)))

    def _convert(self, rows: slice) -> None:
        """Rows of the inbox as Linear-1 reads them; what is said of pairs is among them, and becomes nothing."""
        arrived, num_rows, wire, x = self._inbox[rows], rows.stop - rows.start, self._wire, self._x
        if not num_rows or not self._converts:
            return
        if isinstance(x, Tensor):
            wire.decode(arrived, x[rows])
            return
        out = MXFP8(x.values[rows], x.scales[rows]) if isinstance(x, MXFP8) else Wide(x.values[rows])
        if wire.dispatch_format == "bf16":
            quantize(wire.tokens(arrived), None, out)
        else:
            assert isinstance(out, Wide)
            widen(wire.mxfp8(arrived), out)

    # ---- wave by wave ----

    def dispatch(self, wave: int) -> None:
        if wave >= self._plan.num_waves:
            return
        assert self._transport is not None
        incoming, sent = self._messages.incoming(self._rank, wave), self._messages.rows(self._rank, wave)
        first, arriving = int(self._message_starts[wave, 0]), self._arriving_rows(wave)
        going_home = self._results[self._num_home :][self._route.remote(wave)]
        with self._streams.messages():
            label = Label(self._name, "dispatch", wave)
            self._dispatches[wave] = self._transport.expect(self._inbox[arriving], incoming, label)
            self._dispatches[wave].send(self._rows[first : first + sum(sent)], sent)
            label = Label(self._name, "combine", wave)
            self._combines[wave] = self._transport.expect(going_home, self._route.sent[wave], label)

    def _arriving_rows(self, wave: int) -> slice:
        """Rows of the inbox that a wave's messages fill."""
        begin = int(self._messages.starts[self._rank, wave, 0])
        return slice(begin, begin + sum(self._messages.incoming(self._rank, wave)))

    def compute(self, step: Step) -> None:
        work = self._works[step]
        if step.arrived:
            with self._record.timing("waiting_s"):
                self._dispatches[step.wave].wait()
        # one lane for both products, which the host queues in one go
        with self._watch, self._notes.lane("linear-1", step.wave, work.rows.stop - work.rows.start):
            if step.arrived:
                self._convert(self._arriving_rows(step.wave))
            if work.rows.start < work.rows.stop:
                self._run(work)

    def _run(self, work: Work) -> None:
        said = self._words.index_select(0, self._told[work.rows]).view(torch.int32).view(-1, 2)
        places, weights = said[:, 0].contiguous(), said[:, 1].contiguous().view(torch.float32)
        counts, goes = self._tokens_per_expert[work.counts], self._goes[work.rows]
        rows = RowsByExpert(self._x, counts, places, weights, goes)
        run_experts(
            self._experts, work.experts, rows, self._results, self._workspace, oversubscription=_OVERSUBSCRIPTION
        )

    def combine(self, wave: int) -> None:
        start, num_rows = int(self._wave_starts[wave]), int(self._wave_rows[wave])
        self._streams.hand_over()
        with self._streams.messages():
            going_home = self._results[start : start + num_rows]
            self._combines[wave].send(going_home, self._messages.pairs[:, wave, self._rank].tolist())

    def reduce(self) -> Tensor:
        with self._record.timing("waiting_s"):
            for transfer in self._combines.values():
                transfer.wait()
        with self._watch, self._notes.lane("reduce", rows=self._route.num_rows):
            out = reduce_slots(self._results[self._num_home :], self._route.positions)
        with self._record.timing("waiting_s"):
            for transfer in (*self._dispatches.values(), *self._combines.values()):
                transfer.finish()
        return out
