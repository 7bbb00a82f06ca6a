"""Transports that stand in for a group's own: one notes a call's messages and plays them again, one moves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.landings import Landings
from megamoe.parallel.transport.pairs import Label, Transfer, Transport


def together(group: EPGroup) -> None:
    """Returns when all ranks have come here."""
    if group.transport is not None:
        group.transport.gather(torch.zeros(1, dtype=torch.uint8), Label("bench", "counts"))


class Replay:
    """A transport that notes everything it is asked for, so that a call's messages can be sent again without it."""

    def __init__(self, transport: Transport | None) -> None:
        self._transport = transport
        self.early = transport is not None and transport.early
        self.pages: list[Tensor] = []
        self.arrived: list[Tensor] = []  # rows of each transfer, once it was waited for
        self._events: list[tuple[str, int, tuple[Any, ...]]] = []
        self._num_transfers = 0

    def gather(self, page: Tensor, label: Label) -> Tensor:
        assert self._transport is not None
        self._events.append(("gather", 0, (page, label)))
        self.pages.append(self._transport.gather(page, label))
        return self.pages[-1]

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label, *among: Sequence[int]) -> Transfer:
        """among: for pairs, which take it"""
        assert self._transport is not None
        number, opened = self._num_transfers, self._transport.expect(receive, counts, label, *among)
        self.arrived.append(receive[:0])
        transfer = _ReplayedTransfer(opened, number, self._events, lambda: self._note(number, receive, label))
        # a buffer of its own: the one of the call belongs to the call
        self._events.append(("expect", self._num_transfers, (torch.zeros_like(receive), counts, label, *among)))
        self._num_transfers += 1
        return transfer

    def _note(self, number: int, receive: Tensor, label: Label) -> None:
        """What has arrived, for a transport that answers with it: of what came home nothing but sums depends."""
        if label.phase == "dispatch":
            self.arrived[number] = receive.clone()

    def nodes(self, layer: str) -> tuple[int, ...]:
        """As the transport's; one that knows nothing of hosts has none."""
        found: tuple[int, ...] = getattr(self._transport, "nodes", lambda _: ())(layer)
        return found

    def landings(self, layer: str) -> Landings:
        """The transport's. Their words are not noted: eight bytes a message are sent once, and not again."""
        assert isinstance(self._transport, HostTransport)
        return self._transport.landings(layer)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def note(self, work: Callable[[], object]) -> None:
        """Does it, now and in every replay."""
        work()
        self._events.append(("do", 0, (work,)))

    def replay(self) -> None:
        """Sends and receives once more what was noted, in the same order, waiting where the call waited."""
        transfers: dict[int, Transfer] = {}
        for action, number, arguments in self._events:
            if self._transport is None:
                return
            if action == "gather":
                self._transport.gather(*arguments)
            elif action == "do":
                arguments[0]()
            elif action == "expect":
                transfers[number] = self._transport.expect(*arguments)
            else:
                getattr(transfers[number], action)(*arguments)


class _ReplayedTransfer:
    def __init__(
        self, transfer: Transfer, number: int, events: list[tuple[str, int, tuple[Any, ...]]], note: Callable[[], None]
    ) -> None:
        self._transfer, self._number, self._events, self._note = transfer, number, events, note

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        self._events.append(("send", self._number, (rows.clone(), counts, starts)))
        self._transfer.send(rows, counts, starts)

    def wait(self) -> None:
        self._events.append(("wait", self._number, ()))
        self._transfer.wait()
        self._note()

    def finish(self) -> None:
        self._events.append(("finish", self._number, ()))
        self._transfer.finish()


class StillTransport:
    """A transport that moves nothing and answers as a taped step was answered: what the layer computes alone.

    The rows of a call that is the only one of its step are in the group's workspace still, from the last call that had
    a transport. Where a step has several calls (copies), each wait for dispatched rows copies what had arrived.
    """

    early = False

    def __init__(self, replay: Replay, *, copies: bool = False) -> None:
        self._replay, self._copies = replay, copies
        self._num_pages = self._num_transfers = 0

    def gather(self, page: Tensor, label: Label) -> Tensor:
        del page, label
        self._num_pages += 1
        return self._replay.pages[(self._num_pages - 1) % len(self._replay.pages)]

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        del counts, label
        number = self._num_transfers % len(self._replay.arrived)
        self._num_transfers += 1
        return NoTransfer(receive, self._replay.arrived[number] if self._copies else receive[:0])

    def nodes(self, layer: str) -> tuple[int, ...]:
        return self._replay.nodes(layer)

    def landings(self, layer: str) -> Landings:
        return _StillLandings(self._replay.landings(layer))

    def abort(self) -> None: ...


class _StillLandings(Landings):
    """The memory of this host's ranks, where all has landed already."""

    def __init__(self, landings: Landings) -> None:
        self.rows = landings.rows  # type: ignore[method-assign]

    def expect(self, wave: int, senders: list[int]) -> None: ...

    def send(self, wave: int, receivers: list[int]) -> None: ...

    def wait(self, wave: int, sender: int, lander: int) -> None: ...

    def finish(self) -> None: ...


class NoTransfer:
    def __init__(self, receive: Tensor, arrived: Tensor) -> None:
        self._receive, self._arrived = receive, arrived

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None: ...

    def wait(self) -> None:
        self._receive[: len(self._arrived)] = self._arrived

    def finish(self) -> None: ...
