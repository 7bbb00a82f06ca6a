"""The layer: dispatch, FP4 expert compute and combine in waves, so that communication hides under compute."""

# T tokens of this rank   H hidden   K experts per token   E experts in all   P ranks   W waves
# N rows this rank sends, one per unmasked (token, slot)   B bytes of a dispatched row

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.ambient import eager, undisturbed
from megamoe.execution.autotune import Tuner
from megamoe.execution.checks import (
    any_wrong,
    check_ambient,
    check_device,
    check_formats,
    check_input,
    check_name,
    check_values,
)
from megamoe.execution.experts import Experts, Weight
from megamoe.execution.pipeline import Call, CallRecord, Parts
from megamoe.execution.stacks import load_stacks, shortened
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.recorder import Notes
from megamoe.parallel.streams import on_device
from megamoe.routing.agreement import Part, Terms, agree, exact
from megamoe.routing.messages import Messages, count_rows
from megamoe.routing.permutation import route_rows
from megamoe.routing.segments import to_host
from megamoe.routing.waves import Waves, check_waves, plan_waves
from megamoe.schedule.schedule import LOOKAHEAD
from megamoe.shape import MoEShape

if TYPE_CHECKING:
    from megamoe.catalog import Machine


class MegaMoE(nn.Module):
    """Routed experts of a Mixture-of-Experts layer, spread over the ranks of a group.

    shape             sizes of the layer, MoEShape
    group             torch ProcessGroup or EPGroup; None is one rank
    weight_format     "mxfp4" (the contract's FP8 x FP4 arithmetic) or "bf16"
    dispatch_format   "mxfp8" (H + H/32 bytes a row), "bf16", or "auto"; with mxfp4 weights the bits are the same.
                      With bf16 weights mxfp8 rounds the tokens, and auto does so where the group's link is slow: give
                      the format where bits must not depend on the link
    combine_format    "bf16"
    waves             "auto", a number, or relative sizes of uneven waves; the bits are the same
    device            where the weights are and the tokens must be; the CPU by default
    name              how errors call this layer; must be the same on all ranks
    overlap           False runs one wave, and nothing at the same time: the serial layer that overlap is held against
    keep_dequantized  also keep a BF16 copy of mxfp4 weights, 3 * H * I * 2 bytes an expert (memory_bytes tells), where
                      the device has no kernels, which decode on the way
    arithmetic        on CPUs "fma" keeps to fused multiply-adds where one has BF16 instructions and another has not:
                      ranks must sum alike; "auto" takes the CPU's best
    machine           what `megamoe calibrate` found of this machine, for waves="auto"; None is what ships
    deadline_s        seconds that a call may be kept waiting, where group is not an EPGroup that has its own

    The output of a token is bitwise the same for any number of ranks, any waves and any other tokens in the
    batch, on one device type. last_call holds the CallRecord of the latest call.
    """

    experts_type: ClassVar[type[Experts]] = Experts

    def __init__(
        self,
        shape: MoEShape,
        group: EPGroup | dist.ProcessGroup | None = None,
        *,
        weight_format: str = "mxfp4",
        dispatch_format: str = "mxfp8",
        combine_format: str = "bf16",
        waves: Waves = "auto",
        device: torch.device | str | None = None,
        name: str = "moe",
        overlap: bool = True,
        keep_dequantized: bool = False,
        arithmetic: str = "auto",
        machine: Machine | None = None,
        deadline_s: float = 60.0,
    ) -> None:
        super().__init__()
        check_ambient()
        check_name(name)
        check_formats(shape, weight_format, dispatch_format, combine_format)
        self.shape, self.name = shape, name
        self.weight_format, self.dispatch_format, self.combine_format = weight_format, dispatch_format, combine_format
        self.waves, self.overlap = check_waves(waves if overlap else 1), overlap
        self.device = check_device(device)
        self.group = EPGroup.of(group, self.device, deadline_s=deadline_s)
        self.placement = Placement(shape.num_experts, self.group.size)
        self.machine = machine
        with undisturbed(self.device):
            self.experts = self.experts_type(
                shape,
                self.placement.experts(self.group.rank),
                weight_format=weight_format,
                device=self.device,
                keep_dequantized=keep_dequantized,
                arithmetic=arithmetic,
            )
            self._begin()

    def _begin(self) -> None:
        """What is of the group, and not of the weights: calls are counted from 0, and nothing is known of its link."""
        self.tuner = Tuner(
            self.name,
            self.group,
            self.experts,
            waves=self.waves,
            dispatch_format=self.dispatch_format,
            overlap=self.overlap,
            machine=self.machine,
        )
        self.last_call = CallRecord()
        self._num_calls = 0
        self.group.turns.number(self, self.name)  # layers of one name are told apart by the order in which they came
        self._alone = None
        if self.experts.grouped and self.group.size == 1:
            self._alone = import_module("megamoe.execution.backends.triton_alone").Alone(self.experts)

    def regroup(self, group: EPGroup | dist.ProcessGroup | None) -> list[int]:
        """Goes on in another group, as whichever rank this is there -> global ids of the experts still to be loaded.

        Experts that this rank has and keeps stay, and where all stay no byte is copied; load_expert() brings the
        others. From then on the output has the bits of a layer made anew in that group, and the next call is again the
        first: ranks that stay and ranks that are new count alike. What "auto" chose is forgotten and chosen again from
        the new group's link, with bf16 weights and dispatch_format="auto" perhaps otherwise, which shows in the bits.
        Nothing is sent, so the old group may be broken or gone. Its deadline is kept where group is not an EPGroup.
        """
        new = EPGroup.of(group, self.device, deadline_s=self.group.deadline_s)
        with self._turn(), undisturbed(self.device):
            placement = Placement(self.shape.num_experts, new.size)
            self.experts.regroup(placement.experts(new.rank))
            self.group, self.placement = new, placement
            self._begin()
        return self.experts.missing

    @property
    def local_experts(self) -> range:
        """Global ids of the experts on this rank."""
        return self.experts.ids

    @property
    def memory_bytes(self) -> int:
        """Bytes of this rank's expert weights as they are held."""
        return self.experts.memory_bytes

    def load_expert(
        self,
        expert: int,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Takes one expert's weights, by global id: gate_up [2I, H], gate rows first, and down [H, I].

        gate_up_bias [2I] and down_bias [H], FP32 or BF16, where the shape has biases, and only there.
        """
        with self._turn(), undisturbed(self.device):
            self.experts.load(expert, gate_up, down, gate_up_bias, down_bias)

    def load_experts(
        self, gate_up: Weight, down: Weight, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
    ) -> None:
        """Takes gate_up [E, 2I, H] (gate rows first) and down [E, H, I], of all experts or of this rank's only.

        Each a float tensor, MXFP4, or a pair (packed, scales). Experts without a gate have gate_up [E, I, H]. Where
        the shape has biases, gate_up_bias [E, 2I] and down_bias [E, H] likewise, FP32 or BF16. ValueError for wrong
        shapes, dtypes, NaN weights in a layer of MXFP4, scales that BF16 cannot hold, biases that are missing, not
        finite, or given to a layer without.
        """
        with self._turn(), undisturbed(self.device):
            load_stacks(self.experts, self.shape.num_experts, gate_up, down, gate_up_bias, down_bias)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The group's turn, of the group that this layer is in once it has it."""
        while True:
            group = self.group
            with group.turn(self.name, self.device):
                if group is self.group:
                    yield
                    return

    @eager
    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden [T, H], topk_ids [T, K] int64 (-1 masks), topk_weights [T, K] float32 -> [T, H] bfloat16.

        hidden is bfloat16 or float32; float32 is rounded to BF16 first. Ranks may bring different T, also 0, but all
        must call. ValueError, on every rank, where any rank's input is wrong or the ranks disagree; PeerError where a
        rank is lost, and RuntimeError from then on: a group whose call was interrupted is broken.

        On a GPU with kernels a rank alone waits for nothing, and a CUDA graph can be captured of the call. Values that
        are wrong then raise ValueError in a later call; a token with an id that does not exist is NaN meanwhile.
        """
        with self._turn():
            complaint = self._complaint(hidden, topk_ids, topk_weights)
            with undisturbed(self.device), on_device(self.device):
                if self._alone is not None:
                    return self._compute_alone(hidden, topk_ids, topk_weights, complaint)
                return self._compute(hidden, topk_ids, topk_weights, complaint)

    def _compute(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, complaint: ValueError | None) -> Tensor:
        """The call, wave by wave."""
        record, notes = CallRecord(), self.group.notes(self.name, self._num_calls + 1)
        unbroken = self.group.unbroken(self.name, self._num_calls + 1)
        with notes.lane("call"), unbroken, record.timing("total_s"):
            call = self._open(hidden, topk_ids, topk_weights, complaint, record, notes)
            for wave in range(LOOKAHEAD):
                call.dispatch(wave)
            for step in call.steps:
                if step.arrived:
                    call.dispatch(step.wave + LOOKAHEAD)
                call.compute(step)
                if step.arrived:
                    call.combine(step.wave)
            out = call.reduce()
        self.last_call = record
        self.tuner.note(record, call.stopwatch)
        return out

    def _compute_alone(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, complaint: ValueError | None
    ) -> Tensor:
        """The call of a rank alone whose device has kernels, which waits for nothing: see triton_alone.py."""
        assert self._alone is not None
        if complaint is not None:
            raise complaint
        self._num_calls += 1
        self.last_call = CallRecord(tokens=len(hidden), waves=1)
        hidden, rounds = hidden.to(torch.bfloat16).contiguous(), self.tuner.choose_format() == "mxfp8"
        with self.last_call.timing("total_s"):
            out: Tensor = self._alone.compute(hidden, topk_ids, topk_weights, self.group.workspace, rounds=rounds)
        return out

    def _open(
        self,
        hidden: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        complaint: ValueError | None,
        record: CallRecord,
        notes: Notes,
    ) -> Call:
        """Agrees with all ranks on the call, before any row moves, and lays out this rank's part of it."""
        tokens, counts, firsts = 0, *torch.zeros(2, self.shape.num_experts, dtype=torch.int64)
        if complaint is None:
            counts, firsts, complaint = self._count(topk_ids, topk_weights)
            tokens = 0 if complaint else len(hidden)
        self._num_calls += 1
        self.tuner.learn()
        with record.timing("counts_s"):
            agreed = agree(self.group, self._terms(), Part(tokens, counts, firsts, self.tuner.row_s), complaint)
            choice = self.tuner.choose(agreed)
        with record.timing("compute_s"):
            plan = plan_waves(self.placement, choice.waves)
            messages = Messages.of(plan, choice.wire, agreed.tokens, agreed.counts, agreed.firsts)
            workspace = self.group.workspace
            num_rows = int(counts.numpy().sum())
            route = route_rows(topk_ids, topk_weights, plan, self.group.rank, num_rows, messages, workspace)
            hidden = hidden.to(torch.bfloat16).contiguous()
        parts = Parts(
            self.name, self.group, self.experts, choice.wire, plan, messages, agreed, choice.cost_model, notes
        )
        return Call(parts, route, hidden, record)

    def _count(self, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, ValueError | None]:
        """Rows for each expert and unique tokens, [E] int64 on the CPU, and what is wrong with the values.

        A device is waited for once, for all of it.
        """
        counts = count_rows(topk_ids, self.placement)
        wrong = any_wrong(self.shape, topk_ids, topk_weights)
        found = to_host(torch.cat((counts.flatten(), wrong)), self.group.workspace, "counts")
        pairs, firsts = found[:-1].view(2, -1)
        try:
            if found[-1]:
                check_values(self.shape, topk_ids, topk_weights)
        except ValueError as complaint:
            return pairs, firsts, complaint
        return pairs, firsts, None

    def _complaint(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> ValueError | None:
        try:
            if self.group.recorders and self.device.type != "cpu":
                raise ValueError(f"a recording notes host time, which says nothing of work on {self.device}")
            check_ambient()
            check_input(self.shape, self.device, hidden, topk_ids, topk_weights)
            if self._alone is not None:
                self._alone.refuse(self.name)
            if self.experts.missing:
                missing = shortened(self.experts.missing)
                raise ValueError(f"layer {self.name!r} has no weights for experts {missing}: load them first")
        except ValueError as complaint:
            return complaint
        return None

    def _terms(self) -> Terms:
        return Terms(
            layer=self.name,
            number=self.group.turns.number(self, self.name),
            call=self._num_calls,
            hidden=self.shape.hidden,
            intermediate=self.shape.intermediate,
            num_experts=self.shape.num_experts,
            topk=self.shape.topk,
            activation=str(self.shape.activation),
            bias=self.shape.bias,
            weight_format=self.weight_format,
            dispatch_format=self.dispatch_format,
            combine_format=self.combine_format,
            arithmetic=self.experts.arithmetic,
            waves=self._waves_term(),
        )

    def _waves_term(self) -> str:
        """What "auto" chooses follows from what a wave costs the machine."""
        return f"{self.waves}" if self.machine is None else f"{self.waves} at {exact(self.machine.wave_us.value)} us"

    def extra_repr(self) -> str:
        return (
            f"rank {self.group.rank} of {self.group.size}, hidden={self.shape.hidden}, "
            f"intermediate={self.shape.intermediate}, num_experts={self.shape.num_experts}, topk={self.shape.topk}, "
            f"activation={str(self.shape.activation)!r}, bias={self.shape.bias}, "
            f"weights={self.weight_format}, dispatch={self.dispatch_format}, waves={self.waves}"
        )
