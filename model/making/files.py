"""A checkpoint's folder, which is there whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

INDEX = "model.safetensors.index.json"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside path to write to, which takes path's name when the block ends; an error or a signal removes it.

    ValueError where path is there already and is no empty folder, or cannot be made.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is there already: give a folder that is new")
    draft = path.absolute().parent / f".{path.name}-{uuid4().hex}"
    try:
        try:
            draft.mkdir(parents=True)
        except OSError as refusal:
            raise ValueError(f"{path} cannot be made: {refusal.strerror}") from refusal
        yield draft
        draft.replace(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.path / name, {"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, name)
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> int:
        """Writes the index -> bytes of all tensors."""
        assert self._written == self.num_shards, (self._written, self.num_shards)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._weight_map}
        (self.path / INDEX).write_text(json.dumps(index, indent=1))
        return self._bytes
