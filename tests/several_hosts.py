"""Ranks of one machine that take themselves for ranks of several hosts: they share no memory with those of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise

import pytest

from megamoe.parallel import symmetric
from megamoe.parallel.group import EPGroup


def nodes_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Hosts of so many ranks.    (2, 1) -> (0, 0, 2)"""
    return tuple(begin for begin, end in pairwise(accumulate(sizes, initial=0)) for _ in range(begin, end))


@contextmanager
def hosts(group: EPGroup, sizes: tuple[int, ...]) -> Iterator[None]:
    """Ranks of this machine take themselves for hosts of so many ranks, if they have not met yet, and save any byte."""
    node = nodes_of(sizes)[group.rank]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "host_key", lambda: f"host{node}")
        patch.setattr("megamoe.routing.messages.LEAST_SAVED_BYTES", 1)
        yield
