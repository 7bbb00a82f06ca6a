"""What the system leaves this process of the machine's cores: by affinity, and by its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CORES = Path("/sys/devices/system/cpu")


def cores() -> int:
    """Cores that this process may use at once, at least 1: those it may run on, or whole ones that it has time for."""
    quota = cpu_quota()
    return allowed_cores() if quota is None else max(1, min(allowed_cores(), int(quota)))


def allowed_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores' worth of time that control groups leave this process, None where nothing bounds it or does not say so."""
    shares = []
    for text in group_files("cpu", "cpu.max"):  # version 2: "200000 100000" or "max 100000"
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            shares.append(int(quota) / int(period))
    periods = list(group_files("cpu", "cpu.cfs_period_us"))
    for quota, period in zip(group_files("cpu", "cpu.cfs_quota_us"), periods, strict=False):  # version 1, -1: none
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def cache_bytes() -> int:
    """Of the last level of cache of the cores that this process may run on, each cache once; 0 where nobody says.

    Linux alone says so. A cache is "32768K" in its size and "0-7" in shared_cpu_list.
    """
    sizes = {"K": 1 << 10, "M": 1 << 20}
    found: dict[tuple[int, str], int] = {}
    for core in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        for cache in _CORES.glob(f"cpu{core}/cache/index*"):
            try:
                level, size, shared = (
                    (cache / name).read_text(encoding="utf-8").strip() for name in ("level", "size", "shared_cpu_list")
                )
                found[int(level), shared] = int(size[:-1]) * sizes[size[-1]]
            except (OSError, ValueError, KeyError, IndexError):
                continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def group_files(controller: str, name: str) -> Iterator[str]:
    """What a file says in each of this process's control groups that lets it be read, its own first, then those around.

    Lines of /proc/self/cgroup are "0::/path" (version 2) and "4:memory:/path" (version 1, a tree per controller).
    """
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        inside = Path(path.lstrip("/"))
        for folder in (inside, *inside.parents):
            try:
                text = (root / folder / name).read_text(encoding="utf-8")
            except OSError:
                continue
            yield text.strip()
