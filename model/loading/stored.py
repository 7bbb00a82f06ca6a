"""Matrices as checkpoints store them: one tensor, or values and scales under two names."""

# E experts   N outputs   K inputs   b values that share a scale, along a side

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megamoe.formats import BLOCK, MXFP4, dequantize_mxfp4
from megamoe.formats.blocks import spread_blocks
from megamoe.formats.mxfp8 import e4m3_to_bf16
from megamoe.model.loading.files import FLOATS, Entry, TensorFiles


class Encoding(str, Enum):
    """How a matrix is stored."""

    plain = "plain"
    fp8 = "fp8"  # E4M3, a scale per b x b
    mxfp4 = "mxfp4"  # two E2M1 values a byte, a scale per 32 inputs


# how values and scales are called, and the name of both together; the first that fits counts
_PAIRS = (
    (r"^(.*)_blocks$", r"\1_scales", r"\1"),  # gpt-oss
    (r"^(.*)\.weight$", r"\1.scale", r"\1.weight"),  # DeepSeek-V4
    (r"^(.*)\.weight$", r"\1.weight_scale_inv", r"\1.weight"),  # FP8 of DeepSeek-V3 and transformers
    (r"^(.*)\.weight$", r"\1.weight_scale", r"\1.weight"),
    (r"^(.*)$", r"\1_scale_inv", r"\1"),  # stacks of experts in FP8
)
_SCALES = ("F8_E8M0", "U8", *FLOATS)
_SWITCHES = re.compile(r"(bias|sinks?)$")  # vectors in which minus infinity switches off an expert or a head's sink


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the model as the checkpoint has it.

    name       the checkpoint's, as if it were stored in one piece
    shape      what the values mean: [..., N, K] where there are scales
    encoding   how
    block      b, of FP8
    """

    name: str
    values: Entry
    scales: Entry | None
    shape: tuple[int, ...]
    encoding: Encoding
    block: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.values.size + (self.scales.size if self.scales else 0)

    def read(self, files: TensorFiles, expert: int | None = None) -> Tensor | MXFP4:
        """Whole, or one of a stack of experts: MXFP4 as such, else a float tensor of the stored values (FP8: FP32)."""
        parts = [self._part(files, entry, expert) for entry in (self.values, self.scales) if entry is not None]
        if self.encoding is Encoding.plain:
            return parts[0]
        values, scales = parts
        if self.encoding is Encoding.mxfp4:
            lead = values.shape[: len(self.shape) - 1 - (expert is not None)]
            return MXFP4(values.view(torch.uint8).reshape(*lead, -1), scales.view(torch.uint8).reshape(*lead, -1))
        return dequantize_fp8(values, scales, self.block)

    def _part(self, files: TensorFiles, entry: Entry, expert: int | None) -> Tensor:
        return files.read(entry) if expert is None else files.read(entry, first=expert, count=1)[0]

    def read_dense(self, files: TensorFiles, expert: int | None = None) -> Tensor:
        """As read(), MXFP4 as bfloat16."""
        found = self.read(files, expert)
        return dequantize_mxfp4(found) if isinstance(found, MXFP4) else found


def check_values(values: Tensor, name: str) -> None:
    """ValueError for values that are NaN or infinite. One read. name: of the tensor, in the message.

    values: floats, E4M3, UE8M0; integers always pass. A vector of biases or sinks may hold minus infinity.
    """
    if not values.numel():
        return
    if values.dtype == torch.float8_e8m0fnu:
        good = int(values.view(torch.uint8).max()) != 0xFF
    elif values.dtype == torch.float8_e4m3fn:
        good = int((values.view(torch.uint8) & 0x7F).max()) != 0x7F
    elif values.is_floating_point():
        low, high = torch.aminmax(values if values.dtype.itemsize > 1 else values.to(torch.float32))  # a NaN is both
        switches = values.dim() == 1 and _SWITCHES.search(name) is not None
        good = bool(high.isfinite()) and (switches or bool(low.isfinite()))
    else:
        return
    if not good:
        wrong = int((~values.to(torch.float32).isfinite()).sum())
        dtype = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: {wrong} of {values.numel()} values are NaN or infinite in {dtype}")


def scales_to_float(scales: Tensor) -> Tensor:
    """UE8M0, as such or as its bytes, or floats -> float32"""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.to(torch.float32)


def dequantize_fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """values [..., N, K] float8_e4m3fn times scales [..., ceil(N/b), ceil(K/b)] -> [..., N, K] float32, rounded once"""
    if values.dim() > 2:
        return torch.stack([dequantize_fp8(*each, block) for each in zip(values, scales, strict=True)])
    wide, rows, columns = scales_to_float(scales), *values.shape
    decoded = e4m3_to_bf16(values) if columns % 2 == 0 else values
    return decoded.to(torch.float32).mul_(spread_blocks(wide, block, rows, columns))


def stored_tensors(files: TensorFiles, block: tuple[int, int] = (128, 128)) -> dict[str, Stored]:
    """The checkpoint's tensors by name, scales put to what they scale. block: b x b of FP8 where the config says so.

    ValueError for scales that do not fit their values, and for FP8 or packed values that have none.
    """
    entries, taken, found = files.entries, set[str](), dict[str, Stored]()
    for name, entry in entries.items():
        pair = _pair(name, entries)
        if pair is not None:
            together, scales = pair
            found[together] = _with_scales(files, together, entry, entries[scales], block)
            taken |= {name, scales}
    for name, entry in entries.items():
        if name in taken:
            continue
        if entry.dtype.startswith("F8") or entry.dtype == "F4":
            raise ValueError(f"{entry.file}: {name} is {entry.dtype} and no tensor has its scales")
        found[name] = Stored(name, entry, None, entry.shape, Encoding.plain)
    return found


def _pair(name: str, entries: Mapping[str, Entry]) -> tuple[str, str] | None:
    """The name of values and scales together and the scales' own, where name is of values that have scales."""
    if entries[name].dtype in FLOATS:
        return None
    for values, scales, together in _PAIRS:
        if re.match(values, name) and re.sub(values, scales, name) in entries:
            return re.sub(values, together, name), re.sub(values, scales, name)
    return None


def _with_scales(files: TensorFiles, name: str, values: Entry, scales: Entry, block: tuple[int, int]) -> Stored:
    if scales.dtype not in _SCALES:
        raise ValueError(f"{scales.file}: {scales.name} has dtype {scales.dtype}, expected {', '.join(_SCALES)}")
    if values.dtype == "F8_E4M3":
        return _fp8(name, values, scales, block)
    if values.dtype not in ("I8", "U8", "F4"):
        raise ValueError(
            f"{values.file}: {values.name} is {values.dtype} and has scales, expected F8_E4M3, I8, U8 or F4"
        )
    if scales.dtype not in ("F8_E8M0", "U8"):
        raise ValueError(f"{scales.file}: {scales.name} is {scales.dtype}, expected F8_E8M0 or U8 beside packed values")
    blocked = values.name.endswith("_blocks")
    shape = (*values.shape[:-2], values.shape[-2] * BLOCK) if blocked else (*values.shape[:-1], 2 * values.shape[-1])
    expected = (*shape[:-1], shape[-1] // BLOCK)
    if (blocked and values.shape[-1] != BLOCK // 2) or scales.shape != expected:
        raise ValueError(
            f"{files.path}: {values.name} {list(values.shape)} and {scales.name} {list(scales.shape)} are no MXFP4: "
            f"expected a scale per {BLOCK} values, {list(expected)}"
        )
    return Stored(name, values, scales, shape, Encoding.mxfp4)


def _fp8(name: str, values: Entry, scales: Entry, block: tuple[int, int]) -> Stored:
    if len(values.shape) >= 2:
        rows, columns = values.shape[-2:]
        expected = (*values.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
        if scales.shape == expected:
            return Stored(name, values, scales, values.shape, Encoding.fp8, block)
    raise ValueError(
        f"{scales.file}: {scales.name} is {list(scales.shape)} for {values.name} {list(values.shape)}, expected a "
        f"scale per {block[0]} x {block[1]} values"
    )
