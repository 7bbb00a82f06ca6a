"""A transport that notes when each transfer is sent and when it has arrived."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megamoe.parallel.recorder import Arrival, CallNotes, Flight, now_ns
from megamoe.parallel.transport import Label, Transfer, Transport


class WatchedTransport:
    """Wraps a transport for one call. While watched, the deadline of a transfer runs from its opening."""

    def __init__(self, transport: Transport, notes: CallNotes) -> None:
        self._transport, self._notes = transport, notes
        self.early = transport.early

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        """As the wrapped transport does, and opens a note in the lane of the label's phase."""
        row_bytes = receive[:1].numel() * receive.element_size()
        flight = self._notes.flight(label.phase, label.wave or 0, tuple(counts), row_bytes)
        transfer = _WatchedTransfer(self._transport.expect(receive, counts, label), self._notes, flight)
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
    def __init__(self, transfer: Transfer, notes: CallNotes, flight: Flight) -> None:
        self._transfer, self._notes, self._flight = transfer, notes, flight
        self._arrival: Arrival | None = None

    def watch(self) -> None:
        self._arrival = self._notes.recorder.watch(self._flight, self._transfer.wait)

    def send(self, rows: Tensor, counts: Sequence[int]) -> None:
        self._flight.sent_ns = now_ns()
        self._transfer.send(rows, counts)
        if self._arrival is None:
            self.watch()

    def wait(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.result()

    def finish(self) -> None:
        self._transfer.finish()
