"""This rank's experts: weights as they are held, and the arithmetic of rows that are sorted by expert."""

# E experts in all   e experts of this rank   H hidden   I intermediate   n rows, each expert's padded

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.formats import BLOCK, MXFP4, MXFP4_MAX_SCALE, dequantize_mxfp4, quantize_mxfp4
from megamoe.kernels.layout import interleave_gate_up, separate_gate_up
from megamoe.ops import (
    PREPARED_ROWS,
    activate,
    can_prepare,
    has_kernels,
    linear,
    linear_prepared,
    matmul_dtype,
    prepare,
    row_multiple,
    silu_table,
)
from megamoe.parallel.workspace import Workspace
from megamoe.shape import MoEShape

WEIGHT_FORMATS = ("mxfp4", "bf16")
# What decoding one expert's weights costs, in rows of its matrix products. Measured on one Zen 4 core, 2026-11-24:
# some 0.5 ns a value of MXFP4, 9 ps a multiply-add.
_DECODE_ROWS = 55.0
# The same for kernels, which read packed weights from memory a second time: computed, for an H100 at 3.35 TB/s and 400
# TFLOP/s, and not measured. H and I cancel out.
_READ_ROWS = 30.0
Weight = Tensor | MXFP4 | tuple[Tensor, Tensor]
RowGroups = list[tuple[slice, int]]


class Experts(nn.Module):
    """The experts [first, first + e) of a layer.

    mxfp4   gate_up uint8 [e, 2I, H/2] + scales [e, 2I, H/32], down uint8 [e, H, I/2] + scales [e, H, I/32]:
            packed, dequantised one matrix at a time into a buffer that all layers of a group share.
            keep_dequantized=True also keeps a BF16 copy (3 * H * I * 2 bytes an expert more) and saves that time.
    bf16    gate_up bfloat16 [e, 2I, H], down bfloat16 [e, H, I]; on CPUs that multiply BF16 each matrix is held as
            their product reads it, and the state dict has it as it was

    Where the device runs Triton kernels (`grouped`) gate_up has gate and up rows in turns, and the state dict has them
    as they were; the kernels decode on the way, so keep_dequantized is refused.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor
    down_scales: Tensor
    table: Tensor

    def __init__(
        self,
        shape: MoEShape,
        ids: range,
        *,
        weight_format: str,
        device: torch.device,
        keep_dequantized: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.ids, self.weight_format, self.device = shape, ids, weight_format, device
        self.packed = weight_format == "mxfp4"
        self.grouped = has_kernels(device)
        if self.grouped and keep_dequantized:
            raise ValueError(f"keep_dequantized is of no use on {device}, whose kernels decode weights on their way")
        self.keep_dequantized = keep_dequantized and self.packed
        self._loaded = [False] * len(ids)
        self.prepares = not self.packed and can_prepare(device) and not self.grouped
        self._prepared: dict[str, dict[int, Tensor]] = {"gate_up": {}, "down": {}} if self.prepares else {}
        self._sizes = {"gate_up": (2 * shape.intermediate, shape.hidden), "down": (shape.hidden, shape.intermediate)}
        for name, (rows, columns) in self._sizes.items():
            for key, width, dtype in self._layout(name, columns):
                # plain torch.empty: the pages of a large buffer are not touched before its weights arrive
                self.register_buffer(key, torch.empty(len(ids), rows, width, dtype=dtype, device=device))
        self.register_buffer("table", silu_table(shape.swiglu_limit, device), persistent=False)
        self.matmul_dtype = matmul_dtype(device)

    def _layout(self, name: str, columns: int) -> list[tuple[str, int, torch.dtype]]:
        if self.prepares:
            return []
        if not self.packed:
            return [(name, columns, torch.bfloat16)]
        layout = [(name, columns // 2, torch.uint8), (f"{name}_scales", columns // BLOCK, torch.uint8)]
        if self.keep_dequantized:
            layout.append((f"{name}_dequantized", columns, torch.bfloat16))
        return layout

    def regroup(self, ids: range) -> None:
        """Holds the experts `ids` from now on: those that it has keep their weights, the others' are missing.

        Where the ids stay nothing is copied. Else the kept rows move to new buffers, one buffer after another.
        """
        start = max(self.ids.start, ids.start)
        kept = range(start, max(start, min(self.ids.stop, ids.stop)))
        here, there = (slice(kept.start - held.start, kept.stop - held.start) for held in (self.ids, ids))
        if ids != self.ids:
            for name, buffer in self._weight_buffers():
                moved = buffer.new_empty(len(ids), *buffer.shape[1:])
                moved[there] = buffer[here]
                setattr(self, name, moved)
        shift = self.ids.start - ids.start
        for name, matrices in self._prepared.items():
            self._prepared[name] = {i + shift: matrix for i, matrix in matrices.items() if i + self.ids.start in kept}
        loaded = [False] * len(ids)
        loaded[there] = self._loaded[here]
        self.ids, self._loaded = ids, loaded

    def _weight_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, buffer) for name, buffer in self.named_buffers() if name != "table"]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, matrices in self._prepared.items():
            if not self.missing:
                dense = [matrices[index].to_dense() for index in range(len(self.ids))]
                none = torch.empty(0, *self._sizes[name], dtype=torch.bfloat16)
                destination[prefix + name] = torch.stack(dense) if dense else none
        for key in self._in_turns(destination, prefix):
            destination[key] = separate_gate_up(destination[key])

    def _in_turns(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Keys whose rows are in turns here and not in a state dict."""
        keys = (f"{prefix}gate_up", f"{prefix}gate_up_scales") if self.grouped else ()
        return [key for key in keys if key in state_dict]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mine = {prefix + name: name for name in self._prepared}
        if mine and all(key in state_dict for key in mine):
            for index, expert in enumerate(self.ids):
                self.load(expert, *(state_dict[key][index] for key in mine))
        state_dict = {key: value for key, value in state_dict.items() if key not in mine}
        for key in self._in_turns(state_dict, prefix):
            state_dict[key] = interleave_gate_up(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not mine and all(prefix + name in state_dict for name, _ in self._weight_buffers()):
            self._loaded = [True] * len(self.ids)

    @property
    def memory_bytes(self) -> int:
        """Bytes that this rank's expert weights take, dequantised copies included."""
        held = [buffer for _, buffer in self._weight_buffers()]
        held += [matrix for matrices in self._prepared.values() for matrix in matrices.values()]
        return sum(each.numel() * each.element_size() for each in held)

    @property
    def row_multiple(self) -> int:
        """What the rows of an expert must be padded to."""
        return PREPARED_ROWS if self.prepares else row_multiple(self.device)

    @property
    def decode_rows(self) -> float:
        """What making one expert's weights ready costs, in rows that could be computed meanwhile."""
        if self.grouped:
            return _READ_ROWS if self.packed else 4 * _READ_ROWS
        return _DECODE_ROWS if self.packed and not self.keep_dequantized else 0.0

    @property
    def missing(self) -> list[int]:
        """Global ids of experts without weights yet."""
        return [expert for expert, loaded in zip(self.ids, self._loaded, strict=True) if not loaded]

    def load(self, expert: int, gate_up: Weight, down: Weight) -> None:
        """Takes the weights of one expert, by global id: gate_up [2I, H] with the gate's rows first, down [H, I].

        Each a float tensor, MXFP4, or a pair (packed, scales) of one-byte tensors. What does not come in the
        layer's format is converted: floats are quantised to MXFP4, MXFP4 is dequantised to BF16 without loss.
        Both are looked through before either is taken: where this raises ValueError nothing has changed.
        """
        self.check(expert, gate_up, down)
        index = expert - self.ids.start
        self._loaded[index] = False  # what an interruption leaves is neither the old expert nor the new one
        with torch.no_grad():
            for name, weight in (("gate_up", gate_up), ("down", down)):
                self._store(name, index, weight, self._sizes[name], f"{name} of expert {expert}")
        self._loaded[index] = True

    def check(self, expert: int, gate_up: Weight, down: Weight) -> None:
        """ValueError for what load() would not take."""
        if expert not in self.ids:
            raise ValueError(f"expert {expert} is not of this rank, which holds {describe(self.ids)}")
        for name, given in (("gate_up", gate_up), ("down", down)):
            what = f"{name} of expert {expert}"
            weight = as_weight(given, self._sizes[name], what)
            if self.packed and isinstance(weight, Tensor):
                refuse_unquantizable(weight, what)

    def forget(self, experts: range) -> None:
        """Takes these experts, global ids, for missing until they are loaded again."""
        for expert in experts:
            self._loaded[expert - self.ids.start] = False

    def _store(self, name: str, index: int, weight: Weight, size: tuple[int, int], what: str) -> None:
        weight = as_weight(weight, size, what)
        if not self.packed:
            dense = dequantize_mxfp4(weight) if isinstance(weight, MXFP4) else weight
            if self.prepares:
                self._prepared[name][index] = prepare(dense.to(torch.bfloat16))
            else:
                self.get_buffer(name)[index] = self._laid(name, dense)
            return
        if not isinstance(weight, MXFP4):
            weight = quantize_mxfp4(weight)
        self.get_buffer(name)[index] = self._laid(name, weight.packed)
        self.get_buffer(f"{name}_scales")[index] = self._laid(name, weight.scales)
        if self.keep_dequantized:
            self.get_buffer(f"{name}_dequantized")[index] = dequantize_mxfp4(weight)

    def _laid(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a weight in the order in which they are held."""
        return interleave_gate_up(rows) if self.grouped and name == "gate_up" else rows

    def stack(self, name: str, experts: range) -> MXFP4 | Tensor:
        """gate_up or down of several experts, global ids, as they are held: what grouped products take."""
        part = slice(experts.start - self.ids.start, experts.stop - self.ids.start)
        weights = self.get_buffer(name)[part]
        return MXFP4(weights, self.get_buffer(f"{name}_scales")[part]) if self.packed else weights

    def _weight(self, name: str, index: int, workspace: Workspace) -> Tensor:
        """One weight matrix as the matrix product takes it."""
        if not self.packed:
            weight = self.get_buffer(name)[index]
        elif self.keep_dequantized:
            weight = self.get_buffer(f"{name}_dequantized")[index]
        else:
            packed = MXFP4(self.get_buffer(name)[index], self.get_buffer(f"{name}_scales")[index])
            weight = workspace.take("weight", packed.shape, packed.packed, torch.bfloat16)
            dequantize_mxfp4(packed, out=weight)
        return weight.to(self.matmul_dtype)

    def linear1(self, tokens: Tensor, groups: RowGroups, workspace: Workspace) -> Tensor:
        """tokens [n, H] bfloat16, rows sorted by expert as in groups() -> gate and up [n, 2I] bfloat16"""
        return self._products(tokens, "gate_up", groups, "gate_up", workspace)

    def activation(self, gate_up: Tensor, weights: Tensor, workspace: Workspace) -> Tensor:
        """Clamp, SiLU(gate) * up * weight, rounded as the contract says: [n, 2I], [n] float32 -> [n, I] bfloat16"""
        hidden = workspace.take("hidden", (len(gate_up), self.shape.intermediate), gate_up)
        return activate(gate_up, weights, self.shape.swiglu_limit, self.table, quantized=self.packed, out=hidden)

    def linear2(self, hidden: Tensor, groups: RowGroups, place: Hashable, workspace: Workspace) -> Tensor:
        """hidden [n, I] bfloat16 -> [n, H] bfloat16, in the workspace's buffer called `place` or of its own"""
        return self._products(hidden, "down", groups, place, workspace)

    def _products(self, x: Tensor, name: str, groups: RowGroups, place: Hashable, workspace: Workspace) -> Tensor:
        """Every group's rows by its expert's matrix."""
        if self.prepares and len(groups) == 1:
            return linear_prepared(x, self._prepared[name][groups[0][1]])
        width = 2 * self.shape.intermediate if name == "gate_up" else self.shape.hidden
        out = workspace.take(place, (len(x), width), x, torch.bfloat16)
        for rows, index in groups:
            weight = self._prepared[name][index] if self.prepares else self._weight(name, index, workspace)
            linear(x[rows], weight, out[rows])
        return out

    def groups(self, experts: range, padded_rows: Sequence[int]) -> RowGroups:
        """Rows and local index of each expert that has any; experts are global ids in order.

        padded_rows: rows of each, a multiple of row_multiple
        experts 4..6, rows [8, 0, 16] -> [0:8] 4, [8:24] 6
        """
        spans, start = [], 0
        for expert, rows in zip(experts, padded_rows, strict=True):
            if rows:
                spans.append((slice(start, start + rows), expert - self.ids.start))
            start += rows
        return spans

    def extra_repr(self) -> str:
        held = f"{self.weight_format}, {self.memory_bytes / 1e6:.1f} MB"
        return f"{describe(self.ids)}, {held}" + (", BF16 copy kept" if self.keep_dequantized else "")


def describe(ids: range) -> str:
    """range(4, 8) -> 'experts 4 to 7'"""
    return f"experts {ids.start} to {ids.stop - 1}" if ids else "no experts"


def refuse_unquantizable(weight: Tensor, what: str) -> None:
    """ValueError where quantize_mxfp4() has no code for some value, found without quantising the others."""
    largest = float(weight.detach().to(torch.float32).abs().amax()) if weight.numel() else 0.0
    if not largest < 2.0**127:  # NaN neither
        try:
            quantize_mxfp4(weight)
        except ValueError as refusal:
            raise ValueError(f"{what}: {refusal}") from refusal


def as_weight(weight: Weight, size: tuple[int, int], what: str) -> Tensor | MXFP4:
    """A weight matrix of the given size, checked: float tensor or MXFP4. ValueError names what was found."""
    if isinstance(weight, tuple):
        if len(weight) != 2:
            raise ValueError(f"{what} must be a tensor, MXFP4 or (packed, scales), got {len(weight)} items")
        weight = MXFP4.from_bytes(*weight)
    if not isinstance(weight, Tensor | MXFP4):
        raise ValueError(f"{what} must be a tensor, MXFP4 or (packed, scales), got {type(weight).__name__}")
    if tuple(weight.shape) != size:
        raise ValueError(f"{what} must have shape {list(size)}, got {list(weight.shape)}")
    if isinstance(weight, MXFP4):
        largest = int(weight.scales.max())
        if largest > MXFP4_MAX_SCALE:
            raise ValueError(
                f"{what} has a scale byte of {largest}; above {MXFP4_MAX_SCALE} (2^125) BF16 cannot hold the weights"
            )
    elif not weight.is_floating_point():
        raise ValueError(f"{what} must be a float tensor or MXFP4, got {weight.dtype}")
    return weight
