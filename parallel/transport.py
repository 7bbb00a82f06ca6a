"""How bytes move between ranks: expect, send, wait; several transfers can be in flight together.

Two fast paths under one face. Pairs (isend and irecv with every peer) run at wire speed in both directions on
gloo, where all_to_all_single is half-duplex at the median. All-to-all is the fast path of NCCL and HCCL.
Every wait has the group's deadline; what goes wrong is raised as PeerError and names the peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.errors import PeerError
from megamoe.parallel.threads import calm_gloo_threads


@dataclass(frozen=True, slots=True)
class Label:
    """What a transfer is for, as errors will say it."""

    layer: str
    phase: str
    wave: int | None = None


class Transfer(Protocol):
    """Rows between this rank and all others, in three moments, so that what comes can be on its way early."""

    def send(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Starts sending rows [sum(counts), ...], ordered by peer; they must stay untouched until finish()."""
        ...

    def wait(self) -> None:
        """Returns when all rows to this rank are in place."""
        ...

    def finish(self) -> None:
        """Returns when all rows from this rank have left."""
        ...


class Transport(Protocol):
    """Moves rows between the ranks of a group. early: rows may arrive before this rank has sent its own."""

    early: bool

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        """Opens a transfer whose incoming rows fill receive [sum(counts), ...], ordered by peer. Returns at once."""
        ...

    def gather(self, page: Tensor, label: Label) -> Tensor:
        """page [n] uint8 on the CPU -> [ep_size, n] uint8 on the CPU, every rank's page in order of rank."""
        ...


class _Clock:
    """Deadline and names that both transports need to turn a failure into a PeerError."""

    def __init__(self, deadline_s: float, hosts: dict[int, str]) -> None:
        self.deadline_s, self.hosts = deadline_s, hosts

    def error(self, peer: int, label: Label, since: float, cause: Exception) -> PeerError:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        waited = time.monotonic() - since
        host = self.hosts.get(peer, "unknown host")
        return PeerError(peer, host, label.phase, label.layer, label.wave, waited, self.deadline_s, reason)

    @contextmanager
    def naming(self, group: dist.ProcessGroup, label: Label) -> Iterator[None]:
        """Turns a collective's failure into a PeerError on the next rank."""
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as cause:
            peer = (group.rank() + 1) % group.size()
            unsure = RuntimeError(f"a collective with all ranks failed, so the rank is a guess: {cause}")
            raise self.error(peer, label, begun, unsure) from cause


class PairTransfer:
    """The irecvs and isends of one transfer. A work is waited on once: a second wait on gloo does not return.

    What is done between two posts is done while the peers' messages want the CPU: it is kept short.
    """

    def __init__(self, pairs: PairTransport, label: Label, tag: int) -> None:
        self._pairs, self._label, self._tag = pairs, label, tag
        self._incoming: list[tuple[int, dist.Work]] = []
        self._outgoing: list[tuple[int, dist.Work]] = []
        self._ended: list[dist.Work] = []

    def receive(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Posts a receive for every rank that sends any."""
        self._post(self._incoming, self._pairs.group.recv, rows, counts, self._pairs.senders)

    def send(self, rows: Tensor, counts: Sequence[int]) -> None:
        self._post(self._outgoing, self._pairs.group.send, rows, counts, self._pairs.receivers)

    def wait(self) -> None:
        self._wait_all(self._incoming)

    def finish(self) -> None:
        self._wait_all(self._outgoing)

    def _post(
        self,
        works: list[tuple[int, dist.Work]],
        post: Callable[[list[Tensor], int, int], dist.Work],
        rows: Tensor,
        counts: Sequence[int],
        order: Sequence[int],
    ) -> None:
        starts = list(accumulate(counts, initial=0))
        for peer in order:
            if counts[peer]:
                part = rows[starts[peer] : starts[peer + 1]]
                begun = time.monotonic()
                try:
                    works.append((peer, post([part], peer, self._tag)))
                except RuntimeError as cause:  # gloo refuses at once on a pair that has failed before
                    raise self._pairs.clock.error(peer, self._label, begun, cause) from cause

    def _wait_all(self, works: list[tuple[int, dist.Work]]) -> None:
        begun, clock = time.monotonic(), self._pairs.clock
        while works:
            peer, work = works.pop(0)
            self._ended.append(work)  # to let go of one takes a lock that gloo's thread wants now
            left = clock.deadline_s - (time.monotonic() - begun)
            try:
                work.wait(timedelta(seconds=max(left, 0.001)))
            except RuntimeError as cause:
                raise clock.error(peer, self._label, begun, cause) from cause


class PairTransport:
    """Point-to-point pairs with every peer: gloo's fast path. Tags keep the phases and waves of a call apart."""

    early = True
    _PHASES = ("counts", "more counts", "dispatch", "combine", "link")
    _FIRST_TAG, _TAGS_PER_PHASE = 7_000, 100_000  # far from the small tags that other code on the group may use

    def __init__(self, group: dist.ProcessGroup, deadline_s: float, hosts: dict[int, str]) -> None:
        self.group, self.clock = group, _Clock(deadline_s, hosts)
        calm_gloo_threads()
        rank, size = group.rank(), group.size()
        # from the nearest neighbour on, so that no one is everybody's first
        self.receivers = [(rank + distance) % size for distance in range(1, size)]
        self._gathered: PairTransfer | None = None
        self.senders = [(rank - distance) % size for distance in range(1, size)]

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> PairTransfer:
        tag = self._FIRST_TAG + self._PHASES.index(label.phase) * self._TAGS_PER_PHASE + (label.wave or 0)
        transfer = PairTransfer(self, label, tag)
        transfer.receive(receive, counts)
        return transfer

    def gather(self, page: Tensor, label: Label) -> Tensor:
        rank, size = self.group.rank(), self.group.size()
        one_each = [int(peer != rank) for peer in range(size)]
        pages = page.expand(size - 1, -1).contiguous()
        incoming = page.new_empty(size - 1, page.numel())
        transfer = self.expect(incoming, one_each, label)
        transfer.send(pages, one_each)
        transfer.wait()
        transfer.finish()
        self._gathered = transfer
        return torch.cat((incoming[:rank], page.unsqueeze(0), incoming[rank:]))


class AllToAllTransfer:
    """One all_to_all_single, issued when this rank sends."""

    def __init__(
        self, group: dist.ProcessGroup, clock: _Clock, label: Label, receive: Tensor, counts: Sequence[int]
    ) -> None:
        self._group, self._clock, self._label = group, clock, label
        self._receive, self._receive_counts = receive, list(counts)
        self._work: dist.Work | None = None

    def send(self, rows: Tensor, counts: Sequence[int]) -> None:
        with self._clock.naming(self._group, self._label):
            self._work = dist.all_to_all_single(
                self._receive, rows, self._receive_counts, list(counts), group=self._group, async_op=True
            )

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            with self._clock.naming(self._group, self._label):
                work.wait()

    def finish(self) -> None:
        """wait() has waited for both directions."""


class AllToAllTransport:
    """One all_to_all_single a transfer: the fast path of NCCL and HCCL. The group's own timeout is its deadline.

    A collective that fails does not tell which peer failed it: the error then names the next rank and says so.
    """

    early = False

    def __init__(
        self, group: dist.ProcessGroup, deadline_s: float, hosts: dict[int, str], device: torch.device
    ) -> None:
        self._group, self._clock, self._device = group, _Clock(deadline_s, hosts), device

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> AllToAllTransfer:
        return AllToAllTransfer(self._group, self._clock, label, receive, counts)

    def gather(self, page: Tensor, label: Label) -> Tensor:
        mine = page.to(self._device)
        pages = mine.new_empty(self._group.size() * page.numel())
        with self._clock.naming(self._group, label):
            dist.all_gather_into_tensor(pages, mine, group=self._group)
        return pages.cpu().view(self._group.size(), -1)
