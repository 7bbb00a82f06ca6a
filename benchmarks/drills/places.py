"""Where drills are held: ranks in a lab, each with a link of its own or two sharing one, or ranks of this machine.

What strikes a rank from outside, and what must not be left when all ranks are gone, is the place's. Where ranks share a
host there is no link that is one rank's to be cut or slowed. There "cut" is a rank whose rows and pages still arrive
and whose signals do not: its peers wait for words that are never set, while its process and its heartbeat are well.
"slow" is a rank that is stopped for all but a five-hundredth of the time, which ends no call within a deadline of 2 s.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import psutil

from megamoe.launch.lab import faults
from megamoe.launch.lab.namespaces import Host, lab, processes, runs
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.waiter import Waiter
from megamoe.parallel.transport.host import HostTransport

LINK, SLOW_LINK = "1gbit", "10mbit"
_STOPPED_S, _RUNS_S = 0.499, 0.001
_SHM = Path("/dev/shm")

Blow = Callable[[], AbstractContextManager[object]]


class Place(Protocol):
    """Where the ranks of a drill are."""

    @property
    def hosts(self) -> Sequence[Host] | None:
        """Of each rank; None for this machine."""

    def look(self, pids: Sequence[int]) -> None:
        """Notes what the ranks hold, before one is struck."""

    def blows(self, victim: int, pids: Sequence[int]) -> Mapping[str, Blow]:
        """What strikes the processes of a rank, or of all, from outside, by fault, while a block runs."""

    def left(self) -> str:
        """What is there still once all processes were ended; "" for nothing."""


def _signals(pids: Sequence[int]) -> dict[str, Blow]:
    def send(number: signal.Signals) -> AbstractContextManager[object]:
        for pid in pids:
            os.kill(pid, number)
        return nullcontext()

    kill = partial(send, signal.SIGKILL)
    return {"kill": kill, "group": kill, "stop": partial(send, signal.SIGSTOP)}


# ---- a lab ----


class LabPlace:
    """Ranks in namespaces, each with a link of its own."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = hosts

    def look(self, pids: Sequence[int]) -> None:
        del pids

    def blows(self, victim: int, pids: Sequence[int]) -> Mapping[str, Blow]:
        name = str(self.hosts[0].lab)
        return {
            **_signals(pids),
            "cut": lambda: nullcontext(faults.cut(name, victim)),
            "slow": lambda: nullcontext(faults.slow(name, victim, SLOW_LINK)),
        }

    def left(self) -> str:
        """Processes that the hosts hold still, or the lab where it has been taken down."""
        left = [pid for host in self.hosts for pid in processes(host.namespace or "")]
        return f"processes {left}" if left else ""


@contextmanager
def in_lab(ranks: int, kind: type[LabPlace] = LabPlace, ranks_per_host: int = 1) -> Iterator[LabPlace]:
    with lab(ranks, LINK, ranks_per_host=ranks_per_host) as hosts:
        yield kind(hosts)
    if hosts[0].lab in runs():
        raise RuntimeError(f"the lab {hosts[0].lab} is there still")


class SharingPlace(LabPlace):
    """Ranks in namespaces, two in each."""

    def blows(self, victim: int, pids: Sequence[int]) -> Mapping[str, Blow]:
        del victim
        return {**_signals(pids), "slow": lambda: starved(pids[0])}


in_lab_of_two = partial(in_lab, kind=SharingPlace, ranks_per_host=2)


# ---- one host ----


class HostPlace:
    """Ranks that share this machine's memory."""

    hosts: Sequence[Host] | None = None

    def __init__(self) -> None:
        self._pids: set[int] = set()
        self._segments: set[str] = set()
        self._sockets: set[str] = set()
        self._files = _listed()

    def look(self, pids: Sequence[int]) -> None:
        self._pids.update(pids)
        for pid in pids:
            self._segments |= segments_of(pid)
            self._sockets |= _held(pid, "socket:[")
        if not self._segments:
            raise RuntimeError("the ranks map no memory of each other")

    def blows(self, victim: int, pids: Sequence[int]) -> Mapping[str, Blow]:
        del victim
        return {**_signals(pids), "slow": lambda: starved(pids[0])}

    def left(self) -> str:
        """Processes, segments that anyone still maps, sockets, and files in /dev/shm and for temporary use."""
        found = {
            "processes": sorted(filter(_runs, self._pids)),
            "segments": sorted(self._segments & set().union(*map(segments_of, psutil.pids()))),
            "sockets": sorted(self._sockets & _open_sockets()),
            "files": sorted(name for name in _listed() - self._files if self._is_ours(name)),
        }
        return ", ".join(f"{what} {which}" for what, which in found.items() if which)

    def _is_ours(self, name: str) -> bool:
        """Other programs of the machine make files too; what a rank leaves has its process id in its name."""
        return bool({int(each) for each in re.findall(r"\d+", name)} & self._pids)


@contextmanager
def on_host(ranks: int) -> Iterator[HostPlace]:
    del ranks
    yield HostPlace()


@contextmanager
def starved(pid: int) -> Iterator[None]:
    """A process that is stopped for all but a five-hundredth of the time, for as long as the block runs."""
    over = threading.Event()

    def starve() -> None:
        with suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(_STOPPED_S)
                os.kill(pid, signal.SIGCONT)
                over.wait(_RUNS_S)

    starving = Waiter("starving a process").begin(starve)
    try:
        yield
    finally:
        over.set()
        starving.result()


def near(group: EPGroup) -> int:
    """How many ranks this one reaches through memory."""
    transport = group.transport
    return len(transport.host.near) if isinstance(transport, HostTransport) else 0


def lose_signals(group: EPGroup) -> None:
    """Has none of this rank's signals arrive from now on; what it writes does."""
    transport = group.transport
    assert isinstance(transport, HostTransport)
    assert transport.host.memory is not None
    for peer in transport.host.near:
        segment = transport.host.memory.peers[peer]
        segment.set = lambda word, value: None  # type: ignore[method-assign]  # noqa: ARG005


def _runs(pid: int) -> bool:
    """Whether a process is there that holds anything: one that has ended may wait for its parent to ask after it."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def segments_of(pid: int) -> set[str]:
    """Segments that a process maps or has open, by inode."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[4] for line in lines if "memfd:megamoe" in line} | _held(pid, "/memfd:megamoe")


def _held(pid: int, kind: str) -> set[str]:
    """Inodes of open files of a process whose targets begin so."""
    found = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(file).startswith(kind):
                    found.add(str(file.stat().st_ino))
    return found


def _open_sockets() -> set[str]:
    """Inodes of all sockets that this machine has; those that only wait out their time have none."""
    found = set()
    for table, column in (("tcp", 9), ("tcp6", 9), ("unix", 6)):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        found |= {line.split()[column] for line in lines}
    return found - {"0"}


def _listed() -> set[str]:
    """Files in /dev/shm and where temporary ones go."""
    folders = [each for each in (_SHM, Path(os.environ.get("TMPDIR", "/tmp"))) if each.is_dir()]
    return {str(file) for folder in folders for file in folder.iterdir()}


PLACES: Mapping[str, Callable[[int], AbstractContextManager[LabPlace | HostPlace]]] = {
    "lab": in_lab,
    "hosts": in_lab_of_two,
    "host": on_host,
}
