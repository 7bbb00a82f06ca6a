"""The layer: dispatch, FP4 expert compute and combine in waves, so that communication hides under compute."""

# T tokens of this rank   H hidden   K experts per token   E experts in all   P ranks   W waves
# N rows this rank sends, one per unmasked (token, slot)   B bytes of a dispatched row

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.ambient import can_tell_nobody, eager, settled, undisturbed
from megamoe.execution.autotune import Tuner
from megamoe.execution.checks import (
    any_wrong,
    check_ambient,
    check_device,
    check_formats,
    check_input,
    check_machine,
    check_name,
    check_transport,
    check_values,
)
from megamoe.execution.experts import Experts
from megamoe.execution.journeys import CallRecord
from megamoe.execution.pipeline import Call, Parts
from megamoe.execution.small_call import Input, SmallCalls, library_of
from megamoe.execution.stacks import load_stacks, shortened
from megamoe.formats.given import GivenWeight
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.recorder import Notes, now_ns
from megamoe.parallel.streams import Stopwatch, on_device
from megamoe.parallel.symmetric import Place
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.turns import TurnOf
from megamoe.routing.agreement import Agreement, Page, Part, SmallAgreement, Terms, agree, exact
from megamoe.routing.landing import land
from megamoe.routing.messages import Messages, count_rows
from megamoe.routing.permutation import route_rows
from megamoe.routing.segments import to_host
from megamoe.routing.waves import Waves, check_waves, plan_waves
from megamoe.schedule.schedule import LOOKAHEAD
from megamoe.shape import MoEShape

if TYPE_CHECKING:
    from megamoe.catalog import Machine

_FUSED = "megamoe.execution.backends.triton_fused"  # imports Triton


@dataclass(slots=True)
class _Calls:
    """A layer's calls in its group: how many, and the latest. Apart, since a module is slow to be written to."""

    number: int = 0
    last: CallRecord = field(default_factory=CallRecord)


class MegaMoE(nn.Module):
    """Routed experts of a Mixture-of-Experts layer, spread over the ranks of a group.

    shape             sizes of the layer, MoEShape
    group             torch ProcessGroup or EPGroup; None is one rank
    weight_format     "mxfp4" (the contract's FP8 x FP4 arithmetic) or "bf16"
    dispatch_format   "mxfp8" (H + H/32 bytes a row), "bf16", or "auto"; with mxfp4 weights the bits are the same.
                      With bf16 weights mxfp8 rounds the tokens, and auto does so where the group's link is slow: give
                      the format where bits must not depend on the link
    combine_format    "bf16", or "mxfp8" (H + H/32 bytes a row): every expert's result is rounded once more, which is an
                      error of 2.7 % at the root mean square, for links that are too slow otherwise
    waves             "auto", a number, or relative sizes of uneven waves; the bits are the same. "auto" on CPUs has
                      ranks on CPUs that bring few tokens do without waves: see last_call.small
    device            where the weights are and the tokens must be; the CPU by default
    name              how errors call this layer; must be the same on all ranks
    overlap           False runs one wave, and nothing at the same time: the serial layer that overlap is held against
    keep_dequantized  also keep a BF16 copy of mxfp4 weights, 3 * H * I * 2 bytes an expert (memory_bytes tells), where
                      the device has no kernels, which decode on the way
    arithmetic        on CPUs "fma" keeps to fused multiply-adds where one has BF16 instructions and another has not:
                      ranks must sum alike; "auto" takes the CPU's best
    machine           what `megamoe calibrate` found of this machine, for waves="auto"; None takes what `megamoe bench`
                      kept of it in the user's cache folder, else what ships
    deadline_s        seconds that a call may be kept waiting, where group is not an EPGroup that has its own
    transport         "auto" is the group's; "fused" makes a call one kernel on every rank, over memory that all map,
                      for few tokens on a device with Triton kernels: see docs/mega_kernel.md
    max_tokens_per_rank   most tokens of a rank in a call, for transport="fused", whose buffers have a fixed size

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
        transport: str = "auto",
        max_tokens_per_rank: int | None = None,
    ) -> None:
        super().__init__()
        check_ambient()
        check_name(name)
        check_formats(shape, weight_format, dispatch_format, combine_format)
        check_transport(transport, max_tokens_per_rank)
        check_machine(machine)
        self.shape, self.name = shape, name
        self.weight_format, self.dispatch_format, self.combine_format = weight_format, dispatch_format, combine_format
        self.waves, self.overlap = check_waves(waves if overlap else 1), overlap
        self.device = check_device(device)
        self.group = EPGroup.of(group, self.device, deadline_s=deadline_s)
        self.placement = Placement(shape.num_experts, self.group.size)
        self.machine = machine
        self.transport, self.max_tokens_per_rank = transport, max_tokens_per_rank
        if transport == "fused":
            import_module(_FUSED).check_fused(self.device, shape, combine_format)
        with undisturbed(self.device):
            self.experts = self.experts_type(
                shape,
                self.placement.experts(self.group.rank),
                weight_format=weight_format,
                device=self.device,
                keep_dequantized=keep_dequantized,
                arithmetic=arithmetic,
                interpreted=transport == "fused" and self.device.type == "cpu",
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
            combine_format=self.combine_format,
            overlap=self.overlap,
            machine=self.machine,
        )
        self.experts.belongs_to(self.group, self.name)
        self._calls = _Calls()
        self._number = self.group.turns.number(self, self.name)  # layers of one name are told apart by their order
        self._page = Page(self._terms(self._number), self.group.host)
        library = library_of(self.experts, self.waves, self.combine_format)
        self._small = None if library is None else SmallCalls(self.name, self.group, self.experts, library)
        self._alone = self._fused = None
        if self.transport == "fused":
            self._small, rounds = None, self.experts.packed or self.dispatch_format == "mxfp8"
            self._fused = import_module(_FUSED).Fused(
                self.name,
                self.group,
                self.experts,
                self.placement,
                self.max_tokens_per_rank,
                "mxfp8" if rounds else "bf16",
            )
        elif self.experts.grouped and self.group.size == 1:
            self._alone = import_module("megamoe.execution.backends.triton_alone").Alone(
                self.experts, self.combine_format
            )

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
    def last_call(self) -> CallRecord:
        """What the latest call did on this rank."""
        return self._calls.last

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
        gate_up: GivenWeight,
        down: GivenWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Takes one expert's weights, by global id: gate_up [2I, H], gate rows first, and down [H, I].

        gate_up_bias [2I] and down_bias [H], FP32 or BF16, where the shape has biases, and only there.
        """
        with self._turn(), undisturbed(self.device):
            self.experts.load(expert, gate_up, down, gate_up_bias, down_bias)

    def load_experts(
        self,
        gate_up: GivenWeight,
        down: GivenWeight,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        """Takes gate_up [E, 2I, H] (gate rows first) and down [E, H, I], of all experts or of this rank's only.

        Each a float tensor, MXFP4, or a pair (packed, scales). Experts without a gate have gate_up [E, I, H]. Where
        the shape has biases, gate_up_bias [E, 2I] and down_bias [E, H] likewise, FP32 or BF16. ValueError for wrong
        shapes, dtypes, NaN weights in a layer of MXFP4, scales that BF16 cannot hold, biases that are missing, not
        finite, or given to a layer without.
        """
        with self._turn(), undisturbed(self.device):
            load_stacks(self.experts, self.shape.num_experts, gate_up, down, gate_up_bias, down_bias)

    def _turn(self) -> TurnOf:
        """The group's turn, of the group that this layer is in once it has it."""
        return TurnOf(self)

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
                if self._fused is not None:
                    return self._compute_fused(hidden, topk_ids, topk_weights, complaint)
                if self._alone is not None:
                    return self._compute_alone(hidden, topk_ids, topk_weights, complaint)
                return self._compute(hidden, topk_ids, topk_weights, complaint)

    def _compute(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, complaint: ValueError | None) -> Tensor:
        """The call: in one step where all ranks bring few tokens on CPUs, else wave by wave."""
        calls, group = self._calls, self.group
        record, notes = CallRecord(), group.notes(self.name, calls.number + 1)
        unbroken = group.unbroken(self.name, calls.number + 1)
        with notes.lane("call"), unbroken:
            begun_ns = now_ns()
            given = hidden, topk_ids, topk_weights
            if complaint is None:
                hidden = settled(hidden.to(torch.bfloat16))
                given = hidden, settled(topk_ids), settled(topk_weights)
            agreed = self._agree(given, complaint, record)
            if isinstance(agreed, SmallAgreement):
                assert self._small is not None
                out = self._small.compute(hidden, agreed, begun_ns, notes, record)
                stopwatch = None
            else:
                out, stopwatch = self._in_waves(self._open(given, agreed, record, notes))
            record.total_s = (now_ns() - begun_ns) / 1e9
        self._calls.last = record
        self.tuner.note(record, stopwatch)
        return out

    @staticmethod
    def _in_waves(call: Call) -> tuple[Tensor, Stopwatch | None]:
        for wave in range(LOOKAHEAD):
            call.dispatch(wave)
        for step in call.steps:
            if step.arrived:
                call.dispatch(step.wave + LOOKAHEAD)
            call.compute(step)
            if step.arrived:
                call.combine(step.wave)
        return call.reduce(), call.stopwatch

    def _compute_alone(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, complaint: ValueError | None
    ) -> Tensor:
        """The call of a rank alone whose device has kernels, which waits for nothing: see triton_alone.py."""
        assert self._alone is not None
        if complaint is not None:
            raise complaint
        self._calls.number += 1
        self._calls.last = CallRecord(tokens=len(hidden), waves=1)
        hidden, topk_weights = settled(hidden.to(torch.bfloat16)), settled(topk_weights)
        rounds = self.tuner.choose_format() == "mxfp8"
        with self.last_call.timing("total_s"):
            out: Tensor = self._alone.compute(hidden, topk_ids, topk_weights, self.group.workspace, rounds=rounds)
        return out

    def _compute_fused(
        self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, complaint: ValueError | None
    ) -> Tensor:
        """The call as one kernel, for which the host does not wait: see triton_fused.py."""
        assert self._fused is not None
        calls = self._calls
        if self._fused.opened and self.experts.missing:  # a rank that computes rows of others must not take part
            raise complaint or ValueError(f"layer {self.name!r} has experts without weights")
        number = calls.number + 1
        record = CallRecord(tokens=0 if complaint else len(hidden), waves=1)
        if complaint is None:
            hidden, topk_weights = settled(hidden.to(torch.bfloat16)), settled(topk_weights)
        with self.group.unbroken(self.name, number), record.timing("total_s"):
            if not self._fused.opened:
                nobody = Part(0, np.zeros((2, self.shape.num_experts), np.int32), 0.0)
                agree(self.group, self._current_page(), number, nobody, complaint)
            calls.number = number
            out: Tensor = self._fused.compute(hidden, topk_ids, topk_weights, complaint)
        calls.last = record
        self._fused.complain()
        return out

    def _agree(self, given: Input, complaint: ValueError | None, record: CallRecord) -> Agreement | SmallAgreement:
        """Agrees with all ranks on the call, before any row moves but those that lie behind a page.

        A call that is refused does not count: ranks that called different layers may have been refused together.
        """
        number = self._calls.number + 1
        self.tuner.learn()
        begun, place = perf_counter(), self._place()
        placed = perf_counter()
        part, complaint = self._part(given, complaint, place)
        packed = perf_counter()
        agreed = agree(self.group, self._current_page(), number, part, complaint)
        self._calls.number = number
        record.compute_s += packed - placed
        record.counts_s += placed - begun + perf_counter() - packed
        return agreed

    def _place(self) -> Place | None:
        """Where this rank's page goes in memory that it shares with others, if it shares any."""
        transport = self.group.transport
        return transport.place(self._page.label) if isinstance(transport, HostTransport) else None

    def _part(self, given: Input, complaint: ValueError | None, place: Place | None) -> tuple[Part, ValueError | None]:
        """What this rank brings, which few tokens are among, and what is wrong with the values of its routing."""
        row_s, small = self.tuner.row_s, self._small
        if complaint is None and small is not None and (place is not None or self.group.transport is None):
            wire = self.tuner.known_wire()
            if wire is not None and small.takes(len(given[0]), wire, self.experts):
                part = small.bring(given, place, row_s)
                if part is not None:
                    return part, None
        nodes = self.group.nodes(self.name)
        counts = np.zeros((3 if nodes else 2, self.shape.num_experts), np.int32)
        num_tokens = 0
        if complaint is None:
            found, complaint = self._count(*given[1:])
            if complaint is None:
                num_tokens, counts[:2] = len(given[0]), found.numpy()
        if num_tokens and nodes:
            counts[2] = land(given[1], self.placement, nodes, self.group.rank).counts.numpy()
        return Part(num_tokens, counts, row_s), complaint

    def _open(self, given: Input, agreed: Agreement, record: CallRecord, notes: Notes) -> Call:
        """Lays out this rank's part of a call by waves."""
        hidden, topk_ids, topk_weights = given
        with record.timing("counts_s"):
            choice = self.tuner.choose(agreed)
        with record.timing("compute_s"):
            plan = plan_waves(self.placement, choice.waves)
            messages = Messages.of(plan, choice.wire, agreed.tokens, agreed.counts, agreed.firsts, agreed.landed)
            workspace = self.group.workspace
            num_rows = int(agreed.counts[self.group.rank].numpy().sum())
            nodes = self.group.nodes(self.name)
            landing = land(topk_ids, self.placement, nodes, self.group.rank) if messages.node_limited else None
            route = route_rows(topk_ids, topk_weights, plan, self.group.rank, num_rows, messages, workspace, landing)
        agreed_on = self.name, self.group, plan, messages, agreed, notes
        parts = Parts(*agreed_on, self.experts, choice.wire, choice.cost_model, nodes)
        return Call(parts, route, hidden, record)

    def _count(self, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, ValueError | None]:
        """Rows for each expert and unique tokens, [2, E] int64 on the CPU, and what is wrong with the values.

        A device is waited for once, for all of it.
        """
        counts = count_rows(topk_ids, self.placement)
        wrong = any_wrong(self.shape, topk_ids, topk_weights)
        found = to_host(torch.cat((counts.flatten(), wrong)), self.group.workspace, "counts")
        try:
            if found[-1]:
                check_values(self.shape, topk_ids, topk_weights)
        except ValueError as complaint:
            return found[:-1].view(2, -1), complaint
        return found[:-1].view(2, -1), None

    def _complaint(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> ValueError | None:
        """What all ranks are told of this one's call. ValueError where none could be told anything."""
        try:
            if self.group.recorders and self.device.type != "cpu":
                raise ValueError(f"a recording notes host time, which says nothing of work on {self.device}")
            check_ambient()
            check_input(self.shape, self.device, hidden, topk_ids, topk_weights)
            if self._alone is not None:
                self._alone.refuse(self.name)
            if self._fused is not None:
                self._fused.check_size(len(hidden))
            if not self.experts.whole:
                missing = shortened(self.experts.missing)
                raise ValueError(f"layer {self.name!r} has no weights for experts {missing}: load them first")
        except ValueError as complaint:
            if can_tell_nobody():
                raise
            return complaint
        return None

    def _current_page(self) -> Page:
        """What this rank says of the layer, made anew where layers of its name have gone."""
        number = self.group.turns.number(self, self.name)
        if number != self._number:
            self._number, self._page = number, Page(self._terms(number), self.group.host)
        return self._page

    def _terms(self, number: int) -> Terms:
        return Terms(
            layer=self.name,
            number=number,
            hidden=self.shape.hidden,
            intermediate=self.shape.intermediate,
            num_experts=self.shape.num_experts,
            topk=self.shape.topk,
            activation=str(self.shape.activation),
            bias=self.shape.bias,
            node_limited=self.group.node_limited,
            shared_memory=self.group.shared_memory,
            training=self._training_term(),
            weight_format=self.weight_format,
            dispatch_format=self.dispatch_format,
            combine_format=self.combine_format,
            arithmetic=self.experts.arithmetic,
            waves=self._waves_term(),
            transport=self._transport_term(),
        )

    def _waves_term(self) -> str:
        """What "auto" chooses follows from what a wave costs the machine."""
        return f"{self.waves}" if self.machine is None else f"{self.waves} at {exact(self.machine.wave_us.value)} us"

    def _training_term(self) -> str:
        return "no"

    def _transport_term(self) -> str:
        bound = "" if self.max_tokens_per_rank is None else f", {self.max_tokens_per_rank} tokens"
        return f"{self.transport}{bound}"

    def extra_repr(self) -> str:
        return (
            f"rank {self.group.rank} of {self.group.size}, hidden={self.shape.hidden}, "
            f"intermediate={self.shape.intermediate}, num_experts={self.shape.num_experts}, topk={self.shape.topk}, "
            f"activation={str(self.shape.activation)!r}, bias={self.shape.bias}, "
            f"weights={self.weight_format}, dispatch={self.dispatch_format}, combine={self.combine_format}, "
            f"waves={self.waves}"
        )
