"""Node-limited dispatch: a token goes once to each other host, the bits stay, and a lost rank is named all the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.launch.bench.bench import BenchRequest, bench_rank
from megamoe.launch.lab.namespaces import INTERFACE, lab, sent_bytes
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel import symmetric
from megamoe.parallel.errors import CallRefusedError, PeerError
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.recorder import Recording
from megamoe.parallel.transport import host
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label
from megamoe.parallel.workspace import Workspace
from megamoe.routing.landing import land
from megamoe.routing.messages import Messages, count_rows
from megamoe.routing.permutation import route_rows
from megamoe.routing.row_plan import RankRows, plan_rows
from megamoe.routing.waves import WavePlan, plan_waves
from megamoe.routing.wire import Wire
from megamoe.schedule.machine import Run
from megamoe.schedule.schedule import Step
from megamoe.shape import MoEShape
from tests.cases import Batch, make_batch, make_layer, oracle, split
from tests.protocol_hosts import FAULTS, Case, search, walk
from tests.several_hosts import hosts, nodes_of
from tests.test_lab import needs_lab

shares = pytest.mark.skipif(not symmetric.available(), reason="ranks share memory on Linux and x86-64")
SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
TOKENS = 61
WIRE = Wire("bf16", 16, False)  # four records in a row


# ---- where tokens land, and what is fetched from there ----


@pytest.mark.parametrize("waves", [1, 2, 5, (1, 3, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (1, 3), (3, 2), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("num_experts", [4, 7, 10, 24])
def test_a_token_lands_in_the_first_wave_in_which_any_rank_of_the_host_needs_it(
    num_experts: int, sizes: tuple[int, ...], waves: int | tuple[int, ...]
) -> None:
    nodes = nodes_of(sizes)
    placement = Placement(num_experts, len(nodes))
    plan, rank_of = plan_waves(placement, waves), placement.ranks()
    wave_of = [w for r in range(len(nodes)) for w in range(plan.num_waves) for _ in plan.experts(r, w)]
    ids = torch.randint(-1, num_experts, (40, 4), generator=torch.Generator().manual_seed(num_experts))
    for sender in range(len(nodes)):
        found, counts = land(ids, placement, nodes, sender), [0] * num_experts
        for token, experts in enumerate(ids.tolist()):
            for column in range(len(nodes)):
                here = [e for e in experts if e >= 0 and int(found.columns[rank_of[e]]) == column]
                rank = int(found.ranks[token, column])
                assert (rank >= 0) == bool(here)
                if here:
                    first = [e for e in here if rank_of[e] == rank]
                    assert min(wave_of[e] for e in first) == min(wave_of[e] for e in here)
                    counts[min(first)] += 1  # of one rank the lowest is the first
        assert found.counts.tolist() == counts
        own = [rank for rank, node in enumerate(nodes) if node == nodes[sender]]
        assert [int(found.columns[rank]) for rank in own] == own


def test_tokens_of_the_docstring() -> None:
    found = land(torch.tensor([[0, 1], [3, 2]]), Placement(4, 4), (0, 0, 2, 2), 0)
    assert found.ranks.tolist() == [[0, 1, -1, -1], [-1, -1, 2, -1]]
    assert found.counts.tolist() == [1, 1, 1, 0]
    wild = land(torch.tensor([[0, 1], [5, 2], [-9, 10**9]]), Placement(4, 4), (0, 0, 2, 2), 0)
    assert wild.ranks.tolist() == [*found.ranks.tolist(), [-1, -1, 3, -1]], "ids that there are not are refused later"


@pytest.mark.parametrize("waves", [1, 2, 4, (1, 3, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (1, 3), (3, 2), (1, 1, 2), (4, 4)], ids=str)
def test_every_row_finds_its_token_and_no_token_goes_to_a_host_twice(
    sizes: tuple[int, ...], waves: int | tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megamoe.routing.messages.LEAST_SAVED_BYTES", 1)
    sweep = ((12, 4, 0), (9, 3, 1), (24, 8, 2))
    fetched = [check_inboxes(num_experts, topk, nodes_of(sizes), waves, seed) for num_experts, topk, seed in sweep]
    assert any(fetched)


def check_inboxes(num_experts: int, topk: int, nodes: tuple[int, ...], waves: int | tuple[int, ...], seed: int) -> bool:
    """All ranks' inboxes, filled by messages and then by what is fetched, row by row, wave by wave: is anything?"""
    size, rng = len(nodes), torch.Generator().manual_seed(seed)
    plan = plan_waves(Placement(num_experts, size), waves)
    ids = [torch.randint(-1, num_experts, (3 * rank + 9, topk), generator=rng) for rank in range(size)]
    ids[1] = torch.zeros_like(ids[1])  # all on one expert, many times
    counts, firsts = torch.stack([count_rows(each, plan.placement) for each in ids], 1)
    landings = [land(each, plan.placement, nodes, rank) for rank, each in enumerate(ids)]
    tokens = [len(each) for each in ids]
    messages = Messages.of(plan, WIRE, tokens, counts, firsts, torch.stack([each.counts for each in landings]))
    routes = [
        route_rows(each, torch.rand(each.shape), plan, r, int(counts[r].sum()), messages, Workspace(), landings[r])
        for r, each in enumerate(ids)
    ]
    inboxes: list[dict[int, tuple[int, int]]] = [{t: (r, t) for t in range(len(ids[r]))} for r in range(size)]
    sent, asked = [0] * size, [0] * size
    words = WIRE.row_bytes // WIRE.PAIR_BYTES
    for wave in range(plan.num_waves):
        wanted = []
        for sender, route in enumerate(routes):
            for receiver in range(size):
                unique, fetched, pairs = (
                    int(each[sender, wave, receiver]) for each in (messages.unique, messages.fetched, messages.pairs)
                )
                assert int(messages.heads[sender, wave, receiver]) * words >= pairs + fetched
                at = int(messages.starts[receiver, wave, sender] + messages.heads[sender, wave, receiver])
                for token in route.unique[sent[sender] : sent[sender] + unique].tolist():
                    assert at not in inboxes[receiver]
                    inboxes[receiver][at] = (sender, token)
                    at += 1
                sent[sender] += unique
                at = int(messages.fetch_starts[receiver, wave, sender])
                for lander, row in route.fetches[asked[sender] : asked[sender] + fetched].tolist():
                    wanted.append((receiver, at, lander, row))
                    at += 1
                asked[sender] += fetched
        for receiver, at, lander, row in wanted:  # all that has landed by this wave is there
            assert nodes[lander] == nodes[receiver]
            assert lander != receiver
            assert at not in inboxes[receiver]
            inboxes[receiver][at] = inboxes[lander][row]
        for sender, route in enumerate(routes):
            begin = int(messages.pairs[sender, :wave].sum())
            for receiver, pairs in enumerate(messages.pairs[sender, wave].tolist()):
                for index in range(begin, begin + pairs):
                    assert inboxes[receiver][int(route.token_rows[index])] == (sender, int(route.tokens[index]))
                begin += pairs
    for sender, route in enumerate(routes):
        assert (sent[sender], asked[sender]) == (len(route.unique), len(route.fetches))
        for node in set(nodes) - {nodes[sender]}:
            members = [rank for rank in range(size) if nodes[rank] == node]
            crossing = int(messages.unique[sender][:, members].sum())
            needed = {
                t
                for t, each in enumerate(ids[sender].tolist())
                for e in each
                if e >= 0 and plan.placement.ranks()[e] in members
            }
            assert crossing == len(needed)
    for rank in range(size):
        assert sorted(inboxes[rank]) == rows_of(messages, rank, tokens[rank])
        check_slices(plan, rank, counts, messages, tokens[rank])
    return messages.node_limited


def rows_of(messages: Messages, rank: int, tokens: int) -> list[int]:
    """All rows of a rank's inbox but those of records."""
    rows = list(range(tokens))
    for wave in range(messages.unique.shape[1]):
        for sender in range(len(messages.own)):
            at = int(messages.starts[rank, wave, sender] + messages.heads[sender, wave, rank])
            rows += range(at, at + int(messages.unique[sender, wave, rank]))
        for sender in range(len(messages.own)):
            at = int(messages.fetch_starts[rank, wave, sender])
            rows += range(at, at + int(messages.fetched[sender, wave, rank]))
    assert len(rows) == len(set(rows))
    return rows


def check_slices(plan: WavePlan, rank: int, counts: Tensor, messages: Messages, tokens: int) -> None:
    steps = [Step(wave, plan.experts(rank, wave), True) for wave in range(plan.num_waves)]
    rows = RankRows.of(counts.numpy(), rank, plan.placement.experts(rank))
    found = plan_rows(plan, rank, steps, rows, messages, WIRE, tokens)
    end = found.own.stop
    for wave in range(plan.num_waves):
        assert found.incoming(wave).start == end
        assert found.arriving[wave].stop == found.fetching[wave].start
        end = found.incoming(wave).stop
        assert found.fetching[wave].stop - found.fetching[wave].start == int(messages.fetched[:, wave, rank].sum())
    assert end == found.num_rows
    assert int(found.inbox_starts[rank]) == found.own.start


# ---- layers on ranks that take themselves for several hosts ----


@dataclass
class Outcome:
    outputs: list[Tensor]
    fetched: int
    far_bytes: int
    recording: Recording | None = None


BATCHES = ("plain", "empty rank", "one expert", "all masked", "one token", "no token")


def batch_of(kind: str) -> Batch:
    batch = make_batch(SHAPE, {"one token": 1, "no token": 0}.get(kind, TOKENS))
    if kind == "one expert":
        batch.ids.fill_(9)
    if kind == "all masked":
        batch.ids.fill_(-1)
    return batch


def calls(group: EPGroup, sizes: tuple[int, ...], formats: tuple[str, str], node_limited: bool) -> Outcome:
    """Every kind of batch, with one wave and with three, by two layers in turn on the same buffers."""
    mine = EPGroup.of(dist.group.WORLD, node_limited=node_limited)
    weight_format, dispatch_format = formats
    made = {"weight_format": weight_format, "dispatch_format": dispatch_format}
    layers = [make_layer(SHAPE, mine, waves=waves, name=f"waves{waves}", **made) for waves in (1, 3)]
    outcome = Outcome([], 0, 0)
    with hosts(group, sizes):
        for kind in BATCHES:
            batch = batch_of(kind)
            part = batch.part(split(len(batch.ids), mine.size, empty=1 if kind == "empty rank" else None)[mine.rank])
            for layer in layers:
                outcome.outputs.append(layer(part.hidden, part.ids, part.weights))
                outcome.fetched += layer.last_call.tokens_fetched
                outcome.far_bytes += layer.last_call.far_bytes
    return outcome


def is_right(found: list[Outcome], formats: tuple[str, str]) -> bool:
    expected = [oracle(SHAPE, batch_of(kind), *formats) for kind in BATCHES for _ in range(2)]
    got = [torch.cat(parts) for parts in zip(*(each.outputs for each in found), strict=True)]
    return all(torch.equal(*each) for each in zip(got, expected, strict=True))


@shares
@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (1, 3)], ids=str)
def test_the_bits_are_the_oracles_and_fewer_bytes_leave_a_host(ranks: LocalRanks, sizes: tuple[int, ...]) -> None:
    size, formats = sum(sizes), ("mxfp4", "mxfp8")
    limited, plain = (ranks.run(calls, sizes, formats, each, size=size) for each in (True, False))
    assert is_right(limited, formats)
    assert is_right(plain, formats)
    alone = [rank for rank, node in enumerate(nodes_of(sizes)) if nodes_of(sizes).count(node) == 1]
    assert sum(each.fetched for each in limited)
    assert not any(limited[rank].fetched for rank in alone)
    assert not any(each.fetched for each in plain)
    assert sum(each.far_bytes for each in limited) < sum(each.far_bytes for each in plain)


@shares
def test_a_wire_that_the_experts_read_in_place(ranks: LocalRanks) -> None:
    formats = ("bf16", "bf16")
    found = ranks.run(calls, (2, 2), formats, True)
    assert is_right(found, formats)
    assert sum(each.fetched for each in found)


def recorded(group: EPGroup) -> Outcome:
    with hosts(group, (2, 2)):
        batch = make_batch(SHAPE, TOKENS).part(split(TOKENS, 4)[group.rank])
        layer = make_layer(SHAPE, group, waves=3)
        outputs = [layer(batch.hidden, batch.ids, batch.weights)]
        recording = Recording(group.rank, group.host)
        with group.record(recording):
            outputs.append(layer(batch.hidden, batch.ids, batch.weights))
    return Outcome(outputs, layer.last_call.tokens_fetched, layer.last_call.far_bytes, recording)


@shares
def test_a_recorded_call_has_the_same_bits_and_notes_what_came_through_sockets(ranks: LocalRanks) -> None:
    found = ranks.run(recorded)
    expected = oracle(SHAPE, make_batch(SHAPE, TOKENS), "mxfp4", "mxfp8")
    for number in range(2):
        assert torch.equal(torch.cat([each.outputs[number] for each in found]), expected)
    noted = 0
    for rank, each in enumerate(found):
        assert each.recording is not None
        flights = each.recording.flights
        assert {flight.lane for flight in flights} == {"dispatch", "combine"}
        assert all(flight.arrived_ns and flight.sent_ns for flight in flights if any(flight.received))
        noted += sum(f.received[p] * f.row_bytes for f in flights for p in range(4) if p // 2 != rank // 2)
    assert noted == sum(each.far_bytes for each in found)


def saves_little(group: EPGroup) -> tuple[int, Tensor]:
    batch = make_batch(SHAPE, TOKENS).part(split(TOKENS, 4)[group.rank])
    with hosts(group, (2, 2)), pytest.MonkeyPatch.context() as patch:
        patch.setattr("megamoe.routing.messages.LEAST_SAVED_BYTES", 16 * 1024)
        layer = make_layer(SHAPE, group)
        out = layer(batch.hidden, batch.ids, batch.weights)
    return layer.last_call.tokens_fetched, out


@shares
def test_where_little_is_saved_every_rank_gets_its_own_tokens(ranks: LocalRanks) -> None:
    found = ranks.run(saves_little)
    assert [fetched for fetched, _ in found] == [0] * 4
    assert torch.equal(torch.cat([out for _, out in found]), oracle(SHAPE, make_batch(SHAPE, TOKENS), "mxfp4", "mxfp8"))


def disagrees(group: EPGroup) -> str:
    mine = EPGroup.of(dist.group.WORLD, node_limited=group.rank != 1)
    batch = make_batch(SHAPE, 5)
    with hosts(group, (2, 1)):
        layer = make_layer(SHAPE, mine)
        with pytest.raises(CallRefusedError) as refused:
            layer(batch.hidden, batch.ids, batch.weights)
    return str(refused.value)


@shares
def test_ranks_that_disagree_are_refused_by_name(ranks: LocalRanks) -> None:
    for said in ranks.run(disagrees, size=3):
        assert "node_limited is True on ranks 0, 2, False on rank 1" in said


def wrong_ids(group: EPGroup) -> tuple[str, Tensor]:
    batch = make_batch(SHAPE, 6)
    bad = batch.ids.clone()
    bad[0, 0] = 99
    with hosts(group, (2, 1)):
        layer = make_layer(SHAPE, group)
        layer(batch.hidden, batch.ids, batch.weights)
        with pytest.raises(ValueError, match="99") as refused:
            layer(batch.hidden, bad if group.rank == 1 else batch.ids, batch.weights)
        return str(refused.value), layer(batch.hidden, batch.ids, batch.weights)


@shares
def test_a_wrong_call_is_refused_by_all_and_the_next_one_is_right(ranks: LocalRanks) -> None:
    expected = oracle(SHAPE, make_batch(SHAPE, 6), "mxfp4", "mxfp8")
    for _, out in ranks.run(wrong_ids, size=3):
        assert torch.equal(out, expected)


def more_waves_than_words(group: EPGroup) -> tuple[int, Tensor]:
    batch = make_batch(SHAPE, TOKENS).part(split(TOKENS, 4)[group.rank])
    with hosts(group, (2, 2)), pytest.MonkeyPatch.context() as patch:
        patch.setattr("megamoe.routing.messages.MAX_WAVES", 2)
        patch.setattr(host, "MAX_WAVES", 2)
        layer = make_layer(SHAPE, group, waves=3)
        out = layer(batch.hidden, batch.ids, batch.weights)
    return layer.last_call.tokens_fetched, out


@shares
def test_where_a_wave_has_no_word_every_rank_gets_its_own_tokens(ranks: LocalRanks) -> None:
    found = ranks.run(more_waves_than_words)
    assert [fetched for fetched, _ in found] == [0] * 4
    assert torch.equal(torch.cat([out for _, out in found]), oracle(SHAPE, make_batch(SHAPE, TOKENS), "mxfp4", "mxfp8"))


@pytest.mark.parametrize(
    ("votes", "nodes"),
    [
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], (0, 0, 2)),
        ([[0, 1, 0], [0, 0, 0], [0, 0, 0]], ()),  # rank 1 could not map rank 0's memory
        ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], ()),
        ([[0, 0], [0, 0]], ()),
        ([[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], ()),  # 1 and 2 share with 0 and not with one another
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], (0, 0, 2, 2)),
    ],
    ids=["two and one", "one way", "one host", "no host", "no clique", "two and two"],
)
def test_ranks_of_one_host_share_with_one_another_and_nobody_else(votes: list[list[int]], nodes: tuple[int]) -> None:
    assert host._nodes(torch.tensor(votes).bool()) == nodes


# ---- ranks of a lab that share hosts ----


def over_links(group: EPGroup) -> tuple[list[int], Outcome, list[int]]:
    """Calls in a lab, and what has left this rank's host meanwhile."""
    batch = make_batch(SHAPE, 8 * TOKENS).part(split(8 * TOKENS, group.size)[group.rank])
    layer, outcome, sent = make_layer(SHAPE, group, waves=2), Outcome([], 0, 0), []
    assert group.transport is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megamoe.routing.messages.LEAST_SAVED_BYTES", 1)
        for _ in range(3):
            outcome.outputs.append(layer(batch.hidden, batch.ids, batch.weights))
            outcome.fetched += layer.last_call.tokens_fetched
            outcome.far_bytes = layer.last_call.far_bytes
            group.transport.gather(torch.zeros(1, dtype=torch.uint8), Label("bench", "counts"))
            sent.append(sent_bytes(INTERFACE))
    return group.far, outcome, sent


@needs_lab
@shares
def test_in_the_lab_what_leaves_a_host_is_what_the_layer_counts_and_the_planner_says() -> None:
    sizes = {"tokens_per_rank": 256, "hidden": 512, "intermediate": 64, "num_experts": 8, "topk": 3}
    request = BenchRequest(ranks=4, link="1gbit", ranks_per_host=2, waves=1, repeats=1, **sizes)  # type: ignore[arg-type]
    with lab(4, "1gbit", ranks_per_host=2) as hosts, LocalRanks(4, threads_per_rank=1, hosts=hosts) as ranks:
        found = ranks.run(over_links)
        times = ranks.run(bench_rank, request)
    assert [far for far, *_ in found] == [[2, 3], [2, 3], [0, 1], [0, 1]]
    expected = oracle(SHAPE, make_batch(SHAPE, 8 * TOKENS), "mxfp4", "mxfp8")
    for parts in zip(*(outcome.outputs for _, outcome, _ in found), strict=True):
        assert torch.equal(torch.cat(parts), expected)
    for first in (0, 2):
        members = [outcome for _, outcome, _ in found[first : first + 2]]
        assert all(outcome.fetched for outcome in members)
        counted = sum(outcome.far_bytes for outcome in members)
        *_, before, after = found[first][2]
        assert counted < after - before < 1.2 * counted + 30_000  # headers, two exchanges of pages and heartbeats
    assert all(rank.identical for rank in times)
    runs = [Run.of({**asdict(request), "link_gb_s": 0.125, "node_limited": each}) for each in (True, False)]
    planned, to_each = (run.link_dispatch_bytes + run.link_combine_bytes for run in runs)
    assert sum(rank.far_bytes for rank in times) / 2 == pytest.approx(planned, rel=0.05)
    assert to_each > 1.08 * planned


def test_an_interface_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="there is no interface called 'nothing0'"):
        sent_bytes("nothing0")


# ---- what does not come ----


def lander_does_nothing(group: EPGroup) -> tuple[int, str]:
    """Rank 1 of host {0, 1} posts no receive for rank 2's message, and rank 0 waits for what should land there."""
    mine = EPGroup.of(dist.group.WORLD, deadline_s=0.3)
    assert isinstance(mine.transport, HostTransport)
    with hosts(group, (2, 1)):
        assert mine.nodes("moe") == (0, 0, 2)
    mine.transport.gather(torch.zeros(8, dtype=torch.uint8), Label("moe", "counts"))
    landings, said = mine.transport.landings("moe"), (-1, "")
    if group.rank == 0:
        with pytest.raises(PeerError) as late:
            landings.wait(0, 2, 1)
        said = late.value.rank, late.value.reason
    assert group.transport is not None
    group.transport.gather(torch.zeros(8, dtype=torch.uint8), Label("moe", "counts"))  # nobody leaves before
    return said


@shares
def test_a_rank_at_which_nothing_lands_is_named_at_the_deadline(ranks: LocalRanks) -> None:
    (rank, reason), *_ = ranks.run(lander_does_nothing, size=3)
    assert (rank, reason) == (1, "rank 2's rows did not come to it in time")


def raises_in_the_middle(group: EPGroup, victim: int) -> tuple[str, int | None]:
    batch = make_batch(SHAPE, TOKENS)
    with hosts(group, (2, 2)):
        layer = make_layer(SHAPE, group, waves=3)
        layer(batch.hidden, batch.ids, batch.weights)
        if group.rank == victim:
            layer.experts.linear1 = _raise  # type: ignore[method-assign, assignment]
        try:
            layer(batch.hidden, batch.ids, batch.weights)
        except PeerError as lost:
            return "PeerError", lost.rank
        except KeyError:
            return "KeyError", None
    return "", None


def _raise(*_: object) -> Tensor:
    raise KeyError("as planned")


@shares
@pytest.mark.parametrize("victim", [1, 2])
def test_a_rank_that_raises_is_named_on_its_host_and_on_the_other(ranks: LocalRanks, victim: int) -> None:
    found = ranks.run(raises_in_the_middle, victim)
    assert found == [("KeyError", None) if rank == victim else ("PeerError", victim) for rank in range(4)]


# ---- the protocol ----


@pytest.mark.parametrize("case", [Case((2, 1), 3), Case((2, 1), 1, waves=2)], ids=str)
def test_no_order_of_steps_reads_what_has_not_landed_or_stands_still(case: Case) -> None:
    found = search(case)
    assert found.wrong == ""
    assert found.states > 100


def test_no_order_that_is_drawn_for_two_hosts_of_two_does_either() -> None:
    found = walk(Case((2, 2), 3, waves=2), 30)
    assert found.wrong == ""
    assert found.states > 10_000


@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_finds_faults_that_are_put_in(fault: str) -> None:
    assert search(Case((2, 1), 2), fault).wrong
