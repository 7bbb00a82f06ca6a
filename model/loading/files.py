"""The safetensors files of a checkpoint: headers looked through first, bytes read by range, no pickle opened ever."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from megamoe.paths import AnyPath, lasting_path_of, put_whole

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CONFIG, MANIFEST = "config.json", "megamoe_manifest.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16")
_F4 = "F4"  # two values a byte; its shape counts values
_LONGEST_HEADER = 100_000_000  # the format's own limit
_AT_ONCE = 2**30  # bytes of one read: macOS refuses 2 GiB
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Version:
    """What tells a file from one that took its place, and from itself before it was written to.

    inode   None where the file's mount makes up another whenever it is opened, as some of FUSE and networks do
    """

    size: int
    mtime_ns: int
    inode: int | None

    @classmethod
    def of(cls, descriptor: int) -> Version:
        found = os.fstat(descriptor)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)

    def is_of(self, descriptor: int) -> bool:
        """Whether an open file is this one, as far as can be told."""
        found = Version.of(descriptor)
        return self == (found if self.inode is not None else replace(found, inode=None))

    def checked(self, file: Path) -> Version:
        """This version, without an inode number that the same file does not have when it is opened again."""
        with file.open("rb") as again:
            kept = Version.of(again.fileno()).inode == self.inode
        return self if kept else replace(self, inode=None)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. shape: as torch holds it, F4 as bytes. start, size: of its bytes in the file.

    version   of the file when its header was read
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    version: Version

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.uint8 if self.dtype == _F4 else DTYPES[self.dtype]


class TensorFiles:
    """A checkpoint's tensors by name. Use TensorFiles.open(). read() may be called from several threads.

    bytes_read   by read(), so far
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, entries
        self.bytes_read = 0
        self._open: dict[Path, FileIO] = {}
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def open(cls, path: AnyPath) -> Iterator[TensorFiles]:
        """Reads the headers of a folder's safetensors files: those of its index, or its one file.

        ValueError for a folder without any (also one that has pickles only, which are not opened), a shard that is
        missing or truncated, a header that contradicts itself, and an index that names a tensor which is not there.
        """
        path = lasting_path_of(path)
        files = cls(path, {entry.name: entry for entry in _entries(path)})
        try:
            yield files
        finally:
            files.close()

    def close(self) -> None:
        with self._lock:
            for opened in self._open.values():
                opened.close()
            self._open.clear()

    def read(self, entry: Entry, out: Tensor | None = None, *, first: int = 0, count: int | None = None) -> Tensor:
        """Rows [first, first + count) of a tensor's first dimension, by default all, into out if there is one.

        out is contiguous and has their bytes. ValueError where the file ends before them, or is not the one whose
        header was read.
        """
        shape, start, size = entry.shape, entry.start, entry.size
        if count is not None:
            row = size // shape[0] if shape[0] else 0
            shape, start, size = (count, *shape[1:]), start + first * row, count * row
        if out is None:
            out = torch.empty(shape, dtype=entry.torch_dtype, device="cpu")
        assert out.is_contiguous()
        assert out.nbytes == size, (entry, out.shape, out.dtype)
        if size:
            self._fill(entry, out.view(-1).view(torch.uint8), start)
        return out

    def _fill(self, entry: Entry, out: Tensor, start: int) -> None:
        view, done = memoryview(out.numpy().data), 0
        opened = self._opened(entry.file)
        while done < len(view):
            try:
                got = self._take(opened, view[done : done + _AT_ONCE], start + done)
            except OSError as failure:
                raise ValueError(f"{entry.file}: {entry.name} cannot be read: {failure}") from failure
            if not got:
                raise ValueError(
                    f"{entry.file} is truncated: it ends at byte {start + done}, inside of {entry.name}, whose bytes "
                    f"are [{entry.start}, {entry.start + entry.size})"
                )
            done += got
        if not entry.version.is_of(opened.fileno()):
            raise ValueError(
                f"{entry.file} was changed or replaced after its header was read, so {entry.name} is not what that "
                "says: try again when nothing writes the checkpoint any more"
            )
        with self._lock:
            self.bytes_read += done

    def _take(self, opened: FileIO, view: memoryview, start: int) -> int:
        """Reads some of a file's bytes from one on, and says how many."""
        if sys.platform != "win32" and hasattr(os, "preadv"):
            return os.preadv(opened.fileno(), [view], start)
        with self._lock:  # Windows reads where the file stands, for all threads alike
            opened.seek(start)
            return opened.readinto(view)

    def _opened(self, file: Path) -> FileIO:
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = FileIO(file)
                except OSError as failure:
                    raise ValueError(f"{file} cannot be opened: {failure}") from failure
            return self._open[file]


def _entries(path: Path) -> list[Entry]:
    """Every tensor of the checkpoint, in the order of the files."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder, expected one with config.json and safetensors files")
    weight_map = _weight_map(path)
    shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}, which its index names")
    entries = [entry for shard in shards for entry in read_header(path / shard)]
    names = {entry.name: entry.file.name for entry in entries}
    if len(names) < len(entries):
        seen: set[str] = set()
        double = next(entry.name for entry in entries if entry.name in seen or seen.add(entry.name))  # type: ignore[func-returns-value]
        raise ValueError(f"{path}: two files have a tensor {double}")
    for name, shard in weight_map.items():
        if names.get(name) != shard:
            raise ValueError(f"{path / INDEX} says that {shard} has {name}, which it has not")
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file of the index, nothing where there is no index but the one file."""
    index = path / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            if not weight_map or not all(isinstance(each, str) for each in [*weight_map, *weight_map.values()]):
                raise TypeError("it maps names to file names")
        except (ValueError, KeyError, TypeError) as broken:
            raise ValueError(f"{index} has no weight_map that can be read: {broken!r}") from broken
        outside = [shard for shard in weight_map.values() if Path(shard).name != shard]
        if outside:
            raise ValueError(f"{index} names {outside[0]!r}, which is not a file of this folder")
        return dict(weight_map)
    if (path / SINGLE).is_file():
        return {}
    pickles = sorted(each.name for each in path.iterdir() if each.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{path} holds {pickles[0]} and no safetensors: pickles run code when they are opened, and are not. "
            "Convert it with save_pretrained() of transformers"
        )
    raise ValueError(f"{path} holds neither {INDEX} nor {SINGLE}")


def read_header(file: Path) -> list[Entry]:
    """The tensors of one safetensors file, in the order of their bytes. ValueError for a header that does not fit."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            version = Version.of(opened.fileno()).checked(file)
            total = version.size
            if total < 8 or length > min(_LONGEST_HEADER, total - 8):
                raise ValueError(f"{file} is truncated or no safetensors file: {total} bytes, a header of {length}")
            text = opened.read(length)
    except OSError as failure:
        raise ValueError(f"{file} cannot be read: {failure}") from failure
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        entries = [_entry(file, version, name, each, 8 + length) for name, each in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as broken:
        raise ValueError(f"{file} has a header that cannot be read: {broken}") from broken
    end = max((entry.start + entry.size for entry in entries), default=0)
    if end > total:
        last = max(entries, key=lambda entry: entry.start + entry.size).name
        raise ValueError(f"{file} is truncated: it has {total} bytes, and {last} ends at byte {end}")
    entries.sort(key=lambda entry: (entry.start, entry.size))
    place, before = 8 + length, "the header"
    for entry in entries:
        if entry.start != place:
            raise ValueError(
                f"{file}: {before} ends at byte {place}, and {entry.name}, which is next, begins at {entry.start}"
            )
        place, before = entry.start + entry.size, entry.name
    if place != total:
        raise ValueError(
            f"{file} has {total} bytes, {total - place} more than its header says: something else wrote to it"
        )
    return entries


def _entry(file: Path, version: Version, name: str, described: Mapping[str, Any], data: int) -> Entry:
    dtype, shape = described["dtype"], tuple(described["shape"])
    begin, end = described["data_offsets"]
    if dtype == _F4:
        if not shape or shape[-1] % 2:
            raise ValueError(f"{name} is F4 {list(shape)}, expected an even last dimension")
        shape = (*shape[:-1], shape[-1] // 2)
    elif dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, expected one of {', '.join([*DTYPES, _F4])}")
    if not all(isinstance(each, int) and each >= 0 for each in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {list(shape)} and offsets {begin} to {end}")
    size = math.prod(shape) * (1 if dtype == _F4 else DTYPES[dtype].itemsize)
    if end - begin != size:
        raise ValueError(f"{name} is {dtype} {list(shape)}, which takes {size} bytes, and has {end - begin}")
    return Entry(name, file, dtype, shape, data + begin, size, version)


def config_file(path: Path) -> Path:
    """A checkpoint's config.json. ValueError that says why there is none."""
    file = path / CONFIG
    if file.is_file():
        return file
    if (path / MANIFEST).is_file():
        raise ValueError(f"{path} holds no {CONFIG}: megamoe convert was cut off; run it again to go on")
    if not path.exists():
        raise ValueError(f"{path} holds no {CONFIG}: there is no such folder, and no checkpoint is downloaded")
    raise ValueError(f"{path} holds no {CONFIG}, so it is no checkpoint")


def draft_of(path: Path, mark: str) -> Path:
    """Where a folder is written that is to become path: beside it, or in it where it is there, as a mount may be."""
    path = path.resolve()
    return (path if path.is_dir() else path.parent) / f".{path.name}-{mark}"


def settle(draft: Path, path: Path) -> None:
    """Gives what was written at draft_of(path) its name, or its files their place in path, config.json last.

    OSError where path has such files meanwhile.
    """
    path = path.resolve()
    if draft.parent != path:
        draft.replace(path)
        return
    for each in draft.iterdir():
        if (path / each.name).exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path / each.name))
    for each in sorted(draft.iterdir(), key=lambda each: each.name == "config.json"):
        each.replace(path / each.name)
    draft.rmdir()


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """A block that writes file: what the system refuses is an OSError that names it, also where a library in Rust says
    so in words of its own.
    """
    try:
        yield
    except OSError as failure:
        failure.filename = str(file)
        raise
    except Exception as failure:
        number = re.search(r"\(os error (\d+)\)", str(failure))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from failure


@contextmanager
def writing(part: Path, file: Path) -> Iterator[None]:
    """A block that writes part, which is to become file. What ends it early removes part; an OSError names file."""
    try:
        with naming(file):
            yield
    except BaseException:
        with suppress(OSError):
            if part.is_file():
                part.unlink()
        raise


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file of these tensors, whole or not at all, as put_whole() writes it in place of one that is there.

    It has the rights of any other new file: safetensors itself makes it readable by its owner alone. OSError where it
    cannot be written.
    """
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}

    def make(part: Path) -> None:
        with naming(part):
            save_file(whole, part, {"format": "pt"})
        _give_usual_rights(part)

    def fill(place: Path) -> None:
        place.write_bytes(save(whole, {"format": "pt"}))  # save_file() would put a file in its place

    put_whole(file, make, fill)


def _give_usual_rights(file: Path) -> None:
    """Those that a file has which this process makes in the same folder: what its umask leaves."""
    beside = file.with_name(f".{uuid4().hex}")
    beside.touch()
    try:
        file.chmod(beside.stat().st_mode)
    finally:
        beside.unlink()
