"""Runs tests of Triton kernels on CPU tensors, in a process of their own where Triton interprets.

Whether Triton interprets is settled when a kernel is defined, from the environment, and the suite's own process has
others that compile. So a test marked `interpreted` runs in a child in which nothing was imported before the choice.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import lru_cache, wraps
from importlib import import_module
from typing import Any, ParamSpec

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

_DEADLINE_S = 240.0
_SWITCH = "TRITON_INTERPRET"
Params = ParamSpec("Params")


class _RowByRow:
    """numpy, but for products, which go row by row: a BLAS library may sum a row otherwise beside others.

    On a GPU a tile's instructions have one order; this is the interpreter's.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def matmul(a: NDArray[Any], b: NDArray[Any], **options: Any) -> NDArray[Any]:
        if a.ndim != 2:
            return np.stack([_RowByRow.matmul(*pair, **options) for pair in zip(a, b, strict=True)])
        return np.concatenate([np.matmul(a[row : row + 1], b, **options) for row in range(len(a))])


def interprets_scaled() -> bool:
    """Whether this Triton's interpreter knows tl.dot_scaled, the product of MXFP8 by MXFP4; that of 3.6 does not."""
    return hasattr(import_module("triton.runtime.interpreter").InterpreterBuilder, "create_dot_scaled")


def interpret() -> None:
    """Has Triton interpret in this process, in which none of its kernels may have been imported."""
    os.environ[_SWITCH] = "1"
    torch.set_num_threads(1)
    import_module("triton.runtime.interpreter").np = _RowByRow()  # type: ignore[attr-defined]


def _interpret_beside() -> None:
    os.nice(15)  # it gives way to the tests of the suite's own process
    interpret()


@lru_cache(maxsize=1)
def _child() -> tuple[ProcessPoolExecutor, int]:
    """The child and its process id: started when first needed, it serves the whole run and ends with it."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _interpret_beside)
    return pool, pool.submit(os.getpid).result(_DEADLINE_S)


_ahead: dict[tuple[str, bytes], Future[None]] = {}


def begin(tests: Iterable[tuple[Callable[..., None], Mapping[str, object]]]) -> None:
    """Has the child run tests, in this order, beside those of this process; whoever is called later waits for its own.

    Each is a function that was made by interpreted(), and its arguments.
    """
    for test, arguments in tests:
        key = test.__qualname__, pickle.dumps(arguments)
        _ahead[key] = _child()[0].submit(test, **arguments)


def is_interpreted(item: pytest.Function) -> bool:
    """Whether a test is one that the child can run, and none that is skipped."""
    skipped = item.get_closest_marker("skip") or any(mark.args[0] for mark in item.iter_markers("skipif"))
    return getattr(item.function, "interpreted", False) and not skipped


def stop() -> None:
    """Ends the child, and with it what nobody has asked for."""
    if _child.cache_info().currsize:
        _child()[0].shutdown(cancel_futures=True)


def interpreted(test: Callable[Params, None]) -> Callable[Params, None]:
    """Has a test run in the child; its arguments must be such that can be pickled. It cannot skip.

    What the test raises is raised here, the child's traceback with it. RuntimeError where it takes more than four
    minutes, BrokenProcessPool where it ends the child; the next test then starts another.
    """

    @wraps(test)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> None:
        if os.environ.get(_SWITCH) == "1":  # in the child, which finds the test under this same name
            try:
                test(*args, **kwargs)
            except pytest.fail.Exception as failed:  # of pytest.raises: pytest's own exceptions cannot be pickled
                raise AssertionError(str(failed)) from None
            return None
        pool, pid = _child()
        begun = None if args else _ahead.pop((test.__qualname__, pickle.dumps(kwargs)), None)
        try:
            with suppress(BrokenProcessPool):  # another test has ended that child
                if begun is not None:
                    return begun.result(_DEADLINE_S)
            pool, pid = _child()
            return pool.submit(run, *args, **kwargs).result(_DEADLINE_S)
        except Late as late:
            _child.cache_clear()
            os.kill(pid, signal.SIGKILL)
            pool.shutdown()
            raise RuntimeError(f"{test.__name__} took more than {_DEADLINE_S:g} s in the interpreter") from late
        except BrokenProcessPool:
            _child.cache_clear()
            raise

    run.interpreted = True  # type: ignore[attr-defined]
    return run
