"""Ranks of the mega-kernel on one device: in one process with a stream each, on a CPU in processes of their own.

All programs of all grids must be on the device at once: each rank has its share of the multiprocessors.
"""

# R ranks   T tokens of a rank

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_kernels.measure.layer import DISPATCH_FORMATS, Inputs, layer, weights
from megamoe import MegaMoE, MoEShape
from megamoe.execution.backends.triton_fused import Fused
from megamoe.kernels.mega.call import ExpertWeights, MegaKernel, programs_of
from megamoe.parallel.placement import Placement
from megamoe.parallel.transport.buffers import Exchange, SymmetricBuffer, map_files, virtual_buffers

DEADLINE_S = 5.0


class Ranks:
    """Kernels of `size` ranks that share the experts of a layer, for at most `tokens` tokens each.

    In Triton's interpreter a process has one of them: `rank` says which, and `exchange` finds the others' memory.
    """

    def __init__(
        self,
        sizes: MoEShape,
        weight_format: str,
        device: torch.device,
        size: int,
        tokens: int,
        *,
        rank: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        wire = DISPATCH_FORMATS[weight_format]
        options: dict[str, Any] = {"weight_format": weight_format, "dispatch_format": wire}
        whole = MegaMoE(sizes, device=device, transport="fused", max_tokens_per_rank=tokens, **options)
        whole.load_experts(*weights(sizes, weight_format, device))
        placement = Placement(sizes.num_experts, size)
        self.device, self.size = device, size
        fused = Fused("mega", whole.group, whole.experts, placement, tokens, "mxfp8" if wire == "mxfp8" else "bf16")
        tile = fused.tile()
        programs = programs_of(device, tile, size)
        layout = fused.lay_out(tile, programs, size)
        deadline_s = DEADLINE_S if device.type == "cuda" else 100.0
        buffers: dict[int, SymmetricBuffer]
        if exchange is None:
            buffers = dict(enumerate(virtual_buffers(size, layout.num_bytes, device)))
        else:
            assert rank is not None
            buffers = {rank: map_files(rank, layout.num_bytes, exchange)}
        self.kernels = {
            each: MegaKernel(layout, tile, buffer, placement.ranks(), programs, deadline_s)
            for each, buffer in buffers.items()
        }
        self._experts = {each: experts_of(whole, placement.experts(each)) for each in buffers}
        self._streams = {each: torch.cuda.Stream(device) for each in buffers} if device.type == "cuda" else {}  # type: ignore[no-untyped-call]
        self._whole = whole

    def prepare(self, given: Sequence[Inputs]) -> None:
        """Compiles and loads before any rank runs: a load can wait for the device, which would wait for it."""
        for rank, kernel in self.kernels.items():
            kernel.prepare(*given[rank], self._experts[rank])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def call(self, given: Sequence[Inputs]) -> list[Tensor]:
        """Queues one call of every rank, each in a stream of its own, behind and before the current stream."""
        outputs = []
        for rank, kernel in self.kernels.items():
            if self.device.type != "cuda":
                outputs.append(kernel.launch(*given[rank], self._experts[rank]))
                continue
            stream, current = self._streams[rank], torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs.append(kernel.launch(*given[rank], self._experts[rank]))
        for stream in self._streams.values():
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return outputs

    def problem(self) -> str:
        """What any rank found wrong, '' for nothing; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = {rank: kernel.take() for rank, kernel in self.kernels.items()}
        return "; ".join(f"rank {rank}: {report}" for rank, report in found.items() if report is not None)


def experts_of(whole: MegaMoE, ids: range) -> ExpertWeights:
    """A rank's part of a layer's experts, where they are."""
    stacks = [whole.experts.stack(name, ids) for name in ("gate_up", "down")]
    return ExpertWeights(stacks[0], stacks[1], whole.shape.activation)


def staged(sizes: MoEShape, weight_format: str, device: torch.device, given: Sequence[Inputs]) -> list[Tensor]:
    """What the staged kernels make of every rank's tokens, on one rank."""
    with ExitStack() as patches:
        if device.type == "cpu":
            for module in ("experts", "ops"):
                patches.enter_context(mock.patch(f"megamoe.execution.{module}.has_kernels", return_value=True))
        made = layer(sizes, weight_format, device)
        return [made(*each).clone() for each in given]
