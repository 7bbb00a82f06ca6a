"""The machine under the ranks, as the doctor sees it: cores, memory, limits, room, clock and network."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil

from megamoe.catalog.wording import plural
from megamoe.launch.doctor.check import GIB, Check, Examination, LookAt, gib
from megamoe.launch.lab.namespaces import check_lab
from megamoe.launch.process import LOOPBACK_UP, loopback_refusal
from megamoe.parallel.interfaces import candidates, choose, list_interfaces
from megamoe.schedule import limits

SHARED_MEMORY = Path("/dev/shm")
_TIMESYNC = Path("/run/systemd/timesync/synchronized")
_LEAST_FILES, _FILES = 4096, 65536
_LEAST_PROCESSES, _PROCESSES = 4096, 65536
if sys.platform == "darwin":  # whose kernel may refuse more files, and counts no threads
    _FILES, _LEAST_PROCESSES, _PROCESSES = 8192, 512, 2048
_NO_LIMIT = "this system has no such limit"
_GIB_PER_RANK = 2
_CLOCK_UNSYNCHRONISED = 5  # what adjtimex() returns: TIME_ERROR in <sys/timex.h>


def cores(examination: Examination) -> Check:
    """Cores that this process may use; ranks that share one wait for each other."""
    there, allowed, quota = os.cpu_count() or 1, limits.allowed_cores(), limits.cpu_quota()
    usable = min(allowed, quota or allowed)
    found = f"{usable:g} usable of {there}"
    if allowed < there:
        found += f", affinity leaves {allowed}"
    if quota is not None and quota < there:
        found += f", the control group allows {quota:g}"
    fix = f"use at most --ranks {max(1, int(usable))}"
    if usable < there:
        fix += ", or give this process more cores (taskset, docker --cpus)"
    return Check.needs("cores", usable >= examination.ranks, f"{found}; {plural(examination.ranks, 'rank')}", fix)


def memory(examination: Examination) -> Check:
    """Memory that ranks can still take, of the machine's and the control group's."""
    machine, room = psutil.virtual_memory(), _group_memory_left()
    free = machine.available if room is None else min(machine.available, room)
    found = f"{gib(free)} free of {gib(machine.total)}"
    if free < machine.available:
        found += ", by the control group's limit"
    enough = free >= _GIB_PER_RANK * GIB * examination.ranks
    fix = f"end what takes it, or use fewer ranks: each wants {_GIB_PER_RANK} GiB at least"
    return Check.needs("memory", enough, found, fix)


def shared_memory(_: Examination) -> Check:
    """/dev/shm, where NCCL and Ray put what processes of a machine share; docker makes it 64 MiB."""
    if not SHARED_MEMORY.is_dir():
        return Check.ok("shared memory", f"this system has no {SHARED_MEMORY}")
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{SHARED_MEMORY} {gib(usage.total)}, {gib(usage.free)} free"
    if usage.total < GIB:
        fix = "docker run --shm-size=8g, or as root: mount -o remount,size=8g /dev/shm"
        return Check("shared memory", "warn", found, fix)
    return Check.needs("shared memory", usage.free >= GIB, found, "ls -lh /dev/shm, and delete what dead runs left")


def temporary_files(_: Examination) -> Check:
    """Where checkpoints of the demo and Ray's sessions go."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    fix = "set TMP=C:\\where\\there\\is\\room" if sys.platform == "win32" else "export TMPDIR=/where/there/is/room"
    return Check.needs("temporary files", free >= GIB, f"{folder}, {gib(free)} free", fix)


def open_files(_: Examination) -> Check:
    """Every pair of ranks has connections, and Ray has many more."""
    return _limited("open files", "nofile", "-n", _LEAST_FILES, _FILES)


def processes(_: Examination) -> Check:
    """Processes and threads of the user: a rank has some fifty, a Ray node hundreds."""
    return _limited("processes", "nproc", "-u", _LEAST_PROCESSES, _PROCESSES)


def locked_memory(examination: Examination) -> Check:
    """Memory that may be pinned: RDMA registers its buffers by pinning them, gloo over TCP needs none."""
    limits_here = _limits("memlock")
    if limits_here is None:
        return Check.ok("locked memory", _NO_LIMIT)
    soft, _ = limits_here
    if soft >= GIB or examination.device == "cpu":
        return Check.ok("locked memory", _limit(soft, 2**20, " MiB") + "; matters for RDMA only")
    fix = "ulimit -l unlimited, or docker run --ulimit memlock=-1; not needed without RDMA"
    return Check("locked memory", "warn", _limit(soft, 2**20, " MiB"), fix)


def clock(_: Examination) -> Check:
    """The clock that waits go by, and whether the time of day can be compared between machines, as timelines do."""
    info = time.get_clock_info("monotonic")
    found = f"monotonic to {info.resolution * 1e9:g} ns"
    synchronised = _synchronised()
    if synchronised is None:
        return Check.ok("clock", f"{found}; whether NTP sets the time of day is unknown here")
    found += f"; NTP {'sets' if synchronised else 'does not set'} the time of day"
    fix = "timedatectl set-ntp true, or start chronyd; needed for timelines of several machines only"
    return Check.needs("clock", synchronised, found, fix)


def interfaces(examination: Examination) -> Check:
    """The interface that ranks will use, and what else there would be. ValueError where the named one is not there."""
    there = list_interfaces()
    if examination.interface is None and not any(interface.up for interface in there):
        return Check("interfaces", "fail", "none is up: ranks have nowhere to meet", LOOPBACK_UP)
    chosen = choose(name=examination.interface)
    several = candidates(there)
    if examination.interface is not None:
        why = "as asked for"
    elif chosen.loopback:
        why = "only loopback is up: ranks of this machine alone"
    else:
        why = "the only one" if len(several) == 1 else "where the default route goes, or else the first"
    others = [str(interface) for interface in there if interface.name != chosen.name]
    found = f"{chosen}: {why}" + (f"; also {', '.join(others)}" if others else "")
    fix = f"megamoe doctor --interface {chosen.name}  # or the one that the other machines are reached by"
    return Check.needs("interfaces", examination.interface is not None or len(several) < 2, found, fix)


def loopback(_: Examination) -> Check:
    """Whether this machine's ranks can meet over its own loopback interface."""
    refusal = loopback_refusal()
    if refusal:
        return Check("loopback", "fail", refusal, LOOPBACK_UP)
    return Check.ok("loopback", "127.0.0.1 answers: ranks of this machine meet there")


def lab(_: Examination) -> Check:
    """Whether megamoe lab can shape links here. No fault if not: the ranks do not need it."""
    try:
        check_lab()
    except ValueError as refusal:
        return Check.ok("lab", f"not available: {refusal}")
    return Check.ok("lab", f"root, ip and tc are there; {_delays()}")


LOOK_AT: tuple[LookAt, ...] = (
    cores,
    memory,
    shared_memory,
    temporary_files,
    open_files,
    processes,
    locked_memory,
    clock,
    interfaces,
    loopback,
    lab,
)


def _group_memory_left() -> int | None:
    """Bytes that control groups leave this process, None where nothing bounds it. Their page cache can be had back."""
    left = []
    for names, usages in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for limit, usage in zip(
            limits.group_files("memory", names), limits.group_files("memory", usages), strict=False
        ):
            if limit != "max" and int(limit) < psutil.virtual_memory().total:
                left.append(int(limit) - int(usage))
    return None if not left else max(0, min(left))


def _limits(name: str) -> tuple[float, float] | None:
    """A limit of this process, soft and hard, infinite where nothing bounds it; None where the system has none such."""
    if sys.platform == "win32":
        return None
    import resource

    found = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
    soft, hard = (math.inf if each == resource.RLIM_INFINITY else each for each in found)
    return soft, hard


def _limited(check: str, name: str, flag: str, least: int, wanted: int) -> Check:
    """Whether a limit leaves room for `least`; else what raises it, as far as the hard limit lets it, and that one."""
    limits_here = _limits(name)
    if limits_here is None:
        return Check.ok(check, _NO_LIMIT)
    soft, hard = limits_here
    further = f"/etc/security/limits.conf or docker --ulimit {name}={wanted}"
    if sys.platform == "darwin":
        further = f"sudo launchctl limit {'maxfiles' if name == 'nofile' else 'maxproc'} {wanted} {wanted}"
    fix = f"ulimit {flag} {_limit(hard)}  # more needs {further}"
    if hard >= wanted:
        fix = f"ulimit {flag} {wanted}"
    elif soft == hard:
        fix = f"raise the hard limit: {further}"
    return Check.needs(check, soft >= least, f"limit {_limit(soft)}, hard {_limit(hard)}", fix)


def _limit(limit: float, unit: int = 1, name: str = "") -> str:
    return "unlimited" if limit == math.inf else f"{int(limit) // unit}{name}"


def _synchronised() -> bool | None:
    """Whether something keeps the clock right, None where the system does not say."""
    if _TIMESYNC.exists():
        return True
    if sys.platform != "linux":
        return None
    asked = ctypes.create_string_buffer(1024)  # struct timex, larger than any; all zero: change nothing
    state = ctypes.CDLL(None).adjtimex(asked)
    return None if state < 0 else state != _CLOCK_UNSYNCHRONISED


def _delays() -> str:
    """Whether links can have a latency: that takes sch_netem, of the kernel itself or a module to be loaded."""
    modules = Path("/lib/modules") / platform.release()
    lists = [path for path in (modules / "modules.builtin", modules / "modules.dep") if path.is_file()]
    if Path("/sys/module/sch_netem").exists() or any(b"/sch_netem.ko" in path.read_bytes() for path in lists):
        return "links can be delayed"
    return "the kernel module sch_netem for delays was not found" if lists else "whether it can delay links is unknown"
