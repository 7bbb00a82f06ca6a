"""Where every row of a call lies, and where it goes: it follows from the counts, and is the same on every device.

A call has two buffers. `rows` holds what travels, in rows of the wire:
    messages that this rank sends, by wave and receiver
    pair records of this rank's own rows, as a message has them
    the inbox: this rank's own tokens, then by wave the messages that arrive, by sender, and the tokens that are fetched
`results` holds what the experts compute, [., H] bfloat16:
    results that go home, by wave, receiver and expert
    this rank's own slots as permutation.Route orders them: results that come home, then those that never left
    a row of zeros, which masked slots add
A step reads each row's pair record at its source and writes the row's result to its destination: nothing is gathered
for the experts and nothing is put back in order after them.
"""

# P ranks   W waves   e experts of this rank   J segments

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from megamoe.routing.messages import Array, Messages
from megamoe.routing.segments import Segments, exclusive_sum
from megamoe.routing.waves import WavePlan
from megamoe.routing.wire import Wire
from megamoe.schedule.schedule import Step


@dataclass(frozen=True, slots=True)
class StepRows:
    """What a step computes.

    rows      its rows among those of all steps
    experts   global ids, and counts [experts] int64: rows of each
    places    of its experts among those of all steps
    """

    rows: slice
    experts: range
    counts: Array
    places: slice


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Where the rows of one call lie and go, on one rank. Slices of waves are [W].

    own           rows of the buffer that hold this rank's own tokens, where the inbox begins
    num_rows      rows of the buffer
    sent          rows of the buffer that each wave sends, arriving: rows that it fills, and right behind them fetching:
                  rows that are fetched from other ranks of the host
    num_results   rows of the results, and reduced: those that slots are summed from
    going_home    results that each wave sends home, and coming_home: those that come home in it
    records       pair records, 8 bytes each, of this rank's rows in the order of Route
    fetch_records where in the messages this rank says what is to be fetched, 8 bytes each, in the order of Route
    to_fetch      [W, P] int64: where each other rank's message says so to this one
    inbox_starts  [P] int64: row of each rank's buffer where its inbox begins
    unique        rows of the buffer that unique tokens fill in messages, by wave and receiver
    computed      [2, J] of the rows of all steps, by step, expert and source: their pair records, and their results
    inboxes       [W, P] int64: row of each other rank's buffer where the message that it gets from this one begins
    homes         [W, P] int64: row of its results where those begin that this rank sends home to it
    steps         rows of each step
    """

    own: slice
    num_rows: int
    sent: list[slice]
    arriving: list[slice]
    fetching: list[slice]
    num_results: int
    reduced: slice
    going_home: list[slice]
    coming_home: list[slice]
    records: Segments
    fetch_records: Segments
    to_fetch: Array
    inbox_starts: Array
    unique: Segments
    computed: Segments
    inboxes: Array
    homes: Array
    steps: list[StepRows]

    def incoming(self, wave: int) -> slice:
        """Rows that a wave's messages and what is fetched in it fill."""
        return slice(self.arriving[wave].start, self.fetching[wave].stop)

    def messages(self, wave: int) -> list[tuple[slice, slice]]:
        """Of each message of the wave with unique tokens: which of Route.unique they are, and the rows they fill."""
        size = len(self.unique.lengths) // len(self.sent)
        of_wave = slice(wave * size, (wave + 1) * size)
        columns = (exclusive_sum(self.unique.lengths), self.unique.firsts, self.unique.lengths)
        each = zip(*(column[of_wave].tolist() for column in columns), strict=True)
        return [(slice(start, start + num), slice(row, row + num)) for start, row, num in each if num]


@dataclass(frozen=True, slots=True)
class RankRows:
    """Rows that this rank's experts compute: own [e] int64 of its own, arriving [P, e] of the others, 0 of its own."""

    ids: range
    own: Array
    arriving: Array

    @classmethod
    def of(cls, counts: Array, ep_rank: int, ids: range) -> RankRows:
        """counts [P, E] int64: rows of every rank for every expert."""
        arriving = counts[:, ids.start : ids.stop].copy()
        own = arriving[ep_rank].copy()
        arriving[ep_rank] = 0
        return cls(ids, own, arriving)


def plan_rows(
    plan: WavePlan, ep_rank: int, steps: Sequence[Step], rows: RankRows, messages: Messages, wire: Wire, num_tokens: int
) -> RowPlan:
    """num_tokens: T of this rank."""
    heads, unique, pairs = messages.heads[ep_rank], messages.unique[ep_rank], messages.pairs[ep_rank]  # [W, P]
    sizes, home = heads + unique, messages.pairs[:, :, ep_rank].T  # [W, P]
    message_at, home_at = (exclusive_sum(each.ravel()).reshape(each.shape) for each in (sizes, home))
    sent = _slices(sizes.sum(1).tolist(), 0)
    num_own, records_at = int(rows.own.sum()), sent[-1].stop
    inbox = records_at + -(-wire.PAIR_BYTES * num_own // wire.row_bytes)
    arriving, fetching = _incoming(messages, ep_rank, inbox)
    inbox_starts = _inboxes(messages, wire)
    going_home = _slices(home.sum(1).tolist(), 0)
    coming_home = _slices(pairs.sum(1).tolist(), going_home[-1].stop)

    words = wire.row_bytes // wire.PAIR_BYTES  # pair records that a row has room for
    wave, first = _waves_of(plan, ep_rank)
    before = np.zeros((len(rows.arriving), len(rows.ids) + 1), np.int64)
    np.cumsum(rows.arriving, 1, out=before[:, 1:])
    within = (before[:, :-1] - before[:, first]).T  # [e, P]: rows of the same message for the experts before
    own_at = exclusive_sum(rows.own)
    firsts = np.empty((2, len(rows.ids), len(rows.arriving) + 1), np.int64)  # the rank itself is the last source
    firsts[0, :, :-1] = (inbox + messages.starts[ep_rank, wave]) * words + within
    firsts[1, :, :-1] = home_at[wave] + within
    firsts[0, :, -1], firsts[1, :, -1] = records_at * words + own_at, coming_home[-1].stop + own_at
    lengths = np.concatenate((rows.arriving, rows.own[None])).T  # [e, P + 1]
    computed = Segments(lengths.ravel(), firsts.reshape(2, -1))
    if len(steps) > plan.num_waves:  # else a step is a wave, and experts are in order
        order = _steps_of(steps, wave, lengths.shape, rows.ids.start).ravel().argsort(kind="stable")
        computed = Segments(computed.lengths[order], computed.firsts[:, order])

    num_results = coming_home[-1].stop + num_own + 1
    return RowPlan(
        own=slice(inbox, inbox + num_tokens),
        num_rows=fetching[-1].stop,
        sent=sent,
        arriving=arriving,
        fetching=fetching,
        num_results=num_results,
        reduced=slice(going_home[-1].stop, num_results),
        going_home=going_home,
        coming_home=coming_home,
        records=Segments(np.append(pairs, num_own), np.append(message_at, records_at) * words),
        fetch_records=Segments(messages.fetched[ep_rank].ravel(), (message_at * words + pairs).ravel()),
        to_fetch=(inbox + messages.starts[ep_rank]) * words + messages.pairs[:, :, ep_rank].T,
        inbox_starts=inbox_starts,
        unique=Segments(unique.ravel(), (message_at + heads).ravel()),
        computed=computed,
        inboxes=(inbox_starts[:, None] + messages.starts[:, :, ep_rank]).T,
        homes=_homes(messages)[:, :, ep_rank].T,
        steps=_step_rows(plan, ep_rank, steps, rows),
    )


def _incoming(messages: Messages, ep_rank: int, inbox: int) -> tuple[list[slice], list[slice]]:
    """Rows of the buffer that each wave's messages fill, and those that are fetched in it."""
    begins = (inbox + messages.starts[ep_rank, :, 0]).tolist()
    rows, fetched = (
        (each[:, :, ep_rank].sum(0)).tolist() for each in (messages.heads + messages.unique, messages.fetched)
    )
    ends = [begin + num for begin, num in zip(begins, rows, strict=True)]
    arriving = [slice(begin, end) for begin, end in zip(begins, ends, strict=True)]
    return arriving, [slice(end, end + num) for end, num in zip(ends, fetched, strict=True)]


def _inboxes(messages: Messages, wire: Wire) -> Array:
    """[P] int64: row of each rank's buffer where its inbox begins."""
    records: Array = -(-wire.PAIR_BYTES * messages.own // wire.row_bytes)
    starts: Array = (messages.heads + messages.unique).sum((1, 2)) + records
    return starts


def _homes(messages: Messages) -> Array:
    """[home, W, rank] int64: row of the home rank's results where those begin that a rank sends it in a wave."""
    leaving = messages.pairs.sum((0, 1))  # [P] results that go home from each rank, which come first in its buffer
    by_home = messages.pairs.reshape(len(leaving), -1)
    starts: Array = (by_home.cumsum(1) - by_home + leaving[:, None]).reshape(messages.pairs.shape)
    return starts


def _slices(lengths: list[int], start: int) -> list[slice]:
    """Consecutive slices of these lengths.    [2, 3], 10  ->  10:12, 12:15"""
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=start))]


@lru_cache(maxsize=64)
def _waves_of(plan: WavePlan, ep_rank: int) -> tuple[Array, Array]:
    """The wave of each expert of the rank, and the first expert of that wave, both [e]; experts count from 0."""
    bounds = np.asarray(plan.bounds[ep_rank]) - plan.bounds[ep_rank][0]
    wave = np.repeat(np.arange(plan.num_waves), np.diff(bounds))
    return wave, bounds[wave]


def _steps_of(steps: Sequence[Step], wave: Array, shape: tuple[int, ...], first: int) -> Array:
    """Which step computes the rows of each expert and source, in the order of steps: [e, P + 1]"""
    arrived, own = np.zeros(len(steps), np.int64), np.zeros(shape[0], np.int64)  # no more waves than steps
    for number, step in enumerate(steps):
        own[step.local.start - first : step.local.stop - first] = number
        if step.arrived:
            arrived[step.wave] = number
    found = np.empty(shape, np.int64)
    found[:, :-1], found[:, -1] = arrived[wave][:, None], own
    return found


def _step_rows(plan: WavePlan, ep_rank: int, steps: Sequence[Step], rows: RankRows) -> list[StepRows]:
    arriving, first = rows.arriving.sum(0), rows.ids.start
    found: list[StepRows] = []
    begin = place = 0
    for step in steps:
        own = rows.own[step.local.start - first : step.local.stop - first]
        experts, counts = step.local, own
        if step.arrived:
            experts = plan.experts(ep_rank, step.wave)
            counts = arriving[experts.start - first : experts.stop - first].copy()
            counts[step.local.start - experts.start : step.local.stop - experts.start] += own
        end = begin + int(counts.sum())
        found.append(StepRows(slice(begin, end), experts, counts, slice(place, place + len(experts))))
        begin, place = end, place + len(experts)
    return found
