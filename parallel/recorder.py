"""What happened when, on one rank: intervals of work and flights of rows, noted while a recorder is in place.

Notes are of host time, in nanoseconds since the epoch: ranks of one machine share a clock, those of several are as
close as their clocks. Nothing here knows what a lane means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from megamoe.parallel.health.status import OwnStatus
from megamoe.parallel.health.waiter import Wait, Waiter


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of this rank's own work. `lane` says of what kind; rows is how many it handled."""

    layer: str
    call: int
    lane: str
    wave: int
    begin_ns: int
    end_ns: int
    rows: int


@dataclass(slots=True)
class Flight:
    """Rows on their way to this rank and from it, in one transfer. A time is 0 where it was never reached.

    received[r]   rows that come from each rank
    row_bytes     bytes of one such row
    sent_ns       when this rank began to send its own part
    arrived_ns    when the last row for this rank was there
    """

    layer: str
    call: int
    lane: str
    wave: int
    received: tuple[int, ...]
    row_bytes: int
    sent_ns: int = 0
    arrived_ns: int = 0


@dataclass(slots=True)
class Recording:
    """What one rank noted."""

    rank: int
    host: str
    spans: list[Span] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)


class Notes:
    """Where one call notes what it does. The plain one notes where the rank is, and nothing of the past.

    open_range: makes a block of work a range of that name, which a profiler of the device shows; None without one.
    """

    _NOTHING = nullcontext()
    recorder: Recorder | None = None

    def __init__(
        self, own_status: OwnStatus, open_range: Callable[[str], AbstractContextManager[None]] | None = None
    ) -> None:
        self._own_status, self._open_range = own_status, open_range

    @contextmanager
    def waiting(self, phase: str, wave: int | None) -> Iterator[None]:
        """A block that waits for what another thread watches, and knows from whom it comes."""
        begun = time.monotonic()
        self._own_status.wait(phase, wave, None)
        yield
        self._own_status.arrived(phase, wave, time.monotonic() - begun)

    def work(self, lane: str, wave: int | None = None) -> None:
        """Work begins; its end is known elsewhere."""
        self._own_status.work(lane, wave)

    def lane(self, lane: str, wave: int | None = None, rows: int = 0) -> AbstractContextManager[None]:
        """A block of work."""
        del rows
        self._own_status.work(lane, wave)
        if self._open_range is None:
            return self._NOTHING
        return self._open_range(f"megamoe {lane}" if wave is None else f"megamoe {lane}, wave {wave}")


class CallNotes(Notes):
    """Notes of one call into a recording."""

    def __init__(self, recorder: Recorder, layer: str, call: int, own_status: OwnStatus) -> None:
        super().__init__(own_status)
        self.recorder, self._layer, self._call = recorder, layer, call

    @contextmanager
    def lane(self, lane: str, wave: int | None = None, rows: int = 0) -> Iterator[None]:
        self._own_status.work(lane, wave)
        begun = now_ns()
        yield
        self.span(lane, wave or 0, begun, now_ns(), rows)

    def span(self, lane: str, wave: int, begin_ns: int, end_ns: int, rows: int) -> None:
        """Notes an interval of work that has ended."""
        self.recorder.recording.spans.append(Span(self._layer, self._call, lane, wave, begin_ns, end_ns, rows))

    recorder: Recorder

    def flight(self, lane: str, wave: int, received: tuple[int, ...], row_bytes: int) -> Flight:
        """Opens the note of a transfer."""
        flight = Flight(self._layer, self._call, lane, wave, received, row_bytes)
        self.recorder.recording.flights.append(flight)
        return flight


class Recorder:
    """Takes notes until stop().

    Transfers cannot be asked whether they have arrived, only waited for: a thread for each lane does that, in the
    order in which the transfers were opened, and sleeps meanwhile.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._watchers: dict[str, Waiter] = {}

    def call(self, layer: str, call: int, own_status: OwnStatus) -> CallNotes:
        """Notes for one call of a layer."""
        return CallNotes(self, layer, call, own_status)

    def watch(self, flight: Flight, wait: Callable[[], None]) -> Wait:
        """Has a thread wait for the flight's rows and note when they are there."""

        def arrive() -> None:
            wait()
            flight.arrived_ns = now_ns()

        if flight.lane not in self._watchers:
            self._watchers[flight.lane] = Waiter(f"megamoe {flight.lane} watcher")
        return self._watchers[flight.lane].begin(arrive)

    def stop(self) -> None:
        """Lets the watchers go; they end when what they wait for has come or failed."""
        self._watchers.clear()


_EPOCH_NS = time.time_ns() - time.perf_counter_ns()


def now_ns() -> int:
    """Nanoseconds since the epoch, by a clock that never steps back."""
    return _EPOCH_NS + time.perf_counter_ns()
