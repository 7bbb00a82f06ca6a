"""What was measured of this machine, kept in the user's cache folder: found again by CPU, kernels, version and ranks.

One small file for each combination, moved into place when it is whole: whoever reads beside a writer finds the old one
or the new one. A file that is damaged, or that another version wrote, counts as none and is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.schedule.limits import cores

if TYPE_CHECKING:
    from megamoe.catalog.machine import Machine


@dataclass(frozen=True, slots=True)
class Setting:
    """What constants hold for. kernels: the path that multiplies; shaped: ranks have links of a rate, not loopback.

    shared_memory: whether ranks of a host may share memory.
    """

    cpu: str
    cores: int
    kernels: str
    version: str
    threads_per_rank: int
    ranks: int
    shaped: bool
    shared_memory: bool = True

    @classmethod
    def here(
        cls, kernels: str, threads_per_rank: int, ranks: int, *, shaped: bool, shared_memory: bool = True
    ) -> Setting:
        """This machine's."""
        from megamoe import __version__

        return cls(processor(), cores(), kernels, __version__, threads_per_rank, ranks, shaped, shared_memory)

    @property
    def path(self) -> Path:
        """Where its constants are kept."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return folder() / f"{digest[:16]}.json"


def user_cache() -> Path:
    """Where what was made for this user stays: $XDG_CACHE_HOME/megamoe, by default ~/.cache/megamoe."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:  # nobody's home is known: a folder that does not exist holds nothing and takes nothing
        base = Path(os.devnull)
    return base / "megamoe"


def folder() -> Path:
    """Where machines are kept."""
    return user_cache() / "machines"


@lru_cache(maxsize=1)
def processor() -> str:
    """The CPU's model, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def find(setting: Setting) -> Machine | None:
    """The constants kept for a setting; None where there are none that can be read."""
    try:
        found = json.loads(setting.path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("setting") != asdict(setting):
        return None
    from pydantic import ValidationError

    from megamoe.catalog.machine import Machine

    try:
        return Machine.model_validate(found.get("machine"))
    except ValidationError:
        return None


def keep(setting: Setting, machine: Machine) -> str:
    """Keeps a setting's constants; why not, where the folder takes no file, else an empty text."""
    text = json.dumps({"setting": asdict(setting), "machine": machine.model_dump(exclude_defaults=True)}, indent=1)
    partial = None
    try:
        setting.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=setting.path.parent, suffix=".part", delete=False) as file:
            partial = file.name
            file.write(text.encode())
        os.replace(partial, setting.path)
    except OSError as reason:
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)
        return f"{setting.path.parent}: {reason.strerror or reason}"
    return ""
