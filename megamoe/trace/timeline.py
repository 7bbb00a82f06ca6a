"""What all ranks did, on one time axis: events by rank and lane, the share of communication that hid, the trace file.

Communication of a rank is the time in which rows for it are on their way: from the moment the first sender has begun
to send them until the last has arrived. It is hidden where the rank computes meanwhile. What is counted as compute is
the experts' work and the sum of slots; gathering rows to send is not, so the share is rather too low than too high.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megamoe.parallel.recorder import Flight, Recording
from megamoe.paths import AnyPath, path_of, write_whole

FORWARD = ("dispatch", "linear-1", "activation", "linear-2", "combine", "reduce")
BACKWARD = ("linear-2 gradient", "activation gradient", "linear-1 gradient", "weight gradient")
LANES = FORWARD + BACKWARD
COMMUNICATION = ("dispatch", "combine")
CALL = "call"  # the lane that holds the whole call

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Event:
    """A interval of one lane of one rank, in microseconds since the trace began. bytes: of the rows on the wire."""

    layer: str
    call: int
    rank: int
    lane: str
    wave: int
    begin_us: float
    end_us: float
    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a rank's communication hid, in microseconds; of several ranks, their sums."""

    total_us: float
    compute_us: float
    communication_us: float
    hidden_us: float

    @property
    def hidden_percent(self) -> float | None:
        """100 where all communication hid; None where there was none."""
        return 100 * self.hidden_us / self.communication_us if self.communication_us else None

    @staticmethod
    def of(events: Iterable[Event]) -> Share:
        """The share of one rank's events of one call."""
        intervals: dict[str, list[Interval]] = defaultdict(list)
        for event in events:
            kind = CALL if event.lane == CALL else "out" if event.lane in COMMUNICATION else "in"
            intervals[kind].append((event.begin_us, event.end_us))
        compute, communication = union(intervals["in"]), union(intervals["out"])
        hidden = intersection(compute, communication)
        return Share(*(_length(part) for part in (intervals[CALL], compute, communication, hidden)))

    @staticmethod
    def sum(shares: Sequence[Share]) -> Share:
        """Of several ranks: the longest total, everything else added."""
        added = [sum(getattr(s, name) for s in shares) for name in ("compute_us", "communication_us", "hidden_us")]
        return Share(max((s.total_us for s in shares), default=0.0), *added)


@dataclass(frozen=True, slots=True)
class Run:
    """One call of one layer on all ranks."""

    layer: str
    call: int
    events: tuple[Event, ...]

    @property
    def begin_us(self) -> float:
        return min(event.begin_us for event in self.events)

    @property
    def end_us(self) -> float:
        return max(event.end_us for event in self.events)

    @property
    def lanes(self) -> tuple[str, ...]:
        """Of a forward all, whether it had work for them or not; of a backward those that it had work for."""
        if not any(event.lane in BACKWARD for event in self.events):
            return FORWARD
        return tuple(lane for lane in LANES if any(event.lane == lane for event in self.events))

    @property
    def ranks(self) -> list[int]:
        return sorted({event.rank for event in self.events})

    def of(self, rank: int) -> list[Event]:
        return [event for event in self.events if event.rank == rank]

    def share(self, rank: int | None = None) -> Share:
        """Of one rank, or of all together."""
        if rank is not None:
            return Share.of(self.of(rank))
        return Share.sum([Share.of(self.of(each)) for each in self.ranks])


@dataclass(frozen=True, slots=True)
class Timeline:
    """hosts[r] is where rank r ran; events in no particular order."""

    hosts: dict[int, str]
    events: tuple[Event, ...]

    @classmethod
    def merge(cls, recordings: Sequence[Recording]) -> Timeline:
        """The recordings of all ranks on one axis that begins with the first event."""
        spans = [(r.rank, span) for r in recordings for span in r.spans]
        flights = [(r.rank, flight) for r in recordings for flight in r.flights]
        starts = [span.begin_ns for _, span in spans] + [flight.sent_ns for _, flight in flights if flight.sent_ns]
        zero = min(starts, default=0)
        events = [
            Event(s.layer, s.call, rank, s.lane, s.wave, (s.begin_ns - zero) / 1e3, (s.end_ns - zero) / 1e3, s.rows)
            for rank, s in spans
        ]
        return cls({r.rank: r.host for r in recordings}, (*events, *_flown(flights, zero)))

    def runs(self) -> list[Run]:
        """Calls in the order in which they began."""
        found: dict[tuple[str, int], list[Event]] = defaultdict(list)
        for event in self.events:
            found[event.layer, event.call].append(event)
        runs = [Run(layer, call, tuple(events)) for (layer, call), events in found.items()]
        return sorted(runs, key=lambda run: run.begin_us)

    def keep(self, calls: Iterable[tuple[str, int]]) -> Timeline:
        """The same axis with only some calls, by layer and number."""
        wanted = set(calls)
        return Timeline(self.hosts, tuple(e for e in self.events if (e.layer, e.call) in wanted))

    def save(self, path: AnyPath) -> None:
        """Writes the trace as Chrome and Perfetto read it: a process for each rank, a thread for each lane."""
        write_whole(path_of(path), self.text)

    @property
    def text(self) -> str:
        """What save() writes."""
        return json.dumps(self.as_chrome()) + "\n"

    def as_chrome(self) -> dict[str, Any]:
        """The trace in Chrome's JSON object format, times in microseconds; otherData has the shares that hid."""
        written: list[dict[str, Any]] = []
        for rank, host in sorted(self.hosts.items()):
            written.append(_named("process_name", rank, 0, f"rank {rank} on {host}"))
            written += [_named("thread_name", rank, lane, name) for lane, name in enumerate((CALL, *LANES))]
        for event in sorted(self.events, key=lambda event: event.begin_us):
            written.append(
                {
                    "name": event.layer if event.lane == CALL else f"wave {event.wave}",
                    "cat": event.lane,
                    "ph": "X",
                    "pid": event.rank,
                    "tid": (CALL, *LANES).index(event.lane),
                    "ts": round(event.begin_us, 3),
                    "dur": round(event.end_us - event.begin_us, 3),
                    "args": {n: getattr(event, n) for n in ("layer", "call", "wave", "rows", "bytes")},
                }
            )
        shares = [
            {"layer": run.layer, "call": run.call, "hidden_percent": run.share().hidden_percent}
            | {"hidden_percent_by_rank": {rank: run.share(rank).hidden_percent for rank in run.ranks}}
            for run in self.runs()
        ]
        hosts = {str(rank): host for rank, host in self.hosts.items()}
        return {
            "displayTimeUnit": "ms",
            "otherData": {"megamoe": {"hosts": hosts, "runs": shares}},
            "traceEvents": written,
        }

    @classmethod
    def load(cls, path: AnyPath) -> Timeline:
        """Reads what save() wrote. ValueError for a file that cannot be read or is not such a trace."""
        path = path_of(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"cannot read a trace from {path}: {said}") from error
        try:
            hosts = {int(rank): host for rank, host in found["otherData"]["megamoe"]["hosts"].items()}
            events = [_parsed(event) for event in found["traceEvents"] if event["ph"] == "X"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            lacks = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no trace that megamoe wrote: {lacks}") from error
        if not events:
            raise ValueError(f"{path} holds no event")
        return cls(hosts, tuple(events))


def _flown(flights: Sequence[tuple[int, Flight]], zero: int) -> list[Event]:
    """Flights as events of the rank that receives: from the first sender's start to the last row's arrival.

    A link serves one wave after the other, so one that was sent while an earlier one of its lane was still arriving
    begins when that one has ended.
    """
    sent = {(f.layer, f.call, f.lane, f.wave, rank): f.sent_ns for rank, f in flights if f.sent_ns}
    lane_ends: dict[tuple[str, int, str, int], float] = defaultdict(float)
    events = []
    for rank, f in sorted(flights, key=lambda item: item[1].arrived_ns):
        peers = [(f.layer, f.call, f.lane, f.wave, peer) for peer, rows in enumerate(f.received) if rows]
        senders = [sent[peer] for peer in peers if peer in sent]
        if not senders or not f.arrived_ns:
            continue
        end = (f.arrived_ns - zero) / 1e3
        begin = min(end, max((min(senders) - zero) / 1e3, lane_ends[f.layer, f.call, f.lane, rank]))
        lane_ends[f.layer, f.call, f.lane, rank] = end
        rows = sum(f.received)
        events.append(Event(f.layer, f.call, rank, f.lane, f.wave, begin, end, rows, rows * f.row_bytes))
    return events


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals in order.    [(3, 5), (1, 2), (4, 7)] -> [(1, 2), (3, 7)]"""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What two unions have in common.    [(1, 4), (6, 9)], [(2, 7)] -> [(2, 4), (6, 7)]"""
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            common.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _named(what: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": rank, "tid": lane, "args": {"name": name}}


def _parsed(event: dict[str, Any]) -> Event:
    args = event["args"]
    begin = float(event["ts"])
    return Event(
        layer=str(args["layer"]),
        call=int(args["call"]),
        rank=int(event["pid"]),
        lane=(CALL, *LANES)[int(event["tid"])],
        wave=int(args["wave"]),
        begin_us=begin,
        end_us=begin + float(event["dur"]),
        rows=int(args["rows"]),
        bytes=int(args["bytes"]),
    )
