"""Calls of few tokens taken apart: transports that stand in for the group's own in calls without waves.

Such a call exchanges pages with what lies behind them, and results: one stand-in notes both and does them again, the
other has every page there already and waits for nobody.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from megamoe.launch.bench.replay import NoTransfer, Replay, StillTransport
from megamoe.parallel.group import EPGroup
from megamoe.parallel.symmetric import PLACE_BYTES, Place
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label, Transfer, Transport
from megamoe.routing.agreement import PAGE_TERMS


@contextmanager
def own_core(group: EPGroup) -> Iterator[None]:
    """Keeps this thread on a core of its own for the block, where a rank has one thread and there are cores enough.

    Ranks whose calls take less than a millisecond and wait in between are left on one core by Linux for tens of calls,
    where they find themselves on one, beside cores that are idle: they then take twice as long.
    """
    if sys.platform != "linux":
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    if not 1 < group.size <= len(cores) or torch.get_num_threads() > 1:
        yield
        return
    os.sched_setaffinity(0, {cores[group.rank]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def stand_ins(
    transport: Transport | None, *, small: bool, copies: bool = False
) -> tuple[Replay | SmallReplay | None, StillTransport | SmallStill | None]:
    """What notes a call's messages and what answers with them; of a rank alone neither. copies: see StillTransport."""
    if transport is None:
        return None, None
    if small:
        assert isinstance(transport, HostTransport)
        noted = SmallReplay(transport)
        return noted, SmallStill(transport, noted)
    replay = Replay(transport)
    return replay, StillTransport(replay, copies=copies)


class SmallReplay(HostTransport):
    """A transport that notes the exchanges of a call without waves, so that they can be made again without the call."""

    def __init__(self, transport: HostTransport) -> None:
        super().__init__(transport.pairs, transport.host, transport.sharing)
        self._transport, self._places = transport, list[Place]()
        self.pages: list[Place] = []  # copies of all ranks', of the call, with what lay behind them
        self.pairs = self._noted = Replay(transport.pairs)  # type: ignore[arg-type, assignment]

    def place(self, label: Label) -> Place:
        return self._transport.place(label)

    def share(self, label: Label, num_bytes: int) -> list[Place]:
        self._noted.note(partial(self._exchange, label, num_bytes))
        self.pages = [Place.of(torch.frombuffer(bytearray(place.view), dtype=torch.uint8)) for place in self._places]
        return self._places

    def _exchange(self, label: Label, num_bytes: int) -> None:
        """What was written to this rank's place, or in a replay whatever is there, which nobody reads."""
        self._transport.place(label)
        self._places = self._transport.share(label, num_bytes)

    def signal(self, region: str, peers: Sequence[int]) -> None:
        self._noted.note(partial(self._transport.signal, region, list(peers)))

    def await_signal(self, region: str, peer: int, label: Label) -> None:
        self._noted.note(partial(self._transport.await_signal, region, peer, label))

    def replay(self) -> None:
        """Both exchanges once more, with as many bytes, in the order of the call."""
        self._noted.replay()


class SmallStill(HostTransport):
    """A transport that moves nothing: other ranks' slots and tokens are there already, and so are their results.

    replay: has noted a call like those that are to come. Results are what lies where they would have come to.
    """

    def __init__(self, transport: HostTransport, replay: SmallReplay) -> None:
        super().__init__(transport.pairs, transport.host, transport.sharing)
        self.pairs = _NoPairs()  # type: ignore[assignment]
        self._replay, self._places = replay, list[Place]()
        self._own = Place.of(torch.zeros(PLACE_BYTES, dtype=torch.uint8))

    def place(self, label: Label) -> Place:
        del label
        return self._own

    def share(self, label: Label, num_bytes: int) -> list[Place]:
        """Pages say what this rank's says but for the tokens that each brings, as calls of this layer would."""
        del label, num_bytes
        if not self._places:
            self._places = [self._own if rank == self.rank else page for rank, page in enumerate(self._replay.pages)]
        terms = self._own.view[PAGE_TERMS]
        for place in self._places:
            place.view[PAGE_TERMS] = terms
        return self._places

    def signal(self, region: str, peers: Sequence[int]) -> None: ...

    def await_signal(self, region: str, peer: int, label: Label) -> None: ...


class _NoPairs:
    """Pairs over which nothing travels."""

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label, among: Sequence[int]) -> Transfer:
        del counts, label, among
        return NoTransfer(receive, receive[:0])
