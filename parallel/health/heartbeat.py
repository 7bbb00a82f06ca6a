"""The heartbeat: every rank tells every other where it is, four times a second, over connections of its own.

It says who is lost when the transport cannot: a process that is gone closes its connection, a process that is stopped
falls silent while its host still answers, a host that is gone answers nothing, and a rank that only waits says for
whom. Nothing of it is on the way of rows; a thread of its own sends and hears, and a call's notes are assignments.

Who else holds the group's token can ask for the picture: `megamoe doctor --run` does.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import median
from typing import Any

from torch.distributed import Store

from megamoe.parallel.health.diagnosis import PeerStatus, Verdict, diagnose
from megamoe.parallel.health.records import Heartbeat, Line
from megamoe.parallel.health.status import LEFT, RAISED, OwnStatus, RankStatus
from megamoe.parallel.interfaces import list_interfaces
from megamoe.parallel.rendezvous import wait_for

_log = logging.getLogger(__name__)
BEAT_S = 0.25
PATIENCE_S = 0.7  # how long an error waits for what the others say
_PROBE_S = 0.4
_ANSWERS = 8  # beats whose median says how far away a peer is
_TOLD = 16  # peers of which a rank tells that


@dataclass(slots=True)
class _Peer:
    """What is known of another rank. Times are of time.monotonic().

    deaf_s   seconds since it was last heard in which this process did not run, and could not have heard it
    """

    rank: int
    host: str
    address: str
    port: int
    line: Line | None = None
    position: RankStatus | None = None
    heard: float = field(default_factory=time.monotonic)
    deaf_s: float = 0.0
    closed: bool = False
    answered_s: deque[float] = field(default_factory=lambda: deque(maxlen=_ANSWERS))
    asked: float = 0.0
    unheard: tuple[int, ...] = ()
    answers: tuple[tuple[int, float], ...] = ()
    near: tuple[int, ...] = ()

    def answers_in_s(self, now: float, beat_s: float) -> float:
        """Seconds that its answers take: the median over beats, or what the present one has taken, once that is a beat.

        On a busy machine an answer comes late now and then, which says nothing of a link.
        """
        awaited_s = now - self.asked if self.asked else 0.0
        return max(median(self.answered_s), awaited_s if awaited_s > beat_s else 0.0)


class HeartbeatMonitor:
    """One for each group and rank, from the group's start until leave().

    store      where the ranks meet; addresses and the group's token are left there
    address    IP address of this rank that the others reach
    trouble    called, in the heartbeat's thread, while this rank is in a call: when a peer is found dead or has raised
               an error of its own, and when the ranks that this one waits for, or all others, have given up on others
    gave_up    when each rank was heard to have given up; what it sent before may still arrive
    collective whether every wait of this rank is for all others
    pulse      called there at every beat
    near       says which ranks share memory with this one, in the heartbeat's thread too
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        own_status: OwnStatus,
        *,
        address: str,
        host: str,
        deadline_s: float,
    ) -> None:
        self.rank, self.size, self.host, self.own_status = rank, size, host, own_status
        self.trouble: Callable[[], None] = lambda: None
        self.pulse: Callable[[], None] = lambda: None
        self.near: Callable[[], Sequence[int]] = tuple
        self.gave_up: dict[int, float] = {}
        self.collective = False
        self._beat_s = max(BEAT_S, size / 64)
        self._changed = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._listener = _listen(rank, address, max(16, size))
        self.port, self.address = self._listener.getsockname()[1], address
        self._wake_in, self._wake_out = socket.socketpair()
        self._stopping = False
        self._told = threading.Event()
        self._listened = time.monotonic()  # when the thread last looked for what has come
        try:
            self._peers = self._meet(store, deadline_s)
        except BaseException:
            for channel in (self._listener, self._wake_in, self._wake_out):
                channel.close()
            raise
        self._thread = threading.Thread(target=self._run, name="megamoe heartbeat", daemon=True)
        self._thread.start()

    def _meet(self, store: Store, deadline_s: float) -> dict[int, _Peer]:
        """Finds the others and connects to those of lower rank; those of higher rank come by themselves."""
        if self.rank == 0:
            store.set("heartbeat token", secrets.token_hex(16))
        mine = {"host": self.host, "address": self.address, "port": self.port}
        store.set(f"heartbeat {self.rank}", json.dumps(mine))
        lit = {f"heartbeat {rank}": f"rank {rank}" for rank in range(self.size)}
        wait_for(store, {**lit, "heartbeat token": "rank 0"}, deadline_s)
        peers = {}
        self.token = store.get("heartbeat token").decode()
        for rank in range(self.size):
            if rank != self.rank:
                said = json.loads(store.get(f"heartbeat {rank}"))
                peers[rank] = _Peer(rank, said["host"], said["address"], said["port"])
        for peer in list(peers.values())[: self.rank]:
            peer.line = _line(self._connect(peer, deadline_s))
            peer.line.put({"token": self.token, "rank": self.rank})
            _send(peer.line)  # now: a process that ends before its first beat is known by its connection
        if store.add("heartbeats lit", 1) == self.size:  # a rank that left at once would leave others without an answer
            store.set("all heartbeats lit", "")
        wait_for(store, {"all heartbeats lit": "some rank"}, deadline_s)
        return peers

    def _connect(self, peer: _Peer, within_s: float) -> socket.socket:
        """ConnectionError that names the rank and its address where it cannot be reached there."""
        try:
            return socket.create_connection((peer.address, peer.port), timeout=within_s)
        except OSError as refusal:
            raise ConnectionError(
                f"rank {self.rank} on {self.host} ({self.address}) does not reach the heartbeat of rank {peer.rank} on "
                f"{peer.host} at {peer.address} port {peer.port}: {refusal.strerror or refusal}. Have the ranks use an "
                "interface that they share: GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME, HCCL_SOCKET_IFNAME), or address="
            ) from refusal

    # ---- what a call asks ----

    def lost(self) -> int | None:
        """A peer that is gone or has raised, as far as was heard; the next call cannot be made without it."""
        with self._changed:
            return next((peer.rank for peer in self._peers.values() if self._is_lost(peer)), None)

    def _is_lost(self, peer: _Peer) -> bool:
        """Whether it will not do its part of the call that this rank is in, or of the next.

        One that raises between calls has done its part of those that it has made, and rows of them may be on their way.
        """
        position = peer.position
        if position is None or position.state not in (RAISED, LEFT):
            return peer.closed
        return position.state == RAISED and (bool(position.phase) or self.own_status.calls > position.calls)

    def judge(self, awaited: int | None) -> tuple[Verdict, list[PeerStatus]]:
        """Whom to name, and what every rank was seen to do. Takes PATIENCE_S where the others leave it open."""
        until = time.monotonic() + PATIENCE_S
        found: dict[int, str] = {}
        while True:
            silent = [status.rank for status in self.statuses() if status.silent and not status.closed]
            found |= self._probe([rank for rank in silent if rank not in found])
            statuses = [_with_probe(status, found.get(status.rank)) for status in self.statuses()]
            verdict = diagnose(self.rank, awaited, statuses)
            left = until - time.monotonic()
            if verdict.certain or left <= 0:
                return verdict, statuses
            with self._changed:
                self._changed.wait(left)

    def statuses(self) -> list[PeerStatus]:
        """All ranks as this one sees them, itself included."""
        with self._changed:
            now = time.monotonic()
            statuses = [self._status(peer, now) for peer in self._peers.values()]
        unheard = tuple(status.rank for status in statuses if status.silent)
        own, near = self.own_status.position(), tuple(self.near())
        statuses.append(PeerStatus(self.rank, self.host, own, 0.0, unheard=unheard, answers=self._answers(), near=near))
        return sorted(statuses, key=lambda status: status.rank)

    def _status(self, peer: _Peer, now: float) -> PeerStatus:
        heard_s = now - peer.heard
        position = peer.position
        if position is not None:
            position = replace(position, age_s=position.age_s + heard_s)
        silent = self._is_silent(peer, now)
        return PeerStatus(
            peer.rank, peer.host, position, heard_s, silent, peer.closed, None, peer.unheard, peer.answers, peer.near
        )

    def _is_silent(self, peer: _Peer, now: float) -> bool:
        """Whether it said nothing for four beats of this rank's listening.

        A process that was stopped finds what the others said meanwhile when it goes on, and not at once.
        """
        until = min(now, self._listened + self._beat_s)
        return until - peer.heard - peer.deaf_s > 4 * self._beat_s

    def _listen_again(self) -> None:
        """Notes that the thread looks for what has come; the time in which it should have and did not is no silence."""
        with self._changed:
            now = time.monotonic()
            deaf_s = now - self._listened - self._beat_s
            if deaf_s > self._beat_s:
                for peer in self._peers.values():
                    peer.deaf_s += deaf_s
            self._listened = now

    def _answers(self) -> tuple[tuple[int, float], ...]:
        """(rank, seconds) of the peers that take longest to answer."""
        now, beat_s = time.monotonic(), self._beat_s
        took = [
            (peer.answers_in_s(now, beat_s), peer.rank)
            for peer in self._peers.values()
            if peer.answered_s and not peer.closed
        ]
        return tuple((rank, seconds) for seconds, rank in sorted(took, reverse=True)[:_TOLD])

    def _probe(self, ranks: Sequence[int]) -> dict[int, str]:
        """How their hosts take a connection, all tried at once: "accepted", "refused" (no such process) or ""."""
        found = dict.fromkeys(ranks, "")
        with selectors.DefaultSelector() as tries:
            for rank in ranks:
                peer = self._peers[rank]
                channel = socket.socket(_family(peer.address), socket.SOCK_STREAM)
                channel.setblocking(False)
                channel.connect_ex((peer.address, peer.port))
                tries.register(channel, selectors.EVENT_WRITE, (rank, channel))
            until = time.monotonic() + _PROBE_S
            while tries.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in tries.select(left):
                    rank, channel = key.data
                    error = channel.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    found[rank] = {0: "accepted", errno.ECONNREFUSED: "refused"}.get(error, "")
                    tries.unregister(channel)
                    channel.close()
            for key in list(tries.get_map().values()):
                key.data[1].close()
        return found

    def say(self) -> None:
        """Tells all others now where this rank is, and returns when they have been sent it, or half a second later."""
        self._told.clear()
        self._wake()
        self._told.wait(0.5)

    def leave(self) -> None:
        """Says goodbye and ends the thread."""
        self.own_status.end(LEFT)
        self._stopping = True
        self._wake()
        self._thread.join(2.0)

    # ---- the thread ----

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"!")
        except OSError:
            return  # the thread has ended

    def _run(self) -> None:
        strangers: list[Line] = []
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._wake_in)
        for peer in self._peers.values():
            if peer.line is not None:
                self._selector.register(peer.line.channel, selectors.EVENT_READ, peer)
        beat = 0.0
        try:
            while True:
                stopping = self._stopping
                woken = False
                ready = self._selector.select(0.0 if stopping else max(0.0, beat - time.monotonic()))
                self._listen_again()
                for key, _ in ready:
                    if key.data is self._listener:
                        self._accept(strangers)
                    elif key.data is self._wake_in:
                        self._wake_in.recv(64)
                        woken = True
                    else:
                        self._hear(key.data)
                if stopping and ready and any(peer.line is None for peer in self._peers.values()):
                    continue  # all have met, but who came has not been heard yet: the last word is for it too
                if stopping or woken or time.monotonic() >= beat:
                    self._tell()
                    beat = time.monotonic() + self._beat_s
                if woken:
                    self._told.set()
                if stopping:
                    return
        finally:
            self._close(strangers)

    def _accept(self, strangers: list[Line]) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:  # it has gone again, or no more files can be opened: no reason to fall silent
            return
        line = _line(channel)
        strangers.append(line)
        self._selector.register(channel, selectors.EVENT_READ, line)

    def _hear(self, source: _Peer | Line) -> None:
        if isinstance(source, Line):
            self._hear_stranger(source)
            return
        assert source.line is not None
        try:
            self._take_in(source, source.line.take())
        except EOFError:
            self._selector.unregister(source.line.channel)
            source.line.channel.close()
            self._take_in(source, [], closed=True)

    def _take_in(self, peer: _Peer, records: Sequence[Any], *, closed: bool = False) -> None:
        """What a peer says, or that its connection has ended; where it is lost by that, a call is told."""
        was_lost = self._is_lost(peer)
        for record in records:
            self._note(peer, record)
        if closed:
            with self._changed:
                peer.closed = True
                self._changed.notify_all()
        if self._is_lost(peer) and not was_lost:
            position = peer.position
            if position is not None and position.state == RAISED and position.peer is not None:
                self.gave_up[peer.rank] = peer.heard - position.age_s
            if self.own_status.busy:
                if self._ends_wait(peer):
                    self.trouble()
            else:  # no call is there that could raise it
                _log.info("rank %d on %s is lost, no further call can be made", peer.rank, peer.host)

    def _ends_wait(self, peer: _Peer) -> bool:
        """Whether this rank need not wait any more, now that a peer is lost.

        One that gave up on another has done its part up to there: for others than it, this rank waits on.
        """
        if peer.rank not in self.gave_up or self.collective or len(self.gave_up) == self.size - 1:
            return True
        return self.own_status.awaits(peer.rank)

    def _hear_stranger(self, line: Line) -> None:
        """A rank that says who it is, or a program that asks for the picture; anything else is sent away."""
        try:
            records = line.take()
        except EOFError:
            records = [{}]
        if not records:
            return
        hello = records[0] if isinstance(records[0], dict) else {}
        self._selector.unregister(line.channel)
        known = secrets.compare_digest(str(hello.get("token", "")).encode(), self.token.encode())
        rank = hello.get("rank")
        peer = self._peers.get(rank) if isinstance(rank, int) else None
        if known and peer is not None and peer.line is None:
            peer.line = line
            self._selector.register(line.channel, selectors.EVENT_READ, peer)
            self._take_in(peer, records[1:])
            return
        if known and hello.get("ask"):
            line.put({"size": self.size, "sights": [asdict(status) for status in self.statuses()]})
            _send(line)
        line.channel.close()

    def _note(self, peer: _Peer, record: Any) -> None:
        """Whatever a peer says shows that it is there; what cannot be read is another version's, and is passed over."""
        now = time.monotonic()
        said = record if isinstance(record, dict) else {}
        answered, beat = said.get("answer"), Heartbeat.of(said, self.size)
        with self._changed:
            peer.heard, peer.deaf_s = now, 0.0
            if isinstance(answered, int | float):
                peer.answered_s.append(now - answered)
                peer.asked = 0.0
            if beat is None:
                return
            peer.position, peer.unheard, peer.answers = beat.position, beat.unheard, beat.answers
            peer.near = beat.near
            self._changed.notify_all()
        if peer.line is not None:
            peer.line.put({"answer": beat.at})
            _send(peer.line)

    def _tell(self) -> None:
        self.pulse()
        now = time.monotonic()
        unheard = [peer.rank for peer in self._peers.values() if self._is_silent(peer, now)]
        position = asdict(self.own_status.position())
        near = list(self.near())
        record = {"at": now, "position": position, "unheard": unheard, "answers": self._answers(), "near": near}
        for peer in self._peers.values():
            if peer.line is not None and not peer.closed:
                peer.asked = peer.asked or now
                peer.line.put(record)
                _send(peer.line)

    def _close(self, strangers: list[Line]) -> None:
        lines = [peer.line for peer in self._peers.values() if peer.line is not None]
        for line in (*lines, *strangers):
            line.channel.close()
        for channel in (self._listener, self._wake_in, self._wake_out):
            channel.close()
        self._selector.close()


def _with_probe(status: PeerStatus, found: str | None) -> PeerStatus:
    if found is None:
        return status
    return replace(status, closed=status.closed or found == "refused", reachable=found == "accepted")


def _listen(rank: int, address: str, backlog: int) -> socket.socket:
    try:
        return socket.create_server((address, 0), family=_family(address), backlog=backlog)
    except OSError as refusal:
        there = ", ".join(map(str, list_interfaces()))
        raise ValueError(
            f"rank {rank} cannot listen at {address}: {refusal.strerror}; this machine has {there}"
        ) from refusal


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _line(channel: socket.socket) -> Line:
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.setblocking(False)
    return Line(channel)


def _send(line: Line) -> None:
    """Sends what can be sent; that the other end is gone shows when it is read from."""
    try:
        line.flush()
    except OSError:
        return


def ask(address: str, port: int, token: str, timeout_s: float = 2.0) -> list[PeerStatus]:
    """The picture that one rank has of its group. OSError or EOFError where it does not answer."""
    with socket.create_connection((address, port), timeout=timeout_s) as channel:
        line = Line(channel)
        line.put({"token": token, "ask": True})
        line.flush()
        until = time.monotonic() + timeout_s
        records: list[dict[str, Any]] = []
        with selectors.DefaultSelector() as ready:
            channel.setblocking(False)
            ready.register(channel, selectors.EVENT_READ)
            while not records:
                if not ready.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError(f"no answer from {address} port {port} within {timeout_s:g} s")
                records = line.take()
    told = records[0].get("sights") if isinstance(records[0], dict) else None
    if not isinstance(told, list):
        raise EOFError(f"what {address} port {port} answers is no picture of a group")
    try:
        return [_status(status, len(told)) for status in told]
    except (KeyError, TypeError) as other:
        raise EOFError(f"{address} port {port} answers as another version of megamoe does: {other}") from other


def _status(record: dict[str, Any], size: int) -> PeerStatus:
    known = {each.name: record[each.name] for each in fields(PeerStatus) if each.name in record}
    told = {name: tuple(record[name]) for name in ("unheard", "near")}
    told["answers"] = tuple(map(tuple, record["answers"]))
    return PeerStatus(**{**known, **told, "position": RankStatus.of(record["position"], size)})
