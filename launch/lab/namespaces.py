"""The lab: a network namespace per host on one Linux machine, so that ranks have real links of a real bandwidth.

A host is one rank's, or several ranks' that are to share it: they have one link, and share memory as ranks of a machine
do. Every host's namespace hangs on a switch in a namespace of its own, so nothing of the lab shows among the machine's
own interfaces. A token bucket shapes both directions of each link; a transfer then waits without using the CPU, and
overlap can be measured. Two labs can stand side by side.

A lab's name says who owns it, and is all that there is to know it by: no file remembers a lab.

    megamoe-PID-START-N     lab(): the process with that id and start time. The next start sweeps it when that process
                            is gone.
    megamoe-NAME            keep(): nobody. NAME begins with a letter, so sweep leaves it; it stands until remove().

A lab's namespaces are its name with -switch behind it, and for each host -rRANK, or -rRANKxN of N ranks from RANK on.
The rate that it was built with is the alias of its bridge, which is written last: a lab without one is being built, or
its builder was killed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = Path("/run/netns")
INTERFACE, BRIDGE = "link0", "bridge"
PREFIX = "megamoe-"  # of every lab's name
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_KEPT_NAME = r"[a-z](?:[a-z0-9-]{0,30}[a-z0-9])?"
_OWNED_NAME = r"(\d+)-(\d+)-\d+"
_NAMESPACE = re.compile(
    rf"(?P<run>{PREFIX}(?:{_OWNED_NAME}|{_KEPT_NAME}))-(?:switch|r(?P<rank>\d+)(?:x(?P<ranks>\d+))?)"
)
_CLONE_NEWNET = 0x40000000
_LEAST_BITS_PER_S, _MOST_BITS_PER_S, _MOST_LATENCY_MS = 8, 1e12, 60e3
_numbers = itertools.count()
_BURST_S, _BURST_BYTES = 0.004, 128 * 1024  # a bucket holds what passes in 4 ms, or two of the kernel's large packets


def enter_network(place: Path) -> None:
    """Moves the calling thread, and the threads it will start, into the network namespace that a file stands for."""
    handle = os.open(place, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, f"cannot enter network namespace {place.name}: {os.strerror(number)}")
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Host:
    """Where a rank lives, perhaps with others: network namespace (None for the machine's own), address, interface."""

    namespace: str | None
    address: str
    interface: str

    @property
    def lab(self) -> str | None:
        """Name of the lab that the namespace belongs to, as runs() has it."""
        return self.namespace and self.namespace.rpartition("-")[0]

    @property
    def port(self) -> str:
        """The switch's end of its link, which bears the number of its first rank."""
        match = _NAMESPACE.fullmatch(self.namespace or "")
        assert match, self.namespace
        return f"port{match['rank']}"

    def enter(self) -> None:
        """Moves the calling thread, and the threads it will start, into the namespace."""
        if self.namespace is None:
            return
        enter_network(NAMESPACES / self.namespace)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose lab it is: a process, or nobody's (process None), to be kept until it is taken down."""

    process: int | None
    gone: bool = False

    def __str__(self) -> str:
        return "kept" if self.process is None else f"process {self.process}{', gone' if self.gone else ''}"


def parse_rate(text: str, what: str = "link") -> float:
    """Bits per second of a rate as tc writes it; `what` is what errors call it.    "1gbit" -> 1e9    "250mbit" -> 2.5e8

    ValueError for anything else, with what it should look like, and for what the kernel's token buckets do not hold.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(kbit|mbit|gbit)", text.strip().lower())
    bits_per_s = 0.0 if match is None else float(match[1]) * UNITS[match[2]]
    if not _LEAST_BITS_PER_S <= bits_per_s <= _MOST_BITS_PER_S:
        raise ValueError(f"{what} {text!r} is not a rate such as 1gbit, 2.5gbit or 500mbit, at most 1000gbit")
    return bits_per_s


def check_latency(latency_ms: float) -> None:
    """ValueError for what is no delay of up to a minute."""
    if not 0 <= latency_ms <= _MOST_LATENCY_MS:
        raise ValueError(f"latency_ms must be between 0 and {_MOST_LATENCY_MS:g}, got {latency_ms:g}")


def check_lab() -> None:
    """ValueError that says what to install or how to run where this machine cannot hold a lab."""
    if sys.platform != "linux":
        raise ValueError(f"shaped links need Linux network namespaces, this is {sys.platform}: leave out the link")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ValueError(f"shaped links need {' and '.join(missing)}: install iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise ValueError("shaped links need root, to make network namespaces: run with sudo, or leave out the link")


def burst_bytes(bits_per_s: float) -> int:
    """Bytes that pass a rested link at once.    1 Gbit/s -> 500 kB    100 Mbit/s -> 131 kB"""
    return max(_BURST_BYTES, int(bits_per_s / 8 * _BURST_S))


@contextmanager
def lab(num_ranks: int, link: str, *, latency_ms: float = 0.0, ranks_per_host: int = 1) -> Iterator[list[Host]]:
    """Each rank's host, on links of `link` each way, one way latency_ms; taken down however the block ends.

    ranks_per_host ranks after one another share a host; the last may have fewer. ValueError where the machine cannot
    hold a lab, or its kernel cannot delay packets and latency_ms is not 0.
    """
    bits_per_s = _check_request(num_ranks, link, latency_ms, ranks_per_host)
    sweep()
    run = f"{PREFIX}{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
    try:
        yield _build(_hosts(run, num_ranks, ranks_per_host), run, bits_per_s, latency_ms)
    finally:
        remove(run)


def keep(
    num_ranks: int, link: str, *, latency_ms: float = 0.0, ranks_per_host: int = 1, name: str | None = None
) -> list[Host]:
    """As lab(), but the lab stands until remove(hosts[0].lab), by default as lab1, lab2, ...; all of it or nothing.

    ValueError also for a name that is taken, or is not of up to 32 small letters, digits and hyphens.
    """
    bits_per_s = _check_request(num_ranks, link, latency_ms, ranks_per_host)
    if name is not None and not re.fullmatch(_KEPT_NAME, name):
        raise ValueError(
            f"name {name!r} is not of small letters, digits and hyphens, beginning with a letter, 32 at most"
        )
    sweep()
    with _one_builder():
        standing = runs()
        names = [name] if name else [f"lab{number}" for number in range(1, len(standing) + 2)]
        free = [run for run in (f"{PREFIX}{each}" for each in names) if run not in standing]
        if not free:
            raise ValueError(f"a lab called {name!r} stands already: choose another name, or megamoe lab down {name}")
        try:
            return _build(_hosts(free[0], num_ranks, ranks_per_host), free[0], bits_per_s, latency_ms)
        except BaseException:
            remove(free[0])
            raise


def sweep() -> list[str]:
    """Removes labs whose process is gone; their names. Kept labs stay."""
    gone = [run for run in runs() if owner(run).gone]
    for run in gone:
        remove(run)
    return gone


def runs() -> list[str]:
    """Names of the labs that stand on this machine."""
    if not NAMESPACES.is_dir():
        return []
    matches = (_NAMESPACE.fullmatch(path.name) for path in NAMESPACES.iterdir())
    return sorted({match["run"] for match in matches if match})


def owner(run: str) -> Owner:
    """Whose lab it is, as its name says."""
    match = re.fullmatch(PREFIX + _OWNED_NAME, run)
    return Owner(int(match[1]), gone=_start_time(int(match[1])) != match[2]) if match else Owner(None)


def switch(run: str) -> str:
    """Name of the namespace that holds the lab's bridge and the switch's ends of the links, port0, port1, ..."""
    return f"{run}-switch"


def hosts_of(run: str) -> list[Host]:
    """Each rank's host in a standing lab, in order of rank."""
    matches = [match for name in _namespaces(run) if (match := _NAMESPACE.fullmatch(name)) and match["rank"]]
    held = sorted((int(match["rank"]), int(match["ranks"] or 1)) for match in matches)
    return [host for first, ranks in held for host in [_host(run, first, ranks)] * ranks]


def processes(namespace: str) -> list[int]:
    """Ids of the processes whose network is this namespace; none where it is gone."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(process) for process in listed.stdout.split()]


def remove(run: str) -> list[int]:
    """Ends what still runs in a lab's namespaces, deletes them, and returns the ids of what it ended.

    A lab that is not there is no error. Signals such as Ctrl-C's wait for the end.
    """
    if sys.platform != "linux":
        raise AssertionError("check_lab() comes first")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        namespaces = _namespaces(run)
        ended = [process for each in namespaces for process in processes(each) if process != os.getpid()]
        for process in ended:
            _kill(process)
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
        return ended
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _namespaces(run: str) -> list[str]:
    """What stands of a lab, the switch first: what is left of a lab half removed is then not taken for a whole one."""
    names = [path.name for path in NAMESPACES.glob(f"{run}-*") if path.name.rpartition("-")[0] == run]
    return sorted((name for name in names if _NAMESPACE.fullmatch(name)), key=lambda name: name != switch(run))


@contextmanager
def _one_builder() -> Iterator[None]:
    """Holds the machine's lock on names, which the kernel lets go of when this process ends, however it ends."""
    if sys.platform != "linux":
        raise AssertionError("check_lab() comes first")
    import fcntl

    handle = os.open(NAMESPACES.parent, os.O_RDONLY)  # ip itself locks NAMESPACES
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_request(num_ranks: int, link: str, latency_ms: float, ranks_per_host: int) -> float:
    bits_per_s = parse_rate(link)
    if not 1 <= num_ranks <= 250:
        raise ValueError(f"a lab holds 1 to 250 ranks, got {num_ranks}")
    if ranks_per_host < 1:
        raise ValueError(f"ranks_per_host must be at least 1, got {ranks_per_host}")
    check_latency(latency_ms)
    check_lab()
    return bits_per_s


def _hosts(run: str, num_ranks: int, ranks_per_host: int) -> list[Host]:
    """Each rank's host in a lab that is to be built."""
    firsts = range(0, num_ranks, ranks_per_host)
    held = [(first, min(ranks_per_host, num_ranks - first)) for first in firsts]
    return [host for first, ranks in held for host in [_host(run, first, ranks)] * ranks]


def _host(run: str, first: int, ranks: int) -> Host:
    name = f"{run}-r{first}" if ranks == 1 else f"{run}-r{first}x{ranks}"
    return Host(name, f"10.77.0.{first + 1}", INTERFACE)


def _build(hosts: list[Host], run: str, bits_per_s: float, latency_ms: float) -> list[Host]:
    """hosts: each rank's, which are returned."""
    _ip(f"netns add {switch(run)}")
    _ip(f"-n {switch(run)} link add name {BRIDGE} type bridge")
    _ip(f"-n {switch(run)} link set {BRIDGE} up")
    for host in dict.fromkeys(hosts):
        _ip(f"netns add {host.namespace}")
        _ip(f"-n {switch(run)} link add {host.port} type veth peer name {host.interface} netns {host.namespace}")
        _ip(f"-n {switch(run)} link set {host.port} master {BRIDGE} up")
        _ip(f"-n {host.namespace} addr add {host.address}/24 dev {host.interface}")
        _ip(f"-n {host.namespace} link set {host.interface} up")
        _ip(f"-n {host.namespace} link set lo up")
        # the host's own end shapes what it sends, the switch's end what it receives
        shape(host.namespace or "", host.interface, bits_per_s)
        shape(switch(run), host.port, bits_per_s)
        if latency_ms:
            _delay(host.namespace or "", host.interface, latency_ms)
    _ip(f"-n {switch(run)} link set {BRIDGE} alias {int(bits_per_s)}")
    return hosts


def shape(namespace: str, interface: str, bits_per_s: float, verb: str = "add") -> None:
    """Bounds what leaves an interface; verb "change" does so to one that is bounded, and keeps its queue and delay."""
    run_tool(
        f"tc -n {namespace} qdisc {verb} dev {interface} root handle 1: "
        f"tbf rate {int(bits_per_s)}bit burst {burst_bytes(bits_per_s)} latency 50ms"
    )


def _delay(namespace: str, interface: str, latency_ms: float) -> None:
    try:
        run_tool(f"tc -n {namespace} qdisc add dev {interface} parent 1:1 netem delay {latency_ms}ms limit 100000")
    except RuntimeError as refusal:
        raise ValueError(f"latency_ms {latency_ms} needs the kernel module sch_netem: {refusal}") from refusal


def _ip(arguments: str) -> None:
    run_tool(f"ip {arguments}")


def run_tool(command: str) -> str:
    """What a command of ip or tc prints. RuntimeError with what it complains about."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _start_time(process: int) -> str:
    """Start time of a process in clock ticks since boot, "" where there is none: with the id, its name for good."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _kill(process: int) -> None:
    if sys.platform != "linux":
        raise AssertionError("check_lab() comes first")
    try:
        with open(os.pidfd_open(process), "rb", buffering=0) as handle:
            signal.pidfd_send_signal(handle.fileno(), signal.SIGKILL)
            select.select([handle], [], [], 5.0)  # readable once it has ended
    except ProcessLookupError:
        return


def sent_bytes(interface: str) -> int:
    """Bytes that have left an interface, with headers, in the network namespace of the calling thread.

    ValueError where there is no such interface.
    """
    for line in Path("/proc/thread-self/net/dev").read_text(encoding="utf-8").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface and counters:
            return int(counters.split()[8])  # after eight fields of what was received
    raise ValueError(f"there is no interface called {interface!r}")
