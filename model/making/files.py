"""A checkpoint's folder, which is there whole or not at all."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from uuid import uuid4

from torch import Tensor
from transformers.utils import logging

from megamoe.model.loading.files import INDEX, draft_of, naming, settle, write_tensors

_WAIT_S = 600.0  # for another process that makes the same


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes path's name when the block ends; an error or a signal removes it.

    In a folder that is there and empty, what was written gets its place when the block ends, config.json last.

    OSError, which names path, where the disk is full. ValueError where path is there already and is no empty folder,
    also when the block ends, or cannot be made.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: give a folder that is new")
    draft = draft_of(path, uuid4().hex)
    try:
        try:
            draft.mkdir(parents=True)
        except OSError as refusal:
            raise ValueError(f"{path} cannot be made: {refusal.strerror}") from refusal
        with naming(path):
            yield draft
        try:
            settle(draft, path)
        except OSError as refusal:
            raise ValueError(f"{path} was made by somebody else meanwhile: {refusal.strerror}") from refusal
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def one_maker(path: Path, waits: Callable[[], None]) -> Iterator[None]:
    """A block that no other process of this machine runs for the same path at the same time. waits: called if it must.

    The lock is the kernel's, which lets go of it with the process that has it. path's folder is there. RuntimeError
    where another process has it for longer than ten minutes.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    until, waited = time.monotonic() + _WAIT_S, False
    lock = path.parent / f".{path.name}.lock"
    with lock.open("wb") as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as taken:
                if not waited:
                    waits()
                waited = True
                if time.monotonic() > until:
                    raise RuntimeError(f"another process has been making {path} for {_WAIT_S:g} s") from taken
                time.sleep(0.05)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits for it looks whether path is there


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers, and what it reads GGUF files with, draw no bars in the block."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Shards:
    """Safetensors written one after another, and their index. num_shards is known before."""

    def __init__(self, path: Path, num_shards: int) -> None:
        self.path, self.num_shards = path, num_shards
        self._weight_map: dict[str, str] = {}
        self._written = self._bytes = 0

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        self._written += 1
        name = f"model-{self._written:05d}-of-{self.num_shards:05d}.safetensors"
        write_tensors(tensors, self.path / name)
        self._weight_map |= dict.fromkeys(tensors, name)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> int:
        """Writes the index -> bytes of all tensors."""
        assert self._written == self.num_shards, (self._written, self.num_shards)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        (self.path / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        return self._bytes
