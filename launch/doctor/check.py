"""What a check is, what it is told, and what the doctor says in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megamoe.launch.requests import check_seconds

State = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's.

    state   ok; warn: works, but not as it should; fail: ranks will not run
    found   what is there
    fix     for warn and fail: what to type or to do
    """

    name: str
    state: State
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.state == "ok") != (not self.fix):
            raise ValueError(f"check {self.name}: a fix belongs to warn and fail, got {self.state} with {self.fix!r}")

    @classmethod
    def ok(cls, name: str, found: str) -> Check:
        return cls(name, "ok", found)

    @classmethod
    def needs(cls, name: str, good: bool, found: str, fix: str, otherwise: State = "warn") -> Check:
        """ok where good, else `otherwise` with the fix."""
        return cls(name, "ok", found) if good else cls(name, otherwise, found, fix)


@dataclass(frozen=True, slots=True)
class Link:
    """What passes from one rank to another: gigabytes per second that way, microseconds one way of a message."""

    source: int
    target: int
    gb_s: float
    latency_us: float

    def as_dict(self) -> dict[str, Any]:
        return {"from": self.source, "to": self.target, "gb_s": self.gb_s, "latency_us": self.latency_us}


@dataclass(frozen=True, slots=True)
class Examination:
    """What the checks are told.

    ranks        ranks that are to run on this machine
    device       device type, one of DEVICE_TYPES
    interface    network interface that was asked for, None to choose one
    deadline_s   bound on all that is tried between ranks of one backend, their start included
    exchange     whether ranks are started to try backends and links
    """

    ranks: int
    device: str
    interface: str | None = None
    deadline_s: float = 20.0
    exchange: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= 256:
            raise ValueError(f"ranks must be in [1, 256], got {self.ranks}")
        check_seconds("deadline_s", self.deadline_s)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found. Links are those between every pair of ranks, both ways; none where they were not tried."""

    checks: tuple[Check, ...]
    links: tuple[Link, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings do not count."""
        return all(check.state != "fail" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "checks": [asdict(check) for check in self.checks],
            "links": [link.as_dict() for link in self.links],
            "ok": self.ok,
        }


LookAt = Callable[[Examination], Check]


def gib(num_bytes: float) -> str:
    """2**30 -> "1.0 GiB" """
    return f"{num_bytes / GIB:.1f} GiB"
