"""Recording any run of the layer: what happened when on every rank, and how much communication hid under compute.

with record(layer.group) as trace:      # on every rank
    layer(hidden, ids, weights)
timeline = trace.gather()               # on every rank; all get the whole picture
print(timeline.runs()[0].share().hidden_percent)
timeline.save(Path("trace.json"))       # opens in Perfetto and in `megamoe timeline`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from megamoe.parallel.group import EPGroup
from megamoe.parallel.recorder import Flight, Recording, Span
from megamoe.parallel.transport.pairs import Label, Transport
from megamoe.trace.timeline import Timeline

_WHAT = "trace"


@dataclass(frozen=True, slots=True)
class Trace:
    """This rank's recording so far."""

    group: EPGroup
    recording: Recording

    def gather(self) -> Timeline:
        """All ranks' recordings on one time axis. Every rank must call.

        PeerError where one does not answer, CallRefusedError where one has called something else.
        """
        if self.group.transport is None:
            return Timeline.merge([self.recording])
        with self.group.turn(_WHAT, torch.device("cpu")), self.group.unbroken(_WHAT, 0):
            return self._gather(self.group.transport)

    def _gather(self, transport: Transport) -> Timeline:
        page = torch.frombuffer(bytearray(_packed(self.recording)), dtype=torch.uint8)
        size = torch.tensor([len(page)]).view(torch.uint8)
        sizes = transport.gather(size, Label(_WHAT, "trace")).view(torch.int64).flatten().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(page)] = page
        pages = transport.gather(padded, Label(_WHAT, "trace"))
        return Timeline.merge([_unpacked(bytes(p[:n].tolist())) for p, n in zip(pages, sizes, strict=True)])


@contextmanager
def record(group: EPGroup) -> Iterator[Trace]:
    """Notes what the group's layers do in the block, on this rank, and nothing outside it.

    It costs one to two per cent of a call's time, measured: the README says how. While recorded, the deadline of a
    transfer runs from its opening, up to two waves before it is waited for. RuntimeError where the group is being
    recorded already. A layer on a GPU or NPU refuses a recorded call with a ValueError: what is noted is host time.
    """
    trace = Trace(group, Recording(group.rank, group.host))
    with group.record(trace.recording):
        yield trace


def _packed(recording: Recording) -> bytes:
    return json.dumps(asdict(recording)).encode()


def _unpacked(raw: bytes) -> Recording:
    found = json.loads(raw)
    flights = [Flight(**{**flight, "received": tuple(flight["received"])}) for flight in found["flights"]]
    return Recording(found["rank"], found["host"], [Span(**span) for span in found["spans"]], flights)
