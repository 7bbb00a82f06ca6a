"""What is compared takes turns: each is called once in a round, so that a machine's moods meet all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

K = TypeVar("K")


def in_turn(
    calls: Mapping[K, Callable[[], object]], rounds: int, warm_up: int = 1, before: Callable[[K], object] = bool
) -> dict[K, list[float]]:
    """Milliseconds of each call in every round, after rounds that do not count. Every other round goes backwards.

    before   called with the name of a call that is to begin: of what is not timed
    """
    times: dict[K, list[float]] = {name: [] for name in calls}
    for number in range(-warm_up, rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            before(name)
            begun = time.perf_counter()
            calls[name]()
            if number >= 0:
                times[name].append((time.perf_counter() - begun) * 1e3)
    return times
