"""The transport of ranks of which some share a host: rows for those go through their memory, others through pairs.

A rank copies its rows to where its peer will read them, and sets a word there: one copy, no socket, no other thread.
Which ranks share a host they find out in their first exchange.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from megamoe.parallel.symmetric import MAX_WAVES, PLACE_BYTES, REGIONS, Place, SymmetricMemory, available
from megamoe.parallel.transport.heads import (
    FIRST_BYTES,
    FIRST_EXCHANGE,
    HEAD_BYTES,
    MESSAGE_BYTES,
    check_heads,
    write_head,
)
from megamoe.parallel.transport.landings import Landings
from megamoe.parallel.transport.pairs import Label, PairTransfer, PairTransport

_log = logging.getLogger(__name__)
_CARD_BYTES = 256
_SLICE_S = 0.01
_REGION_OF = {"dispatch": "rows", "combine": "results", "link": "rows"}


@dataclass(slots=True, eq=False)
class Host:
    """What the ranks of one process group that share a host have in common, whatever EPGroups they make of it.

    shares    whether this rank offers its memory
    near      those ranks but this one, from the nearest neighbour on; none before the first exchange
    far       the other ranks
    nodes     of each rank the lowest rank of its host, where several hosts hold the ranks and one holds two; else ()
    exchange  number of the latest exchange of pages, which all ranks count alike
    regions   buffers of this rank that others write to, by name
    """

    shares: bool = True
    memory: SymmetricMemory | None = None
    near: list[int] = field(default_factory=list)
    far: list[int] = field(default_factory=list)
    nodes: tuple[int, ...] = ()
    exchange: int = 0
    met: bool = False
    regions: dict[str, Tensor] = field(default_factory=dict)

    def release(self) -> None:
        """Gives the memory back, once the group has ended."""
        if self.memory is not None:
            self.memory.close()
        self.memory = None
        self.near.clear()
        self.regions.clear()

    def holds(self, region: str, rows: Tensor) -> bool:
        """Whether rows lie in a region of this rank, so that others can write them."""
        whole = self.regions.get(region)  # storages are compared: a tensor without rows has no address
        return whole is not None and rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


class HostTransfer:
    """One transfer between ranks of a host, and the one of pairs for what others send and get.

    Rows to this rank come to a region of its segment; starts, given with the rows, say where.
    """

    def __init__(
        self, transport: HostTransport, label: Label, counts: Sequence[int], pairs: PairTransfer | None
    ) -> None:
        assert transport.host.memory is not None
        self._transport, self._memory = transport, transport.host.memory
        self._label, self._pairs, self._exchange = label, pairs, transport.host.exchange
        self._region = _REGION_OF[label.phase]
        self._expected = [peer for peer in transport.host.near if counts[peer]]

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        if self._pairs is not None:
            self._pairs.send(rows, counts)
        begins, row_bytes = list(accumulate(counts, initial=0)), rows[:1].nbytes
        flat, word = rows.reshape(-1).view(torch.uint8), self._word(self._transport.rank)
        for peer in self._transport.host.near:
            if counts[peer]:
                num_bytes, segment = counts[peer] * row_bytes, self._memory.peers[peer]
                place = segment.regions[self._region].narrow(0, starts[peer] * row_bytes, num_bytes)
                place.copy_(flat.narrow(0, begins[peer] * row_bytes, num_bytes))
                segment.set(word, self._exchange)

    def _word(self, sender: int) -> int:
        return self._memory.words.rows(REGIONS.index(self._region), self._label.wave or 0, sender)

    def wait(self, within_s: float | None = None) -> None:
        """within_s in place of what is left of the call's deadline"""
        while self._expected:
            peer = self._expected[0]
            self._transport.wait_for(peer, self._word(peer), self._exchange, self._label, within_s)
            self._expected.pop(0)
        if self._pairs is not None:
            self._pairs.wait(within_s)

    def finish(self) -> None:
        if self._pairs is not None:
            self._pairs.finish()


class HostTransport:
    """Memory within a host, pairs between hosts, and pairs alone for buffers that do not lie in a shared region."""

    early, device_type = True, "cpu"

    def __init__(self, pairs: PairTransport, host: Host, sharing: Host) -> None:
        """sharing: the one of the group's two Hosts that shares memory; host itself, unless that does without."""
        self.pairs, self.clock, self.host, self.sharing = pairs, pairs.clock, host, sharing
        self.rank, self.size = pairs.group.rank(), pairs.group.size()
        self._alone: tuple[Place, ...] = ()  # where this rank writes pages, where it shares no memory
        self._inboxes = torch.empty(0, MESSAGE_BYTES, dtype=torch.uint8)
        self._far_places: list[Place] = []

    @property
    def aborted(self) -> bool:
        """Whether all waits were broken off."""
        return self.pairs.aborted

    @property
    def _pages(self) -> Host:
        """Through whose memory pages go: once ranks have met to share some, all of the process group's pages.

        A rank that does without then hears ranks that do not, and all of them find out that they differ.
        """
        return self.sharing if self.sharing.met else self.host

    def nodes(self, layer: str) -> tuple[int, ...]:
        """As in Host; all ranks must ask, for the first time they do they find out who shares a host."""
        if not self.host.met:
            self._meet(Label(layer, "counts"))
        return self.host.nodes

    def landings(self, layer: str) -> Landings:
        """For a call whose dispatch is node-limited, once its pages have been exchanged."""
        return Landings(self, layer)

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> HostTransfer | PairTransfer:
        host, region = self.host, _REGION_OF.get(label.phase)
        if region is None or (label.wave or 0) >= MAX_WAVES or not host.holds(region, receive):
            return self.pairs.expect(receive, counts, label)
        pairs = self.pairs.expect(receive, counts, label, host.far) if host.far else None
        return HostTransfer(self, label, counts, pairs)

    def place(self, label: Label) -> Place:
        """Where this rank writes what it brings to the next exchange, for share(): PLACE_BYTES, for far MESSAGE_BYTES.

        To be asked by all ranks in the same order, and followed by share() or gather().
        """
        if not self.host.met:
            self._meet(label)
        return self._own_places()[(self._pages.exchange + 1) % 2]

    def _own_places(self) -> Sequence[Place]:
        memory = self._pages.memory
        if memory is not None:
            return memory.own.places
        if not self._alone:
            self._alone = tuple(Place.of(torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)) for _ in range(2))
        return self._alone

    def share(self, label: Label, num_bytes: int) -> list[Place]:
        """An exchange of what all ranks have written to their places -> the place of each, in order of rank.

        num_bytes that this rank has written; other ranks may have written more or fewer. Places stay as they are until
        this rank's next exchange: where a rank of this host has come to the next but one, it has read.
        """
        host, own = self._pages, self._own_places()
        memory, far = host.memory, None
        if host.far:
            if len(self._far_places) != len(host.far):
                self._inboxes = torch.empty(len(host.far), MESSAGE_BYTES, dtype=torch.uint8)
                self._far_places = [Place.of(inbox) for inbox in self._inboxes]
            assert num_bytes <= MESSAGE_BYTES
            far = self.pairs.expect_first(self._inboxes, label, host.far)
            far.send_all(torch.frombuffer(own[(host.exchange + 1) % 2].view, dtype=torch.uint8, count=num_bytes))
        self._share(label)
        places = [own[host.exchange % 2]] * self.size
        for peer in host.near:
            assert memory is not None
            places[peer] = memory.peers[peer].places[host.exchange % 2]
        if far is not None:
            far.wait()
            far.finish()
            for peer, place in zip(host.far, self._far_places, strict=True):
                places[peer] = place
        return places

    def signal(self, region: str, peers: Sequence[int]) -> None:
        """Tells peers that this rank has written to its own region what they read there, in the latest exchange."""
        memory = self.host.memory
        assert memory is not None
        word = memory.words.rows(REGIONS.index(region), 0, self.rank)
        for peer in peers:
            memory.peers[peer].set(word, self.host.exchange)

    def await_signal(self, region: str, peer: int, label: Label) -> None:
        """Waits for a peer's signal()."""
        memory = self.host.memory
        assert memory is not None
        word = memory.words.rows(REGIONS.index(region), 0, peer)
        self.wait_for(peer, word, self.host.exchange, label, None)

    def regions(self, region: str) -> dict[int, int]:
        """Addresses of that region of this rank and those that share its memory."""
        memory = self.host.memory
        assert memory is not None
        return {rank: memory.peers[rank].addresses[region] for rank in (self.rank, *self.host.near)}

    def gather(self, page: Tensor, label: Label) -> Tensor:
        """As Transport says. CallRefusedError, on all ranks, where one gathers something else or calls a layer."""
        place, num_bytes = self.place(label), page.numel()
        first = min(num_bytes, FIRST_BYTES)
        write_head(place.view, label, num_bytes)
        place.view[HEAD_BYTES : HEAD_BYTES + first] = page[:first].numpy().data
        views = [each.view for each in self.share(label, HEAD_BYTES + first)]
        check_heads(views, self.rank, self.clock.global_ranks)
        whole = page.new_empty(self.size, num_bytes)
        for row, view in zip(whole.numpy(), views, strict=True):
            row[:first] = view[HEAD_BYTES : HEAD_BYTES + first]
        for begin in range(first, num_bytes, PLACE_BYTES):
            part = slice(begin, min(begin + PLACE_BYTES, num_bytes))
            self._gather(page[part], whole[:, part], label)
        return whole

    def _gather(self, page: Tensor, into: Tensor, label: Label) -> None:
        """Parts of pages, once all ranks know how long each other's are."""
        host, memory = self._pages, self._pages.memory
        number, num_bytes, rows = (host.exchange + 1) % 2, len(page), into.numpy()
        far, incoming = None, page.new_empty(len(host.far), num_bytes)
        if memory is not None:
            memory.own.places[number].view[:num_bytes] = page.numpy().data
        if host.far:
            far = self.pairs.expect(incoming, [int(peer in host.far) for peer in range(self.size)], label, host.far)
            far.send_all(page)
        self._share(label)
        rows[self.rank] = page.numpy()
        for rank in host.near:
            assert memory is not None
            rows[rank] = memory.peers[rank].places[number].view[:num_bytes]
        if far is not None:
            far.wait()
            far.finish()
            into[host.far] = incoming

    def _share(self, label: Label) -> None:
        """The exchange with ranks of this host."""
        host, memory = self._pages, self._pages.memory
        host.exchange += 1
        if memory is None:
            return
        word = memory.words.page(host.exchange, self.rank)
        for peer in host.near:
            memory.peers[peer].set(word, host.exchange)
        for peer in host.near:
            self.wait_for(peer, memory.words.page(host.exchange, peer), host.exchange, label, None)

    def _ask_all(self, page: Tensor, label: Label) -> Tensor:
        """As gather(), of few bytes and by messages alone, before it is known who shares memory."""
        num_bytes, rank = HEAD_BYTES + len(page), self.rank
        message = torch.zeros(num_bytes, dtype=torch.uint8)
        write_head(message.numpy().data, Label(label.layer, f"{FIRST_EXCHANGE}{self.host.shares}"), len(page))
        message[HEAD_BYTES:] = page
        inboxes = torch.zeros(self.size - 1, MESSAGE_BYTES, dtype=torch.uint8)
        transfer = self.pairs.expect_first(inboxes, label, sorted(self.pairs.receivers))
        transfer.send_all(message)
        transfer.wait()
        transfer.finish()
        everyones = torch.cat((inboxes[:rank, :num_bytes], message[None], inboxes[rank:, :num_bytes]))
        check_heads([each.numpy().data for each in everyones], rank, self.clock.global_ranks)
        return everyones[:, HEAD_BYTES:]

    def _meet(self, label: Label) -> None:
        """Finds out who shares this rank's memory: two ranks do where each has mapped the other's segment.

        CallRefusedError, on all ranks, where some are to share memory and others are not.
        """
        host, rank = self.host, self.rank
        if not host.shares:
            if not self.sharing.met:
                self._ask_all(_padded(b""), label)
            host.met, host.far = True, [peer for peer in range(self.size) if peer != rank]
            return
        memory = _own_memory(rank, self.size)
        cards = self._ask_all(_padded(b"" if memory is None else memory.card()), label)
        vote = torch.zeros(self.size, dtype=torch.uint8)
        for peer in range(self.size):
            card = bytes(cards[peer].numpy()).rstrip(b"\0")
            vote[peer] = peer != rank and memory is not None and bool(card) and memory.attach(peer, card)
        votes = self._ask_all(vote, label)
        host.met, host.nodes = True, _nodes(votes.bool())
        host.near = [peer for peer in self.pairs.receivers if vote[peer] and votes[peer, rank]]
        host.far = [peer for peer in range(self.size) if peer != rank and peer not in host.near]
        if host.near and memory is not None:
            memory.keep(host.near)
            host.memory = memory
            host.regions.update(memory.own.regions)

    def wait_for(self, peer: int, word: int, value: int, label: Label, within_s: float | None) -> None:
        """Waits for a peer to set a word of this rank. PeerError where it does not in time, or its process is gone."""
        memory, clock = self._pages.memory, self.clock
        assert memory is not None
        status, begun = clock.own_status, time.monotonic()
        spin = threading.get_ident() == status.thread
        status.wait(label.phase, label.wave, peer)
        end = begun + (clock.left_s() if within_s is None else within_s)
        while not memory.wait(word, value, min(_SLICE_S, max(end - time.monotonic(), 0.0)), spin=spin):
            spin = False
            if self.pairs.is_over(peer):
                raise clock.error(peer, label, begun, "the wait was broken off")
            if memory.gone(peer) and not memory.wait(word, value, 0.0, spin=False):
                raise clock.error(peer, label, begun, "its process is gone")
            if time.monotonic() >= end:
                raise clock.error(peer, label, begun, "its rows did not come in time")
        status.arrived(label.phase, label.wave, time.monotonic() - begun)

    def abort(self) -> None:
        """As Transport says: waits for memory look every 10 ms."""
        self.pairs.abort()


def _nodes(votes: Tensor) -> tuple[int, ...]:
    """votes [P, P]: who can write whose memory -> the lowest rank of each one's host, () where none need be told apart.

    Ranks are of one host where all of them share with one another and with nobody else.
    """
    shared = votes & votes.T | torch.eye(len(votes), dtype=torch.bool)
    alike = [bool((shared[members] == members).all()) for members in shared]
    nodes = tuple(int(shared[rank].int().argmax()) if alike[rank] else rank for rank in range(len(votes)))
    return nodes if 1 < len(set(nodes)) < len(nodes) else ()


def _own_memory(rank: int, size: int) -> SymmetricMemory | None:
    if not available():
        return None
    try:
        return SymmetricMemory(rank, size)
    except OSError as refused:  # a sandbox, or a limit of this process
        _log.warning("rank %d shares no memory with others of its host, rows go through sockets: %s", rank, refused)
        return None


def _padded(card: bytes) -> Tensor:
    assert len(card) <= _CARD_BYTES
    return torch.frombuffer(bytearray(card.ljust(_CARD_BYTES, b"\0")), dtype=torch.uint8)
