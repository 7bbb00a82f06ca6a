"""What a new process inherits: two of these that are equal say that a server's fork is as good as a fresh process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

# variables that are read when they are used, if ever, and are handed over with every start: of terminals, of pytest,
# which changes its own for every test, of torch, which sets one when transformers asks what it can compile, and of Ray,
# which sets some when it is imported
_READ_WHEN_USED = {"COLUMNS", "LINES", "NO_COLOR", "PYTEST_CURRENT_TEST", "PYTHONBREAKPOINT", "TORCHINDUCTOR_CACHE_DIR"}
_OF_RAY = "RAY_"
_STATUS = {"Uid", "Gid", "Groups", "Umask", "SigIgn", "CapInh", "CapPrm", "NoNewPrivs", "Seccomp", "Cpus_allowed"}


def surroundings() -> dict[str, Any]:
    """What a process that this one starts now has from it, by Linux's /proc: none of it is this process's alone.

    Its id is among it, so that a fork of the process that began a server is told apart. Streams, working directory
    and sys.path are not: they are handed over with every start.
    """
    if sys.platform != "linux":
        raise AssertionError("context() comes first")
    import resource

    limits = [value for name, value in sorted(vars(resource).items()) if name.startswith("RLIMIT_")]
    own = Path("/proc/self")
    return {
        "process": os.getpid(),
        "group": os.getpgrp(),
        "session": os.getsid(0),
        "program": (sys.executable, *sys.flags),
        "environment": {name: value for name, value in os.environ.items() if _read_early(name)},
        "status": _status((own / "status").read_text(encoding="utf-8")),
        "limits": [resource.getrlimit(limit) for limit in limits],
        "scheduling": (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)),
        "cgroup": (own / "cgroup").read_text(encoding="utf-8"),
        "memory": (own / "oom_score_adj").read_text(encoding="utf-8"),
        "namespaces": {kind.name: os.readlink(kind) for kind in (own / "ns").iterdir()},
        "root": os.readlink(own / "root"),
    }


def unsearched_folder() -> str | None:
    """The working directory, where this process does not look for modules in it, as processes may that it starts."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it has been removed
        return None
    return None if here in map(os.path.realpath, sys.path) else here


def _read_early(name: str) -> bool:
    """Whether a library may read the variable while it is imported, as far as is known."""
    return name not in _READ_WHEN_USED and not name.startswith(_OF_RAY)


def _status(text: str) -> dict[str, str]:
    lines = dict(line.split(":", 1) for line in text.splitlines())
    found = {name: value.strip() for name, value in lines.items() if name in _STATUS}
    ignored = int(found["SigIgn"], 16) & ~(1 << (signal.SIGINT - 1))  # which every start settles by itself
    return {**found, "SigIgn": f"{ignored:x}"}
