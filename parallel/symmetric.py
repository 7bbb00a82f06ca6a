"""Memory that the ranks of a host share: each has a segment of one layout, and writes into the segments of others.

A segment is an anonymous file (memfd): it has no name that another program could open, takes no room of /dev/shm, and
the kernel frees it when the last process that maps it is gone, however that process ended. Pages are taken when they
are first written, so a segment can be as large as the machine's memory, which ends first.

A rank writes rows into a region of another rank and then sets a word there to the number of the exchange; the other
rank waits for the word. What is for all, a page, a rank writes into a place of its own segment, where its peers read it
once the word says so. Stores must become visible in the order in which they are made: x86-64 promises that, so other
processors exchange messages instead.
"""

# P ranks of the group

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import secrets
import select
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TOKEN_BYTES, _WORD_BYTES = 16, 8
REGIONS = ("rows", "results")
PLACE_BYTES = 1024 * 1024  # of what a rank brings to an exchange; of a small call's page and tokens, too
MAX_WAVES = 4096
_ADDRESSES = 2**46
_SPIN_S = 50e-6  # what falling asleep and being woken costs, about, where each rank has a core
_SHORT_SPIN_S = 5e-6  # where ranks share cores, and the one that is waited for may want this one
_LOOKS = 20  # between looks at the clock
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


@dataclass(frozen=True, slots=True)
class Words:
    """Which word of a segment is for what, by index. Pages have two each, since a rank may be one exchange ahead."""

    size: int

    def page(self, exchange: int, sender: int) -> int:
        return (exchange % 2) * self.size + sender

    def rows(self, region: int, wave: int, sender: int) -> int:
        assert wave < MAX_WAVES
        return (2 + region * MAX_WAVES + wave) * self.size + sender

    @property
    def count(self) -> int:
        return (2 + len(REGIONS) * MAX_WAVES) * self.size


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offsets in a segment: token, words, pages, then one region after another."""

    size: int
    region_bytes: int

    @property
    def words(self) -> int:
        return mmap.PAGESIZE

    def place(self, number: int) -> int:
        """Two, used in turn, since a rank may be one exchange ahead of who reads."""
        return _aligned(self.words + _WORD_BYTES * Words(self.size).count) + number * PLACE_BYTES

    def region(self, index: int) -> int:
        return self.place(2) + index * self.region_bytes

    @property
    def total(self) -> int:
        return self.region(len(REGIONS))


def _aligned(offset: int) -> int:
    return -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank writes what all are to read: the same memory as a view, and as an address."""

    view: memoryview
    address: int

    @classmethod
    def of(cls, memory: Tensor) -> Place:
        """memory: contiguous, uint8, on the CPU."""
        return cls(memory.numpy().data, memory.data_ptr())


class Segment:
    """One rank's segment as this process maps it."""

    def __init__(self, file: int, layout: Layout) -> None:
        self._map = mmap.mmap(file, layout.total)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._address = self._bytes.data_ptr() + layout.words
        self._layout = layout
        end = layout.words + _WORD_BYTES * Words(layout.size).count
        self.words = memoryview(self._map)[layout.words : end].cast("Q")
        self.regions = {name: self._region(index) for index, name in enumerate(REGIONS)}
        self.addresses = {name: region.data_ptr() for name, region in self.regions.items()}
        self.places = tuple(Place.of(self._bytes[layout.place(each) :][:PLACE_BYTES]) for each in range(2))

    def _region(self, index: int) -> Tensor:
        begin = self._layout.region(index)
        return self._bytes[begin : begin + self._layout.region_bytes]

    def token(self) -> memoryview:
        """What tells this group's segments from whatever else a process may have open."""
        return memoryview(self._map)[:_TOKEN_BYTES]

    def words_from(self, word: int, count: int) -> Tensor:
        """Words from that one on, [count, 1] int64, for messages that end there."""
        begin = self._layout.words + _WORD_BYTES * word
        return self._bytes[begin : begin + _WORD_BYTES * count].view(torch.int64).unsqueeze(1)

    def set(self, word: int, value: int) -> None:
        """Sets a word, after all that this thread has written before, and wakes who waits for it."""
        self.words[word] = value
        _futex(self._address + _WORD_BYTES * word, _FUTEX_WAKE, 2**31 - 1, None)

    def sleep(self, word: int, seen: int, within_s: float) -> None:
        """Returns when the word may no longer be `seen`, or the time has passed."""
        _futex(self._address + _WORD_BYTES * word, _FUTEX_WAIT, seen % 2**32, within_s)  # the kernel sees its low half


class SymmetricMemory:
    """This rank's segment and those of the ranks that share its host.

    peers   segments by rank, this rank's own included, once attach() has found them

    OSError where the system grants no such file, or not the addresses for it.
    """

    own: Segment
    _file: int

    def __init__(self, rank: int, size: int) -> None:
        self._layout, self.words, self._rank = Layout(size, region_bytes(size)), Words(size), rank
        self._spin_s = _SHORT_SPIN_S
        self._processes: dict[int, int] = {}
        self.peers: dict[int, Segment] = {}
        if sys.platform != "linux":
            raise AssertionError("available() comes first")
        self._file = os.memfd_create("megamoe")
        os.ftruncate(self._file, self._layout.total)
        self.own = Segment(self._file, self._layout)
        self.own.token()[:] = secrets.token_bytes(_TOKEN_BYTES)
        self.peers[rank] = self.own

    def card(self) -> bytes:
        """What another rank needs to find this segment."""
        where = f"{host_key()} {os.getpid()} {self._file} {self._layout.total} {bytes(self.own.token()).hex()}"
        return where.encode()

    def attach(self, rank: int, card: bytes) -> bool:
        """Maps a rank's segment; False where it is of another host or may not be opened by this process."""
        if sys.platform != "linux":
            raise AssertionError("available() comes first")
        key, process, file, total, token = card.decode().split()
        if key != host_key() or int(total) != self._layout.total:
            return False
        try:
            self._processes[rank] = os.pidfd_open(int(process))
            opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        except OSError:  # of another user or of a process that may not be looked into: messages reach it all the same
            return False
        try:
            if os.fstat(opened).st_size != self._layout.total:
                return False
            segment = Segment(opened, self._layout)
        except OSError:  # addresses for it are not granted
            return False
        finally:
            os.close(opened)
        if bytes(segment.token()).hex() != token:
            return False
        self.peers[rank] = segment
        return True

    def keep(self, ranks: Collection[int]) -> None:
        """Lets go of the segments of all ranks but these and this one; no rank will open this one's any more."""
        if sys.platform != "linux":
            raise AssertionError("available() comes first")
        os.close(self._file)
        self._file = -1
        self.peers = {rank: segment for rank, segment in self.peers.items() if rank in ranks or rank == self._rank}
        if len(self.peers) <= len(os.sched_getaffinity(0)):
            self._spin_s = _SPIN_S

    def gone(self, rank: int) -> bool:
        """Whether the process of a rank has ended."""
        if sys.platform != "linux":
            raise AssertionError("available() comes first")
        poll = select.poll()
        poll.register(self._processes[rank], select.POLLIN)
        return bool(poll.poll(0))

    def wait(self, word: int, value: int, within_s: float, *, spin: bool) -> bool:
        """Waits for a word of this rank's segment -> whether it has come to that value in that time.

        spin: look at it for some microseconds before sleeping, which a thread beside the call's own must not do.
        It then sleeps: to yield the core instead would let all who want it go first, however short the wait.
        """
        words = self.own.words
        if words[word] == value:
            return True
        now = time.monotonic()
        end, spin_end = now + within_s, now + self._spin_s
        while spin and now < spin_end:
            for _ in range(_LOOKS):
                if words[word] == value:
                    return True
            now = time.monotonic()
        while (seen := words[word]) != value:
            left = end - time.monotonic()
            if left <= 0:
                return False
            self.own.sleep(word, seen, left)
        return True

    def close(self) -> None:
        """Lets go of everything; a segment stays mapped as long as a tensor of it is in use."""
        for process in self._processes.values():
            os.close(process)
        self._processes.clear()
        self.peers.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_file") and not ending():  # Python that ends has taken `os` away, and the kernel closes files
            self.close()


def region_bytes(size: int) -> int:
    """Bytes of one region of `size` ranks: the machine's memory, which no rank can have more rows than.

    On a host of very many ranks less: a process maps the regions of all, in half of the addresses that it has.
    """
    if sys.platform != "linux":
        raise AssertionError("available() comes first")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _aligned(min(memory, _ADDRESSES // (len(REGIONS) * size)))


def available() -> bool:
    """Whether ranks can share memory here: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and hasattr(os, "memfd_create")


def host_key() -> str:
    """The same for processes that can open each other's files by process id, and that a lab takes for one host."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ":".join([boot, *(str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "pid", "user"))])


def _futex(address: int, operation: int, value: int, within_s: float | None) -> None:
    timeout = None
    if within_s is not None:
        whole = int(within_s)
        timeout = ctypes.byref(_Timespec(whole, int((within_s - whole) * 1e9)))
    done = _SYSCALL(_SYS_FUTEX, address, operation, value, timeout, None, 0)
    if done < 0 and ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
        raise OSError(ctypes.get_errno(), "futex")


def _system_call() -> Any:
    """The C library's. None but on Linux: elsewhere ranks share no memory, and Windows has none without a name."""
    if sys.platform != "linux":
        return None
    call, word = ctypes.CDLL(None, use_errno=True).syscall, ctypes.c_uint32
    call.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, word, ctypes.c_void_p, ctypes.c_void_p, word)
    call.restype = ctypes.c_long
    return call


_SYSCALL = _system_call()
