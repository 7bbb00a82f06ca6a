"""After a batch that failed: which seats have to be replaced, and which error tells best what happened.

Pure functions over outcomes: what each rank's call came to, as the cluster collected it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamoe.launch.seats import SeatLostError
from megamoe.parallel.errors import PeerError


class StuckError(RuntimeError):
    """A rank did not answer, though the others had and the deadline was long past."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Whether and how a group comes back.

    restarts    how often, over the whole life of the cluster
    backoff_s   wait before the first of several restarts in a row; each further one waits twice as long, 30 s at most
    elastic     (least, most) ranks: where a seat cannot be had again the group goes on without it, and takes it back
                when it can; None keeps the number of ranks
    retry_s     how long after a failed try a seat that is out is tried again
    """

    restarts: int = 0
    backoff_s: float = 0.5
    elastic: tuple[int, int] | None = None
    retry_s: float = 5.0

    def __post_init__(self) -> None:
        if self.restarts < 0 or self.backoff_s < 0 or self.retry_s <= 0:
            raise ValueError(
                f"restarts {self.restarts} and backoff_s {self.backoff_s} must not be negative, "
                f"retry_s {self.retry_s} must be positive"
            )
        if self.elastic is not None and not 1 <= self.elastic[0] <= self.elastic[1]:
            raise ValueError(f"elastic must be (least, most) with 1 <= least <= most, got {self.elastic}")

    def wait_s(self, in_a_row: int) -> float:
        """Before the in_a_row-th restart without a batch in between.    0.5: 0.5, 1, 2, ..., 30"""
        return min(30.0, self.backoff_s * 2.0 ** (in_a_row - 1))


def parse_elastic(text: str) -> tuple[int, int]:
    """'2:4' -> (2, 4). ValueError for anything else."""
    least, colon, most = text.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal()):
        raise ValueError(f"elastic must be MIN:MAX, such as 2:4, got {text!r}")
    return int(least), int(most)


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch that failed.

    replace   ranks whose seats are to be started anew
    error     what to raise where the group does not come back
    retry     whether starting anew can help: not where the request itself was wrong
    """

    replace: tuple[int, ...]
    error: Exception
    retry: bool

    @property
    def summary(self) -> str:
        return str(self.error).partition("\n")[0]


def judge(outcomes: Sequence[Any], alive: Mapping[int, bool]) -> Failure | None:
    """What is to be done, None where no rank failed. outcomes[r] is a rank's result or the exception that it came to.

    A rank whose process is gone or that never answered is replaced; so is one that raised an error of its own, and the
    one that most of the others name. Ranks that only lost a peer stay, with all that they have loaded.
    """
    errors = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Exception)}
    if not errors:
        return None
    wrong = [error for error in errors.values() if isinstance(error, ValueError)]
    gone = [rank for rank, error in errors.items() if isinstance(error, SeatLostError | StuckError)]
    gone += [rank for rank, here in alive.items() if not here and rank not in gone]
    if wrong and not gone:
        return Failure((), wrong[0], retry=False)
    # where a rank is gone the others' errors are of that, whatever their kind
    own = [] if gone else [rank for rank, error in errors.items() if not isinstance(error, PeerError)]
    lost_peer = [error for error in errors.values() if isinstance(error, PeerError)]
    named = Counter(error.rank for error in lost_peer)
    blamed = [] if gone or own else [named.most_common(1)[0][0]]
    if own:
        told: Exception = errors[own[0]]
    else:
        told = next((error for error in lost_peer if error.rank in (*gone, *blamed)), errors[(*gone, min(errors))[0]])
    return Failure(tuple(sorted({*gone, *own, *blamed})), told, retry=True)
