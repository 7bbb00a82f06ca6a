"""Calls of a group take turns: its buffers, its messages and its numbers serve one call at a time.

Threads. A call waits until the calls that came before it, from whatever thread, have ended. With several ranks the
calls of all of them must pair up: the n-th call of a rank meets the n-th of every other. Two threads that call the same
layer may come in any order, since a rank's tokens are its own affair. Where they call different layers the order must
be the same on all ranks; ranks on which it is not find out from the pages that open a call, and all refuse.

Streams. What a call queues on a device begins after what the group's previous call has queued, in whatever stream.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Queue(Protocol):
    """A stream of a device."""

    def wait_event(self, event: Any) -> None: ...


class Event(Protocol):
    """A place in a stream."""

    def record(self, stream: Any) -> None: ...


@dataclass(slots=True, eq=False)
class _Ticket:
    """One call that has its turn or waits for it; since: when it came or, once it has its turn, got it."""

    what: str
    thread: threading.Thread = field(default_factory=threading.current_thread)
    since: float = field(default_factory=time.monotonic)


_living: weakref.WeakSet[Turns] = weakref.WeakSet()


class Turns:
    """Who has a group's turn, who waits for it, and the layers that take turns.

    A copy begins anew: nobody has its turn. So does a process that is forked, which has none of the other threads.
    """

    def __init__(self) -> None:
        self._ended: dict[torch.device, Event] = {}
        self._layers: dict[str, list[weakref.ref[object]]] = {}
        self.begin()
        _living.add(self)

    def begin(self) -> None:
        """Nobody has the turn, and nobody waits for it."""
        self._changed = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._holder: _Ticket | None = None

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return type(self), ()

    def take(self, what: str, device: torch.device, deadline_s: float) -> _Turn:
        """Has the turn for the block, and gives it back however the block ends. what: for errors, "layer 'moe'".

        RuntimeError where this thread has the turn already, or waits for it: a signal handler or a hook that calls from
        inside of a call would wait for itself. RuntimeError where one other call keeps it for longer than deadline_s.
        """
        return _Turn(self, what, device, deadline_s)

    def _wait(self, ticket: _Ticket, deadline_s: float) -> None:
        with self._changed:
            self._refuse_reentry(ticket)
            self._waiting.append(ticket)
            while self._holder is not None or self._waiting[0] is not ticket:
                holder = self._holder
                begun = ticket.since if holder is None else max(holder.since, ticket.since)
                left = begun + deadline_s - time.monotonic()
                if left <= 0:
                    who = "" if holder is None else f": {holder.what} in thread {holder.thread.name!r}"
                    raise RuntimeError(
                        f"{ticket.what} in thread {ticket.thread.name!r} was kept waiting for its turn for "
                        f"{time.monotonic() - begun:.1f} s (deadline {deadline_s:g} s) by one call of its group{who}"
                    )
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            ticket.since = time.monotonic()
            self._holder = self._waiting.popleft()

    def _refuse_reentry(self, ticket: _Ticket) -> None:
        for other in (self._holder, *self._waiting):
            if other is not None and other.thread is ticket.thread:
                raise RuntimeError(
                    f"{ticket.what} was called from inside of a call of {other.what}, in thread {other.thread.name!r}: "
                    "a group's calls take turns, and this one would wait for itself"
                )

    def _leave(self, ticket: _Ticket) -> None:
        with self._changed:
            if self._holder is ticket:
                self._holder = None
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
            self._changed.notify_all()

    # ---- streams ----

    def _follow(self, device: torch.device) -> None:
        """Has the current stream wait for what the previous call queued, in this stream or another."""
        event = self._ended.get(device)
        if event is not None and (stream := queue_of(device)) is not None:
            stream.wait_event(event)

    def _mark(self, device: torch.device) -> None:
        stream = queue_of(device)
        if stream is not None:
            event = self._ended.get(device) or event_of(device)
            event.record(stream)
            self._ended[device] = event

    # ---- layers ----

    def number(self, layer: object, name: str) -> int:
        """Which of the living layers of that name it is, from 1, in the order in which this was first asked."""
        with self._changed:
            known = self._layers.get(name, ())
            if len(known) == 1 and known[0]() is layer:
                return 1
            living = [ref for ref in self._layers.get(name, ()) if ref() is not None]
            if not any(ref() is layer for ref in living):
                living.append(weakref.ref(layer))
            self._layers[name] = living
            return next(number for number, ref in enumerate(living, 1) if ref() is layer)


def _begin_in_child() -> None:
    for turns in list(_living):
        turns.begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


class _Turn:
    """A turn for a block. A class, since a generator costs a call of few tokens several times as much."""

    def __init__(self, turns: Turns, what: str, device: torch.device, deadline_s: float) -> None:
        self._turns, self._ticket, self._device, self._deadline_s = turns, _Ticket(what), device, deadline_s

    def __enter__(self) -> None:
        try:
            self._turns._wait(self._ticket, self._deadline_s)
            self._turns._follow(self._device)
        except BaseException:
            self._turns._leave(self._ticket)
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._turns._holder is self._ticket:  # not where it never came to have the turn
                self._turns._mark(self._device)
        finally:
            self._turns._leave(self._ticket)


class Taker(Protocol):
    """What takes turns: a layer, or its weights. group is its EPGroup, which can become another."""

    name: str
    device: torch.device

    @property
    def group(self) -> Any: ...


class TurnOf:
    """The turn of the group that a taker is in once it has it, for a block."""

    def __init__(self, taker: Taker) -> None:
        self._taker = taker

    def __enter__(self) -> None:
        while True:
            group = self._taker.group
            turn = group.turn(self._taker.name, self._taker.device)
            try:
                turn.__enter__()
                if group is self._taker.group:
                    self._turn: AbstractContextManager[None] = turn
                    return
            except BaseException:  # Ctrl-C, which may come when the turn has been taken
                turn.__exit__(None, None, None)
                raise
            turn.__exit__(None, None, None)

    def __exit__(self, *raised: Any) -> None:
        self._turn.__exit__(*raised)


def queue_of(device: torch.device) -> Queue | None:
    """The current stream of a device that has some; None on a CPU or Apple's GPU, and while a graph is captured.

    A graph's capture must not wait for what lies outside of it, and need not: its buffers are its own.
    """
    if device.type == "cpu":
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    current = getattr(torch.get_device_module(device), "current_stream", None)
    stream: Queue | None = None if current is None else current(device)
    return stream


def event_of(device: torch.device) -> Event:
    """An event that streams of the device can record and wait for."""
    event: Event = torch.get_device_module(device).Event()
    return event
