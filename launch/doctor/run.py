"""The picture of a run that goes on: what each rank does, asked of the ranks of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megamoe.catalog.wording import nearest
from megamoe.launch.lab.namespaces import enter_network
from megamoe.parallel.health.diagnosis import PeerStatus
from megamoe.parallel.health.heartbeat import ask
from megamoe.parallel.health.runs import listed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Picture:
    """A run as one of its ranks sees it."""

    run: str
    asked: int
    statuses: list[PeerStatus]

    def as_dict(self) -> dict[str, Any]:
        return {"run": self.run, "asked_rank": self.asked, "ranks": [_as_dict(status) for status in self.statuses]}


def look(run: str, timeout_s: float = 2.0) -> Picture:
    """The picture that the first rank that answers has. ValueError where no such run is on this machine.

    RuntimeError where none of its ranks answers: all are stopped, or stuck in something that holds Python.
    """
    runs = listed()
    if run not in runs:
        there = nearest(run, runs) if runs else "no run is listed here: name one with --run when it is launched"
        raise ValueError(f"no run is called {run!r} on this machine; {there}")
    said = []
    for rank in runs[run]:
        try:
            found = _in_network_of(rank.pid, partial(ask, rank.address, rank.port, rank.token, timeout_s))
        except (OSError, EOFError) as silence:
            said.append(f"rank {rank.rank} (process {rank.pid}): {silence or type(silence).__name__}")
        else:
            return Picture(run, rank.rank, found)
    raise RuntimeError(f"no rank of run {run!r} answers: {'; '.join(said)}")


def _as_dict(status: PeerStatus) -> dict[str, Any]:
    position = status.position
    return {
        "rank": status.rank,
        "host": status.host,
        "condition": condition(status),
        "heard_s_ago": status.heard_s,
        "position": None if position is None else asdict(position),
    }


def condition(status: PeerStatus) -> str:
    """A rank's condition in one word, as the rank that was asked knows it; nobody is probed for the picture."""
    return "silent" if status.silent and status.condition in ("working", "waiting", "outside") else status.condition


def _in_network_of(pid: int, ask_there: Callable[[], T]) -> T:
    """Runs in a thread that has moved to the network of a process, where that is another (ranks in a lab)."""
    there = Path(f"/proc/{pid}/ns/net")
    if not there.exists() or os.readlink(there) == os.readlink("/proc/self/ns/net"):
        return ask_there()

    def visit() -> T:
        enter_network(there)
        return ask_there()

    with ThreadPoolExecutor(1) as visitor:
        return visitor.submit(visit).result()
