"""What has landed at the ranks of this host from other hosts, told without any of them doing anything for it.

With node-limited dispatch a rank reads tokens from the memory of another rank of its host, whose sockets they came
through. Only the receiving rank could be told by gloo that they are there, and it may be computing. So the sender sends
a word behind each message: the number of the exchange, which gloo's thread puts into the receiver's segment, and which
every rank of that host can see there.

That the word comes last rests on the order in which things are posted: the receiver posts the message's receive before
the word's, the sender its send before the word's, and all that passes between two ranks goes through one connection of
gloo in that order, each piece read by a system call of its own (gloo/transport/tcp/pair.cc: one queue of a pair; a
receive is announced when it is posted, and a send goes out when both are there).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megamoe.parallel.symmetric import REGIONS
from megamoe.parallel.transport.pairs import Label, PairTransfer

if TYPE_CHECKING:
    from megamoe.parallel.transport.host import HostTransport

_REGION = "rows"
_FIRST_NAP_S, _LONGEST_NAP_S = 2e-5, 5e-4


class Landings:
    """Of one call: words that go out and come in behind its messages, and the memory of this host's ranks.

    Nobody is woken for a word that a socket brought, so who waits for one looks again after a nap.
    """

    def __init__(self, transport: HostTransport, layer: str) -> None:
        self._transport, self._layer, self._exchange = transport, layer, transport.host.exchange
        self._words: list[PairTransfer] = []

    def expect(self, wave: int, senders: list[int]) -> None:
        """To be called after the wave's messages are expected. senders: ranks of other hosts that send one."""
        memory, size = self._transport.host.memory, self._transport.size
        if memory is None or not senders:
            return
        first = memory.words.rows(REGIONS.index(_REGION), wave, 0)
        incoming = self._transport.pairs.expect(
            memory.own.words_from(first, size), [1] * size, self._label(wave), senders
        )
        self._words.append(incoming)

    def send(self, wave: int, receivers: list[int]) -> None:
        """To be called after the wave's messages are sent, with the ranks of other hosts that have one to lend from."""
        if not receivers:
            return
        size = self._transport.size
        outgoing = self._transport.pairs.open(self._label(wave), receivers)
        outgoing.send(torch.full((size, 1), self._exchange), [1] * size)
        self._words.append(outgoing)

    def wait(self, wave: int, sender: int, lander: int) -> None:
        """Returns when a sender's message of the wave has landed at a rank of this host.

        PeerError where it does not in time, or that rank's process is gone.
        """
        memory, clock = self._transport.host.memory, self._transport.clock
        assert memory is not None
        words, word = memory.peers[lander].words, memory.words.rows(REGIONS.index(_REGION), wave, sender)
        if words[word] == self._exchange:
            return
        label, begun, nap = Label(self._layer, "dispatch", wave), time.monotonic(), _FIRST_NAP_S
        clock.own_status.wait(label.phase, wave, lander)
        end = begun + clock.left_s()
        while words[word] != self._exchange:
            if self._transport.aborted or clock.has_given_up(lander, sender):
                raise clock.error(lander, label, begun, "the wait was broken off")
            if memory.gone(lander) and words[word] != self._exchange:
                raise clock.error(lander, label, begun, "its process is gone")
            if time.monotonic() >= end:
                raise clock.error(lander, label, begun, f"rank {sender}'s rows did not come to it in time")
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)
        clock.own_status.arrived(label.phase, wave, time.monotonic() - begun)

    def rows(self, lander: int, row_bytes: int) -> Tensor:
        """All of a rank's buffer of rows [., B] uint8."""
        memory = self._transport.host.memory
        assert memory is not None
        region = memory.peers[lander].regions[_REGION]
        return region[: len(region) // row_bytes * row_bytes].view(-1, row_bytes)

    def finish(self) -> None:
        """Returns when all words have come and gone."""
        for transfer in self._words:
            transfer.wait()
            transfer.finish()

    def _label(self, wave: int) -> Label:
        return Label(self._layer, "landed", wave)
