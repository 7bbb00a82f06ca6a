"""The host's side of the mega-kernel: what a rank holds for it, one launch a call, and whom a call waited for in vain.

A launch waits for nothing, and its sizes follow from the number of tokens alone, so a CUDA graph can be captured of it.
"""

# P ranks   T tokens of this rank   K experts per token   H hidden   e experts of this rank

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.activations import SWIGLU, Activation
from megamoe.formats import BLOCK, MXFP4
from megamoe.kernels.chips.targets import OPTIONS, Build, Target, chip_of
from megamoe.kernels.chips.tiles import INSTRUCTIONS, LARGE_SCALES, TABLES, Table, Tile, tile_for
from megamoe.kernels.device.activation import constants_of
from megamoe.kernels.layout import LARGEST_SMALL_SCALE, Prepacked
from megamoe.kernels.mega.kernel import VARYING, mega_kernel
from megamoe.kernels.mega.layout import Layout
from megamoe.parallel.transport.buffers import SymmetricBuffer

MOST_PROGRAMS = 2  # of a multiprocessor: what the registers leave room for
MOST_ROWS = 64  # of a block: kernels with larger tiles have no registers left for what is around the products


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """A rank's experts as the grouped products take them (`Grouped`).

    gate_up, down             [e, 2I, H] and [e, H, I], gate and up rows in turns; MXFP4, Prepacked or bfloat16
    gate_up_bias, down_bias   [e, 2I] and [e, H] float32, or None
    """

    gate_up: MXFP4 | Prepacked | Tensor
    down: MXFP4 | Prepacked | Tensor
    activation: Activation
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def small_scales(self) -> bool:
        return all(not isinstance(each, Prepacked) or each.small_scales for each in (self.gate_up, self.down))

    @property
    def arguments(self) -> dict[str, Tensor | None]:
        (w1, scales1), (w2, scales2) = _parts(self.gate_up), _parts(self.down)
        biases = {"bias1": self.gate_up_bias, "bias2": self.down_bias}
        return {"w1": w1, "w1_scales": scales1, "w2": w2, "w2_scales": scales2, **biases}


def _parts(weight: MXFP4 | Prepacked | Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(weight, Tensor):
        return weight, None
    return (weight.words if isinstance(weight, Prepacked) else weight.packed), weight.scales


@dataclass(frozen=True, slots=True)
class Report:
    """What went wrong in a call, as far as the device has come.

    counts    ranks whose counts did not come by the deadline   results   ranks whose results did not
    stuck     programs of this rank waited in vain for others of this rank
    wrong     an id that was neither -1 nor an expert, or a weight that was not finite
    """

    counts: tuple[int, ...]
    results: tuple[int, ...]
    stuck: bool
    wrong: bool

    @property
    def broken(self) -> bool:
        """Whether counters can no longer be trusted."""
        return bool(self.counts or self.results or self.stuck)


def interpreting() -> bool:
    """Whether Triton interprets in this process, so that the kernel runs on CPU tensors."""
    return not isinstance(mega_kernel, triton.JITFunction)


def tile_of(table: Table, kind: str, rows_per_expert: int, *, small_scales: bool = True) -> Tile:
    """The tile for so many rows an expert, with MOST_ROWS rows at most; any tile has the same bits."""
    if not small_scales:
        return _roomy(LARGE_SCALES)
    few = tiles_of_few(table, kind)
    wanted = _roomy(tile_for(table, kind, rows_per_expert, 1))
    return wanted if wanted in few else few[-1]


def tiles_of_few(table: Table, kind: str) -> list[Tile]:
    """A table's tiles of MOST_ROWS rows at most, or its smallest one."""
    tiles = [_roomy(tile) for _, tile in table[kind]]
    return [tile for tile in tiles if tile.rows <= MOST_ROWS] or [min(tiles, key=lambda tile: tile.rows)]


def _roomy(tile: Tile) -> Tile:
    """The tile, with eight warps where it has 64 rows: the registers of four do not hold what is around products."""
    return replace(tile, num_warps=max(tile.num_warps, 8), programs=1) if tile.rows >= MOST_ROWS else tile


def programs_of(device: torch.device, tile: Tile, sharing: int = 1) -> int:
    """Programs of a grid that are all on the device at once, where `sharing` ranks have one each there.

    One in Triton's interpreter, which runs programs one after the other.
    """
    if device.type == "cpu":
        return 1
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, processors * min(tile.programs, MOST_PROGRAMS) // sharing)


class MegaKernel:
    """The mega-kernel of one rank: the memory that its calls use, and what they found wrong.

    layout, tile     as Layout.of() and tile_of() have them      buffer   of layout.num_bytes
    owners, places   [E] int32 on the device: which rank holds each expert, and which of that rank's experts it is
    programs         of the grid; all of them, and those of other ranks on the same device, must be there at once
    deadline_s       seconds from the start of a call in which all its waits must be over

    Layers of one layout may share it: their calls follow each other on every rank alike.
    """

    def __init__(
        self,
        layout: Layout,
        tile: Tile,
        buffer: SymmetricBuffer,
        owners: Sequence[int],
        programs: int,
        deadline_s: float,
    ) -> None:
        assert (layout.rows, layout.columns) == (tile.rows, tile.columns), (layout, tile)
        assert len(buffer.local) >= layout.num_bytes, (len(buffer.local), layout.num_bytes)
        self.layout, self.tile, self.buffer, self.programs = layout, tile, buffer, programs
        self._deadline_ms, self._device = max(1, int(deadline_s * 1000)), buffer.local.device
        self.num_local = sum(owner == buffer.rank for owner in owners)
        places = [sum(owner == before for before in owners[:expert]) for expert, owner in enumerate(owners)]
        self._owners, self._places = (self._new(each) for each in (owners, places))
        ring = layout.ring * layout.rows
        self._memory: dict[str, Tensor | None] = {
            "state": self._zeros(layout.state_words, torch.int64),
            "scratch": self._zeros(layout.scratch_size, torch.int32),
            "record": self._zeros(2 * layout.ranks + 2, torch.int64),
            "row_weights": self._zeros(ring, torch.float32),
            **self._operand("x", ring, layout.hidden),
            **self._operand("activated", ring, layout.intermediate),
        }
        self._here = torch.zeros(2 * layout.ranks + 2, dtype=torch.int64, pin_memory=self._device.type == "cuda")

    def _new(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=self._device)

    def _operand(self, name: str, rows: int, width: int) -> dict[str, Tensor | None]:
        kind = self.layout.kind
        values = self._zeros(rows * width, torch.uint8 if kind == "mxfp4" else torch.bfloat16)
        return {
            name: values,
            f"{name}_scales": self._zeros(rows * width // BLOCK, torch.uint8) if kind == "mxfp4" else None,
        }

    @property
    def memory_bytes(self) -> int:
        """Bytes of this rank's buffer and of what is its own."""
        own = sum(each.nbytes for each in self._memory.values() if each is not None)
        return self.buffer.local.nbytes + own

    def launch(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
        """hidden [T, H] bfloat16, topk_ids [T, K] int64 (-1 masks), topk_weights [T, K] float32 -> [T, H] bfloat16.

        All ranks must call. ValueError, before anything is sent, for more tokens than the layout has room for.
        """
        if len(hidden) > self.layout.tokens:
            raise ValueError(
                f"{len(hidden)} tokens are more than the {self.layout.tokens} that a rank may bring to a call"
            )
        out = hidden.new_empty(len(hidden), self.layout.hidden)
        mega_kernel[(self.programs,)](**self._arguments(hidden, topk_ids, topk_weights, out, experts))
        record = self._memory["record"]
        assert record is not None
        self._here.copy_(record, non_blocking=True)
        return out

    def prepare(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> None:
        """Compiles and loads the kernel: a launch that had to, while peers run already, would keep them waiting."""
        if self._device.type == "cpu":
            return
        out = torch.empty_like(hidden)
        arguments = self._arguments(hidden, topk_ids, topk_weights, out, experts)
        mega_kernel.warmup(grid=(self.programs,), **arguments)[self.programs, 1, 1]  # which loads it

    def _arguments(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor, experts: ExpertWeights
    ) -> dict[str, Any]:
        on_cpu = self._device.type == "cpu"
        launch = {key: value for key, value in self.tile.launch.items() if key not in ("ROWS", "COLUMNS")}
        return {
            "hidden": hidden,
            "topk_ids": topk_ids.contiguous(),
            "topk_weights": topk_weights.contiguous(),
            "out": out,
            "owners": self._owners,
            "places": self._places,
            "bases": self.buffer.addresses,
            **self._memory,
            **experts.arguments,
            "rank": self.buffer.rank,
            "num_tokens": len(hidden),
            "num_local": self.num_local,
            "num_programs": self.programs,
            "hidden_stride": hidden.stride(0),
            "deadline_ms": self._deadline_ms,
            "L": self.layout,
            "CLOCK": "host" if on_cpu else chip_of(self._device).partition(":")[0],
            "OPERAND": tl.float32 if on_cpu else tl.bfloat16,
            "SMALL_SCALES": experts.small_scales,
            **constants_of(experts.activation),
            **launch,
            **OPTIONS,
        }

    def take(self) -> Report | None:
        """What calls since the last one of this found wrong, as far as the device has come; None for nothing.

        Waits for the device where there is something, so that it is told once; not while a graph is captured.
        """
        found, ranks = self._here.tolist(), self.layout.ranks
        if not any(found):
            return None
        record = self._memory["record"]
        assert record is not None
        if not (record.is_cuda and torch.cuda.is_current_stream_capturing()):
            found = record.tolist()
            self._here.copy_(record.zero_())
        counts, results = (tuple(rank for rank in range(ranks) if found[part * ranks + rank]) for part in range(2))
        return Report(counts, results, bool(found[2 * ranks]), bool(found[2 * ranks + 1]))


# ---- what is compiled ahead ----


def builds(target: Target) -> list[Build]:
    """Tiles of few rows, and that of large scales: DeepSeek-V4-Pro's sizes and activation, eight ranks of 64 tokens."""
    found = []
    for kind in TABLES[target.name]:
        tiles = tiles_of_few(TABLES[target.name], kind)
        found += [_build(target, kind, tile, small_scales=True) for tile in tiles]
        if kind == "wide":
            found.append(_build(target, kind, _roomy(LARGE_SCALES), small_scales=False))
    return found


_OPERANDS: dict[str, tuple[str, str | None, str, str | None]] = {
    "mxfp4": ("*u8", "*u8", "*u8", "*u8"),
    "wide": ("*bf16", None, "*i32", "*u8"),
    "bf16": ("*bf16", None, "*bf16", None),
}


def _build(target: Target, kind: str, tile: Tile, *, small_scales: bool) -> Build:
    x, x_scales, w, w_scales = _OPERANDS[kind]
    layout = Layout.of(
        ranks=8,
        num_experts=384,
        most_experts=48,
        topk=6,
        tokens=64,
        hidden=7168,
        intermediate=3072,
        linear1_rows=6144,
        kind=kind,
        wire="bf16" if kind == "bf16" else "mxfp8",
        rows=tile.rows,
        columns=tile.columns,
        wave=8,
    )
    types: dict[str, str | None] = {
        "hidden": "*bf16",
        "topk_ids": "*i64",
        "topk_weights": "*fp32",
        "out": "*bf16",
        **dict.fromkeys(("owners", "places", "scratch"), "*i32"),
        **dict.fromkeys(("bases", "state", "record"), "*i64"),
        "row_weights": "*fp32",
        **dict.fromkeys(("x", "activated"), x),
        **dict.fromkeys(("x_scales", "activated_scales"), x_scales),
        **dict.fromkeys(("w1", "w2"), w),
        **dict.fromkeys(("w1_scales", "w2_scales"), w_scales),
        **dict.fromkeys(("bias1", "bias2"), None),
        **dict.fromkeys(VARYING, "i32"),
    }
    constants = {
        "L": layout,
        "CLOCK": target.backend,
        "OPERAND": tl.bfloat16,
        "SMALL_SCALES": small_scales,
        **constants_of(SWIGLU.with_limit(10.0)),
        "DEPTH": tile.depth,
        **{name: None for name, kind in types.items() if kind is None},
    }
    signature = {name: types.get(name) or "constexpr" for name in mega_kernel.arg_names}
    pointers = {name for name, each in signature.items() if each.startswith("*")}
    return Build(
        label=f"V4-Pro {kind}{'' if small_scales else f', scales above {LARGEST_SMALL_SCALE},'} {tile.label}",
        kernel=mega_kernel,
        signature=signature,
        constants=constants,
        aligned=frozenset(pointers - {"hidden", "topk_ids", "topk_weights", "out"}),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        instruction=INSTRUCTIONS[target.name].get(kind, ""),
        options=dict(tile.options),
    )
