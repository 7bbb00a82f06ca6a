"""One backward call in flight: gradients of outputs travel out, gradients of tokens travel home."""

# T tokens of this rank   K experts per token   H hidden   I intermediate   W waves   e experts of this rank
# n rows that this rank computes   U tokens that came from other ranks

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.execution.journeys import CallParts, CallRecord, Journeys
from megamoe.execution.ops import reduce_slots
from megamoe.kernels.cpu.library import Rows
from megamoe.parallel.streams import Streams
from megamoe.routing.permutation import Route
from megamoe.routing.row_plan import RankRows, StepRows, plan_rows
from megamoe.routing.wire import Wire, pair_records, read_records
from megamoe.training.derivatives import activate_backward, sum_in_lanes
from megamoe.training.experts import Picked, TrainableExperts
from megamoe.training.kept import Kept, in_batch_order, whole_waves
from megamoe.training.pages import empty
from megamoe.training.wire import GradientWire, HomeWire


@dataclass(frozen=True, slots=True)
class ExpertGradients:
    """Gradients of this rank's master weights, of their dtypes; None for those that need none.

    gate_up [e, 2I, H], down [e, H, I], gate_up_bias [e, 2I], down_bias [e, H]
    """

    gate_up: Tensor | None
    down: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @classmethod
    def like(cls, masters: Sequence[Tensor], needed: Sequence[bool]) -> ExpertGradients:
        """Room for those that are needed, of two masters or, with biases, four."""
        pairs = zip(masters, needed, strict=True)
        found = [empty(each.shape, each.dtype, each.device) if need else None for each, need in pairs]
        return cls(*found, *[None] * (4 - len(found)))

    def each(self) -> tuple[Tensor | None, ...]:
        return self.gate_up, self.down, self.gate_up_bias, self.down_bias


@dataclass(frozen=True, slots=True)
class BackwardParts(CallParts):
    """The same for a backward, and how its forward encoded tokens."""

    experts: TrainableExperts
    token_wire: Wire
    wire: GradientWire


class BackwardCall(Journeys):
    """One backward call.

    Rows are by expert, those of an expert in the order of the global batch. Of each wave recompute() needs no rows of
    other ranks, data() needs the wave's, weights() needs data() of the same wave and nothing else.
    gradient [T, H] bfloat16, of this rank's outputs
    """

    def __init__(
        self,
        parts: BackwardParts,
        kept: Kept,
        route: Route,
        hidden: Tensor,
        gradient: Tensor,
        expert_gradients: ExpertGradients,
        record: CallRecord,
    ) -> None:
        super().__init__(parts, record, Streams(torch.device("cpu")))  # none: messages are queued behind compute
        self._parts, self._kept, self._route = parts, kept, route
        self._experts, self.expert_gradients = parts.experts, expert_gradients
        self._home = HomeWire(parts.wire.dispatch_format, parts.wire.hidden)
        with record.timing("compute_s"):
            self._lay_out(hidden, gradient)

    def _lay_out(self, hidden: Tensor, gradient: Tensor) -> None:
        """Buffers, where rows lie in them, and this rank's own rows in its inbox."""
        parts, workspace, shape = self._parts, self._parts.group.workspace, self._experts.shape
        rows = RankRows.of(parts.agreed.counts.numpy(), self._rank, parts.experts.ids)
        steps = whole_waves(parts.plan, self._rank)
        self._plan = plan = plan_rows(parts.plan, self._rank, steps, rows, parts.messages, parts.wire, len(hidden))
        self._rows = workspace.take("rows", (plan.num_rows, parts.wire.row_bytes), hidden, torch.uint8)
        self._records = self._rows.view(torch.int32).view(-1, 2)
        self._results = workspace.take("results", (plan.num_results, self._home.row_bytes), hidden, torch.uint8)
        self._results[-1].zero_()  # what a masked slot adds
        row_bytes = parts.wire.row_bytes, self._home.row_bytes
        self._note(parts, len(hidden), self._route.num_rows, int(rows.own.sum()), row_bytes)
        order = in_batch_order(rows, self._rank)
        sources, destinations = (each[order] for each in plan.computed.expand())
        device = hidden.device
        self._sources, self._destinations = (torch.from_numpy(each).to(device) for each in (sources, destinations))
        records = torch.from_numpy(plan.records.expand()).to(device)
        self._records.index_copy_(0, records, pair_records(self._route.token_rows, self._route.weights))
        self._encode(hidden, gradient)
        num_rows, inbox = len(sources), self._rows[plan.own.start :]
        self._linear1 = workspace.take("backward linear1", (num_rows, shape.linear1_rows), hidden, torch.bfloat16)
        self._activated = workspace.take("backward activated", (num_rows, shape.intermediate), hidden, torch.bfloat16)
        self._gradient_rows = torch.empty(num_rows, dtype=torch.int64, device=device)
        self._weights = torch.empty(num_rows, dtype=torch.float32, device=device)
        self._gradients = self._decoded(parts.wire, parts.wire.gradients(inbox), "backward gradients")
        self._read_own = False
        self._tokens = self._open_tokens(inbox)

    def _encode(self, hidden: Tensor, gradient: Tensor) -> None:
        own, wire = self._rows[self._plan.own], self._parts.wire
        encoder = Wire(wire.dispatch_format, wire.hidden, round_on_arrival=False)
        encoder.encode(gradient, wire.gradients(own))
        if wire.token_wire is not None:
            wire.token_wire.encode(hidden, wire.forward_tokens(own))

    def _decoded(self, wire: Wire, rows: Tensor, name: str) -> Tensor:
        """Where rows are as bfloat16 once they have been decoded: themselves, or a buffer."""
        if wire.in_place:
            return wire.tokens(rows)
        return self._parts.group.workspace.take(name, (len(rows), wire.hidden), rows, torch.bfloat16)

    def _open_tokens(self, inbox: Tensor) -> Tensor:
        """The tokens that the experts read, [., H] bfloat16: decoded, or to be decoded when they arrive."""
        wire, kept = self._parts.token_wire, self._kept
        if self._parts.wire.token_wire is not None:
            return self._decoded(wire, self._parts.wire.forward_tokens(inbox), "tokens")
        tokens = self._decoded(wire, kept.rows, "tokens")
        if not wire.in_place:
            wire.decode(kept.rows, tokens)
        return tokens

    def sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Of each wave the rows that this rank computes, the bytes that it receives, and those that it sends home."""
        plan = self._plan
        rows = [step.rows.stop - step.rows.start for step in plan.steps]
        arriving = [(each.stop - each.start) * self._parts.wire.row_bytes for each in plan.arriving]
        home = [(each.stop - each.start) * self._home.row_bytes for each in plan.going_home]
        return rows, arriving, home

    # ---- communication ----

    def _pack_wave(self, wave: int) -> None:
        inbox = self._rows[self._plan.own.start :]
        with self._record.timing("compute_s"):
            for unique, rows in self._plan.messages(wave):
                torch.index_select(inbox, 0, self._route.unique[unique], out=self._rows[rows])

    def arrive(self, wave: int) -> None:
        """Waits for the wave's gradients, and decodes them."""
        arrived = [self._plan.own] * (not self._read_own)
        self._read_own = True
        if self._transport is not None:
            with self._record.timing("waiting_s"):
                self._dispatches[wave].wait()
            arrived.append(self._plan.arriving[wave])
        wire, first = self._parts.wire, self._plan.own.start
        with self._record.timing("compute_s"):
            for rows in arrived:
                here, there = self._rows[rows], slice(rows.start - first, rows.stop - first)
                if not wire.in_place:
                    decoder = Wire(wire.dispatch_format, wire.hidden, round_on_arrival=False)
                    decoder.decode(wire.gradients(here), self._gradients[there])
                if wire.token_wire is not None and not wire.token_wire.in_place:
                    wire.token_wire.decode(wire.forward_tokens(here), self._tokens[there])
            of_wave = self._plan.steps[wave].rows
            rows_of, weights = read_records(self._records.index_select(0, self._sources[of_wave]))
            self._gradient_rows[of_wave] = rows_of.to(torch.int64)
            self._weights[of_wave] = weights

    # ---- compute ----

    def recompute(self, wave: int) -> None:
        """Linear-1 of the wave again, or what was kept of it."""
        step = self._plan.steps[wave]
        rows = step.rows
        if rows.start == rows.stop:
            return
        out = self._linear1[rows]
        with self._record.timing("compute_s"), self._lane("linear-1", wave, step):
            if len(self._kept.linear1):
                torch.index_select(self._kept.linear1, 0, self._kept.places[rows], out=out)
                return
            by_expert = Rows(self._tokens, torch.from_numpy(step.counts), self._token_sources(rows))
            self._experts.recompute_linear1(by_expert, step.experts, out, self._parts.group.workspace)

    def _token_sources(self, rows: slice) -> Tensor:
        again = self._parts.wire.token_wire is not None
        return self._gradient_rows[rows] if again else self._kept.sources[rows]

    def data(self, wave: int) -> None:
        """Gradients of the wave's tokens and top-k weights, once it has arrived; and what weights() needs."""
        step = self._plan.steps[wave]
        if step.rows.start != step.rows.stop:
            with self._record.timing("compute_s"):
                self._data(step, wave)

    def _data(self, step: StepRows, wave: int) -> None:
        rows, experts, workspace = step.rows, self._experts, self._parts.group.workspace
        counts, goes = torch.from_numpy(step.counts), self._destinations[rows]
        linear1, weights, shape = self._linear1[rows], self._weights[rows], experts.shape
        with self._lane("linear-2 gradient", wave, step):
            size = (len(linear1), shape.intermediate)
            of_activated = workspace.take("backward of activated", size, linear1, torch.float32)
            incoming = Rows(self._gradients, counts, self._gradient_rows[rows])
            experts.data_gradient("down", incoming, step.experts, of_activated)
        with self._lane("activation gradient", wave, step):
            of_weights = activate_backward(
                linear1,
                weights,
                of_activated,
                experts.tables,
                quantized=experts.format.activations == "mxfp8",
                activated=self._activated[rows],
            )
            if shape.bias:
                of_weights += self._of_bias(step)
            self._home.weights(self._results)[goes] = of_weights
        with self._lane("linear-1 gradient", wave, step):
            by_expert = Rows(linear1, counts)
            if self._home.in_place:
                experts.data_gradient("gate_up", by_expert, step.experts, self._home.rows(self._results), goes)
            else:
                size = (len(linear1), shape.hidden)
                of_tokens = workspace.take("backward of tokens", size, linear1, torch.bfloat16)
                experts.data_gradient("gate_up", by_expert, step.experts, of_tokens)
                self._home.encode(of_tokens, self._results, goes)

    def _of_bias(self, step: StepRows) -> Tensor:
        """What Linear-2's bias adds to the gradients of the step's top-k weights, [n] float32."""
        bias = self._experts.bias("down", step.experts)
        of_rows = bias.repeat_interleave(torch.from_numpy(step.counts).to(bias.device), 0)
        return sum_in_lanes(self._gradients[self._gradient_rows[step.rows]].to(torch.float32) * of_rows, 1)

    def weights(self, wave: int) -> None:
        """Gradients of the weights of the wave's experts."""
        step = self._plan.steps[wave]
        with self._record.timing("compute_s"), self._lane("weight gradient", wave, step):
            start = step.rows.start
            for expert, count in zip(step.experts, step.counts.tolist(), strict=True):
                self._weights_of(expert - self._experts.ids.start, slice(start, start + count))
                start += count

    def _weights_of(self, index: int, rows: slice) -> None:
        found = self.expert_gradients
        if rows.start == rows.stop:
            for each in found.each():
                if each is not None:
                    each[index] = 0
            return
        gradients = Picked(self._gradients, self._gradient_rows[rows])
        own = torch.arange(rows.start, rows.stop, device=gradients.rows.device)
        if found.down is not None:
            self._experts.weight_gradient(gradients, Picked(self._activated, own), found.down[index])
        if found.gate_up is not None:
            tokens = Picked(self._tokens, self._token_sources(rows))
            self._experts.weight_gradient(Picked(self._linear1, own), tokens, found.gate_up[index])
        if found.gate_up_bias is not None:
            found.gate_up_bias[index] = sum_in_lanes(self._linear1[rows].to(torch.float32), 0)
        if found.down_bias is not None:
            wide = self._gradients.index_select(0, gradients.rows).to(torch.float32)
            found.down_bias[index] = sum_in_lanes(wide * self._weights[rows].unsqueeze(-1), 0)

    def reduce(self) -> tuple[Tensor, Tensor]:
        """Once all results are home -> gradients of tokens [T, H] bfloat16 and of top-k weights [T, K] float32"""
        self._wait_home()
        with self._record.timing("compute_s"), self._notes.lane("reduce", rows=self._route.num_rows):
            results, positions = self._results[self._plan.reduced], self._route.positions
            of_tokens = reduce_slots(self._home.decode(results), positions)[:, : self._parts.wire.hidden]
            of_weights = self._home.weights(results)[positions]
        self._finish()
        return of_tokens, of_weights

    def _lane(self, lane: str, wave: int, step: StepRows) -> AbstractContextManager[None]:
        return self._notes.lane(lane, wave, step.rows.stop - step.rows.start)
