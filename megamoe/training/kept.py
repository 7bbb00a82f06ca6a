"""What a forward call leaves for its backward: tensors alone, of sizes that do not depend on waves.

Nothing of it lies in the group's workspace, which other calls use in between. All of it is saved through autograd, so
that activation checkpointing drops it and makes it anew.
"""

# T tokens of this rank   P ranks   E experts in all   U tokens that came from other ranks   n rows this rank computes
# H hidden   I intermediate   B bytes of a row of the wire

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.execution.pipeline import Call
from megamoe.parallel.workspace import Workspace
from megamoe.routing.agreement import Agreement
from megamoe.routing.messages import Array, Messages
from megamoe.routing.row_plan import RankRows, RowPlan, plan_rows
from megamoe.routing.segments import Segments, exclusive_sum
from megamoe.routing.waves import WavePlan
from megamoe.routing.wire import read_records
from megamoe.schedule.schedule import Step
from megamoe.training.experts import Captured


@dataclass(frozen=True, slots=True)
class Kept:
    """agreed     [P, 1 + 2E] int64: tokens, rows for each expert and first tokens of every rank
    num_waves  [1] int64: waves of the forward
    rows       [T + U, B] uint8: each token once, this rank's own first; [0, B] where they are dispatched again
    sources    [n] int64: row of each computed row's token, rows by expert in the order of the global batch
    weights    [n] float32
    linear1    [n, 2I] bfloat16: Linear-1's results in the order of the forward's steps; [0, 2I] where recomputed
    places     [n] int64: row of linear1 of each row; [0] where they are recomputed
    """

    agreed: Tensor
    num_waves: Tensor
    rows: Tensor
    sources: Tensor
    weights: Tensor
    linear1: Tensor
    places: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.agreed, self.num_waves, self.rows, self.sources, self.weights, self.linear1, self.places

    def agreement(self) -> Agreement:
        size = (self.agreed.shape[1] - 1) // 2
        tokens, counts, firsts = self.agreed.tensor_split((1, 1 + size), 1)
        return Agreement(tokens.flatten().tolist(), counts.contiguous(), firsts.contiguous(), 0.0)


def keep(call: Call, workspace: Workspace, num_tokens: int, saved: str, captured: Captured | None) -> Kept:
    """From a call that has just ended, while its rows are still in the workspace.

    captured: Linear-1's results, where they are kept
    """
    parts, rank, device = call.parts, call.parts.group.rank, call.destinations.device
    wire, messages, agreed = parts.wire, parts.messages, parts.agreed
    said = torch.cat((torch.tensor(agreed.tokens)[:, None], agreed.counts, agreed.firsts), 1)
    num_waves = torch.tensor([parts.plan.num_waves])
    if saved == "dispatch-again":
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        rows = torch.empty(0, wire.row_bytes, dtype=torch.uint8, device=device)
        return Kept(said, num_waves, rows, nothing, nothing.to(torch.float32), *_no_rows(parts.experts, device))
    arrived = RankRows.of(agreed.counts.numpy(), rank, parts.experts.ids)
    row_plan = plan_rows(parts.plan, rank, whole_waves(parts.plan, rank), arrived, messages, wire, num_tokens)
    like = torch.empty(0, device=device)
    buffer = workspace.take("rows", (row_plan.num_rows, wire.row_bytes), like, torch.uint8)
    order = in_batch_order(arrived, rank)
    places = torch.from_numpy(row_plan.computed.expand()[0][order]).to(device)
    inbox_rows, weights = read_records(buffer.view(torch.int32).view(-1, 2).index_select(0, places))
    tokens = _token_rows(messages, rank, num_tokens).to(device)
    inbox = buffer[row_plan.own.start :]
    compact = torch.empty(len(inbox), dtype=torch.int64, device=device)
    compact[tokens] = torch.arange(len(tokens), device=device)
    linear1, found = _no_rows(parts.experts, device)
    if captured is not None:
        linear1, found = captured.rows, _places(call, row_plan, order)
    sources = compact[inbox_rows.to(torch.int64)]
    return Kept(said, num_waves, inbox.index_select(0, tokens), sources, weights, linear1, found)


def whole_waves(plan: WavePlan, rank: int) -> list[Step]:
    """Steps that are waves: what arrived and this rank's own rows together, so that experts are in order."""
    return [Step(wave, experts, True) for wave, experts in enumerate(plan.waves(rank))]


def in_batch_order(rows: RankRows, rank: int) -> Array:
    """[n] int64: rows by expert and source, this rank as its own last source, in the order of the global batch.

    One expert with rows [2, 0, 1] of ranks 0, 1, 2 of which this is rank 1, with 2 of its own:
    they lie as 0 0 2 1 1  ->  [0, 1, 3, 4, 2]
    """
    lengths = np.concatenate((rows.arriving, rows.own[None])).T  # [e, P + 1]
    starts = exclusive_sum(lengths.ravel()).reshape(lengths.shape)
    size = len(rows.arriving)
    columns = [size if source == rank else source for source in range(size)]
    return Segments(lengths[:, columns].ravel(), starts[:, columns].ravel()).expand()


def _no_rows(experts: Experts, device: torch.device) -> tuple[Tensor, Tensor]:
    linear1 = torch.empty(0, experts.shape.linear1_rows, dtype=torch.bfloat16, device=device)
    return linear1, linear1.new_empty(0, dtype=torch.int64)


def _places(call: Call, row_plan: RowPlan, order: Array) -> Tensor:
    """[n] int64: which row of all steps each row by expert is, found by where the call wrote its result."""
    device = call.destinations.device
    step_rows = torch.empty(row_plan.num_results, dtype=torch.int64, device=device)
    step_rows[call.destinations] = torch.arange(len(order), device=device)
    return step_rows[torch.from_numpy(row_plan.computed.expand()[1][order]).to(device)]


def _token_rows(messages: Messages, rank: int, num_tokens: int) -> Tensor:
    """[T + U] int64: rows of the inbox that hold tokens."""
    firsts = (messages.starts[rank] + messages.heads[:, :, rank].T).ravel()  # by wave and sender
    lengths = messages.unique[:, :, rank].T.ravel()
    found = Segments(np.append(num_tokens, lengths), np.append(0, firsts)).expand()
    return torch.from_numpy(found)
