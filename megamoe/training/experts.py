"""This rank's experts as training holds them: packed for the products of both passes, derived from master weights."""

# e experts of this rank   H hidden   I intermediate   n rows   N outputs   K inputs

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megamoe.execution.experts import HELD, Experts, describe
from megamoe.execution.products import Held, KernelProducts
from megamoe.execution.weights import Matrix
from megamoe.formats import BLOCK, MXFP4, VALUES, WEIGHT_FORMATS, dequantize_mxfp4
from megamoe.formats.given import GivenWeight
from megamoe.kernels.cpu.library import Rows
from megamoe.parallel.workspace import Workspace
from megamoe.training.rounding import Place, round_stochastically
from megamoe.training.steps import Seen, local, refuse_parametrized, watch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MASTER_DTYPES = (torch.float32, torch.bfloat16)
_BF16 = WEIGHT_FORMATS["bf16"]
STEP = "rounding_step"  # a key of a state dict
_SHARDS = "megamoe.training.distributed.shards"  # imports DTensor, which takes as long as half of torch


class TrainableExperts(Experts):
    """Experts whose weights are packed twice: for the forward as ever, and transposed in BF16 for data gradients.

    Both come from master weights, which are parameters: gate_up [e, 2I, H], down [e, H, I], and in FP32 gate_up_bias
    [e, 2I] and down_bias [e, H] where the shape has biases. A state dict has these; `held`, which says whose they are;
    and `rounding_step` where rounding is stochastic. The transposed ones take 2 bytes a weight and are exactly the
    values that the forward multiplies by.
    """

    gate_up: nn.Parameter
    down: nn.Parameter
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    captured: Captured | None = None
    by_kernels_of_gpus = False  # those are of the forward alone
    distributed = False  # whether the parameters are DTensors

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._backward = {
            name: Matrix(f"{name}, transposed", matrix.inputs, matrix.outputs, _BF16)
            for name, matrix in self.matrices.items()
        }
        self._transposed = {
            name: {
                key: torch.empty(len(self.ids), *size, dtype=dtype, device=self.device)
                for key, (size, dtype) in self.layout.buffers(matrix).items()
            }
            for name, matrix in self._backward.items()
        }

    @property
    def memory_bytes(self) -> int:
        """Bytes of the packed weights of both passes; master weights are the layer's."""
        stacks = [stack for held in self._transposed.values() for stack in held.values()]
        return super().memory_bytes + sum(stack.numel() * stack.element_size() for stack in stacks)

    def _put(self, expert: int, weights: Any, biases: Any) -> None:
        super()._put(expert, weights, biases)
        index = expert - self.ids.start
        for name, matrix in self._backward.items():
            places = {key: stack[index] for key, stack in self._transposed[name].items()}
            self.layout.pack_into(matrix, self.format.dense(weights[name]).T, places)

    def regroup(self, ids: range) -> None:
        """ValueError where experts would move: optimisers hold the parameters."""
        if ids != self.ids:
            raise ValueError("a layer that trains cannot regroup: save it, and load what was saved in the new group")

    # ---- master weights ----

    def make_masters(self, dtype: torch.dtype, seed: int, rounding: str) -> None:
        """The parameters, with first values that depend on the seed and an expert's global id.

        rounding is how they are quantised, "nearest" or "stochastic"; rounding_step counts how often they were.
        """
        self.rounding, self.rounding_step, self._seed = rounding, 0, seed
        for name, matrix in self.matrices.items():
            sizes = len(self.ids), matrix.outputs, matrix.inputs
            setattr(self, name, nn.Parameter(torch.empty(*sizes, dtype=dtype, device=self.device)))
        for name, matrix in self.matrices.items():
            bias = torch.zeros(len(self.ids), matrix.outputs, dtype=torch.float32, device=self.device)
            self.register_parameter(f"{name}_bias", nn.Parameter(bias) if self.shape.bias else None)
        self._quantized: Seen | None = None
        watch(self)
        self.reset_parameters(seed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of what was pickled: it has parameters of its own, and optimisers that step them."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        watch(self)

    @property
    def masters(self) -> tuple[nn.Parameter, ...]:
        """The parameters: gate_up, down, and the biases where there are any; DTensors after distribute().

        ValueError where others have been added to them, or one is calculated from others.
        """
        refuse_parametrized(self)
        names = [*self.matrices, *(f"{name}_bias" for name in self.matrices if self.shape.bias)]
        found = dict(self.named_parameters(recurse=False))
        if found.keys() != set(names):
            raise ValueError(f"a layer's experts have the parameters {', '.join(names)}, found {', '.join(found)}")
        return tuple(found[name] for name in names)

    def values(self) -> tuple[Tensor, ...]:
        """The masters as tensors of this rank's experts; autograd passes their gradients on to the masters."""
        return tuple(local(master) for master in self.masters)

    def sources(self) -> tuple[Tensor, ...]:
        """What an optimiser changes where the masters change."""
        return self.masters

    def distribute(self, mesh: DeviceMesh) -> None:
        """See TrainableMoE."""
        shards = import_module(_SHARDS)
        for name, master in list(self.named_parameters()):
            self.register_parameter(name, shards.shard(master, mesh, self.shape.num_experts))
        self.distributed = True

    def __setattr__(self, name: str, value: Any) -> None:
        """ValueError where a framework would have a parameter sharded over a mesh that the layer does not know: FSDP
        takes each rank's stack for a copy of the same one, and would gather parts of different experts as one."""
        mesh = getattr(value, "device_mesh", None) if isinstance(value, nn.Parameter) else None
        if mesh is not None and mesh != getattr(getattr(self, name, None), "device_mesh", None):
            raise ValueError(
                f"a layer's experts cannot be sharded by FSDP, since each rank has others ({describe(self.ids)} here): "
                "leave them out with fully_shard(model, ignored_params=set(layer.parameters())); "
                "layer.distribute(mesh) makes DTensors of them"
            )
        super().__setattr__(name, value)

    def reset_parameters(self, seed: int) -> None:
        """See TrainableMoE."""
        with torch.no_grad():
            stacks = self.values()
            for index, expert in enumerate(self.ids):
                generator = torch.Generator(device="cpu").manual_seed(seed * 1_000_003 + expert)
                for stack in stacks[:2]:
                    bound = stack.shape[2] ** -0.5
                    values = torch.empty(stack.shape[1:], dtype=torch.float32, device="cpu")
                    stack[index] = values.uniform_(-bound, bound, generator=generator)
            for bias in stacks[2:]:
                bias.zero_()

    def load(
        self,
        expert: int,
        gate_up: GivenWeight,
        down: GivenWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Experts.load() into the master weights, in whatever precision they come."""
        self.check(expert, gate_up, down, gate_up_bias, down_bias)
        index, given = expert - self.ids.start, (gate_up, down, gate_up_bias, down_bias)
        with torch.no_grad():
            for master, each in zip(self.values(), given, strict=False):
                weight = MXFP4.from_bytes(*each) if isinstance(each, tuple) else each
                assert weight is not None
                master[index] = dequantize_mxfp4(weight, torch.float32) if isinstance(weight, MXFP4) else weight

    def quantize(self) -> None:
        """Packs all experts anew from the master weights. ValueError where a cast gave them a dtype of no master."""
        values = [each.detach() for each in self.values()]
        for master in values:
            if master.dtype not in MASTER_DTYPES:
                raise ValueError(
                    f"master weights must be torch.float32 or torch.bfloat16 to be trained, got {master.dtype}: cast "
                    f"{describe(self.ids)} back, as layer.float() does"
                )
        self.rounding_step += 1
        for index, expert in enumerate(self.ids):
            gate_up, down, *biases = (each[index] for each in values)
            rounded = self._rounded(gate_up, expert, 0), self._rounded(down, expert, 1)
            super().load(expert, *rounded, *biases)
        self._quantized = Seen.of(self.sources())

    def _rounded(self, weight: Tensor, expert: int, matrix: int) -> Tensor | MXFP4:
        if self.rounding == "nearest":
            return weight
        place = Place(self._seed, self.rounding_step, expert, matrix)
        return round_stochastically(weight, self.weight_format, place)

    def quantize_what_changed(self) -> None:
        """quantize() where a master weight is another tensor, was changed in place or stepped, since the last time."""
        if not self._unchanged():
            self.quantize()

    def has_stepped(self) -> None:
        """An optimiser has changed master weights, perhaps without torch counting it."""
        self._quantized = None

    def unchanged_since(self, rounding_step: int) -> bool:
        """Whether the masters are those that were quantised as that rounding_step."""
        return self.rounding_step == rounding_step and self._unchanged()

    def _unchanged(self) -> bool:
        return self._quantized is not None and self._quantized.still(self.sources())

    def inference_state_dict(self) -> dict[str, Tensor]:
        """A state dict of Experts in place of one of master weights: what the forward multiplies by."""
        self.quantize_what_changed()
        return self._state("")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if not self.distributed:  # a DTensor knows which part of the whole it is
            destination[prefix + HELD] = self._whose
        if self.rounding == "stochastic":
            destination[prefix + STEP] = torch.tensor(self.rounding_step, dtype=torch.int64, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        with self._changing():
            own = [prefix + HELD] * (not self.distributed) + [prefix + STEP] * (self.rounding == "stochastic")
            held = {key: state_dict[key] for key in own if key in state_dict}
            whose = held.get(prefix + HELD, self._whose)
            if whose.tolist() != self._whose.tolist():
                error_msgs.append(self._strangers(prefix, whose))
                return
            missing_keys.extend(key for key in own if key not in held)
            if prefix + STEP in held:
                self.rounding_step = int(held[prefix + STEP])
                self.has_stepped()
            rest = {key: value for key, value in state_dict.items() if key not in held}
            if self.distributed:
                rest |= import_module(_SHARDS).own_shards(rest, prefix, dict(self.named_parameters()))
            nn.Module._load_from_state_dict(
                self, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    # ---- rows sorted by expert ----

    def linear1(self, rows: Rows, experts: range, workspace: Workspace) -> Tensor:
        """Experts.linear1(), into the next rows of `captured` where there is one."""
        if self.captured is None:
            return super().linear1(rows, experts, workspace)
        out = self.captured.take(len(rows.x) if rows.source is None else len(rows.source))
        self._multiply("gate_up", rows, experts, out, workspace)
        return out

    def recompute_linear1(self, rows: Rows, experts: range, out: Tensor, workspace: Workspace) -> None:
        """linear1() into out [n, 2I] bfloat16."""
        self._multiply("gate_up", rows, experts, out, workspace)

    def data_gradient(self, name: str, rows: Rows, experts: range, out: Tensor, goes: Tensor | None = None) -> None:
        """Rows [., N] bfloat16 by the matrix that the forward multiplied by, not transposed: into out [., K].

        out is bfloat16 or float32; row r goes to row goes[r] of it
        """
        part = slice(experts.start - self.ids.start, experts.stop - self.ids.start)
        held = Held(self._backward[name], {key: stack[part] for key, stack in self._transposed[name].items()})
        self.products.multiply(rows, held, out, goes)

    def weight_gradient(self, left: Picked, right: Picked, out: Tensor) -> None:
        """Rows [n, N] and [n, K] of one expert in the order of the global batch -> their product over rows, out [N, K].

        For each output the rows are summed in the order in which the device's products sum over K.
        """
        num_rows, inputs = len(right.rows), right.x.shape[1]
        matrix = Matrix("rows", inputs, num_rows, _BF16)
        counts = torch.tensor([left.x.shape[1]], dtype=torch.int64, device="cpu")
        if isinstance(self.products, KernelProducts):
            pitch = -(-num_rows // BLOCK) * BLOCK
            columns = left.x.new_empty(left.x.shape[1], pitch)
            packed = right.x.new_empty(1, -(-inputs // BLOCK), pitch // 2, BLOCK, 2)
            self.products.library.turn_rows(left.x, left.rows, columns)
            self.products.library.pack_rows(right.x, right.rows, packed[0])
            self.products.multiply(Rows(columns, counts), Held(matrix, {VALUES: packed}), out)
            return
        columns, turned = left.x[left.rows].T.contiguous(), right.x[right.rows].T.contiguous()
        self.products.multiply(Rows(columns, counts), Held(matrix, {VALUES: turned.unsqueeze(0)}), out)


@dataclass(slots=True)
class Captured:
    """Linear-1's results of one forward, step after step: rows [n, 2I] bfloat16, of which `filled` are there."""

    rows: Tensor
    filled: int = 0

    def take(self, num_rows: int) -> Tensor:
        """The next num_rows of them."""
        self.filled += num_rows
        return self.rows[self.filled - num_rows : self.filled]


@dataclass(frozen=True, slots=True)
class Picked:
    """Some rows of x [., N] bfloat16: rows [n] int64, which of them, in order."""

    x: Tensor
    rows: Tensor
