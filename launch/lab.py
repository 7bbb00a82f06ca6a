"""The lab: a network namespace per rank on one Linux machine, so that ranks have real links of a real bandwidth.

Every rank's namespace hangs on a switch in a namespace of its own, so nothing of the lab shows among the machine's own
interfaces. A token bucket shapes both directions of each link; a transfer then waits without using the CPU, and
overlap can be measured. Names carry the id and start time of the process that made them: two labs can stand side by
side, and the next start removes what a killed one left.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMESPACES = Path("/run/netns")
_PREFIX = "megamoe"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BURST_S, _BURST_BYTES = 0.004, 128 * 1024  # a bucket holds what passes in 4 ms, or two of the kernel's large packets


@dataclass(frozen=True, slots=True)
class Host:
    """Where a rank lives: its network namespace (None for the machine's own), address and interface."""

    namespace: str | None
    address: str
    interface: str

    def enter(self) -> None:
        """Moves the calling thread, and the threads it will start, into the namespace."""
        if self.namespace is None:
            return
        handle = os.open(NAMESPACES / self.namespace, os.O_RDONLY)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(handle, _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"cannot enter network namespace {self.namespace}: {os.strerror(number)}")
        finally:
            os.close(handle)


def parse_rate(text: str) -> float:
    """Bits per second of a rate as tc writes it.    "1gbit" -> 1e9    "250mbit" -> 2.5e8

    ValueError for anything else, with what it should look like.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"link {text!r} is not a rate such as 1gbit, 2.5gbit or 500mbit")
    return float(match[1]) * _UNITS[match[2]]


def check_lab() -> None:
    """ValueError that says what to install or how to run where this machine cannot hold a lab."""
    if not sys.platform.startswith("linux"):
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
def lab(num_ranks: int, link: str, *, latency_ms: float = 0.0) -> Iterator[list[Host]]:
    """Hosts for num_ranks ranks on links of `link` each way, one way latency_ms; taken down however the block ends.

    ValueError where the machine cannot hold a lab, or its kernel cannot delay packets and latency_ms is not 0.
    """
    bits_per_s = parse_rate(link)
    if not 1 <= num_ranks <= 250:
        raise ValueError(f"a lab holds 1 to 250 ranks, got {num_ranks}")
    if latency_ms < 0:
        raise ValueError(f"latency_ms must not be negative, got {latency_ms}")
    check_lab()
    sweep()
    run = f"{_PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
    try:
        yield _build(run, num_ranks, bits_per_s, latency_ms)
    finally:
        remove(run)


def sweep() -> list[str]:
    """Removes labs whose process is gone; their names."""
    gone = []
    for run in runs():
        _, process, started, _ = run.split("-")
        if _start_time(int(process)) != started:
            remove(run)
            gone.append(run)
    return gone


def runs() -> list[str]:
    """Names of the labs that stand on this machine."""
    if not NAMESPACES.is_dir():
        return []
    matches = (re.match(rf"({_PREFIX}-\d+-\d+-\d+)-(?:switch|r\d+)$", path.name) for path in NAMESPACES.iterdir())
    return sorted({match[1] for match in matches if match})


def remove(run: str) -> None:
    """Ends what still runs in a lab's namespaces and deletes them; a lab that is not there is no error."""
    for path in sorted(NAMESPACES.glob(f"{run}-*")):
        listed = subprocess.run(["ip", "netns", "pids", path.name], capture_output=True, text=True, check=False)
        for process in map(int, listed.stdout.split()):
            if process != os.getpid():
                _kill(process)
        subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


def _build(run: str, num_ranks: int, bits_per_s: float, latency_ms: float) -> list[Host]:
    switch = f"{run}-switch"
    _ip(f"netns add {switch}")
    _ip(f"-n {switch} link add name bridge type bridge")
    _ip(f"-n {switch} link set bridge up")
    hosts = []
    for rank in range(num_ranks):
        host = Host(f"{run}-r{rank}", f"10.77.0.{rank + 1}", "link0")
        _ip(f"netns add {host.namespace}")
        _ip(f"-n {switch} link add port{rank} type veth peer name {host.interface} netns {host.namespace}")
        _ip(f"-n {switch} link set port{rank} master bridge up")
        _ip(f"-n {host.namespace} addr add {host.address}/24 dev {host.interface}")
        _ip(f"-n {host.namespace} link set {host.interface} up")
        _ip(f"-n {host.namespace} link set lo up")
        # the rank's own end shapes what it sends, the switch's end what it receives
        _shape(host.namespace or "", host.interface, bits_per_s, latency_ms)
        _shape(switch, f"port{rank}", bits_per_s, 0.0)
        hosts.append(host)
    return hosts


def _shape(namespace: str, interface: str, bits_per_s: float, latency_ms: float) -> None:
    burst = burst_bytes(bits_per_s)
    _run(
        f"tc -n {namespace} qdisc add dev {interface} root handle 1: "
        f"tbf rate {int(bits_per_s)}bit burst {burst} latency 50ms"
    )
    if latency_ms:
        try:
            _run(f"tc -n {namespace} qdisc add dev {interface} parent 1:1 netem delay {latency_ms}ms limit 100000")
        except RuntimeError as refusal:
            raise ValueError(f"latency_ms {latency_ms} needs the kernel module sch_netem: {refusal}") from refusal


def _ip(arguments: str) -> None:
    _run(f"ip {arguments}")


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip() or f'exit code {done.returncode}'}")


def _start_time(process: int) -> str:
    """Start time of a process in clock ticks since boot, "" where there is none: with the id, its name for good."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
