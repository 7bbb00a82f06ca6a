"""This rank's experts: weights as they are held, and the arithmetic of rows that are sorted by expert."""

# E experts in all   e experts of this rank   H hidden   I intermediate   M rows of x   n rows

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megamoe.ambient import undisturbed
from megamoe.execution.ops import activate, add_bias, has_kernels
from megamoe.execution.products import DEQUANTIZED, Held, KernelProducts, products_of
from megamoe.execution.weights import InTurns, Matrix, Panels
from megamoe.formats import MXFP4, SCALES, VALUES, WEIGHT_FORMATS
from megamoe.formats.given import GivenWeight, about, as_bias, as_weight, bias_fault, elsewhere, scale_fault
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.cpu.library import Rows
from megamoe.kernels.gating import tables_of
from megamoe.kernels.layout import LARGEST_SMALL_SCALE, Prepacked
from megamoe.parallel.group import EPGroup
from megamoe.parallel.private import arrived
from megamoe.parallel.turns import TurnOf
from megamoe.parallel.workspace import Workspace
from megamoe.shape import MoEShape

# What kernels of a GPU pay for reading packed weights from memory a second time, in rows of an expert's products:
# computed, for an H100 at 3.35 TB/s and 400 TFLOP/s, and not measured. H and I cancel out.
_READ_ROWS = 30.0
HELD, _BIAS = "held", "_bias"  # keys of a state dict, the second behind a matrix's name
_BIASES = "biases"  # where biases are among what is held


class Experts(nn.Module):
    """The experts [first, first + e) of a layer.

    Their weights belong to this rank alone. They are neither parameters nor buffers, so that nothing that broadcasts,
    averages, compares, casts or moves those touches them. A state dict has them as they come, and says whose they are:

    mxfp4   gate_up uint8 [e, 2I, H/2] + gate_up_scales [e, 2I, H/32], down uint8 [e, H, I/2] + down_scales [e, H, I/32]
    bf16    gate_up bfloat16 [e, 2I, H], down bfloat16 [e, H, I]
    bias    gate_up_bias float32 [e, 2I], down_bias float32 [e, H], where the shape has biases
    held    int64 [3]: first expert, end, E

    Without a gate 2I is I. In memory they lie as the device's products read them. keep_dequantized=True also keeps a
    BF16 copy of mxfp4 weights where torch multiplies, 3 * H * I * 2 bytes an expert with a gate; kernels decode on the
    way, so there it is refused. interpreted=True holds them as on a device with Triton kernels, for kernels that Triton
    interprets.
    """

    by_kernels_of_gpus: ClassVar[bool] = True  # where a device has Triton kernels; else torch multiplies there

    def __init__(
        self,
        shape: MoEShape,
        ids: range,
        *,
        weight_format: str,
        device: torch.device,
        keep_dequantized: bool = False,
        arithmetic: str = "auto",
        interpreted: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.ids, self.weight_format, self.device = shape, ids, weight_format, device
        self.format = WEIGHT_FORMATS[weight_format]
        self.packed = weight_format == "mxfp4"  # which GPUs' kernels read in ways of its own
        self.grouped = self.by_kernels_of_gpus and (interpreted or has_kernels(device)) and self.format.kernels
        self.products = products_of(device, arithmetic, kernels=self.format.kernels)
        self.layout = self.products.layout
        if self.grouped:
            self.layout = Panels() if reads_wide(device) else InTurns()
        if keep_dequantized and (self.grouped or isinstance(self.products, KernelProducts)):
            raise ValueError(f"keep_dequantized is of no use on {device}, whose kernels decode weights on their way")
        self.keep_dequantized = keep_dequantized and self.format.decodes
        self.matrices = {
            "gate_up": Matrix("gate_up", shape.linear1_rows, shape.hidden, self.format, shape.activation.gated),
            "down": Matrix("down", shape.hidden, shape.intermediate, self.format),
        }
        self._loaded = [False] * len(ids)
        self._largest_scales = [0] * len(ids)  # of both matrices, where they are prepacked
        # plain torch.empty: the pages of a large buffer are not touched before its weights arrive
        self._stacks = {
            name: {
                key: torch.empty(len(ids), *size, dtype=dtype, device=device)
                for key, (size, dtype) in self._held_sizes(matrix).items()
            }
            for name, matrix in self.matrices.items()
        }
        if shape.bias:
            self._stacks[_BIASES] = {
                name: torch.empty(len(ids), matrix.outputs, dtype=torch.float32, device=device)
                for name, matrix in self.matrices.items()
            }
        self.tables = tables_of(shape.activation, device)
        self.group: EPGroup | None = None
        self.name = ""

    def _held_sizes(self, matrix: Matrix) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        buffers = self.layout.buffers(matrix)
        if self.keep_dequantized:
            buffers = {**buffers, DEQUANTIZED: ((matrix.outputs, matrix.inputs), torch.bfloat16)}
        return buffers

    def regroup(self, ids: range) -> None:
        """Holds the experts `ids` from now on: those that it has keep their weights, the others' are missing.

        Where the ids stay nothing is copied. Else the kept rows move to new buffers, one buffer after another.
        """
        start = max(self.ids.start, ids.start)
        kept = range(start, max(start, min(self.ids.stop, ids.stop)))
        here, there = (slice(kept.start - held.start, kept.stop - held.start) for held in (self.ids, ids))
        if ids != self.ids:
            for stacks in self._stacks.values():
                for key, stack in stacks.items():
                    moved = stack.new_empty(len(ids), *stack.shape[1:])
                    moved[there] = stack[here]
                    stacks[key] = moved
        loaded, largest = [False] * len(ids), [0] * len(ids)
        loaded[there], largest[there] = self._loaded[here], self._largest_scales[here]
        self.ids, self._loaded, self._largest_scales = ids, loaded, largest

    # ---- what surrounds a module ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Casts leave the weights as they are; ValueError for a move to another device."""
        moved = fn(torch.empty(0, dtype=torch.uint8, device=self.device)).device
        if moved != self.device:
            raise ValueError(
                f"{describe(self.ids)} are on {self.device}, not to be moved to {moved}: make the layer there"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def belongs_to(self, group: EPGroup, name: str) -> None:
        """The group whose calls compute with these weights, and the layer's name: what changes them takes its turn."""
        self.group, self.name = group, name

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The turn of the layer's group, if there is one, with all that torch may have set put aside."""
        with nullcontext() if self.group is None else TurnOf(self), undisturbed(self.device):
            yield

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        with self._changing():
            destination |= self._state(prefix)

    def _state(self, prefix: str) -> dict[str, Tensor]:
        """Copies of what is held, which stay as they are when other weights are loaded."""
        state = {prefix + HELD: self._whose}
        if self.missing:
            return state
        for name, matrix in self.matrices.items():
            held = [stack.untyped_storage() for stack in self._stacks[name].values()]
            for key, stack in self.layout.unpack(matrix, self._stacks[name]).items():
                is_view = any(stack.untyped_storage() is each for each in held)
                state[f"{prefix}{name}{key}"] = stack.clone() if is_view else stack
        for name, bias in self._stacks.get(_BIASES, {}).items():
            state[f"{prefix}{name}{_BIAS}"] = self.layout.unpack_bias(self.matrices[name], bias).clone()
        return state

    @property
    def _whose(self) -> Tensor:
        return torch.tensor([self.ids.start, self.ids.stop, self.shape.num_experts], dtype=torch.int64, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],  # noqa: ARG002
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes all of this rank's experts, or none where anything is amiss. What is interrupted is missing."""
        with self._changing():
            self._take_state(state_dict, prefix, strict, missing_keys, unexpected_keys, error_msgs)

    def _take_state(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = self._expected(prefix)
        absent = [key for key in (prefix + HELD, *expected) if key not in state_dict]
        state_dict = {key: arrived(value) for key, value in state_dict.items()}
        faults = [] if absent else self._faults(state_dict, prefix, expected)
        missing_keys.extend(absent)
        error_msgs.extend(faults)
        known = {prefix + HELD, *expected}
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        if absent or faults:
            return
        self.forget(self.ids)
        for index, expert in enumerate(self.ids):
            weights = {}
            for name in self.matrices:
                stacks = {key: state_dict[f"{prefix}{name}{key}"] for key in self.matrices[name].plain()}
                weights[name] = self.format.join({key: stack[index].resolve_neg() for key, stack in stacks.items()})
            biases = {name: state_dict[f"{prefix}{name}{_BIAS}"][index] for name in self._stacks.get(_BIASES, {})}
            self._put(expert, weights, biases)

    def _expected(self, prefix: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Keys of a state dict, with shapes and dtypes."""
        weights = {
            f"{prefix}{name}{key}": ((len(self.ids), *size), dtype)
            for name, matrix in self.matrices.items()
            for key, (size, dtype) in matrix.plain().items()
        }
        biases = {
            f"{prefix}{name}{_BIAS}": ((len(self.ids), self.matrices[name].outputs), torch.float32)
            for name in self._stacks.get(_BIASES, {})
        }
        return {**weights, **biases}

    def _faults(
        self, state_dict: Mapping[str, Any], prefix: str, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> list[str]:
        """What speaks against taking a state dict's weights."""
        whose, keys = state_dict[prefix + HELD], (prefix + HELD, *expected)
        if lost := [fault for key in keys if (fault := elsewhere(state_dict[key], key))]:
            return lost
        if whose.tolist() != self._whose.tolist():
            return [self._strangers(prefix, whose)]
        wrong = [
            f"{key} must be {dtype} {list(size)}, got {state_dict[key].dtype} {list(state_dict[key].shape)}"
            for key, (size, dtype) in expected.items()
            if tuple(state_dict[key].shape) != size or state_dict[key].dtype != dtype
        ]
        scales = [key for key in expected if key.endswith(SCALES) and self.ids]
        biases = [key for key in expected if key.endswith(_BIAS)]
        values = [] if self.packed or wrong else [key for key in expected if key not in biases]
        faults = [
            *(self._value_fault(state_dict[key], key) for key in values),
            *(scale_fault(state_dict[key], key) for key in scales),
            *(bias_fault(state_dict[key], key) for key in biases),
        ]
        return wrong or [fault for fault in faults if fault]

    def _value_fault(self, values: Tensor, key: str) -> str:
        try:
            self.format.refuse(values)
        except ValueError as refusal:
            return f"{key}: {refusal}"
        return ""

    def _strangers(self, prefix: str, whose: Tensor) -> str:
        """Why a state dict of other experts is refused."""
        first, end, everything = whose.tolist()
        return (
            f"{prefix}*: the state dict has {describe(range(first, end))} of {everything}, this rank holds "
            f"{describe(self.ids)} of {self.shape.num_experts}: save and load each rank's own"
        )

    # ---- weights ----

    @property
    def memory_bytes(self) -> int:
        """Bytes that this rank's expert weights take, dequantised copies included."""
        held = [stack for stacks in self._stacks.values() for stack in stacks.values()]
        return sum(each.numel() * each.element_size() for each in held)

    @property
    def arithmetic(self) -> str:
        """How products are summed: "fma", "bf16-dot", "bf16-tile", "torch" or "triton"."""
        return "triton" if self.grouped else self.products.arithmetic

    @property
    def decode_rows(self) -> float:
        """What making one expert's weights ready costs, in rows that could be computed meanwhile."""
        if self.grouped:
            return _READ_ROWS if self.packed else 4 * _READ_ROWS
        decodes = self.format.decodes and not self.keep_dequantized
        return self.products.decode_rows if decodes else self.products.read_rows

    @property
    def whole(self) -> bool:
        """Whether no expert is missing."""
        return all(self._loaded)

    @property
    def missing(self) -> list[int]:
        """Global ids of experts without weights yet."""
        return [expert for expert, loaded in zip(self.ids, self._loaded, strict=True) if not loaded]

    def load(
        self,
        expert: int,
        gate_up: GivenWeight,
        down: GivenWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Takes the weights of one expert, by global id: gate_up [2I, H] with the gate's rows first, down [H, I].

        Each a float tensor, MXFP4, or a pair (packed, scales) of one-byte tensors. What does not come in the
        layer's format is converted: floats are quantised to MXFP4, MXFP4 is dequantised to BF16 without loss.
        Without a gate gate_up is [I, H]. Where the shape has biases, and only there, gate_up_bias [2I] and down_bias
        [H] are FP32 or BF16, in the order of the rows. All is looked through before any is taken: where this raises
        ValueError nothing has changed.
        """
        self._refuse_stranger(expert)
        given = {"gate_up": gate_up, "down": down}
        biases = self._checked_biases(expert, {"gate_up": gate_up_bias, "down": down_bias})
        with torch.no_grad():
            self._put(
                expert,
                {name: self._taken(matrix, given[name], expert) for name, matrix in self.matrices.items()},
                biases,
            )

    def _put(self, expert: int, weights: Mapping[str, Tensor | MXFP4], biases: Mapping[str, Tensor]) -> None:
        """Takes one expert's weights, which are in the layer's format, and its biases, if the shape has any."""
        with torch.no_grad():
            index = expert - self.ids.start
            self._loaded[index] = False  # what an interruption leaves is neither the old expert nor the new one
            for name, matrix in self.matrices.items():
                self._store(name, index, matrix, weights[name])
            for name, bias in biases.items():
                self._stacks[_BIASES][name][index] = self.layout.pack_bias(self.matrices[name], bias)
            if self.packed and isinstance(self.layout, Panels):
                scales = [self._stacks[name][SCALES][index] for name in self.matrices]
                self._largest_scales[index] = max(int(each.max()) for each in scales)
        self._loaded[index] = True

    def _store(self, name: str, index: int, matrix: Matrix, weight: Tensor | MXFP4) -> None:
        """A weight to where it is held."""
        places = {key: stack[index] for key, stack in self._stacks[name].items()}
        if self.keep_dequantized:
            places.pop(DEQUANTIZED).copy_(self.format.dense(weight))  # which may be on another device
        self.layout.pack_into(matrix, weight, places)

    def check(
        self,
        expert: int,
        gate_up: GivenWeight,
        down: GivenWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """ValueError for what load() would not take."""
        self._refuse_stranger(expert)
        given = {"gate_up": gate_up, "down": down}
        self._checked_biases(expert, {"gate_up": gate_up_bias, "down": down_bias})
        for name, matrix in self.matrices.items():
            what = f"{name} of expert {expert}"
            weight = as_weight(given[name], (matrix.outputs, matrix.inputs), what)
            with about(what):
                self.format.refuse(weight)

    def _checked_biases(self, expert: int, biases: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The biases that the shape has; ValueError names what is missing, too much, or not what it should be."""
        given = {name: bias for name, bias in biases.items() if bias is not None}
        for name, matrix in self.matrices.items():
            what = f"{name}{_BIAS} of expert {expert}"
            if not self.shape.bias and name in given:
                raise ValueError(f"{what} was given to a layer without biases: make it with MoEShape(..., bias=True)")
            if self.shape.bias and name not in given:
                raise ValueError(f"{what} is missing: the layer's shape has bias=True, so both biases are needed")
            if name in given:
                given[name] = as_bias(given[name], matrix.outputs, what)
        return given

    def forget(self, experts: range) -> None:
        """Takes these experts, global ids, for missing until they are loaded again."""
        for expert in experts:
            self._loaded[expert - self.ids.start] = False

    def _refuse_stranger(self, expert: int) -> None:
        if isinstance(expert, bool) or not hasattr(expert, "__index__"):
            raise ValueError(f"expert must be an integer, a global id, got {expert!r}")
        if expert not in self.ids:
            raise ValueError(f"expert {expert} is not of this rank, which holds {describe(self.ids)}")

    def _taken(self, matrix: Matrix, weight: GivenWeight, expert: int) -> Tensor | MXFP4:
        """A weight in the layer's format. ValueError names what is wrong with it."""
        what = f"{matrix.name} of expert {expert}"
        weight = as_weight(weight, (matrix.outputs, matrix.inputs), what)
        with about(what):
            return self.format.take(weight)

    def stack(self, name: str, experts: range) -> MXFP4 | Prepacked | Tensor:
        """gate_up or down of several experts, global ids, as they are held: what a GPU's grouped products take."""
        held = self._held(name, experts)
        values = held.stacks[VALUES]
        if not self.packed:
            return values
        if not isinstance(self.layout, Panels):
            return MXFP4(values, held.stacks[SCALES])
        largest = max(self._largest_scales, default=0)  # of all experts: no kernel is compiled for some of them
        sizes = held.matrix.outputs, held.matrix.inputs
        return Prepacked(values, held.stacks[SCALES], *sizes, small_scales=largest <= LARGEST_SMALL_SCALE)

    def held(self, name: str) -> Held:
        """gate_up or down of all experts of this rank."""
        return Held(self.matrices[name], self._stacks[name])

    def _held(self, name: str, experts: range) -> Held:
        part = slice(experts.start - self.ids.start, experts.stop - self.ids.start)
        return Held(self.matrices[name], {key: stack[part] for key, stack in self._stacks[name].items()})

    # ---- rows sorted by expert, of the experts with these global ids ----

    def linear1(self, rows: Rows, experts: range, workspace: Workspace) -> Tensor:
        """rows of tokens [M, H] bfloat16 -> gate and up [n, 2I] bfloat16"""
        num_rows = len(rows.x) if rows.source is None else len(rows.source)
        out = workspace.take("gate_up", (num_rows, self.shape.linear1_rows), rows.x)
        self._multiply("gate_up", rows, experts, out, workspace)
        return out

    def activation(self, gate_up: Tensor, weights: Tensor, workspace: Workspace) -> Tensor:
        """The shape's activation times weight, rounded as the contract says: [n, 2I], [n] float32 -> [n, I] bfloat16"""
        hidden = workspace.take("hidden", (len(gate_up), self.shape.intermediate), gate_up)
        return activate(gate_up, weights, self.tables, quantized=self.format.activations == "mxfp8", out=hidden)

    def linear2(
        self, rows: Rows, experts: range, weights: Tensor, out: Tensor, goes: Tensor | None, workspace: Workspace
    ) -> Tensor:
        """rows of hidden [n, I] bfloat16 into out [n, H] bfloat16, row r into out[goes[r]]; goes [n] int64, None for r.

        weights [n] float32, by which a bias is multiplied; hidden has its own in it
        """
        self._multiply("down", rows, experts, out, workspace, weights, goes)
        return out

    def _multiply(
        self,
        name: str,
        rows: Rows,
        experts: range,
        out: Tensor,
        workspace: Workspace,
        weights: Tensor | None = None,
        goes: Tensor | None = None,
    ) -> None:
        """A product and its bias, if the shape has one, which is added to the FP32 sum before it is rounded."""
        held = self._held(name, experts)
        if not self.shape.bias:
            self.products.multiply(rows, held, out, goes, workspace)
            return
        num_rows = len(rows.x) if rows.source is None else len(rows.source)
        sums = workspace.take("sums", (num_rows, held.matrix.outputs), out, torch.float32)
        self.products.multiply(rows, held, sums, None, workspace)
        add_bias(sums, self.bias(name, experts), rows.counts, out, weights=weights, goes=goes)

    def bias(self, name: str, experts: range) -> Tensor:
        """Biases [experts, N] float32 of gate_up or down, global ids, in the order of the product's columns."""
        assert self.shape.bias
        return self._stacks[_BIASES][name][experts.start - self.ids.start : experts.stop - self.ids.start]

    def extra_repr(self) -> str:
        held = f"{self.weight_format}, {self.memory_bytes / 1e6:.1f} MB"
        return f"{describe(self.ids)}, {held}" + (", BF16 copy kept" if self.keep_dequantized else "")


def describe(ids: range) -> str:
    """range(4, 8) -> 'experts 4 to 7'"""
    return f"experts {ids.start} to {ids.stop - 1}" if ids else "no experts"
