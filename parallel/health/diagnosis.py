"""Who is to blame: from what every rank last said of itself, and how it can be reached, one name.

Pure functions over records: no socket and no clock, so that every case can be tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megamoe.parallel.health.status import LEFT, OUTSIDE, RAISED, WAITING, WORKING, RankStatus

DEAD, UNREACHABLE, STOPPED, STALLED = "dead", "unreachable", "stopped", "stalled"
ABSENT, UNDELIVERED, SLOW, CUT_OFF = "absent", "undelivered", "slow", "cut off"
_NEVER_S = 10.0
_FAR_S = 0.005  # answers that take longer come over a slow link
_STARVED_S = 0.25  # or, where ranks share memory and no link lies between, from a process that hardly runs
_ARRIVES_S, _ONE_ARRIVES_S = 0.25, 0.5  # what is under way for longer is missing; where it is one, between hosts
_MEANING = {
    DEAD: "is dead, its process is gone",
    UNREACHABLE: "cannot be reached: its host or its link is down",
    STOPPED: "does not run: its host answers, its process says nothing",
    STALLED: "is stalled",
    RAISED: "raised",
    LEFT: "has left the group",
    ABSENT: "has not made the call that the others wait in",
    UNDELIVERED: "has gone on, and others still wait for what it says it has sent before: its messages do not arrive",
    SLOW: "is behind a slow link: ranks wait for each other's rows, and all of them run",
    CUT_OFF: "is this rank, and no other can be reached: it is its own link or host that is down",
}


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What one rank knows of another, or of itself.

    position    what it said last; None where it has said nothing yet
    heard_s     seconds since it said anything
    silent      whether that is longer than a rank that runs lets pass
    closed      its connection ended, which the kernel does for a process that is gone
    reachable   whether its host takes a connection: None where nobody tried
    unheard     ranks that it says are silent to it
    answers     (rank, seconds) of those whose answers take longest to come to it
    near        ranks that it shares memory with
    """

    rank: int
    host: str
    position: RankStatus | None
    heard_s: float
    silent: bool = False
    closed: bool = False
    reachable: bool | None = None
    unheard: tuple[int, ...] = ()
    answers: tuple[tuple[int, float], ...] = ()
    near: tuple[int, ...] = ()

    @property
    def condition(self) -> str:
        """One word: dead, unreachable, stopped, raised, left, outside, working or waiting."""
        state = self.position.state if self.position else WORKING
        if state in (RAISED, LEFT):
            return state
        if self.closed:
            return DEAD
        if self.silent and self.reachable is not None:
            return STOPPED if self.reachable else UNREACHABLE
        return state

    def __str__(self) -> str:
        who = f"rank {self.rank} on {self.host}"
        if self.condition in (DEAD, STOPPED, UNREACHABLE):
            last = "it never said anything" if self.position is None else f"last seen: {self.position}"
            return f"{who}: {self.condition}; not heard for {self.heard_s:.1f} s; {last}"
        return f"{who}: {self.position or 'nothing heard yet'}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A rank, its condition, and whether more evidence could still change that."""

    rank: int
    condition: str
    certain: bool

    @property
    def meaning(self) -> str:
        return _MEANING[self.condition]


def diagnose(me: int, awaited: int | None, statuses: Sequence[PeerStatus]) -> Verdict:
    """The rank to name, from what rank `me` sees of all ranks; awaited is the one it waited for.

    A rank that waits is never to blame for it: blame goes on to the one that it waits for. What a peer found out before
    is believed, so that all ranks name the same one.
    """
    others = [status for status in statuses if status.rank != me]
    conditions = {status.rank: status.condition for status in others}
    if len(others) > 1 and all(condition in (UNREACHABLE, STOPPED) for condition in conditions.values()):
        return Verdict(me, CUT_OFF, certain=True)
    for condition in (DEAD, UNREACHABLE, STOPPED):
        found = [rank for rank, each in conditions.items() if each == condition]
        found = [rank for rank in found if condition == DEAD or not _heard_by_another(me, rank, statuses)]
        if found:
            return Verdict(awaited if awaited in found else found[0], condition, certain=True)
    raised = [status for status in others if conditions[status.rank] == RAISED and status.position]
    own = [status.rank for status in raised if status.position and status.position.peer is None]
    if own:
        return Verdict(own[0], RAISED, certain=True)
    if raised:  # errors about a peer: the first that was raised
        first = max((status.position for status in raised if status.position), key=lambda position: position.age_s)
        assert first.peer is not None
        if first.complaint == SLOW and len(statuses) == 2:  # of two each names the other
            return Verdict(others[0].rank, SLOW, certain=True)
        return Verdict(first.peer, first.complaint if first.complaint in _MEANING else STALLED, certain=True)
    return _follow(me, awaited, statuses)


def _heard_by_another(me: int, rank: int, statuses: Sequence[PeerStatus]) -> bool:
    """Whether a rank that is silent here is heard by one that is not: then the way between is bad, and not the rank."""
    return any(
        status.rank not in (me, rank) and status.condition in (WORKING, WAITING, OUTSIDE) and rank not in status.unheard
        for status in statuses
        if not status.silent and status.position
    )


def _follow(me: int, awaited: int | None, statuses: Sequence[PeerStatus]) -> Verdict:
    """All ranks are there: along what each waits for, to one that waits for nobody or has sent what is waited for."""
    at = {status.rank: status for status in statuses}
    passed = {me}
    waiter, rank = me, awaited
    while rank is not None and rank not in passed:
        passed.add(rank)
        position = at[rank].position
        if at[rank].silent or _is_missing(at[waiter], at[rank]):
            break
        if position is None or position.state == WORKING:
            return Verdict(rank, STALLED, certain=False)
        if position.state in (OUTSIDE, LEFT):
            return Verdict(rank, ABSENT if position.state == OUTSIDE else LEFT, certain=position.state == LEFT)
        waiter, rank = rank, position.peer
    return _under_way(me, awaited, statuses)


def _is_missing(waiter: PeerStatus, sender: PeerStatus, arrives_s: float = _ONE_ARRIVES_S) -> bool:
    """Whether a rank still waits for what the other says it sent a while ago.

    The message left before the sender came to where it is; the waiter had not got it when it last looked.
    """
    waits, sent = waiter.position, sender.position
    if waits is None or sent is None or waits.state != WAITING or waits.peer != sender.rank:
        return False
    if sender.rank in waiter.near:
        arrives_s = _ARRIVES_S
    return sent.is_past(waits) and sent.age_s - waiter.heard_s - waits.looked_s >= arrives_s


def _under_way(me: int, awaited: int | None, statuses: Sequence[PeerStatus]) -> Verdict:
    """Messages are under way: the rank whose messages several others miss; else that whose best link is the worst; else
    that whose messages one other misses; else the one that is in most waits.

    Of one missing message either end may be to blame, and a slow link explains it, but not that several miss the same
    rank's, nor that a rank misses what another has left in its memory. Two ranks cannot tell which end of a slow link
    it is: each names the other.
    """
    ranks = [status.rank for status in statuses]
    sender, waiters = _most_missed(statuses, _ARRIVES_S)
    if sender is not None and len(waiters) > 1:
        return Verdict(sender, UNDELIVERED, certain=False)
    sender, waiters = _most_missed(statuses, _ONE_ARRIVES_S)
    links = _links(statuses)
    within_host = any(sender in waiter.near for waiter in waiters) or all(
        me in status.near for status in statuses if status.rank != me
    )
    late_s = _STARVED_S if within_host else _FAR_S
    if len(ranks) == 2:
        far = ranks[1 - ranks.index(me)] if sender is None or max(links.values(), default=0.0) > late_s else None
    else:
        far = _farthest(ranks, links, late_s)
    if far is not None:
        return Verdict(far, SLOW, certain=True)
    if sender is not None:
        return Verdict(sender, UNDELIVERED, certain=False)
    waits = [
        (status.rank, status.position.peer)
        for status in statuses
        if status.position and status.position.state == WAITING
    ]
    in_waits = Counter(rank for pair in waits for rank in pair if rank is not None)
    return Verdict(max(ranks, key=lambda rank: (in_waits[rank], rank == awaited, -rank)), SLOW, certain=False)


def _most_missed(statuses: Sequence[PeerStatus], arrives_s: float) -> tuple[int | None, list[PeerStatus]]:
    """The rank whose messages most others miss, and those others; None where there is none, or no single one."""
    missed = {
        sender.rank: [waiter for waiter in statuses if _is_missing(waiter, sender, arrives_s)] for sender in statuses
    }
    most = max(map(len, missed.values()))
    senders = [rank for rank, waiters in missed.items() if len(waiters) == most]
    return (senders[0], missed[senders[0]]) if most and len(senders) == 1 else (None, [])


def _links(statuses: Sequence[PeerStatus]) -> dict[frozenset[int], float]:
    """Seconds that an answer takes between two ranks, as the one says that waits longer for it."""
    links: dict[frozenset[int], float] = {}
    for status in statuses:
        for peer, seconds in (*status.answers, *((peer, _NEVER_S) for peer in status.unheard)):
            pair = frozenset((status.rank, peer))
            links[pair] = max(links.get(pair, 0.0), seconds)
    return links


def _farthest(ranks: Sequence[int], links: dict[frozenset[int], float], late_s: float) -> int | None:
    """The rank whose best link is by far the worst and takes longer than late_s, None where there is none."""
    best = {rank: min((each for pair, each in links.items() if rank in pair), default=0.0) for rank in ranks}
    worst, second = sorted(ranks, key=lambda rank: -best[rank])[:2]
    return worst if best[worst] > max(late_s, 3 * best[second]) else None
