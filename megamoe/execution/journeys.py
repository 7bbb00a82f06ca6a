"""What a call of the layer is in either direction: messages of tokens go out, results come home; and what it did."""

# P ranks   n rows   B bytes of a row

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from torch import Tensor

from megamoe.execution.fetching import Fetching
from megamoe.parallel.group import EPGroup
from megamoe.parallel.recorder import Notes
from megamoe.parallel.streams import Streams
from megamoe.parallel.transport.pairs import Label, Transfer
from megamoe.routing.agreement import Agreement
from megamoe.routing.messages import Messages
from megamoe.routing.row_plan import RowPlan
from megamoe.routing.waves import WavePlan


@dataclass(slots=True)
class CallRecord:
    """What one call of the layer did on this rank. Seconds are host time; bytes are those that left this rank.

    tokens, waves     this rank's tokens, and the waves of the call
    rows_local        (token, expert) pairs of this rank's tokens and experts
    rows_sent         pairs of its tokens and other ranks' experts
    rows_received     pairs of other ranks' tokens and its experts
    dispatch_bytes    sent with tokens, combine_bytes with results; far_bytes those of both for ranks that it shares no
                      memory with
    tokens_fetched    tokens from other hosts that it read from a rank of its own host, on which they landed
    counts_s          the exchange of counts that opens the call
    compute_s         its products and all else that a rank computes; waiting_s its waits, total_s the whole call
    small             all ranks brought few tokens, so that one exchange carried them, and there was one wave: see
                      small_call.py

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
class CallParts:
    """What a call needs of its layer, and what the ranks agreed on."""

    name: str
    group: EPGroup
    plan: WavePlan
    messages: Messages
    agreed: Agreement
    notes: Notes


class Journeys:
    """Rows of a call on their way, wave by wave. A rank alone has no transport: nothing is sent, nothing arrives.

    Before anything is sent, whoever derives from it lays out the row plan and two buffers, by rows:
    _rows    messages that go out, and the inbox        _results    what goes home, and what comes home
    """

    _plan: RowPlan
    _rows: Tensor
    _results: Tensor
    _fetching: Fetching | None = None

    def __init__(self, parts: CallParts, record: CallRecord, streams: Streams) -> None:
        self._name, self._rank, self._messages = parts.name, parts.group.rank, parts.messages
        self._transport, self._notes = parts.group.watched(parts.notes), parts.notes
        self._streams, self._record = streams, record
        self._dispatches: dict[int, Transfer] = {}
        self._combines: dict[int, Transfer] = {}

    def dispatch(self, wave: int) -> None:
        """Sends this rank's messages of the wave, and opens the way for what comes in and for what will come home."""
        if self._transport is None or wave >= len(self._plan.sent):
            return
        plan, messages = self._plan, self._messages
        with self._streams.messages():
            incoming = messages.incoming(self._rank, wave)
            arriving = self._rows[plan.arriving[wave]]
            self._dispatches[wave] = self._transport.expect(arriving, incoming, Label(self._name, "dispatch", wave))
            if self._fetching is not None:
                self._fetching.expect(wave)
        self._pack_wave(wave)
        with self._streams.messages():
            rows, starts = messages.rows(self._rank, wave), plan.inboxes[wave].tolist()
            self._dispatches[wave].send(self._rows[plan.sent[wave]], rows, starts)
            if self._fetching is not None:
                self._fetching.send(wave)
            coming_home, sent = self._results[plan.coming_home[wave]], messages.pairs[self._rank, wave].tolist()
            self._combines[wave] = self._transport.expect(coming_home, sent, Label(self._name, "combine", wave))

    def _pack_wave(self, wave: int) -> None:
        """Encodes the wave's messages, where they are not by now."""
        raise NotImplementedError

    def combine(self, wave: int) -> None:
        """Sends the wave's results home, from where they stay until the call has ended."""
        if self._transport is None:
            return
        self._streams.hand_over()
        with self._streams.messages():
            rows, starts = self._messages.pairs[:, wave, self._rank].tolist(), self._plan.homes[wave].tolist()
            self._combines[wave].send(self._results[self._plan.going_home[wave]], rows, starts)

    def _wait_home(self) -> None:
        """Returns when all results are home."""
        with self._record.timing("waiting_s"):
            for transfer in self._combines.values():
                transfer.wait()

    def _finish(self) -> None:
        """Returns when what this rank sent has left."""
        with self._record.timing("waiting_s"):
            for transfer in (*self._dispatches.values(), *self._combines.values()):
                transfer.finish()
            if self._fetching is not None:
                self._fetching.finish()

    def _note(self, parts: CallParts, num_tokens: int, num_rows: int, num_own: int, row_bytes: tuple[int, int]) -> None:
        """Notes how much moves: of this rank's num_rows rows num_own stay; bytes of a row on its way out and home."""
        record, plan, messages, rank, far = self._record, self._plan, self._messages, self._rank, parts.group.far
        record.tokens, record.waves, record.rows_local = num_tokens, parts.plan.num_waves, num_own
        record.rows_sent, record.rows_received = num_rows - num_own, plan.going_home[-1].stop
        record.dispatch_bytes = plan.sent[-1].stop * row_bytes[0]
        record.combine_bytes = record.rows_received * row_bytes[1]
        record.far_bytes = int((messages.heads + messages.unique)[rank][:, far].sum()) * row_bytes[0]
        record.far_bytes += int(messages.pairs[far, :, rank].sum()) * row_bytes[1]
        record.tokens_fetched = int(messages.fetched[:, :, rank].sum())
