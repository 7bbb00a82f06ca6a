"""What both grouped products share on the host: their operands, the launch of a persistent grid, the builds to compile.

Rows are sorted by expert, and tokens_per_expert, on the device, says how many each has. The host does not read it: the
grid has a fixed number of programs, and each finds its tiles by itself (`tiles`).
"""

# R rows, sorted by expert   e experts of this rank   K what is summed over   N rows of each expert's weight

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.formats import MXFP4, MXFP8, dequantize_mxfp4, dequantize_mxfp8
from megamoe.kernels.chips.targets import OPTIONS, Build, Target
from megamoe.kernels.chips.tiles import INSTRUCTIONS, LARGE_SCALES, Tile, num_programs, tile_for
from megamoe.kernels.chips.tuned import table_of, tiles_of
from megamoe.kernels.layout import CHUNK, LARGEST_SMALL_SCALE, Prepacked, Wide, in_memory_order

# arguments of both kernels that change from call to call: they are not compiled again for a 1 or a multiple of 16,
SIZES = ["num_experts", "num_programs"]
# nor for where a step's part of a buffer begins
SLICED = ["tokens_per_expert", "source", "weights", "index", "bias"]


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows and the weights of their experts: MXFP8 by MXFP4, the same widened by prepacked ones, or BF16 by BF16.

    x                   [M, K] MXFP8, Wide or bfloat16; may be rows of a wider buffer
    weight              [e, N, K] MXFP4, Prepacked or bfloat16, contiguous
    tokens_per_expert   [e] int32 on the device: rows of each expert, together R at most; rows beyond are nobody's
    source              [R] int32: in which row of x each row is, sorted by expert; None where x is those rows, R = M
                        x = [a, b], source [1, 0, 1]  ->  rows b, a, b
    bias                [e, N] float32, added to each expert's sums before they are rounded; None for none
    oversubscription    how many times as many programs as the device runs at once: other streams' kernels can begin
                        where one has ended

    ValueError where these do not fit together.
    """

    x: MXFP8 | Wide | Tensor
    weight: MXFP4 | Prepacked | Tensor
    tokens_per_expert: Tensor
    source: Tensor | None = None
    oversubscription: int = 1
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        kinds = {MXFP8: MXFP4, Wide: Prepacked}
        if not isinstance(self.weight, kinds.get(type(self.x), Tensor)):
            pairs = "MXFP8 rows by MXFP4 weights, widened ones by prepacked weights, or BF16 rows by BF16 weights"
            given = f"{type(self.x).__name__} by {type(self.weight).__name__}"
            raise ValueError(f"a grouped product takes {pairs}, got {given}")
        (num_experts, _, depth), width = self.weight.shape, self._values.shape[1]
        if depth != width:
            raise ValueError(f"a grouped product sums over {depth} of the weights and {width} of the rows")
        if tuple(self.tokens_per_expert.shape) != (num_experts,) or self.tokens_per_expert.dtype != torch.int32:
            given = f"{self.tokens_per_expert.dtype} {list(self.tokens_per_expert.shape)}"
            raise ValueError(f"tokens_per_expert must be int32 [{num_experts}], got {given}")
        if self.source is not None and (self.source.dim() != 1 or self.source.dtype != torch.int32):
            raise ValueError(f"source must be int32 [R], got {self.source.dtype} {list(self.source.shape)}")
        if self.bias is not None:
            wanted = [num_experts, self.num_columns]
            if list(self.bias.shape) != wanted or self.bias.dtype != torch.float32:
                raise ValueError(f"bias must be float32 {wanted}, got {self.bias.dtype} {list(self.bias.shape)}")
            assert self.bias.is_contiguous(), self.bias.stride()
        strides = [each.stride(-1) for each in (self._values, *self._scales)]
        assert strides == [1] * len(strides), strides
        if isinstance(self.x, Wide):
            stride = self._values.stride(0)
            assert stride % 8 == 0, stride
            assert len(self._values) * stride < 1 << 34, (len(self._values), stride)  # in eighths they fit 31 bits
        assert all(each.is_contiguous() for each in self._parts), [each.stride() for each in self._parts]

    @property
    def _parts(self) -> list[Tensor]:
        """The weights, and their scales if they have any."""
        if isinstance(self.weight, Tensor):
            return [self.weight]
        return [self.weight.words if isinstance(self.weight, Prepacked) else self.weight.packed, self.weight.scales]

    @property
    def _values(self) -> Tensor:
        if isinstance(self.x, MXFP8):
            return self.x.values.view(torch.uint8)
        return self.x.values if isinstance(self.x, Wide) else self.x

    @property
    def _scales(self) -> list[Tensor]:
        return [self.x.scales] if isinstance(self.x, MXFP8) else []

    @property
    def num_rows(self) -> int:
        return len(self._values if self.source is None else self.source)

    @property
    def num_columns(self) -> int:
        return int(self.weight.shape[1])

    @property
    def kind(self) -> str:
        """Which tiles the product takes: "wide" for widened rows, else by the format of the weights."""
        if isinstance(self.x, Wide):
            return "wide"
        return "mxfp4" if isinstance(self.weight, MXFP4) else "bf16"

    def run(self, kernel: Any, results: Mapping[str, Any], tile: Tile | None, programs: int | None) -> None:
        """Launches kernel on these operands and `results`, its other arguments, or does not where there are no rows."""
        device, num_experts = self.tokens_per_expert.device, len(self.tokens_per_expert)
        if not self.num_rows or not num_experts:
            return
        tile = tile or self._tile(device)
        if self.kind == "wide" and tile.depth % CHUNK:
            raise ValueError(f"tiles for prepacked weights have a depth that {CHUNK} divides, got {tile.label}")
        programs = programs or num_programs(device, tile) * self.oversubscription
        constants = {
            "K": self._values.shape[1],
            "N": self.num_columns,
            "EXPERTS": experts_width(num_experts),
            "OPERAND": tl.float32 if device.type == "cpu" else tl.bfloat16,
            "SMALL_SCALES": self._small_scales,
        }
        kernel[(programs,)](**self._arguments(programs), **results, **constants, **tile.launch, **OPTIONS)

    def _tile(self, device: torch.device) -> Tile:
        if not self._small_scales:
            return LARGE_SCALES
        return tile_for(table_of(device), self.kind, self.num_rows, len(self.tokens_per_expert))

    @property
    def _small_scales(self) -> bool:
        return not isinstance(self.weight, Prepacked) or self.weight.small_scales

    def _arguments(self, programs: int) -> dict[str, Any]:
        scales, weights = self._scales, self._parts
        return {
            "x": self._values,
            "x_scales": scales[0] if scales else None,
            "w": weights[0],
            "w_scales": weights[1] if len(weights) > 1 else None,
            "bias": self.bias,
            "tokens_per_expert": self.tokens_per_expert,
            "source": self.source,
            "num_experts": len(self.tokens_per_expert),
            "num_programs": programs,
            "x_stride": self._values.stride(0),
            "x_scale_stride": scales[0].stride(0) if scales else 0,
        }

    def products_torch(self, weights: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """What the product means, an expert after the other: its rows, and in FP64, rounded, their product [n, N].

        A bias is in it, times each row's weight [R] where there are weights.
        """
        start = 0
        for expert, count in enumerate(self.tokens_per_expert.tolist()):
            rows = slice(start, start + count)
            start += count
            lie = rows if self.source is None else self.source[rows].to(torch.int64)
            product = self._rows_fp64(lie) @ self._weight_fp64(expert).T
            if self.bias is not None:
                scale = 1.0 if weights is None else weights[rows].to(torch.float64).unsqueeze(-1)
                product += scale * self.bias[expert].to(torch.float64)
            yield rows, product.to(torch.bfloat16)

    def _weight_fp64(self, expert: int) -> Tensor:
        weight = self.weight
        if isinstance(weight, Tensor):
            return weight[expert].to(torch.float64)
        plain = weight[expert : expert + 1].plain() if isinstance(weight, Prepacked) else weight
        place = 0 if isinstance(weight, Prepacked) else expert
        return dequantize_mxfp4(MXFP4(plain.packed[place], plain.scales[place]), torch.float64)

    def _rows_fp64(self, lie: slice | Tensor) -> Tensor:
        values = self._values[lie]
        if isinstance(self.x, MXFP8):
            return dequantize_mxfp8(MXFP8(values.view(torch.float8_e4m3fn), self.x.scales[lie]), torch.float64)
        return (in_memory_order(values) if isinstance(self.x, Wide) else values).to(torch.float64)


def experts_width(num_experts: int) -> int:
    """Width of the vector in which a kernel has its experts: 5 -> 8"""
    return int(triton.next_power_of_2(max(num_experts, 2)))


def builds_of(
    target: Target,
    kernel: Any,
    case: str,
    fixed: Mapping[str, Any],
    results: Mapping[str, Mapping[str, str | None]],
) -> list[Build]:
    """A product of 64 experts with every tile of the target and its devices, for both formats of the weights.

    case     whose sizes they are, for the label
    fixed    values of constants: K and N, and the kernel's own
    results  format of the weights -> Triton type of each of the kernel's own parameters, None for one that is None
    """
    found = []
    for kind, own in results.items():
        tiles = tiles_of(target.name, kind)
        types, instruction = {**_TYPES[kind], **own}, INSTRUCTIONS[target.name].get(kind, "")
        for label, tile in tiles.items():
            found.append(_build(kernel, f"{case} {kind} {label}", tile, fixed, types, instruction))
        if tiles and kind == "wide":
            label = f"{case} wide, scales above {LARGEST_SMALL_SCALE}, {LARGE_SCALES.label}"
            large = {**fixed, "SMALL_SCALES": False}
            found.append(_build(kernel, label, LARGE_SCALES, large, types, instruction))
    return found


_SIZES = dict.fromkeys(("num_experts", "num_programs", "x_stride", "x_scale_stride"), "i32")
_SHARED: Mapping[str, str | None] = {"tokens_per_expert": "*i32", "bias": None, **_SIZES}
_TYPES: Mapping[str, Mapping[str, str | None]] = {
    "mxfp4": {**_SHARED, "x": "*u8", "x_scales": "*u8", "w": "*u8", "w_scales": "*u8"},
    "wide": {**_SHARED, "x": "*bf16", "x_scales": None, "w": "*i32", "w_scales": "*u8"},
    "bf16": {**_SHARED, "x": "*bf16", "x_scales": None, "w": "*bf16", "w_scales": None},
}


def _build(
    kernel: Any,
    label: str,
    tile: Tile,
    fixed: Mapping[str, Any],
    types: Mapping[str, str | None],
    instruction: str,
) -> Build:
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    absent = {name: None for name, kind in types.items() if kind is None}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    pointers = [name for name, kind in signature.items() if kind.startswith("*") and name not in SLICED]
    aligned = [*pointers, *(name for name in signature if name.endswith("_stride"))]
    return Build(
        label=label,
        kernel=kernel,
        signature=signature,
        constants={"SMALL_SCALES": True, **fixed, **sizes, **absent, "EXPERTS": 64, "OPERAND": tl.bfloat16},
        aligned=frozenset(aligned),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        instruction=instruction,
        options=dict(tile.options),
    )
