"""How a device multiplies rows, sorted by expert, with expert weights. A row has the same bits in any company.

On a CPU that is up to kernels of our own, whose order of summation is fixed. Where they cannot be compiled, and on
devices that have none, torch multiplies: always as many rows at once, in a product of one shape, after a test on the
machine that a row then has the same bits wherever it stands among them.
"""

# n rows   M rows of x   K inputs   N outputs   e experts

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megamoe.execution.weights import Blocks, Layout, Matrix, RowMajor
from megamoe.formats import BLOCK, MXFP4, SCALES, VALUES, dequantize_mxfp4
from megamoe.kernels.cpu.build import BuildError
from megamoe.kernels.cpu.layout import pack_bf16
from megamoe.kernels.cpu.library import KernelWarning, Library, Rows, chosen, load
from megamoe.kernels.cpu.library import product_of as product_by_kernel
from megamoe.kernels.cpu.paths import runnable
from megamoe.parallel.workspace import Workspace

DEQUANTIZED = "_dequantized"
ROW_BLOCKS = (32, 64, 128, 256)
# What decoding one expert's weights costs, in rows of its products. By torch's look-ups, on one Zen 4 core, 2026-11-24:
# some 0.5 ns a value of MXFP4, 9 ps a multiply-add.
_TORCH_DECODE_ROWS = 55.0
# The same by our kernels, then what reading BF16 weights costs. By vectors: half of a row's product, and the reading.
# Tiles compute a row while memory brings a hundredth of a matrix: on one Sapphire Rapids core, 2026-11-29, one row by
# 2048 x 2048 takes 0.24 ms from MXFP4 and 0.64 ms from BF16, and each of 512 rows 8.5 us: `benchmarks.cpu_kernels`.
_VECTOR_ROWS, _TILE_ROWS = (1.0, 0.0), (27.0, 74.0)
_LOOKED_AT = 16  # values along each dimension of a weight that may have changed


@dataclass(frozen=True, slots=True)
class Held:
    """The matrices of several experts as a layout holds them, stacks [e, ...]."""

    matrix: Matrix
    stacks: Mapping[str, Tensor]


class Products(ABC):
    """One way to multiply.

    arithmetic    what ranks must have alike for a token to have the same bits on all: how products are summed
    layout        how weights must be held
    decode_rows   what making one expert's MXFP4 weights ready costs, in rows that could be computed meanwhile
    read_rows     what reading one expert's weights of another format a second time costs, likewise
    """

    arithmetic: str
    layout: Layout
    decode_rows: float
    read_rows: float
    path = "torch"  # what multiplies; the CPU's kernels have several ways

    @abstractmethod
    def multiply(
        self, rows: Rows, held: Held, out: Tensor, goes: Tensor | None = None, workspace: Workspace | None = None
    ) -> None:
        """Each row times its expert's matrix, rounded once to BF16, or as it is summed.

        out [., N] bfloat16 or float32; row r goes to row goes[r] of it, goes [n] int64, by default to its own
        """


class KernelProducts(Products):
    """The CPU's kernels."""

    def __init__(self, library: Library) -> None:
        self.library, self.arithmetic, self.path = library, library.path.arithmetic, library.path.name
        self.layout = Blocks(library.path.order)
        self.decode_rows, self.read_rows = _TILE_ROWS if self.arithmetic == "bf16-tile" else _VECTOR_ROWS

    def multiply(
        self,
        rows: Rows,
        held: Held,
        out: Tensor,
        goes: Tensor | None = None,
        workspace: Workspace | None = None,  # noqa: ARG002  what torch decodes into; nothing is decoded to memory here
    ) -> None:
        stacks = held.stacks
        weights = (stacks[VALUES], stacks[SCALES]) if held.matrix.packed else stacks[VALUES]
        self.library.products(rows, weights, held.matrix.outputs, out, goes)


class TorchProducts(Products):
    """torch's products, of row blocks of one size; MXFP4 weights are decoded for one expert at a time."""

    arithmetic = "torch"
    layout = RowMajor()
    decode_rows, read_rows = _TORCH_DECODE_ROWS, 0.0

    def multiply(
        self, rows: Rows, held: Held, out: Tensor, goes: Tensor | None = None, workspace: Workspace | None = None
    ) -> None:
        begin = 0
        for expert, count in enumerate(rows.counts.tolist()):
            if not count:
                continue
            part = slice(begin, begin + count)
            x = rows.x[part] if rows.source is None else rows.x.index_select(0, rows.source[part])
            result = multiply_in_blocks(x, self._weight(held, expert, workspace or Workspace()), out.dtype)
            out[part if goes is None else goes[part]] = result
            begin += count

    def _weight(self, held: Held, expert: int, workspace: Workspace) -> Tensor:
        """One weight matrix, bfloat16."""
        stacks = held.stacks
        if DEQUANTIZED in stacks:
            return stacks[DEQUANTIZED][expert]
        matrix, held_format = held.matrix, held.matrix.format
        weight = held_format.join({key: stacks[key][expert] for key in matrix.plain()})
        if not held_format.decodes:
            return held_format.dense(weight)
        out = workspace.take("weight", (matrix.outputs, matrix.inputs), stacks[VALUES], torch.bfloat16)
        return held_format.dense(weight, out)


def products_of(device: torch.device, arithmetic: str = "auto", *, kernels: bool = True) -> Products:
    """How the device multiplies: the best that it has, or, on a CPU, the best of one arithmetic.

    kernels   whether ours read the weights; else torch multiplies. ValueError where there are none of that arithmetic.
    """
    if arithmetic == "auto":
        library = chosen() if device.type == "cpu" and kernels else None
        return TorchProducts() if library is None else KernelProducts(library)
    if not kernels:
        raise ValueError(f"arithmetic {arithmetic!r} is of kernels that do not read these weights; leave it out")
    if device.type != "cpu":
        raise ValueError(f"arithmetic {arithmetic!r} is for CPUs; on {device} leave it out")
    reasons = []
    for path in runnable():
        if path.arithmetic == arithmetic:
            try:
                return KernelProducts(load(path))
            except BuildError as reason:
                reasons.append(f"{path.name}: {reason}")
    known = ", ".join(sorted({"auto", *(path.arithmetic for path in runnable())}))
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise ValueError(f"arithmetic must be one of {known} on this CPU, got {arithmetic!r}{why}")


def linear(x: Tensor, weight: Tensor | MXFP4, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [n, K] bfloat16 by weight [N, K] bfloat16 or MXFP4 -> [n, N] bfloat16, or float32 where that is asked for.

    FP32 accumulation, and the bits that a layer's experts give the same rows on this device.
    """
    library = chosen() if x.device.type == "cpu" else None
    if library is None:
        dense = dequantize_mxfp4(weight) if isinstance(weight, MXFP4) else weight
        return multiply_in_blocks(x, dense.to(torch.bfloat16), dtype)
    out = torch.empty(len(x), weight.shape[0], dtype=dtype, device=x.device)
    product_by_kernel(library, x.contiguous(), weight if isinstance(weight, MXFP4) else weight.to(torch.bfloat16), out)
    return out


class Prepared:
    """A matrix [N, K] bfloat16 as the products of its device read it, for use again and again; linear()'s bits."""

    def __init__(self, weight: Tensor) -> None:
        self._library = chosen() if weight.device.type == "cpu" else None
        weight = weight.detach().to(torch.bfloat16)
        self._outputs, self._held = len(weight), weight if self._library is None else pack_bf16(weight)[None]

    def multiply(self, x: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """x [n, K] bfloat16 -> [n, N] of dtype, bfloat16 or float32"""
        if self._library is None:
            return multiply_in_blocks(x, self._held, dtype)
        out = torch.empty(len(x), self._outputs, dtype=dtype, device=x.device)
        counts = torch.tensor([len(x)], dtype=torch.int64, device="cpu")
        self._library.products(Rows(x.contiguous(), counts), self._held, self._outputs, out)
        return out


class Known:
    """A weight as it was when something was made of it: changes as torch counts them, and some of its values.

    The values, on a CPU, show what torch does not count: a change through `.data`, by NumPy, by a collective, and any
    of a tensor that was made in inference mode. 16 along each dimension are looked at.
    """

    def __init__(self, weight: Tensor) -> None:
        self._at, self._values = _counted(weight), _some(weight).clone()

    def still(self, weight: Tensor) -> bool:
        """Whether it shows no change. A weight with NaN among its values always does."""
        return self._at == _counted(weight) and torch.equal(self._values, _some(weight))


def _counted(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _some(weight: Tensor) -> Tensor:
    """A view; of no values elsewhere than on a CPU, since a device would have to be waited for."""
    if weight.device.type != "cpu":
        return weight.new_empty(0, device="cpu")
    step = [-(-size // _LOOKED_AT) or 1 for size in weight.shape]
    return weight.detach()[tuple(slice(None, None, each) for each in step)]


# ---- torch's products ----


def multiply_dtype(device: torch.device) -> torch.dtype:
    """BF16, or FP32 on CPUs without BF16 instructions: both hold the operands exactly and sum in FP32."""
    if device.type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16") or features.get("avx_vnni_2")
    return torch.bfloat16 if native else torch.float32


def multiply_in_blocks(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [n, K] by weight [N, K], both bfloat16 -> [n, N], block by block of rows, the last one filled up with zeros."""
    kind = torch.float32 if dtype == torch.float32 else multiply_dtype(x.device)
    out = torch.empty(len(x), len(weight), dtype=dtype, device=x.device)
    # BLAS libraries sum what is beyond a multiple of their vectors in other ways
    outputs, inputs = (-(-size // BLOCK) * BLOCK for size in weight.shape)
    weight = _padded(weight.to(kind), outputs, inputs)
    size = rows_at_once(x.device, kind, (outputs, inputs), torch.get_num_threads())
    for start in range(0, len(x), size):
        rows = x[start : start + size].to(kind)
        product = torch.mm(_padded(rows, size, inputs), weight.t())
        out[start : start + len(rows)] = product[: len(rows), : out.shape[1]]
    return out


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    missing = rows - matrix.shape[0], columns - matrix.shape[1]
    return torch.nn.functional.pad(matrix, (0, missing[1], 0, missing[0])) if any(missing) else matrix


@lru_cache(maxsize=256)
def rows_at_once(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], num_threads: int) -> int:
    """Rows of one product by a weight of that shape, so that a row's bits do not depend on its place or its company.

    Tried on this machine: the smallest of ROW_BLOCKS that passes, and the largest, with a warning, where none does.
    """
    for size in ROW_BLOCKS:
        if keeps_bits(device, dtype, shape, size):
            return size
    warnings.warn(
        f"on this machine torch's products of {dtype} [{size}, {shape[1]}] by {list(shape)} with {num_threads} threads "
        "give a row other bits in another place: outputs depend on the batch",
        KernelWarning,
        stacklevel=2,
    )
    return size


def keeps_bits(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], size: int) -> bool:
    """Whether rows of a product of `size` rows have the same bits when they stand elsewhere, beside others."""
    if device.type == "meta":  # tensors without values
        return True
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(rows: int) -> Tensor:
        values = torch.randn(rows, shape[1], generator=generator, dtype=torch.float32, device="cpu")
        return values.to(torch.bfloat16).to(device, dtype)

    x, weight = random(size), random(shape[0])
    here = torch.mm(x, weight.t())
    for shift in (1, size // 2 + 1):
        if not torch.equal(torch.mm(x.roll(shift, 0).contiguous(), weight.t()), here.roll(shift, 0)):
            return False
    other = random(size)
    other[::2] = x[::2]
    return torch.equal(torch.mm(other, weight.t())[::2], here[::2])
