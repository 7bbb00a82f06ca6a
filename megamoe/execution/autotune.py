"""What a layer decides for itself, on all ranks alike: waves="auto" and dispatch_format="auto".

Both follow from the measured link of the group, measured once, and from the compute of the layer's own calls, of which
the slowest rank's counts. What a wave costs is the machine's: of the profile that was handed in, else of what
`megamoe bench` measured of this machine and kept, else of the profile that ships; the most of all ranks'. Until compute
is measured, a profile of this machine says what it is; without one the first calls go by rules that need neither.
"""

# T tokens of this rank   H hidden   K experts per token   R rows that a rank computes on average

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from megamoe.execution.experts import Experts
from megamoe.execution.journeys import CallRecord
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.streams import Stopwatch
from megamoe.routing.agreement import Agreement
from megamoe.routing.waves import Waves, auto_waves
from megamoe.routing.wire import Wire
from megamoe.schedule.cost_model import CostModel, Spread, best_waves
from megamoe.schedule.kept import Setting, find

if TYPE_CHECKING:
    from megamoe.catalog import Machine

# Encoding a value to MXFP8 once per token and decoding it once per row, on one Zen 4 core, 2026-11-24. Twice that for
# each byte it saves: where the link moves a byte in less time, the rounding does not pay.
_CODEC_S = 1.2e-9
_MIN_ROWS = 256  # calls with fewer rows say more of fixed costs than of rows
# Beginning a wave where no profile says it: a GPU's launches, a guess until one is measured.
_OTHER_WAVE_S = 20e-6
_TRIES = 4  # calls of about the same size after which the number of waves stays


@dataclass(frozen=True, slots=True)
class Choice:
    """How one call runs."""

    waves: int | Sequence[int]
    wire: Wire
    cost_model: CostModel


class Tuner:
    """Decides for one layer. waves and dispatch_format as the user gave them; without overlap nothing is covered.

    dispatch_format is None, and row_s 0, until they are known.
    """

    def __init__(
        self,
        name: str,
        group: EPGroup,
        experts: Experts,
        *,
        waves: Waves,
        dispatch_format: str,
        combine_format: str,
        overlap: bool,
        machine: Machine | None = None,
    ) -> None:
        self._name, self._group, self._experts = name, group, experts
        self._waves, self._overlap = waves, overlap
        self._placement = Placement(experts.shape.num_experts, group.size)
        self.dispatch_format = None if dispatch_format == "auto" else dispatch_format
        self._combine_format = combine_format
        # [P, E]: 1 where an expert is on another rank
        self._remote = (np.arange(group.size)[:, None] != np.array(self._placement.ranks(), np.int64)).astype(np.int64)
        self._settled: dict[int, list[int]] = {}
        self._wire: Wire | None = None
        self._given = machine
        self._measured_row_s = 0.0
        self._last: tuple[CallRecord, Stopwatch | None] | None = None

    @cached_property
    def _machine(self) -> Machine | None:
        """The profile that was handed in, else this machine's where it was measured and waves are to be chosen."""
        chooses = self._waves == "auto" and self._group.size > 1 and self._experts.device.type == "cpu"
        if self._given is not None or not chooses:
            return self._given
        here = (self._experts.products.path, torch.get_num_threads(), self._group.size)
        places = (
            (shaped, shares)
            for shares in (self._group.shared_memory, not self._group.shared_memory)
            for shaped in (True, False)
        )
        settings = (Setting.here(*here, shaped=shaped, shared_memory=shares) for shaped, shares in places)
        return next(filter(None, map(find, settings)), None)

    @cached_property
    def _wave_s(self) -> float:
        """Seconds that a wave takes beside its rows. Profiles are read when waves are first weighed."""
        return _wave_s(self._experts.device.type, self._machine)

    @cached_property
    def _expected_row_s(self) -> float:
        return 0.0 if self._machine is None else _row_s(self._experts, self._machine)

    @property
    def row_s(self) -> float:
        """Seconds that a row takes to compute: as measured, else as the machine's profile says, else 0."""
        return self._measured_row_s or self._expected_row_s

    def note(self, record: CallRecord, stopwatch: Stopwatch | None = None) -> None:
        """Takes a call to learn from. Where a stopwatch knows what it computed, that is read when learn() is called."""
        self._last = (record, stopwatch)
        if stopwatch is None:
            self.learn()

    def learn(self) -> None:
        """From the last call, waiting until it has ended: the least time for a row counts, the rest is disturbance."""
        if self._last is None:
            return
        (record, stopwatch), self._last = self._last, None
        if stopwatch is not None:
            record.compute_s = stopwatch.read_s()
        rows = record.rows_local + record.rows_received
        if rows >= _MIN_ROWS:
            row_s = record.compute_s / rows
            self._measured_row_s = min(self._measured_row_s or row_s, row_s)

    def choose(self, agreed: Agreement) -> Choice:
        """Waves, wire and cost model of a call. All ranks come to the same; the link is measured when first needed."""
        wire = self._wire_of(self.choose_format())
        rows = sum(agreed.tokens) * self._experts.shape.topk / len(agreed.tokens)
        out_bytes = self._out_bytes(wire, agreed)
        first_guess = auto_waves(self._placement, rows, out_bytes)
        if self._waves == "auto" and first_guess > 1:
            self._group.link(self._name, self._experts.device)
            if self._given is None:  # which all ranks know of each other: their terms say so
                self._group.wave_cost(self._name, self._wave_s)
        cost_model = self._cost_model(out_bytes, wire.result_bytes, agreed.row_s)
        if self._waves != "auto":
            assert not isinstance(self._waves, str)
            return Choice(self._waves, wire, cost_model)
        if first_guess > 1 and agreed.row_s:
            return Choice(self._settle(rows, cost_model), wire, cost_model)
        return Choice(first_guess, wire, cost_model)

    def known_wire(self) -> Wire | None:
        """The wire of a call, where nothing has to be measured for it, on all ranks alike."""
        if self._wire is not None:
            return self._wire
        if self.dispatch_format is None and not self._experts.packed and self._group.transport is not None:
            return None
        return self._wire_of(self.choose_format())

    def _wire_of(self, dispatch_format: str) -> Wire:
        if self._wire is None:
            rounds = self._experts.format.activations == "mxfp8"
            self._wire = Wire(
                dispatch_format,
                self._experts.shape.hidden,
                round_on_arrival=rounds,
                combine_format=self._combine_format,
            )
        return self._wire

    def choose_format(self) -> str:
        """Once for good, so that bits do not change between calls: with bf16 weights the wire's rounding shows in them.

        With mxfp4 weights the tokens are rounded in any case, and once per token is less work than once per row.
        """
        if self.dispatch_format is None:
            if self._experts.packed:
                self.dispatch_format = "mxfp8"
            elif self._group.transport is None:
                self.dispatch_format = "bf16"
            else:
                link = self._group.link(self._name, self._experts.device)
                self.dispatch_format = "mxfp8" if 1 / link > _CODEC_S else "bf16"
        return self.dispatch_format

    def _out_bytes(self, wire: Wire, agreed: Agreement) -> float:
        """Bytes that a row has sent with it on average: a token goes once for all of its rows."""
        sent = agreed.firsts if agreed.landed is None else agreed.landed  # to a rank or to a host once
        rows, tokens = (int(np.vdot(each.numpy(), self._remote)) for each in (agreed.counts, sent))
        return wire.PAIR_BYTES + wire.row_bytes * tokens / max(rows, 1)

    def _cost_model(self, out_bytes: float, home_bytes: float, row_s: float) -> CostModel:
        decode_rows = self._experts.decode_rows
        if not self._overlap:
            return CostModel(1.0, 0.0, 0.0, 0.0, decode_rows)
        if not self._group.links or not row_s:
            f_remote = 1 - 1 / self._group.size
            return CostModel.balanced(out_bytes, home_bytes, f_remote, decode_rows)
        link = self._group.links[0]
        agreed = None if self._given is not None else next(iter(self._group.wave_costs), None)
        wave_s = self._wave_s if agreed is None else agreed
        return CostModel(row_s, out_bytes / link, home_bytes / link, wave_s, decode_rows)

    def _settle(self, rows: float, cost_model: CostModel) -> int:
        """The best number of waves, decided anew for the first calls of about that size and kept from then on."""
        tries = self._settled.setdefault(int(rows).bit_length(), [])
        if len(tries) < _TRIES:
            tries.append(best_waves(Spread(self._placement.most, self._group.size), rows, cost_model))
        return tries[-1]


def _wave_s(device_type: str, machine: Machine | None) -> float:
    if machine is None and device_type != "cpu":
        return _OTHER_WAVE_S
    from megamoe.catalog import load_machine  # a layer of which nothing is to be weighed needs none of what it imports

    return (machine or load_machine("cpu")).wave_us.value / 1e6


def _row_s(experts: Experts, machine: Machine) -> float:
    from megamoe.schedule.machine import product_row_us

    shape = experts.shape
    return product_row_us(machine, shape.hidden, shape.intermediate, packed=experts.packed) / 1e6
