"""A checkpoint rewritten with its experts in another format, shard by shard, going on where it was cut off."""

# E experts   N outputs   K inputs

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4, WEIGHT_FORMATS
from megamoe.formats.given import about
from megamoe.model.loading.expert_weights import expert_source, names_of_experts, parameter_names
from megamoe.model.loading.files import CONFIG, DTYPES, INDEX, MANIFEST, SINGLE, Entry, TensorFiles, writing
from megamoe.model.loading.naming import dense_targets, made_by, name_tensors
from megamoe.model.loading.quantization import RoundingError, check_scales, quantize
from megamoe.model.loading.skeleton import build, fp8_block, naming_format, read_config
from megamoe.model.loading.stored import Encoding, Stored, check_values, stored_tensors
from megamoe.paths import AnyPath, lasting_path_of

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*")
_AT_ONCE = 64 << 20  # bytes that are copied at a time
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor as it will be written, and how its bytes are made, a part at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    parts: Callable[[], Iterator[Tensor]]


@dataclass(slots=True)
class Conversion:
    """What convert() did.

    bytes_read, bytes_written   by this run
    shards, shards_kept         of the result, and those that an earlier run had finished
    tensors_converted           matrices that got another format
    quantization_error          of each shard that this run wrote, ||rounded - weight|| / ||weight||
    """

    source: str
    target: str
    experts: str
    scales: str
    bytes_read: int = 0
    bytes_written: int = 0
    shards: int = 0
    shards_kept: int = 0
    tensors_converted: int = 0
    quantization_error: dict[str, float] = field(default_factory=dict)


def convert(
    source: AnyPath,
    target: AnyPath,
    *,
    experts: str,
    scales: str = "contract",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Conversion:
    """Writes the checkpoint `source` to the folder `target` with its experts in "mxfp4" or "bf16"; all else is copied.

    A shard is written under another name and gets its own when it is whole; config.json comes last, so that a folder
    with one is complete. megamoe_manifest.json has each finished shard's size and SHA-256: called again after an
    interruption, shards that are whole are kept. progress: bytes of the source that are done, and all.

    MXFP4 experts are `*.weight` U8 with `*.scale` E8M0 beside them where an expert has tensors of its own, as
    DeepSeek-V4 has them, and `*_blocks` with `*_scales` where all are in one, as gpt-oss has them. ValueError, with
    nothing written, for what load() would not take, for a target that holds something else, and for one that was begun
    from another source or with other settings. A value that the other format has no code for is found when its shard
    is read: the ValueError then says which shards stay.
    """
    source, target = lasting_path_of(source, "source"), lasting_path_of(target, "target")
    if experts not in WEIGHT_FORMATS:
        raise ValueError(f"experts must be one of {', '.join(WEIGHT_FORMATS)}, got {experts!r}")
    check_scales(scales)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the source itself: give another folder")
    with TensorFiles.open(source) as files:
        config = read_config(source)
        with naming_format(config):
            stored = stored_tensors(files, fp8_block(config))
            of_experts, unused = _expert_tensors(source, stored, experts)
        done = Conversion(str(source), str(target), experts, scales)
        writer = _Writer(files, target, done, progress)
        manifest = writer.begin()
        shards = _shards(stored)
        done.shards = len(shards)
        with writer.keeping(manifest):
            for number, (shard, tensors) in enumerate(shards.items(), 1):
                name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                if writer.has(manifest, name):
                    done.shards_kept += 1
                    writer.skip(tensors)
                    continue
                error = RoundingError()
                pieces = [
                    piece
                    for each in tensors
                    for piece in writer.pieces(each, of_experts.get(each.name), error, read=each.name not in unused)
                ]
                manifest["shards"][name] = writer.write(name, pieces)
                done.tensors_converted += sum(each.name in of_experts for each in tensors)
                if error.norm:
                    done.quantization_error[name] = error.relative
                manifest["shards"][name]["from"] = shard
                _write_json(target / MANIFEST, manifest)
        writer.end(manifest, config, experts, dense_fp8=_has_dense_fp8(stored, of_experts))
        done.bytes_read = files.bytes_read
    return done


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of an expert tensor. transposed: in BF16 it is [..., inputs, outputs], in MXFP4 not."""

    experts: str
    transposed: bool


def _expert_tensors(
    source: Path, stored: dict[str, Stored], experts: str
) -> tuple[dict[str, _Change], tuple[str, ...]]:
    """The experts' matrices that are to change, by name; names that load() has no place for.

    ValueError for what load() would not take.
    """
    skeleton = build(source, None)
    naming = name_tensors(skeleton.model, skeleton.tensors, stored)
    targets = {name: target for target in naming.targets.values() for name in made_by(target, skeleton.tensors)}
    dense_targets(naming, skeleton.model, skeleton.tensors, names_of_experts(skeleton.blocks))
    changes = {}
    for block in skeleton.blocks:
        made = expert_source(block.name, block.structure, targets, skeleton.tensors, skeleton.model)
        made.check(experts)
        for name in parameter_names(block.structure)[:2]:
            target = made.parameters[name].target
            if not target.rows_stacked:
                raise ValueError(
                    f"{source}: transformers rearranges {target.stored[0].name} while it loads it, and a rearranged "
                    f"checkpoint cannot be written: load(experts={experts!r}) converts it while loading"
                )
            for each in target.stored:
                wanted = Encoding.mxfp4 if experts == "mxfp4" else Encoding.plain
                if each.encoding is not wanted or (experts == "bf16" and each.values.dtype != "BF16"):
                    changes[each.name] = _Change(experts, block.structure.is_transposed)
                    _check_inputs(each, changes[each.name])
    return changes, naming.unused


def _check_inputs(stored: Stored, change: _Change) -> None:
    inputs = stored.shape[-2] if change.transposed and stored.encoding is not Encoding.mxfp4 else stored.shape[-1]
    if change.experts == "mxfp4" and inputs % BLOCK:
        raise ValueError(f"{stored.name} is {list(stored.shape)}: {inputs} inputs are no multiple of {BLOCK}")


def _has_dense_fp8(stored: dict[str, Stored], of_experts: dict[str, _Change]) -> bool:
    return any(each.encoding is Encoding.fp8 and each.name not in of_experts for each in stored.values())


def _shards(stored: dict[str, Stored]) -> dict[str, list[Stored]]:
    """Tensors by the file that their values are in, in the order of their bytes."""
    shards: dict[str, list[Stored]] = {}
    for each in stored.values():
        shards.setdefault(each.values.file.name, []).append(each)
    for tensors in shards.values():
        tensors.sort(key=lambda each: each.values.start)
    return dict(sorted(shards.items()))


class _Writer:
    """Writes shards, each whole or not at all."""

    def __init__(
        self, files: TensorFiles, target: Path, done: Conversion, progress: Callable[[int, int], None]
    ) -> None:
        self.files, self.target, self.done, self._progress = files, target, done, progress
        self._total = sum(entry.size for entry in files.entries.values())
        self._skipped = 0

    def begin(self) -> dict[str, Any]:
        """The manifest of a run that was cut off, or a new one. ValueError where the target is of something else."""
        settings = {
            "version": _VERSION,
            "experts": self.done.experts,
            "scales": self.done.scales,
            "source": _fingerprint(self.files),
        }
        file = self.target / MANIFEST
        if self.target.exists() and not self.target.is_dir():
            raise ValueError(f"{self.target} is no folder")
        if file.is_file():
            try:
                known = json.loads(file.read_bytes())
                found = {key: known[key] for key in settings}
                assert isinstance(known["shards"], dict)
            except (ValueError, KeyError, TypeError, AssertionError) as broken:
                raise ValueError(f"{file} cannot be read: remove {self.target} to begin anew") from broken
            for key, value in settings.items():
                if found[key] != value:
                    what = "from another source" if key == "source" else f"with {key} {found[key]!r}"
                    raise ValueError(f"{self.target} was begun {what}: remove it, or give another folder")
            return dict(known)
        if self.target.is_dir() and any(self.target.iterdir()):
            raise ValueError(f"{self.target} is not empty and has no {MANIFEST}: give another folder")
        self.target.mkdir(parents=True, exist_ok=True)
        manifest = {**settings, "shards": {}}
        _write_json(file, manifest)
        return manifest

    def has(self, manifest: dict[str, Any], name: str) -> bool:
        """Whether the shard is there as the manifest has it, byte for byte."""
        known, file = manifest["shards"].get(name), self.target / name
        if known is None or not file.is_file() or file.stat().st_size != known["size"]:
            return False
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while chunk := opened.read(_AT_ONCE):
                digest.update(chunk)
        return bool(digest.hexdigest() == known["sha256"])

    @contextmanager
    def keeping(self, manifest: dict[str, Any]) -> Iterator[None]:
        """A ValueError of the block says what stays in the target; the folder goes where that would be nothing."""
        try:
            yield
        except ValueError as refusal:
            if kept := len(manifest["shards"]):
                raise ValueError(
                    f"{refusal}; {self.target} keeps what is whole, {kept} of {self.done.shards} shards: the same "
                    "command goes on from there, and a source that has changed needs another folder"
                ) from refusal
            (self.target / MANIFEST).unlink()
            with suppress(OSError):  # of a folder with something else in it, or of somebody else's
                self.target.rmdir()
            raise

    def skip(self, tensors: list[Stored]) -> None:
        self._skipped += sum(each.size for each in tensors)
        self._progress(self._skipped + self.files.bytes_read, self._total)

    def pieces(self, stored: Stored, change: _Change | None, error: RoundingError, *, read: bool) -> list[Piece]:
        """What is written for a tensor of the source. read: by load(), which refuses values that are not finite."""
        if change is None:
            return [self._copied(entry, read) for entry in (stored.values, stored.scales) if entry is not None]
        if change.experts == "bf16":
            return [self._bf16(stored, change, error)]
        return self._mxfp4(stored, change, error)

    def _copied(self, entry: Entry, read: bool) -> Piece:
        def checked(part: Tensor) -> Tensor:
            if read:
                check_values(part, f"{entry.file}: {entry.name}")
            return part

        def parts() -> Iterator[Tensor]:
            rows = entry.shape[0] if entry.shape else 0
            step = max(1, _AT_ONCE // max(1, entry.size // max(1, rows)))
            if rows <= step:
                yield checked(self.files.read(entry))
                return
            for first in range(0, rows, step):
                yield checked(self.files.read(entry, first=first, count=min(step, rows - first)))

        shape = (*entry.shape[:-1], 2 * entry.shape[-1]) if entry.dtype == "F4" else entry.shape
        return Piece(entry.name, entry.dtype, shape, entry.size, parts)

    def _matrices(self, stored: Stored) -> Iterator[Tensor | MXFP4]:
        """One after another, as they are stored."""
        if len(stored.shape) == 2:
            yield stored.read(self.files)
        else:
            for expert in range(stored.shape[0]):
                yield stored.read(self.files, expert)

    def _bf16(self, stored: Stored, change: _Change, error: RoundingError) -> Piece:
        flips = change.transposed and stored.encoding is Encoding.mxfp4

        def parts() -> Iterator[Tensor]:
            for matrix in self._matrices(stored):
                with about(stored.name):
                    dense = WEIGHT_FORMATS["bf16"].take(matrix)
                assert isinstance(dense, Tensor)
                if isinstance(matrix, Tensor):
                    error.add(matrix, dense)
                yield dense.mT if flips else dense

        shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2]) if flips else stored.shape
        return _piece(stored.name, torch.bfloat16, shape, parts)

    def _mxfp4(self, stored: Stored, change: _Change, error: RoundingError) -> list[Piece]:
        """Values and scales. Scales wait in memory for their turn: they are a sixteenth of what was read."""
        shape = (*stored.shape[:-2], stored.shape[-1], stored.shape[-2]) if change.transposed else stored.shape
        waiting: list[Tensor] = []

        def values() -> Iterator[Tensor]:
            for matrix in self._matrices(stored):
                assert isinstance(matrix, Tensor)
                weight = matrix.mT.contiguous() if change.transposed else matrix
                with about(stored.name):
                    packed = quantize(weight, self.done.scales, error)
                waiting.append(packed.scales)
                yield packed.packed

        def scales() -> Iterator[Tensor]:
            while waiting:
                yield waiting.pop(0)

        groups = (*shape[:-1], shape[-1] // BLOCK)
        if len(shape) == 3:
            return [
                _piece(f"{stored.name}_blocks", torch.uint8, (*groups, BLOCK // 2), values),
                _piece(f"{stored.name}_scales", torch.uint8, groups, scales),
            ]
        return [
            _piece(stored.name, torch.uint8, (*shape[:-1], shape[-1] // 2), values),
            _piece(f"{stored.name.removesuffix('.weight')}.scale", torch.float8_e8m0fnu, groups, scales),
        ]

    def write(self, name: str, pieces: list[Piece]) -> dict[str, Any]:
        """A shard -> what the manifest says of it."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for piece in pieces:
            header[piece.name] = {
                "dtype": piece.dtype,
                "shape": list(piece.shape),
                "data_offsets": [begin, begin + piece.size],
            }
            begin += piece.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        digest, file = hashlib.sha256(), self.target / f".{name}.part"
        with writing(file, self.target / name), file.open("wb") as opened:
            for chunk in (len(text).to_bytes(8, "little"), text):
                opened.write(chunk)
                digest.update(chunk)
            for piece in pieces:
                written = 0
                for part in piece.parts():
                    raw = part.contiguous().view(-1).view(torch.uint8).numpy().data
                    opened.write(raw)
                    digest.update(raw)
                    written += len(raw)
                    self._progress(self._skipped + self.files.bytes_read, self._total)
                assert written == piece.size, (piece.name, written, piece.size)
            opened.flush()
            os.fsync(opened.fileno())
        file.replace(self.target / name)
        size = 8 + len(text) + begin
        self.done.bytes_written += size
        return {"size": size, "sha256": digest.hexdigest(), "tensors": [piece.name for piece in pieces]}

    def end(self, manifest: dict[str, Any], config: dict[str, Any], experts: str, *, dense_fp8: bool) -> None:
        """The index, what lies beside the weights, and config.json last."""
        shards = manifest["shards"]
        if len(shards) > 1:
            weight_map = {tensor: name for name, each in shards.items() for tensor in each["tensors"]}
            total = sum(each["size"] for each in shards.values())
            _write_json(self.target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for pattern in _COPIED:
            for file in self.files.path.glob(pattern):
                if file.name not in (CONFIG, INDEX, MANIFEST) and file.is_file():
                    part = self.target / f".{file.name}.part"
                    with writing(part, self.target / file.name):
                        shutil.copyfile(file, part)
                    part.replace(self.target / file.name)
        _write_json(self.target / CONFIG, config_with(config, experts, dense_fp8=dense_fp8))


def config_with(config: dict[str, Any], experts: str, *, dense_fp8: bool) -> dict[str, Any]:
    """What config.json says of formats: dense FP8 stays as it was; experts are what they are now."""
    known = config.get("quantization_config") or {}
    if dense_fp8:
        changed = {**config, "quantization_config": {**known, "expert_dtype": "fp4" if experts == "mxfp4" else "bf16"}}
    else:
        changed = {key: value for key, value in config.items() if key != "quantization_config"}
        if experts == "mxfp4":
            changed["quantization_config"] = {"quant_method": "mxfp4"}
    if "expert_dtype" in changed:
        changed["expert_dtype"] = "fp4" if experts == "mxfp4" else "bf16"
    return changed


def _piece(name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Callable[[], Iterator[Tensor]]) -> Piece:
    size = dtype.itemsize
    for each in shape:
        size *= each
    return Piece(name, _NAMES[dtype], shape, size, parts)


def _fingerprint(files: TensorFiles) -> str:
    """Of what the source's headers and config say, and when its files were written."""
    digest = hashlib.sha256((files.path / CONFIG).read_bytes())
    for file in sorted({entry.file for entry in files.entries.values()}):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    for name, entry in sorted(files.entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.start}\n".encode())
    return digest.hexdigest()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    with writing(part, file), part.open("w", encoding="utf-8") as opened:
        json.dump(content, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())
    part.replace(file)
