"""What a cluster can be asked wrongly, found by the driver, so that no rank is asked and none is restarted for it."""

# T tokens

from __future__ import annotations

import inspect
import math
import multiprocessing as mp
import os
import sys
from collections.abc import Callable, Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.catalog.wording import plural
from megamoe.launch.devices import device_type, num_devices
from megamoe.parallel.health.runs import check_name

MOST_HERE = 256
IMPORTABLE = "What runs on ranks is a function at the top of a module that a fresh process can import"


def check_tokens(token_ids: Any, vocab_size: int) -> list[int]:
    """Token ids as plain integers. ValueError for what is no [T] of integers in [0, vocab_size)."""
    if hasattr(token_ids, "__array__") and not isinstance(token_ids, Tensor):
        token_ids = torch.as_tensor(token_ids)
    if isinstance(token_ids, Tensor):
        _check_tensor(token_ids)
        ids = token_ids.tolist()
    elif isinstance(token_ids, Iterable) and not isinstance(token_ids, str | bytes | dict | set):
        ids = list(token_ids)
    else:
        raise ValueError(f"token_ids must be [T] integers, got {type(token_ids).__name__}")
    for place, token in enumerate(ids):
        if not _is_integer(token):
            raise ValueError(f"token_ids must be [T] integers, got {type(token).__name__} at place {place}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} is outside of the checkpoint's vocabulary of {vocab_size}")
    return [int(token) for token in ids]


def _is_integer(value: object) -> bool:
    """Of whichever kind, numpy's too; True is none."""
    return not isinstance(value, bool) and isinstance(value, Integral)


def _check_tensor(token_ids: Tensor) -> None:
    if token_ids.dim() != 1:
        flat = ": token_ids.flatten() runs all as one batch" if token_ids.dim() else ""
        raise ValueError(f"token_ids must be [T], got {list(token_ids.shape)}{flat}")
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise ValueError(f"token_ids must be integers, got {token_ids.dtype}")
    if token_ids.is_meta:
        raise ValueError("token_ids are on meta, which holds no values")


def check_work(work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """ValueError for what cannot be called as work(group, *args)."""
    if not callable(work):
        raise ValueError(f"work must be a function of a module, got {type(work).__name__}")
    try:
        signature = inspect.signature(work)
    except ValueError:  # of a function that is not Python's nothing is known
        return
    try:
        signature.bind(None, *args)
    except TypeError as wrong:
        name = getattr(work, "__name__", type(work).__name__)
        raise ValueError(
            f"{name}{signature} cannot be called with a group and {len(args)} arguments: {wrong}"
        ) from wrong


def check_count(name: str, value: Any, least: int = 1) -> None:
    """ValueError for what is no integer of at least `least`."""
    if _is_integer(value) and value >= least:
        return
    bound = "positive" if least == 1 else f"at least {least}"
    raise ValueError(f"{name} must be {bound}, got {value!r}")


def check_system() -> None:
    """ValueError on a system where this package starts no processes: pipes, signals and locks are POSIX's."""
    if sys.platform == "win32":
        raise ValueError(
            "ranks and workers are started on Linux and macOS, this is Windows: run it in WSL (wsl --install), or "
            "start processes in a way of your own and have them meet by init_group()"
        )


def check_ranks_here(name: str, value: Any) -> None:
    """ValueError for what is no number of ranks that one machine could hold, and where none can be started."""
    check_system()
    check_count(name, value)
    if value > MOST_HERE:
        raise ValueError(f"a machine holds at most {MOST_HERE} ranks, got {value}")


def check_seconds(name: str, value: object) -> None:
    """ValueError for what is no positive, finite number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return
    raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_pool(name: str, num_workers: Any, deadline_s: object, threads: Any, run: Any) -> None:
    """ValueError for what workers cannot be started with, wherever they are."""
    check_count(name, num_workers)
    check_seconds("deadline_s", deadline_s)
    if threads is not None:
        check_count("threads", threads)
    if run is not None:
        check_name(run)


def check_devices(device: str, needed: int) -> None:
    """ValueError for a device type that is not known, or of which this machine has too few for one a rank."""
    device_type(device)
    if device != "cpu" and num_devices(device) < needed:
        raise ValueError(
            f"{plural(needed, 'rank')} on this machine need{'s' * (needed == 1)} as many {device} devices, it has "
            f"{num_devices(device)}"
        )


def check_main() -> None:
    """ValueError where a spawned process could not import the program that starts it, as Python has it do first."""
    if getattr(mp.current_process(), "_inheriting", False):
        raise ValueError(
            "this program starts ranks while one of them imports it: put what starts them under "
            "if __name__ == '__main__':"
        )
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or getattr(main.__spec__, "name", None) is not None or getattr(sys, "frozen", False):
        return
    begun_in = getattr(mp.process, "ORIGINAL_DIR", None) or os.getcwd()
    if not os.path.exists(os.path.join(begun_in, path)):
        raise ValueError(
            f"ranks are spawned, and each begins by importing the program's file, but {path} is none: save the program "
            "as a file and run that (python program.py), or give it with python -c"
        )


def make_folder(path: Path) -> None:
    """Makes a folder and those above it. ValueError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as refusal:
        raise ValueError(f"{path} cannot be a folder: {refusal.strerror}") from refusal
