"""What serves the whole run: kernels, four ranks, two compilers; and one thread for torch, as ranks share two cores.

`pytest -n 2` shares the files between two processes, each with ranks of its own: two_workers.py.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from megamoe.kernels.cpu.library import prepare
from megamoe.launch.forking.server import MODELS, context, preload
from megamoe.launch.ranks import LocalRanks
from tests import interpreter, two_workers

if TYPE_CHECKING:
    from tests.ahead_builds import AheadBuilds


Beside = dict[str, tuple[Path, Future[Any]]]


def pytest_configure() -> None:
    gc.disable()  # until all is imported: what that makes stays, and would be looked through again and again


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> two_workers.ByScope:
    return two_workers.ByScope(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """The CPU's kernels are compiled while xdist starts its workers and tests are imported."""
    if not two_workers.shared() and not session.config.option.collectonly:
        Thread(target=_prepare, name="prepares the CPU's kernels").start()


def _prepare() -> None:
    prepare(partial(print, file=sys.stderr))


def pytest_collection_finish(session: pytest.Session) -> None:
    """The CPU's kernels are there before any test has a deadline.

    The fork server begins before a test changes the environment; with transformers where collected tests have it.

    What was imported stays: load() and many a test collect garbage, and would look through a million objects each time.
    """
    if "transformers" in sys.modules:
        preload(MODELS)
    if not session.config.option.collectonly:
        _prepare()
        context(forked=True)
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries would call what is left at the end a leak
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if two_workers.shared():
        items.sort(key=lambda item: two_workers.place_of(item.nodeid))


class Pool:
    """Ranks started when first needed, and again after a test that killed them or after many that left threads.

    torch's caches of DTensors hold meshes, and those the threads of groups that have ended: each wakes a hundred times
    a second, and with some hundred of them the tests beside wait for minutes.
    """

    MOST_THREADS = 100  # of a rank between tests

    def __init__(self) -> None:
        self._ranks: LocalRanks | None = None

    def get(self) -> LocalRanks:
        if self._ranks is not None and any(_threads(pid) > self.MOST_THREADS for pid in self._ranks.pids):
            self._ranks.stop()
        if self._ranks is None or not self._ranks.pids:
            self._ranks = LocalRanks(4, threads_per_rank=1, deadline_s=60.0).__enter__()
        return self._ranks

    def stop(self) -> None:
        if self._ranks is not None:
            self._ranks.stop()


def _threads(pid: int) -> int:
    try:
        return psutil.Process(pid).num_threads()
    except psutil.NoSuchProcess:
        return 0


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    started = Pool()
    yield started
    started.stop()


@pytest.fixture
def ranks(pool: Pool) -> LocalRanks:
    """Four ranks on gloo, one thread each."""
    return pool.get()


@pytest.fixture(scope="session", autouse=True)
def ahead_builds(request: pytest.FixtureRequest) -> Iterator[AheadBuilds | None]:
    """Kernels for all chips, compiled beside the other tests from the session's start where a test asks for them."""
    asked = any(item.path.name == "test_kernels_ahead.py" for item in request.session.items)
    if not asked or not two_workers.begins_beside():
        yield None
        return
    from tests.ahead_builds import AheadBuilds

    builds = AheadBuilds()
    yield builds
    builds.stop()


@pytest.fixture(scope="session", autouse=True)
def interpreted_ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of kernels in Triton's interpreter run in its process from the session's start, beside the other tests."""
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    found = [item for item in functions if interpreter.is_interpreted(item)]
    if two_workers.shared():  # what the other process may be given it runs itself
        found = [item for item in found if two_workers.scope_of(item.nodeid) == two_workers.BESIDE_SCOPE]
    given = [(item.function, item.callspec.params if hasattr(item, "callspec") else {}) for item in found]
    if find_spec("triton") is not None and two_workers.begins_beside():
        interpreter.begin((test, each) for test, each in given if set(signature(test).parameters) == set(each))
    yield
    interpreter.stop()


@pytest.fixture(scope="session", autouse=True)
def begun_beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """For each module that has a function `beside`: a folder, and what the function makes of it, begun at once."""
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    begun: Beside = {}
    with ThreadPoolExecutor(2) as pool:
        for module in modules:
            if hasattr(module, "beside") and two_workers.begins_beside():
                out = tmp_path_factory.mktemp("beside")
                begun[module.__name__] = out, pool.submit(module.beside, out)
        yield begun
        pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread_in_fixtures() -> None:
    torch.set_num_threads(1)  # those of a module come before those of its first test


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
