"""A transport that notes when each transfer is sent and when it has arrived."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from megamoe.parallel.errors import PeerError
from megamoe.parallel.health.waiter import Wait
from megamoe.parallel.recorder import CallNotes, Flight, now_ns
from megamoe.parallel.transport.host import HostTransfer, HostTransport
from megamoe.parallel.transport.pairs import Label, PairTransfer, PairTransport, Transfer, Transport

_PATIENCE_S = 24 * 3600.0  # of a watcher, whose call keeps the deadline


class WatchedTransport:
    """Wraps a transport for one call.

    A transfer of pairs is watched from its opening on, and the call's deadline counts while the call waits for it: a
    rank that computes for longer than the deadline is not kept waiting by anyone.
    """

    def __init__(self, transport: Transport, notes: CallNotes) -> None:
        self._transport, self._notes = transport, notes
        self.early = transport.early

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        """As the wrapped transport does, and opens a note in the lane of the label's phase."""
        row_bytes = receive[:1].numel() * receive.element_size()
        flight = self._notes.flight(label.phase, label.wave or 0, tuple(counts), row_bytes)
        watched = self._transport.expect(receive, counts, label)
        transfer = _WatchedTransfer(self._transport, label, watched, self._notes, flight)
        if self.early:
            transfer.watch()
        return transfer

    def abort(self) -> None:
        """As the wrapped transport does."""
        self._transport.abort()

    def gather(self, page: Tensor, label: Label) -> Tensor:
        """As the wrapped transport does; noted nowhere."""
        return self._transport.gather(page, label)


class _WatchedTransfer:
    def __init__(
        self, transport: Transport, label: Label, transfer: Transfer, notes: CallNotes, flight: Flight
    ) -> None:
        self._transport, self._label, self._transfer = transport, label, transfer
        self._notes, self._flight = notes, flight
        self._arrival: Wait | None = None

    def watch(self) -> None:
        transfer = self._transfer
        # a collective keeps the group's deadline, whoever waits for it
        wait = transfer.wait
        if isinstance(transfer, PairTransfer | HostTransfer):
            wait = partial(transfer.wait, _PATIENCE_S)
        self._arrival = self._notes.recorder.watch(self._flight, wait)

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        self._flight.sent_ns = now_ns()
        self._transfer.send(rows, counts, starts)
        if self._arrival is None:
            self.watch()

    def wait(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            with self._notes.waiting(self._label.phase, self._label.wave):
                self._take(arrival)

    def _take(self, arrival: Wait) -> None:
        """Where the rows do not come in time the watcher's wait is broken off, which has it say whom it waited for."""
        begun, transport = time.monotonic(), self._transport
        late = isinstance(transport, PairTransport | HostTransport) and not arrival.within(transport.clock.left_s())
        if late:
            transport.abort()
        try:
            arrival.result()
        except PeerError as error:
            if late:
                error.waited_s, error.reason = time.monotonic() - begun, "its rows did not come in time"
            raise

    def finish(self) -> None:
        self._transfer.finish()
