"""Where rows lie and go: all ranks' buffers are filled, sent, computed and sent home row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megamoe.parallel.placement import Placement
from megamoe.parallel.workspace import Workspace
from megamoe.routing.messages import Messages, count_rows
from megamoe.routing.permutation import Route, route_rows
from megamoe.routing.row_plan import RankRows, RowPlan, plan_rows
from megamoe.routing.segments import Segments
from megamoe.routing.waves import WavePlan, plan_waves
from megamoe.routing.wire import Wire
from megamoe.schedule.schedule import Load, Step, schedule

WIRE = Wire("bf16", 16, False)  # four pair records in a row
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a call whose rows are numbers: row r of rank q is q * 10,000 + r, token t too."""

    route: Route
    plan: RowPlan
    steps: list[Step]
    records: Tensor
    tokens: Tensor
    results: Tensor
    experts: list[int]


def expanded(segments: Segments) -> list[list[int]]:
    """Each segment's numbers, one by one."""
    firsts = np.atleast_2d(segments.firsts).tolist()
    lengths = segments.lengths.tolist()
    return [[first + i for first, n in zip(row, lengths, strict=True) for i in range(n)] for row in firsts]


def call(plan: WavePlan, all_ids: list[Tensor], costs: tuple[float, float]) -> tuple[list[Rank], Messages]:
    """All ranks after packing, each with a schedule of its own."""
    both = torch.stack([count_rows(ids, plan.placement) for ids in all_ids], 1)
    counts, firsts = both[0], both[1]
    messages = Messages.of(plan, WIRE, [len(ids) for ids in all_ids], counts, firsts)
    return [packed(plan, rank, ids, counts, messages, costs) for rank, ids in enumerate(all_ids)], messages


def packed(
    plan: WavePlan, rank: int, ids: Tensor, counts: Tensor, messages: Messages, costs: tuple[float, float]
) -> Rank:
    num_rows = int(counts[rank].sum())
    route = route_rows(ids, torch.ones(ids.shape), plan, rank, num_rows, messages, Workspace())
    rows = RankRows.of(counts.numpy(), rank, plan.placement.experts(rank))
    arriving = messages.pairs[:, :, rank].sum(0).tolist()
    steps = schedule(plan.waves(rank), Load(rows.own.tolist(), arriving, *costs, decode_cost=0.0))
    row_plan = plan_rows(plan, rank, steps, rows, messages, WIRE, len(ids))
    experts = [0] * num_rows
    for token, positions in enumerate(route.positions.tolist()):
        for slot, row in enumerate(positions):
            if row < num_rows:
                experts[row] = int(ids[token, slot])
    tokens = torch.full((row_plan.num_rows,), NO_TOKEN)
    records = torch.full((row_plan.num_rows, WIRE.row_bytes // WIRE.PAIR_BYTES), NO_TOKEN)
    base = 10_000 * rank
    (at,) = expanded(row_plan.records)
    assert len(at) == len(set(at))
    records.view(-1)[at] = base + torch.arange(num_rows)
    tokens[row_plan.own] = base + torch.arange(len(ids))
    (at,) = expanded(row_plan.unique)
    assert (records[at] == NO_TOKEN).all(), "pair records and tokens lie apart"
    tokens[at] = base + route.unique
    wavewise = torch.full_like(tokens, NO_TOKEN)
    for wave in range(plan.num_waves):
        for unique, rows_of_message in row_plan.messages(wave):
            wavewise[rows_of_message] = base + route.unique[unique]
    assert torch.equal(wavewise[: row_plan.own.start], tokens[: row_plan.own.start]), "one message at a time"
    results = torch.full((row_plan.num_results,), NO_TOKEN)
    return Rank(route, row_plan, steps, records, tokens, results, experts)


def exchange(sizes: list[list[int]], parts: list[tuple[Tensor, Tensor]]) -> None:
    """Moves rows between ranks: sizes[sender][receiver], parts[rank] what it sends and what it receives."""
    moved = [torch.split(sent, row) for (sent, _), row in zip(parts, sizes, strict=True)]
    for receiver, (_, received) in enumerate(parts):
        received.copy_(torch.cat([pieces[receiver] for pieces in moved]))


def compute(ranks: list[Rank], number: int, plan: WavePlan) -> None:
    """Checks which rows each step of a rank computes, in which order, and writes them to their destinations."""
    rank = ranks[number]
    sources, destinations = expanded(rank.plan.computed)
    done: list[int] = []
    for step, work in zip(rank.steps, rank.plan.steps, strict=True):
        rows = rank.records.view(-1)[sources[work.rows]].tolist()
        here = [row for row in range(len(rank.experts)) if rank.experts[row] in step.local]
        expected = [(rank.experts[row], len(ranks), 10_000 * number + row) for row in here]
        if step.arrived:
            experts = plan.experts(number, step.wave)
            for sender, other in enumerate(ranks):
                leaving = [row for row, expert in enumerate(other.experts) if expert in experts and sender != number]
                expected += [(other.experts[row], sender, 10_000 * sender + row) for row in leaving]
        assert rows == [row for *_, row in sorted(expected)], "by expert, then source, then row"
        found = [expert for expert, count in zip(work.experts, work.counts.tolist(), strict=True) for _ in range(count)]
        assert found == [expert for expert, *_ in sorted(expected)]
        for row in rows:  # the token that each row reads is its own
            sender, index = divmod(row, 10_000)
            token = rank.tokens[rank.plan.own.start + int(ranks[sender].route.token_rows[index])]
            assert int(token) == 10_000 * sender + int(ranks[sender].route.tokens[index])
        rank.results[destinations[work.rows]] = torch.tensor(rows, dtype=torch.int64)
        done += rows
    assert len(done) == len(set(done)) == len(sources)


def check(shape: tuple[int, int, int], waves: int | tuple[int, ...], costs: tuple[float, float], seed: int) -> None:
    num_experts, size, topk = shape
    rng = torch.Generator().manual_seed(seed)
    plan = plan_waves(Placement(num_experts, size), waves)
    ids = [torch.randint(-1, num_experts, (5 * (rank + seed) % 17, topk), generator=rng) for rank in range(size)]
    ranks, messages = call(plan, ids, costs)
    for wave in range(plan.num_waves):
        sizes = [messages.rows(sender, wave) for sender in range(size)]
        for what in ("records", "tokens"):
            buffers = [getattr(rank, what) for rank in ranks]
            pairs = zip(buffers, ranks, strict=True)
            exchange(sizes, [(each[rank.plan.sent[wave]], each[rank.plan.arriving[wave]]) for each, rank in pairs])
    for number in range(size):
        compute(ranks, number, plan)
    for wave in range(plan.num_waves):
        sizes = messages.pairs[:, wave].T.tolist()
        slices = [(rank.plan.going_home[wave], rank.plan.coming_home[wave]) for rank in ranks]
        exchange(sizes, [(r.results[away], r.results[home]) for r, (away, home) in zip(ranks, slices, strict=True)])
    for number, rank in enumerate(ranks):
        slots = rank.results[rank.plan.reduced].tolist()
        assert slots == [10_000 * number + row for row in range(rank.route.num_rows)] + [NO_TOKEN], "then the zero row"


@pytest.mark.parametrize("costs", [(0.0, 0.0), (1.5, 0.7)], ids=["no_head", "head_and_tail"])
@pytest.mark.parametrize("waves", [1, 2, 5, (1, 3, 2)], ids=str)
@pytest.mark.parametrize("shape", [(4, 1, 2), (6, 2, 3), (7, 3, 5), (2, 3, 2), (9, 4, 1), (12, 5, 8)], ids=str)
def test_every_row_is_computed_once_from_its_token_and_comes_home(
    shape: tuple[int, int, int], waves: int | tuple[int, ...], costs: tuple[float, float]
) -> None:
    for seed in range(3):
        check(shape, waves, costs, seed)
