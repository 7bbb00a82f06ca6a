"""The layer that trains: experts are parameters, and gradients have the same bits for any number of ranks."""

# T tokens of this rank   H hidden   I intermediate   K experts per token   e experts of this rank

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from megamoe.ambient import eager, in_a_transform, settled, undisturbed
from megamoe.execution.experts import Experts
from megamoe.execution.journeys import CallRecord
from megamoe.execution.pipeline import Call
from megamoe.execution.small_call import Input
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.private import is_batched
from megamoe.parallel.recorder import Notes
from megamoe.parallel.streams import on_device
from megamoe.routing.agreement import Agreement, Page, Part, agree
from megamoe.routing.messages import Messages
from megamoe.routing.permutation import route_rows
from megamoe.routing.waves import WavePlan, plan_waves
from megamoe.routing.wire import Wire
from megamoe.schedule.backward import DATA, RECOMPUTE, SAVED, WEIGHTS, BackwardLoad, schedule_backward
from megamoe.schedule.schedule import LOOKAHEAD
from megamoe.training.call import BackwardCall, BackwardParts, ExpertGradients
from megamoe.training.distributed.mesh import check_mesh
from megamoe.training.experts import MASTER_DTYPES, Captured, TrainableExperts
from megamoe.training.function import Apply
from megamoe.training.kept import Kept, keep
from megamoe.training.pages import empty
from megamoe.training.rounding import ROUNDINGS
from megamoe.training.wire import GradientWire, check_gradient_format

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Origin:
    """The forward call that a backward belongs to: its number, its group, and how often weights had been rounded."""

    call: int
    group: EPGroup
    rounding_step: int


class TrainableMoE(MegaMoE):
    """MegaMoE whose experts are parameters: master weights that each forward has quantised, gradients for all of it.

    experts.gate_up [e, 2I, H] and experts.down [e, H, I] of master_dtype are this rank's experts (gate_up [e, I, H]
    without a gate); experts.gate_up_bias [e, 2I] and experts.down_bias [e, H], FP32, where the shape has biases. What
    the forward multiplies by is made from them, in one pass, before the first forward after they changed: torch counts
    in-place changes, and tells of its optimisers' steps, and some values of each expert show others. quantize() does so
    at once, and is needed after changes of single values through `.data`. Rounding passes gradients straight through to
    the master weights.

    In addition to MegaMoE's arguments:
    master_dtype      torch.float32 or torch.bfloat16
    gradient_format   how gradients travel, both ways: "bf16", or "mxfp8", which rounds them
    saved             what a forward leaves for its backward: "tokens" keeps those that the rank's experts read,
                      "activations" also Linear-1's results, "dispatch-again" neither, so that tokens travel again
    rounding          how masters become weights: "nearest", or "stochastic", up or down by chance and unbiased; chance
                      follows from seed, a weight's place in the layer and how often it was rounded, which a state
                      dict has
    seed              of the first weights and of chance; both depend on an expert's global id, and not on the ranks

    Bits of all gradients depend on the global batch alone: on no number of ranks, waves or schedule. Every rank must
    run the backward of each call, in the same order, also one without tokens. last_backward holds its CallRecord.
    tokens_per_expert, int64 [E] on the CPU, is what the latest forward had of all ranks: the same on each of them.
    """

    experts_type: ClassVar[type[Experts]] = TrainableExperts
    experts: TrainableExperts

    def __init__(
        self,
        *args: Any,
        master_dtype: torch.dtype = torch.float32,
        gradient_format: str = "bf16",
        saved: str = "tokens",
        rounding: str = "nearest",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("transport") == "fused":
            raise ValueError("transport='fused' has no backward pass: leave transport out, or make a MegaMoE")
        self.gradient_format, self.saved = gradient_format, saved
        super().__init__(*args, **kwargs)
        if master_dtype not in MASTER_DTYPES:
            raise ValueError(f"master_dtype must be torch.float32 or torch.bfloat16, got {master_dtype}")
        if saved not in SAVED:
            raise ValueError(f"saved must be one of {', '.join(SAVED)}, got {saved!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        check_gradient_format(gradient_format, self.shape.hidden)
        self.last_backward = CallRecord()
        self.tokens_per_expert = torch.zeros(self.shape.num_experts, dtype=torch.int64, device="cpu")
        self._latest: Call | None = None
        self._keeping = False  # whether the forward that runs has a backward
        with undisturbed(self.device):
            self.experts.make_masters(master_dtype, seed, rounding)
        _living.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, and of what was pickled."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _living.add(self)

    def _begin(self) -> None:
        """As MegaMoE's, but all calls go by waves: what they leave in the workspace is what a backward needs."""
        super()._begin()
        self._small = None

    def _training_term(self) -> str:
        again = ", dispatch-again" if self.saved == "dispatch-again" else ""
        return f"{self.gradient_format} gradients{again}"

    # ---- master weights ----

    def reset_parameters(self, seed: int = 0) -> None:
        """Uniform weights in [-1 / sqrt(K), 1 / sqrt(K)], K a matrix's inputs, as nn.Linear has them; biases 0."""
        self.experts.reset_parameters(seed)

    def quantize(self) -> None:
        """Makes what both passes multiply by from the master weights, in one pass over them.

        ValueError for master weights that the format has no code for, NaN among them: the expert is then missing.
        """
        with self._turn(), undisturbed(self.device):
            self.experts.quantize()

    def inference_state_dict(self) -> dict[str, Tensor]:
        """What the forward multiplies by, as the state dict of a MegaMoE of this shape, format and rank."""
        with self._turn(), undisturbed(self.device):
            return {f"experts.{name}": each for name, each in self.experts.inference_state_dict().items()}

    def distribute(self, mesh: DeviceMesh) -> TrainableMoE:
        """Makes the parameters DTensors, Shard(0) on the mesh, and so their gradients -> this layer.

        mesh has one dimension, the ranks of the layer's group in their order; of a larger mesh take that dimension,
        mesh["ep"]. The parameters are new ones: make optimisers afterwards. torch.distributed.checkpoint then saves
        and loads whole stacks [E, ...] for any number of ranks. ValueError for another mesh, and for numbers of
        experts that DTensor would lay out otherwise, which is said with the numbers.
        """
        with self._turn():
            check_mesh(mesh, self.group)
            self.experts.distribute(mesh)
        return self

    # ---- forward ----

    @eager
    def forward(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As MegaMoE.forward(); where a gradient is asked for, of anything, its backward is one call of all ranks."""
        masters = self.experts.values()
        asked = torch.is_grad_enabled() and any(
            getattr(each, "requires_grad", False) for each in (hidden, topk_weights, *masters)
        )
        if asked and not in_a_transform():  # which torch would refuse before the other ranks heard of it
            out: Tensor = Apply.apply(  # type: ignore[no-untyped-call]
                self, hidden, topk_ids, topk_weights, *masters
            )
            return out
        return super().forward(hidden, topk_ids, topk_weights)

    def forward_and_keep(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Kept, Origin]:
        """The forward, and what its backward needs of it."""
        with self._turn():
            complaint = self._complaint(hidden, topk_ids, topk_weights)
            with undisturbed(self.device), on_device(self.device):
                self._keeping = True
                try:
                    out = self._compute(hidden, topk_ids, topk_weights, complaint)
                    assert self._latest is not None
                    kept = keep(self._latest, self.group.workspace, len(hidden), self.saved, self.experts.captured)
                finally:
                    self._latest = self.experts.captured = None
                    self._keeping = False
        return out, kept, Origin(self._calls.number, self.group, self.experts.rounding_step)

    def _open(self, given: Input, agreed: Agreement, record: CallRecord, notes: Notes) -> Call:
        """As MegaMoE's; every rank gets its tokens from their own rank, so that all that it read lies in its inbox."""
        self._latest = call = super()._open(given, replace(agreed, landed=None), record, notes)
        self.tokens_per_expert = agreed.counts.sum(0)
        if self._keeping and self.saved == "activations":
            own = self.local_experts
            num_rows = int(call.parts.agreed.counts[:, own.start : own.stop].sum())
            self.experts.captured = Captured(empty((num_rows, self.shape.linear1_rows), torch.bfloat16, self.device))
        return call

    def _complaint(self, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> ValueError | None:
        """Quantises what has changed, so that weights which cannot be are a complaint like others."""
        try:
            if not in_a_transform():
                with undisturbed(self.device):
                    self.experts.quantize_what_changed()
        except ValueError as complaint:
            return complaint
        return super()._complaint(hidden, topk_ids, topk_weights)

    # ---- backward ----

    @eager
    def backward_of(
        self,
        origin: Origin,
        kept: Kept,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gradient: Tensor,
        hidden: Tensor | None,
        of_masters: ExpertGradients,
    ) -> tuple[Tensor, Tensor]:
        """gradient [T, H] of a call's output -> gradients of hidden [T, H] and topk_weights [T, K]; fills of_masters.

        hidden is given where tokens are dispatched again. RuntimeError for a batch of gradients.
        """
        if is_batched(gradient):
            raise RuntimeError(
                f"layer {self.name!r} takes one gradient in a backward, and got a batch of them: is_grads_batched and "
                "vectorize must be False"
            )
        with self._turn(), undisturbed(self.device), on_device(self.device):
            name, record = f"{self.name} (backward)", CallRecord()
            notes = self.group.notes(name, origin.call)
            with notes.lane("call"), self.group.unbroken(name, origin.call), record.timing("total_s"):
                agreed = self._agree_backward(name, origin, kept, record)
                call = self._open_backward(
                    name, agreed, kept, topk_ids, topk_weights, gradient, hidden, of_masters, record, notes
                )
                self._run(call)
                found = call.reduce()
            self.last_backward = record
        return found

    def _agree_backward(self, name: str, origin: Origin, kept: Kept, record: CallRecord) -> Agreement:
        """Keeps ranks in step: all say the backward of which call this is."""
        complaint = None
        if origin.group is not self.group:
            complaint = ValueError(f"layer {self.name!r} is in another group than when its forward ran")
        elif not self.experts.unchanged_since(origin.rounding_step):
            complaint = ValueError(
                f"weights of layer {self.name!r} were modified between a forward and its backward: step after it"
            )
        agreed, rank = kept.agreement(), self.group.rank
        counts = torch.stack((agreed.counts[rank], agreed.firsts[rank])).to(torch.int32).numpy()
        part = Part(agreed.tokens[rank], counts, self.tuner.row_s)
        terms = replace(self._terms(self.group.turns.number(self, self.name)), layer=name)
        with record.timing("counts_s"):
            answer = agree(self.group, Page(terms, self.group.host), origin.call, part, complaint)
        assert isinstance(answer, Agreement)
        return replace(agreed, row_s=answer.row_s)

    def _open_backward(
        self,
        name: str,
        agreed: Agreement,
        kept: Kept,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gradient: Tensor,
        hidden: Tensor | None,
        of_masters: ExpertGradients,
        record: CallRecord,
        notes: Notes,
    ) -> BackwardCall:
        """Lays out this rank's part of the call: its route again, by the backward's wire."""
        again, group = self.saved == "dispatch-again", self.group
        rounds = self.experts.format.activations == "mxfp8"
        token_wire = Wire(self.tuner.choose_format(), self.shape.hidden, round_on_arrival=rounds)
        wire = GradientWire(
            self.gradient_format, self.shape.hidden, round_on_arrival=False, token_wire=token_wire if again else None
        )
        with record.timing("compute_s"):
            plan = self._backward_plan(kept)
            messages = Messages.of(plan, wire, agreed.tokens, agreed.counts, agreed.firsts)
            num_rows = int(agreed.counts[group.rank].sum())
            topk_ids, topk_weights = settled(topk_ids), settled(topk_weights)
            route = route_rows(topk_ids, topk_weights, plan, group.rank, num_rows, messages, group.workspace)
            gradient = settled(gradient.to(torch.bfloat16))
            tokens = gradient if hidden is None else settled(hidden.to(torch.bfloat16))
        parts = BackwardParts(name, group, plan, messages, agreed, notes, self.experts, token_wire, wire)
        return BackwardCall(parts, kept, route, tokens, gradient, of_masters, record)

    def _backward_plan(self, kept: Kept) -> WavePlan:
        """The forward's waves."""
        sizes = self.waves if isinstance(self.waves, tuple) else int(kept.num_waves)
        return plan_waves(self.placement, sizes)

    def _run(self, call: BackwardCall) -> None:
        """The call, wave by wave. Tokens that are dispatched again come with the gradients: nothing precedes them."""
        again = self.saved == "dispatch-again"
        if not self.overlap:
            call.dispatch(0)
            call.arrive(0)
            call.recompute(0)
            call.data(0)
            call.weights(0)
            call.combine(0)
            return
        for wave in range(LOOKAHEAD):
            call.dispatch(wave)
        for step in schedule_backward(self._load(call)):
            if step.work == RECOMPUTE and not again:
                call.recompute(step.wave)
            elif step.work == DATA:
                call.dispatch(step.wave + LOOKAHEAD)
                call.arrive(step.wave)
                if again:
                    call.recompute(step.wave)
                call.data(step.wave)
                call.combine(step.wave)
            elif step.work == WEIGHTS:
                call.weights(step.wave)

    def _load(self, call: BackwardCall) -> BackwardLoad:
        """What the schedule needs to know, in units of one row of the forward: two thirds of it are Linear-1's."""
        rows, dispatch, combine = call.sizes()
        links, row_s = self.group.links, self.tuner.row_s
        byte = 8 / 3 * sum(rows) / max(sum(dispatch) + sum(combine), 1)  # where the link takes as long as compute
        if links and row_s:
            byte = 1 / links[0] / row_s
        linear1 = {"tokens": (2 / 3, 0.0), "activations": (0.0, 0.0), "dispatch-again": (0.0, 2 / 3)}[self.saved]
        return BackwardLoad(
            recompute=[linear1[0] * each for each in rows],
            data=[(1 + linear1[1]) * each for each in rows],
            weights=rows,
            dispatch=[byte * each for each in dispatch],
            combine=[byte * each for each in combine],
        )


_living: WeakSet[TrainableMoE] = WeakSet()


def living_layers() -> tuple[TrainableMoE, ...]:
    """All layers of this process that have not been let go of."""
    return tuple(_living)
