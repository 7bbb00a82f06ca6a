"""Errors of a group: the one that names a rank (who did not answer, where, when), and the one that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields


class CallRefusedError(ValueError):
    """All ranks of a group refused a call together, before any row moved: the group can be used again."""


@dataclass(eq=False)
class PeerError(RuntimeError):
    """A rank was lost, stalled past the deadline, or its link broke. The group cannot be used any more.

    rank, host   the peer to blame, in the group's numbering
    phase        "counts", "dispatch", "combine", ...
    layer        name of the layer that waited          wave    its wave, None outside of waves
    waited_s     how long this rank waited              reason  what the transport said
    condition    "dead", "unreachable", "stopped", "stalled", "raised", "left", "absent", "undelivered", "slow" or
                 "cut off" (this rank itself); "" where the ranks have no heartbeat and only the transport was heard
    meaning      that in words
    picture      a line for every rank: what it was last seen to do, and how long ago
    global_rank  the peer's rank in the whole program, where the group numbers its ranks otherwise; else None
    """

    rank: int
    host: str
    phase: str
    layer: str
    wave: int | None
    waited_s: float
    deadline_s: float
    reason: str
    condition: str = ""
    meaning: str = "did not deliver"
    picture: tuple[str, ...] = ()
    global_rank: int | None = None

    def __str__(self) -> str:
        wave = "" if self.wave is None else f", wave {self.wave}"
        who = named(self.rank, self.global_rank)
        lines = [
            f"{who} on {self.host} {self.meaning}: layer {self.layer!r}{wave}, phase {self.phase}, "
            f"after {self.waited_s:.1f} s (deadline {self.deadline_s:g} s): {self.reason}"
        ]
        return "\n  ".join([*lines, *self.picture])

    def __reduce__(self) -> tuple[type[PeerError], tuple[object, ...], dict[str, object]]:
        notes: dict[str, object] = {"__notes__": self.__notes__} if hasattr(self, "__notes__") else {}
        return type(self), tuple(getattr(self, each.name) for each in fields(self)), notes


def named(rank: int, global_rank: int | None) -> str:
    """A rank as messages call it.    1, None -> "rank 1"    1, 5 -> "rank 1 (global rank 5)" """
    return f"rank {rank}" if global_rank in (None, rank) else f"rank {rank} (global rank {global_rank})"


def listed(ranks: Sequence[int], name: Callable[[int], str] = "rank {}".format) -> str:
    """[2] -> "rank 2"    [0, 1] -> "ranks 0, 1"    name: how messages call a rank"""
    names = [name(rank) for rank in ranks]
    return names[0] if len(names) == 1 else f"ranks {', '.join(each.removeprefix('rank ') for each in names)}"


def difference(term: str, values: Mapping[int, object], name: Callable[[int], str] = "rank {}".format) -> str:
    """What ranks have otherwise than one another; "" where the values, by rank, are alike.

    "waves", {0: 1, 1: 2, 2: 1} -> "waves is 1 on ranks 0, 2, 2 on rank 1"
    """
    having = {value: [rank for rank, other in values.items() if other == value] for value in values.values()}
    said = ", ".join(f"{value} on {listed(ranks, name)}" for value, ranks in having.items())
    return f"{term} is {said}" if len(having) > 1 else ""
