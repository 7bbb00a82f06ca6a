"""After a batch that failed: which workers have to be replaced, and which error tells best what happened.

collect() waits for what each rank's call comes to; what follows from that is pure functions.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

from megamoe.launch.cluster.worker_handle import WorkerLostError
from megamoe.parallel.errors import PeerError

NAMED_S = 5.0  # for a rank that the others have named to answer all the same: what it says can tell more


class StuckError(RuntimeError):
    """A rank did not answer, though the others had and the deadline was long past."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Whether and how a group comes back.

    restarts    how often, over the whole life of the cluster
    backoff_s   wait before the first of several restarts in a row; each further one waits twice as long, 30 s at most
    elastic     (least, most) ranks: where a worker cannot be had again within the cluster's deadline the group goes on
                without it, and takes it back between batches when it can; None keeps the number of ranks
    retry_s     how long after a failed try a worker that is out is tried again
    """

    restarts: int = 0
    backoff_s: float = 0.5
    elastic: tuple[int, int] | None = None
    retry_s: float = 5.0

    def __post_init__(self) -> None:
        if not isinstance(self.restarts, int) or self.restarts < 0:
            raise ValueError(f"restarts must be an integer of 0 or more, got {self.restarts!r}")
        if not isinstance(self.backoff_s, int | float) or not 0 <= self.backoff_s < math.inf:
            raise ValueError(f"backoff_s must be 0 or more and finite, got {self.backoff_s!r}")
        if not isinstance(self.retry_s, int | float) or not 0 < self.retry_s < math.inf:
            raise ValueError(f"retry_s must be positive and finite, got {self.retry_s!r}")
        if self.elastic is not None and not _is_range(self.elastic):
            raise ValueError(f"elastic must be (least, most) with 1 <= least <= most, got {self.elastic!r}")

    def wait_s(self, in_a_row: int) -> float:
        """Before the in_a_row-th restart without a batch in between.    0.5: 0.5, 1, 2, ..., 30"""
        return min(30.0, self.backoff_s * 2.0 ** min(in_a_row - 1, 60))


def _is_range(elastic: object) -> bool:
    if not isinstance(elastic, Sequence) or len(elastic) != 2 or not all(isinstance(each, int) for each in elastic):
        return False
    least, most = elastic
    return bool(1 <= least <= most)


def parse_elastic(text: str) -> tuple[int, int]:
    """'2:4' -> (2, 4). ValueError for anything else."""
    least, colon, most = text.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal()):
        raise ValueError(f"elastic must be MIN:MAX, such as 2:4, got {text!r}")
    return int(least), int(most)


def collect(futures: Sequence[Future[Any]], method: str, *, within_s: float, patience_s: float) -> list[Any]:
    """What every rank's call came to: its result, what it raised, or StuckError where there is no answer.

    All have within_s. Once one has failed, the others have patience_s to say what they know of it; one that they name
    is replaced in any case, and only has a moment more.
    """
    wait(futures, timeout=within_s, return_when=FIRST_EXCEPTION)
    if any(isinstance(outcome, Exception) for outcome in _so_far(futures).values()):
        until = time.monotonic() + patience_s
        while (unnamed := _unnamed(futures)) and (left := until - time.monotonic()) > 0:
            wait(unnamed, timeout=left, return_when=FIRST_COMPLETED)
        wait(futures, timeout=min(NAMED_S, patience_s))
    found = _so_far(futures)
    return [found.get(rank, StuckError(f"rank {rank} did not come back from {method}")) for rank in range(len(futures))]


def _so_far(futures: Sequence[Future[Any]]) -> dict[int, Any]:
    """Results and exceptions by rank, of the calls that have ended."""
    ended = [(rank, future, future.exception()) for rank, future in enumerate(futures) if future.done()]
    return {rank: future.result() if error is None else error for rank, future, error in ended}


def _unnamed(futures: Sequence[Future[Any]]) -> list[Future[Any]]:
    """Calls that have not ended, of ranks that none of those that have is about."""
    named = {outcome.rank for outcome in _so_far(futures).values() if isinstance(outcome, PeerError)}
    return [future for rank, future in enumerate(futures) if not future.done() and rank not in named]


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch that failed.

    replace   ranks whose workers are to be started anew
    error     what to raise where the group does not come back
    retry     whether starting anew can help: not where the request itself was wrong
    summary   in one line
    """

    replace: tuple[int, ...]
    error: Exception
    retry: bool
    summary: str


def judge(outcomes: Sequence[Any], alive: Mapping[int, bool]) -> Failure | None:
    """What is to be done, None where no rank failed. outcomes[r] is a rank's result or the exception that it came to.

    A rank whose process is gone or that never answered is replaced; so is one that raised an error of its own, and the
    one that most of the others name. Ranks that only lost a peer stay, with all that they have loaded.

        [PeerError of 2, result, WorkerLostError, PeerError of 2]  ->  replace (2,), raise the first PeerError
    """
    errors = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Exception)}
    if not errors:
        return None
    gone = {rank for rank, error in errors.items() if isinstance(error, WorkerLostError | StuckError)}
    gone |= {rank for rank, here in alive.items() if not here}
    wrong = {rank: error for rank, error in errors.items() if isinstance(error, ValueError)}
    if wrong and not gone:
        return _failure((), wrong, retry=False)
    lost_peer = {rank: error for rank, error in errors.items() if isinstance(error, PeerError)}
    # where a rank is gone the others' errors are of that, whatever their kind
    own = {} if gone else {rank: error for rank, error in errors.items() if rank not in lost_peer}
    if own:
        return _failure(own, own)
    named = Counter(error.rank for error in lost_peer.values())
    replace = gone or {named.most_common(1)[0][0]}
    about = {rank: error for rank, error in lost_peer.items() if error.rank in replace}
    return _failure(replace, about or {rank: errors[rank] for rank in sorted(gone & errors.keys())} or errors)


def _failure(replace: Iterable[int], tells: Mapping[int, Exception], *, retry: bool = True) -> Failure:
    """tells: errors that tell what happened, by the rank that raised them; the first is raised."""
    rank, error = next(iter(tells.items()))
    said = str(error).partition("\n")[0]
    if not isinstance(error, PeerError | WorkerLostError | StuckError):  # which say themselves of whom they speak
        said = f"rank {rank} raised {type(error).__name__}: {said}"
    return Failure(tuple(sorted(replace)), error, retry, said)
