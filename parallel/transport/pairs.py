"""How bytes move between ranks: expect, send, wait; several transfers can be in flight together.

Two fast paths under one face. Pairs (isend and irecv with every peer) run at wire speed in both directions on
gloo, where all_to_all_single is half-duplex at the median. All-to-all (all_to_all.py) is that of NCCL and HCCL.
Every wait has the group's deadline; what goes wrong is raised as PeerError and names the peer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.errors import PeerError
from megamoe.parallel.health.heartbeat import HeartbeatMonitor
from megamoe.parallel.health.status import OwnStatus
from megamoe.parallel.health.waiter import BrokenOffError, Waiter

WHOLE_BYTES = 32 * 1024  # of the largest message that goes as one
_LEAST_S = 0.001  # of a wait for what should be there: gloo has none of no time


@dataclass(frozen=True, slots=True)
class Label:
    """What a transfer is for, as errors will say it."""

    layer: str
    phase: str
    wave: int | None = None


class Transfer(Protocol):
    """Rows between this rank and all others, in three moments, so that what comes can be on its way early."""

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        """Starts sending rows [sum(counts), ...], ordered by peer; they must stay untouched until finish().

        starts[r]: the row of rank r's buffer where they begin, counted from where the buffer that it took from its
        workspace begins. Only memory that ranks share needs it: with messages the receiver says where they go.
        """
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

    def abort(self) -> None:
        """Has every wait of this rank end in an error; called from another thread than the one that waits."""
        ...


class Clock:
    """Deadline, names and notes that both transports need, and what turns a failure into a PeerError.

    global_ranks   of the group's ranks in the whole program, where they differ; empty where they are the same
    monitors       at most one heartbeat: says who is to blame where the transport only knows whom it waited for
    """

    def __init__(
        self, deadline_s: float, hosts: dict[int, str], own_status: OwnStatus, global_ranks: Sequence[int] = ()
    ) -> None:
        self.deadline_s, self.hosts, self.own_status = deadline_s, hosts, own_status
        self.global_ranks = tuple(global_ranks)
        self.monitors: list[HeartbeatMonitor] = []

    def left_s(self) -> float:
        """Seconds that this call may still be kept waiting; once a rank has given up, up to a deadline from then."""
        left_s = self.deadline_s - self.own_status.waited_s
        if self.monitors and self.monitors[0].gave_up:
            since_s = time.monotonic() - min(self.monitors[0].gave_up.values())
            left_s = min(left_s, self.deadline_s - since_s)
        return left_s

    def has_given_up(self, *ranks: int) -> bool:
        """Whether one of these ranks has announced that it gave up on a call: what has not come from it will not."""
        return bool(self.monitors) and not self.monitors[0].gave_up.keys().isdisjoint(ranks)

    def error(self, peer: int, label: Label, since: float, cause: Exception | str) -> PeerError:
        reason = _plain(cause)
        waited = time.monotonic() - since
        where = (label.phase, label.layer, label.wave, waited, self.deadline_s, reason)
        if not self.monitors:
            known = self.global_ranks[peer] if self.global_ranks else None
            return PeerError(peer, self.hosts.get(peer, "unknown host"), *where, global_rank=known)
        self.own_status.give_up()
        verdict, statuses = self.monitors[0].judge(peer)
        return PeerError(
            verdict.rank,
            statuses[verdict.rank].host,
            *where,
            condition=verdict.condition,
            meaning=verdict.meaning,
            picture=tuple(map(str, statuses)),
            global_rank=self.global_ranks[verdict.rank] if self.global_ranks else None,
        )

    @contextmanager
    def naming(self, group: dist.ProcessGroup, label: Label) -> Iterator[None]:
        """Turns a collective's failure into a PeerError: on the next rank, where no heartbeat knows better."""
        begun = time.monotonic()
        self.own_status.wait(label.phase, label.wave, None)
        try:
            yield
        except MissingPageError as cause:
            raise self.error(cause.rank, label, begun, cause) from cause
        except RuntimeError as cause:
            peer = (group.rank() + 1) % group.size()
            guess = "" if self.monitors else ", so the rank is a guess"
            raise self.error(peer, label, begun, f"a collective with all ranks failed{guess}: {cause}") from cause
        self.own_status.arrived(label.phase, label.wave, time.monotonic() - begun)


def _give_way() -> None:
    """Lets gloo's thread go first where it waits for this core.

    Posting holds a connection. gloo's thread leaves one that is held to its next round, which begins at once: where it
    takes the core from the thread that posts, it spins for all of its turn, and the post takes milliseconds.
    """
    if hasattr(os, "sched_yield"):  # not everywhere
        os.sched_yield()


class MissingPageError(RuntimeError):
    """A collective is said to have ended, and what a rank should have sent is not there."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"the exchange ended without rank {rank}'s page")
        self.rank = rank


def _plain(cause: Exception | str) -> str:
    """What the transport said, without the place in its source and its advice."""
    said = str(cause).strip().partition("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", said).partition(". This is typically")[0] or type(cause).__name__


class PairTransfer:
    """The irecvs and isends of one transfer. A work is waited on once: a second wait on gloo does not return.

    What is done between two posts is done while the peers' messages want the CPU: it is kept short.

    A large message goes as a body and a tail of a few values, and the tail, which comes last, is waited for first. gloo
    tells those that wait for a message of a lost connection, but for the one that it was in the middle of: who waits
    for that one waits until the deadline. Who waits for one to leave does too, whatever it is: see waiter.py.
    """

    _TAIL = 32

    def __init__(self, pairs: PairTransport, label: Label, tag: int, among: Collection[int] | None) -> None:
        self._pairs, self._label, self._tag = pairs, label, tag
        self._among = pairs.receivers if among is None else among
        self._incoming: list[tuple[int, dist.Work]] = []
        self._outgoing: list[tuple[int, dist.Work]] = []
        self._ended: list[dist.Work] = []

    def receive(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Posts a receive for every rank that sends any."""
        self._post(self._incoming, self._pairs.group.recv, rows, counts, self._pairs.senders)

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        del starts
        if rows.nbytes > WHOLE_BYTES:
            _give_way()
        self._post(self._outgoing, self._pairs.group.send, rows, counts, self._pairs.receivers)

    def send_all(self, message: Tensor) -> None:
        """Starts sending the same message to all ranks of the transfer.

        Up to WHOLE_BYTES it can be shorter than their room for it. gloo ends the process of a receiver whose room is
        smaller.
        """
        for peer in self._pairs.receivers:
            if peer in self._among:
                self._post_one(self._outgoing, self._pairs.group.send, message, peer)

    def wait(self, within_s: float | None = None) -> None:
        """within_s in place of what is left of the call's deadline"""
        self._wait_all(self._incoming, self._label.phase, within_s)
        if self._tag == self._pairs.OPENING_TAG:  # who opens an exchange has got all that was sent to it before
            self._pairs.leaving.clear()

    def finish(self) -> None:
        """Where large messages may be stuck, what other transfers have sent is waited for too: in one wait."""
        if self._outgoing and self._pairs.may_be_stuck:
            self._pairs.finish_all()
        self._wait_all(self._outgoing, f"sending {self._label.phase}")

    def leaving(self) -> list[int]:
        """Peers of the messages that have not been waited for."""
        return [peer for peer, _ in self._outgoing]

    def leave(self, deadline: float) -> Iterator[int]:
        """Waits until what it has sent has left, message by message: the peer of each before it is waited for."""
        while self._outgoing:
            peer, work = self._outgoing[0]
            yield peer
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), _LEAST_S)))
            self._ended.append(self._outgoing.pop(0)[1])

    def note_leaving(self, peer: int) -> None:
        """What this rank waits for, for others to see."""
        self._pairs.clock.own_status.wait(f"sending {self._label.phase}", self._label.wave, peer)

    def error(self, peer: int, since: float, cause: Exception) -> PeerError:
        """Of a peer for whom this transfer has waited in vain."""
        return self._pairs.clock.error(peer, self._label, since, cause)

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
            if counts[peer] and peer in self._among:
                self._post_one(works, post, rows[starts[peer] : starts[peer + 1]], peer)

    def _post_one(
        self,
        works: list[tuple[int, dist.Work]],
        post: Callable[[list[Tensor], int, int], dist.Work],
        part: Tensor,
        peer: int,
    ) -> None:
        begun = time.monotonic()
        try:
            if part.nbytes > WHOLE_BYTES:
                if works is self._outgoing:
                    self._pairs.leaving[self] = None
                flat = part.view(-1)
                body = post([flat[: -self._TAIL]], peer, self._tag)
                works.append((peer, post([flat[-self._TAIL :]], peer, self._tag + self._pairs.TAIL_TAG)))
                works.append((peer, body))
            else:
                works.append((peer, post([part], peer, self._tag)))
        except RuntimeError as cause:  # gloo refuses at once on a pair that has failed before
            raise self._pairs.clock.error(peer, self._label, begun, cause) from cause

    def _wait_all(self, works: list[tuple[int, dist.Work]], phase: str, within_s: float | None = None) -> None:
        """phase: as others see it"""
        begun, pairs, clock = time.monotonic(), self._pairs, self._pairs.clock
        while works:
            peer, work = works.pop(0)
            self._ended.append(work)  # to let go of one takes a lock that gloo's thread wants now
            clock.own_status.wait(phase, self._label.wave, peer)
            left = (clock.left_s() if within_s is None else within_s) - (time.monotonic() - begun)
            try:
                pairs.wait_for(work, peer, left)
            except RuntimeError as cause:
                raise clock.error(peer, self._label, begun, cause) from cause
        clock.own_status.arrived(phase, self._label.wave, time.monotonic() - begun)


class PairTransport:
    """Point-to-point pairs with every peer: gloo's fast path. Tags keep the phases and waves of a call apart."""

    early, device_type = True, "cpu"
    _PHASES = ("counts", "more counts", "dispatch", "combine", "link", "load", "landed", "sum", "trace")
    _FIRST_TAG, _TAGS_PER_PHASE = 7_000, 100_000  # far from the small tags that other code on the group may use
    TAIL_TAG = _TAGS_PER_PHASE // 2
    _NO_TAG = _FIRST_TAG - 1  # nothing is ever sent with it
    OPENING_TAG = _FIRST_TAG - 2

    def __init__(self, group: dist.ProcessGroup, clock: Clock) -> None:
        self.group, self.clock = group, clock
        self.aborted = False
        self.leaving: dict[PairTransfer, None] = {}  # that have sent what no buffer of a socket may hold, in order
        self._waiter = Waiter("megamoe waiter")
        rank, size = group.rank(), group.size()
        # from the nearest neighbour on, so that no one is everybody's first
        self.receivers = [(rank + distance) % size for distance in range(1, size)]
        self.senders = [(rank - distance) % size for distance in range(1, size)]

    def expect(
        self, receive: Tensor, counts: Sequence[int], label: Label, among: Collection[int] | None = None
    ) -> PairTransfer:
        """among: moves the rows of these peers only, both ways; the others' have another way."""
        transfer = self.open(label, among)
        transfer.receive(receive, counts)
        return transfer

    def expect_first(self, inboxes: Tensor, label: Label, among: Sequence[int]) -> PairTransfer:
        """Opens an exchange whose messages have the same tag whatever it is for, so that any two meet.

        inboxes [n, WHOLE_BYTES] uint8: room for the message of each rank of among, in ascending order.
        """
        transfer = PairTransfer(self, label, self.OPENING_TAG, among)
        transfer.receive(inboxes, [int(peer in among) for peer in range(self.group.size())])
        return transfer

    def open(self, label: Label, among: Collection[int] | None = None) -> PairTransfer:
        """A transfer that receives nothing yet."""
        tag = self._FIRST_TAG + self._PHASES.index(label.phase) * self._TAGS_PER_PHASE + (label.wave or 0)
        return PairTransfer(self, label, tag, among)

    def is_over(self, peer: int) -> bool:
        """Whether nothing comes from a peer any more: all was broken off, or it gave up."""
        return self.aborted or self.clock.has_given_up(peer)

    def wait_for(self, work: dist.Work, peer: int, within_s: float) -> None:
        """Returns when a peer's message is there, or one to it has left. RuntimeError where that is not in time."""
        over = self.is_over(peer)
        try:
            work.wait(timedelta(seconds=_LEAST_S if over else max(within_s, _LEAST_S)))
        except RuntimeError as cause:
            if over:
                raise BrokenOffError from cause
            raise

    @property
    def may_be_stuck(self) -> bool:
        """Whether a wait for a message to leave may be one that nothing ends, though it is known who gave up.

        A few bytes leave at once where nothing large is before them.
        """
        return bool(self.leaving and self.clock.monitors)

    def finish_all(self) -> None:
        """Returns when all that large transfers have sent has left: another thread waits, this one can break it off."""
        transfers, self.leaving = [*self.leaving], {}
        at = [(transfer, peer) for transfer in transfers for peer in transfer.leaving()][:1]
        if not at:
            return
        begun, noted = time.monotonic(), at[0]
        deadline = begun + self.clock.left_s()

        def wait() -> None:
            for transfer in transfers:
                for peer in transfer.leave(deadline):
                    at[0] = transfer, peer

        def is_over() -> bool:
            nonlocal noted
            if at[0] != noted:
                noted = at[0]
                noted[0].note_leaving(noted[1])
            return self.is_over(noted[1])

        noted[0].note_leaving(noted[1])
        try:
            self._waiter.wait(wait, is_over)
        except RuntimeError as cause:
            transfer, peer = at[0]
            raise transfer.error(peer, begun, cause) from cause
        self.clock.own_status.arrived("sending", None, time.monotonic() - begun)

    def abort(self) -> None:
        """Has every wait of this rank end in an error, from any thread.

        gloo has no call for it, but a receive that runs out of time closes all connections of its rank. One on a
        connection that is closed already fails before, and so all peers are tried.
        """
        self.aborted = True
        for peer in self.receivers:
            try:
                self.group.recv([torch.empty(1)], peer, self._NO_TAG).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue
