"""A call of the layer as one kernel on every rank: dispatch, experts and combine over memory that all ranks map.

The host waits for nothing, counts never leave the devices, and sizes follow from T alone, so a CUDA graph can be
captured of it. Ranks meet on the host once, in the first call, where they exchange pages, as in each call that is no
kernel (layer.py), and then map each other's memory. What went wrong in a call is raised by a later one on a GPU, and at
once on a CPU, whose kernel Triton interprets.
"""

# P ranks   T tokens of this rank   H hidden   K experts per token

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.execution.ops import has_kernels
from megamoe.formats import BLOCK
from megamoe.kernels.chips.targets import reads_wide
from megamoe.kernels.chips.tiles import Tile
from megamoe.kernels.chips.tuned import table_of
from megamoe.kernels.mega.call import ExpertWeights, MegaKernel, Report, interpreting, programs_of, tile_of
from megamoe.kernels.mega.layout import Layout
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.transport.buffers import Exchange, SymmetricBuffer, exchange_over, open_buffer, virtual_buffers
from megamoe.parallel.transport.pairs import Label
from megamoe.shape import MoEShape


def check_fused(device: torch.device, shape: MoEShape, combine_format: str) -> None:
    """ValueError where transport="fused" cannot run on a device, or a layer."""
    if combine_format != "bf16":
        raise ValueError(f"transport='fused' has combine_format='bf16' alone, got {combine_format!r}")
    if shape.hidden % BLOCK:
        raise ValueError(f"transport='fused' needs a hidden size that {BLOCK} divides, got {shape.hidden}")
    if device.type == "cpu" and not interpreting():
        raise ValueError(
            "transport='fused' runs on a CPU in Triton's interpreter alone: set TRITON_INTERPRET=1 before the program "
            "begins to try it there, slowly, or leave transport out"
        )
    if device.type != "cpu" and not has_kernels(device):
        raise ValueError(
            f"transport='fused' needs a device with Triton kernels, {device} has none: leave transport out"
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """What all ranks must have alike, beside what their pages have.

    owners   [E], the rank of each expert   columns   of a tile
    """

    owners: Sequence[int]
    columns: int


class Fused:
    """The calls of one layer of a group. Memory comes with the first one, and layers of one size share it."""

    def __init__(
        self, layer: str, group: EPGroup, experts: Experts, placement: Placement, tokens: int, wire: str
    ) -> None:
        self._layer, self._group, self._experts = layer, group, experts
        self._tokens, self._wire, self._owners = tokens, wire, tuple(placement.ranks())
        self._kernel: MegaKernel | None = None
        self._complaints: list[ValueError] = []

    @property
    def opened(self) -> bool:
        """Whether ranks have met and mapped each other's memory."""
        return self._kernel is not None

    @property
    def memory_bytes(self) -> int:
        """Bytes of symmetric buffer and ring, 0 before the first call."""
        return 0 if self._kernel is None else self._kernel.memory_bytes

    def compute(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, complaint: ValueError | None) -> Tensor:
        """hidden [T, H] bfloat16, topk_ids [T, K] int64 (-1 masks), topk_weights [T, K] float32 -> [T, H] bfloat16.

        A rank with a complaint takes part without tokens, so that nobody waits for it, and complain() raises it then;
        in the first call none has one. PeerError where a rank was not there in time, now or in an earlier call.
        """
        kernel = self._kernel or self._open()
        self._look(kernel)
        if complaint is not None:
            self._complaints.append(complaint)
            hidden, topk_ids, topk_weights = self._nothing()
        out = kernel.launch(hidden, topk_ids, topk_weights, self._weights())
        if hidden.device.type == "cpu":
            self._look(kernel)
        return out

    def check_size(self, num_tokens: int) -> None:
        """ValueError for more tokens than there is room for."""
        if num_tokens > self._tokens:
            raise ValueError(
                f"layer {self._layer!r} has transport='fused' for max_tokens_per_rank {self._tokens}, got {num_tokens} "
                "tokens: make it for more"
            )

    def complain(self) -> None:
        """Raises what is wrong with this rank's input, of this call or, on a GPU, of an earlier one."""
        if self._complaints:
            complaints, self._complaints = self._complaints, []
            raise complaints[0]

    def _look(self, kernel: MegaKernel) -> None:
        """PeerError where the device found a rank late; keeps what it found wrong in values."""
        report = kernel.take()
        if report is not None and report.broken:
            raise self._lost(report)
        if report is not None:
            num_experts = self._experts.shape.num_experts
            self._complaints.append(
                ValueError(
                    f"a call of layer {self._layer!r} had topk_ids outside of [0, {num_experts}) that were not -1, or "
                    "topk_weights that were not finite; tokens with such ids became NaN"
                )
            )

    def _lost(self, report: Report) -> PeerError:
        group = self._group
        phase, ranks = ("dispatch", report.counts) if report.counts else ("combine", report.results)
        what = "counts" if report.counts else "results"
        if not ranks:
            phase, ranks, what = "experts", (group.rank,), "own programs"
        listed = ", ".join(str(rank) for rank in ranks)
        reason = f"rank {group.rank} waited in the kernel for the {what} of rank{'s' * (len(ranks) > 1)} {listed}"
        if group.clock is not None:
            since = time.monotonic() - group.deadline_s
            return group.clock.error(ranks[0], Label(self._layer, phase), since, reason)
        host, waited = group.hosts.get(ranks[0], "unknown host"), group.deadline_s
        return PeerError(ranks[0], host, phase, self._layer, None, waited, group.deadline_s, reason)

    # ---- once ----

    def _open(self) -> MegaKernel:
        """Maps the memory of all ranks, compiles. CallRefusedError on all where their tiles differ."""
        group, experts = self._group, self._experts
        exchange = _alone if group.transport is None else exchange_over(group.transport, self._layer)
        tile = self.tile()
        self._compare(exchange, Terms(self._owners, tile.columns))
        devices = exchange(_identity(experts.device, group).encode())
        sharing = devices.count(devices[group.rank])
        layout = self.lay_out(tile, programs_of(experts.device, tile, sharing), group.size)
        key = (layout, tile, self._owners)
        kernels = group.workspace.kernels
        if key not in kernels:
            buffer = self._buffer(layout.num_bytes)
            programs = programs_of(experts.device, tile, sharing)
            kernels[key] = MegaKernel(layout, tile, buffer, self._owners, programs, group.deadline_s)
        kernel = kernels[key]
        assert isinstance(kernel, MegaKernel)
        kernel.prepare(*self._nothing(), self._weights())
        exchange(b"ready")  # nobody's kernel waits for one that is being compiled
        self._kernel = kernel
        return kernel

    def _compare(self, exchange: Exchange, mine: Terms) -> None:
        group, digest = self._group, sha256(str(mine).encode()).digest()
        for rank, theirs in enumerate(exchange(digest)):
            if theirs != digest:
                raise CallRefusedError(
                    f"{group.named(rank)} has other terms than {group.named(group.rank)}, whose are {mine}: make the "
                    "layer alike on all ranks"
                )

    def _buffer(self, num_bytes: int) -> SymmetricBuffer:
        group, device = self._group, self._experts.device
        if group.transport is None:
            return virtual_buffers(1, num_bytes, device)[0]
        return open_buffer(group.transport, group.rank, num_bytes, device, self._layer)

    @property
    def _kind(self) -> str:
        if not self._experts.packed:
            return "bf16"
        return "wide" if reads_wide(self._experts.device) else "mxfp4"

    def tile(self) -> Tile:
        """The tile for as many tokens as ranks may bring."""
        shape = self._experts.shape
        rows = -(-self._tokens * self._group.size * shape.topk // shape.num_experts)
        return tile_of(table_of(self._experts.device), self._kind, rows, small_scales=self._weights().small_scales)

    def lay_out(self, tile: Tile, programs: int, ranks: int) -> Layout:
        """Sizes of all ranks. A wave has two tiles of Linear-1 for each program, and four blocks at least."""
        shape, owners = self._experts.shape, self._owners
        return Layout.of(
            ranks=ranks,
            num_experts=shape.num_experts,
            most_experts=max(owners.count(rank) for rank in range(ranks)),
            topk=shape.topk,
            tokens=self._tokens,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            linear1_rows=shape.linear1_rows,
            kind=self._kind,
            wire=self._wire,
            rows=tile.rows,
            columns=tile.columns,
            wave=max(4, -(-2 * programs * tile.columns // shape.linear1_rows)),
        )

    def _weights(self) -> ExpertWeights:
        experts = self._experts
        biases = [experts.bias(name, experts.ids) if experts.shape.bias else None for name in ("gate_up", "down")]
        stacks = [experts.stack(name, experts.ids) for name in ("gate_up", "down")]
        return ExpertWeights(stacks[0], stacks[1], experts.shape.activation, *biases)

    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        device, shape = self._experts.device, self._experts.shape
        return (
            torch.empty(0, shape.hidden, dtype=torch.bfloat16, device=device),
            torch.empty(0, shape.topk, dtype=torch.int64, device=device),
            torch.empty(0, shape.topk, dtype=torch.float32, device=device),
        )


def _alone(card: bytes) -> list[bytes]:
    return [card]


def _identity(device: torch.device, group: EPGroup) -> str:
    """The same for ranks that share a device; ranks on CPUs share nothing that a kernel must leave room on."""
    if device.type == "cpu":
        return f"rank {group.rank}"
    return f"{group.host} {torch.cuda.get_device_properties(device).uuid}"
