"""Four ranks that serve the whole run, and one thread for torch so that ranks do not fight over two cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megamoe.launch.ranks import LocalRanks


class Pool:
    """Ranks started when first needed, and again after a test that killed them."""

    def __init__(self) -> None:
        self._ranks: LocalRanks | None = None

    def get(self) -> LocalRanks:
        if self._ranks is None or not self._ranks.pids:
            self._ranks = LocalRanks(4, threads_per_rank=1, deadline_s=60.0).__enter__()
        return self._ranks

    def stop(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    started = Pool()
    yield started
    started.stop()


@pytest.fixture
def ranks(pool: Pool) -> LocalRanks:
    """Four ranks on gloo, one thread each."""
    return pool.get()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
