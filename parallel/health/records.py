"""A connection that carries records, and what a heartbeat says in one."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megamoe.parallel.health.status import RankStatus

_MOST_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")


class Line:
    """A connection that carries records: JSON behind a length."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._arrived, self._leaving = bytearray(), bytearray()

    def put(self, record: dict[str, Any]) -> None:
        """Queues a record. One that finds a megabyte waiting is dropped: whoever does not read needs no more of it."""
        if len(self._leaving) < _MOST_BYTES:
            body = json.dumps(record).encode()
            self._leaving += _LENGTH.pack(len(body)) + body

    @property
    def waiting(self) -> bool:
        """Whether something has yet to be sent."""
        return bool(self._leaving)

    def flush(self) -> None:
        """Sends what the kernel takes. OSError where the connection is gone."""
        try:
            while self._leaving:
                del self._leaving[: self.channel.send(self._leaving)]
        except BlockingIOError:
            return

    def take(self) -> list[Any]:
        """Records that have arrived, None for one that is no JSON: where it ends is known all the same.

        EOFError, once none is left, where the connection has ended.
        """
        ended = False
        try:
            while not ended:
                piece = self.channel.recv(65536)
                self._arrived += piece
                ended = not piece
        except BlockingIOError:
            pass
        except OSError:
            ended = True
        records: list[Any] = []
        while len(self._arrived) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._arrived)
            if size > _MOST_BYTES:
                raise EOFError("no record of a heartbeat")
            if len(self._arrived) < _LENGTH.size + size:
                break
            records.append(_parsed(self._arrived[_LENGTH.size : _LENGTH.size + size]))
            del self._arrived[: _LENGTH.size + size]
        if ended and not records:
            raise EOFError("the connection has ended")
        return records


def _parsed(body: bytearray) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(body)
    return None


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank tells four times a second.

    at        when, by its own clock; an answer repeats it
    position  where it is
    unheard   ranks that it does not hear
    answers   (rank, seconds) of those whose answers take longest to come to it
    near      ranks that it shares memory with
    """

    at: float
    position: RankStatus
    unheard: tuple[int, ...]
    answers: tuple[tuple[int, float], ...]
    near: tuple[int, ...]

    @classmethod
    def of(cls, record: dict[str, Any], size: int) -> Heartbeat | None:
        """None for a record that says nothing that could be used: it shows that the rank is there, and no more."""
        position = RankStatus.of(record.get("position"), size)
        at, lists = record.get("at"), [record.get(name, []) for name in ("unheard", "answers", "near")]
        if position is None or not isinstance(at, int | float) or not all(isinstance(each, list) for each in lists):
            return None
        unheard, answers, near = lists
        ranks, sharing = (tuple(rank for rank in each if _is_rank(rank, size)) for each in (unheard, near))
        pairs = (tuple(each) for each in answers if isinstance(each, list) and len(each) == 2)
        known = tuple(pair for pair in pairs if _is_rank(pair[0], size) and isinstance(pair[1], int | float))
        return cls(at, position, ranks, known, sharing)


def _is_rank(value: object, size: int) -> bool:
    return isinstance(value, int) and 0 <= value < size
