"""Orders of rows, their bytes on the wire and the sum of the slots, against loops over single rows."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from megamoe.execution.ops import reduce_slots
from megamoe.formats import quantize_mxfp8
from megamoe.kernels.cpu.library import using
from megamoe.kernels.cpu.paths import runnable
from megamoe.parallel.placement import Placement
from megamoe.parallel.workspace import Workspace
from megamoe.reference import round_mxfp8
from megamoe.routing.messages import Messages, count_rows
from megamoe.routing.permutation import Route, route_rows
from megamoe.routing.waves import WavePlan, plan_waves
from megamoe.routing.wire import Wire, pair_records, read_records

CPU = torch.device("cpu")


@pytest.fixture(params=[None, *runnable()[:1]], ids=["torch", "kernels"][: 1 + len(runnable())], autouse=True)
def by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways in which a CPU does all of this."""
    with using(request.param):
        yield


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed) % 2**31)


# ---- route_rows ----


def route(ids: Tensor, weights: Tensor, plan: WavePlan, rank: int) -> Route:
    return routed(ids, weights, plan, rank)[0]


WIRE = Wire("bf16", 32, False)


def routed(ids: Tensor, weights: Tensor, plan: WavePlan, rank: int) -> tuple[Route, Messages]:
    """The route where all ranks bring the same ids."""
    counts, firsts = count_rows(ids, plan.placement)
    size = plan.placement.ep_size
    messages = Messages.of(plan, WIRE, [len(ids)] * size, counts.expand(size, -1), firsts.expand(size, -1))
    return route_rows(ids, weights, plan, rank, int(counts.sum()), messages, Workspace()), messages


def check_route(ids: Tensor, weights: Tensor, plan: WavePlan, rank: int) -> None:
    """Every field of the route against a sort of (wave, rank, expert, slot) tuples."""
    got = route(ids, weights, plan, rank)
    homes = {
        e: (w, r) for r in range(plan.placement.ep_size) for w in range(plan.num_waves) for e in plan.experts(r, w)
    }
    leaving: list[tuple[int, ...]] = []
    staying: list[tuple[int, ...]] = []
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                wave, home = homes[expert]
                rows = staying if home == rank else leaving
                rows.append((0 if home == rank else wave, home, expert, token, slot))
    rows = sorted(leaving) + sorted(staying)

    assert got.num_rows == len(rows)
    assert got.tokens.tolist() == [token for *_, token, _ in rows]
    assert got.weights.tolist() == [float(weights[token, slot]) for *_, token, slot in rows]
    positions = torch.full(ids.shape, len(rows))
    for index, (*_, token, slot) in enumerate(rows):
        positions[token, slot] = index
    assert got.positions.tolist() == positions.tolist()

    own_tokens = [token for *_, token, _ in sorted(staying)]
    assert got.token_rows.tolist()[len(leaving) :] == own_tokens, "the inbox begins with this rank's own tokens"


def test_route_of_the_docstring() -> None:
    ids = torch.tensor([[2, 0], [3, 2], [1, -1]])
    weights = torch.arange(6, dtype=torch.float32).view(3, 2)
    got = route(ids, weights, plan_waves(Placement(4, 2), 1), 0)
    assert got.tokens.tolist() == [0, 1, 1, 0, 2]
    assert got.positions.tolist() == [[0, 3], [2, 1], [4, 5]]
    assert got.weights.tolist() == [0, 3, 2, 1, 4]


@pytest.mark.parametrize("waves", [1, 2, 3, 7, (1, 3, 2)], ids=str)
@pytest.mark.parametrize(("num_experts", "ep_size"), [(1, 1), (4, 2), (10, 3), (10, 4), (7, 7), (2, 5)])
def test_routes_are_those_of_a_sort_of_single_rows(
    num_experts: int, ep_size: int, waves: int | tuple[int, ...]
) -> None:
    plan = plan_waves(Placement(num_experts, ep_size), waves)
    for num_tokens, topk in ((0, 2), (1, 1), (13, 3), (40, 4)):
        rng = generator(num_experts, ep_size, num_tokens)
        # masked slots, the same expert twice in a row, and the last expert empty where there are several
        ids = torch.randint(-1, max(1, num_experts - 1), (num_tokens, topk), generator=rng)
        weights = torch.rand(num_tokens, topk, generator=rng)
        for rank in range(ep_size):
            check_route(ids, weights, plan, rank)


@pytest.mark.parametrize("expert", [-1, 0, 3, 9], ids=["all_masked", "first", "own_of_rank_1", "last"])
def test_routes_hold_when_every_slot_has_the_same_expert(expert: int) -> None:
    plan = plan_waves(Placement(10, 4), 2)
    for rank in range(4):
        check_route(torch.full((5, 3), expert), torch.rand(5, 3, generator=generator(expert)), plan, rank)


# ---- the wire ----


def encode(wire: Wire, tokens: Tensor) -> Tensor:
    return wire.encode(tokens, torch.empty(len(tokens), wire.row_bytes, dtype=torch.uint8))


def decode(wire: Wire, rows: Tensor) -> Tensor:
    tokens = wire.decode(rows, torch.empty(len(rows), wire.hidden, dtype=torch.bfloat16))
    if wire.in_place:
        assert torch.equal(tokens.view(torch.int16), wire.tokens(rows).view(torch.int16))
    return tokens


def make_tokens(num_tokens: int, hidden: int) -> Tensor:
    rng = generator(num_tokens, hidden)
    tokens = (
        torch.randn(num_tokens, hidden, generator=rng) * torch.randint(0, 12, (num_tokens, 1), generator=rng).exp2()
    )
    tokens.flatten()[:1] = -0.0
    return tokens.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("hidden", "mxfp8", "bf16"), [(32, 48, 64), (96, 112, 192), (2880, 2976, 5760), (4096, 4224, 8192)]
)
def test_a_row_has_the_bytes_of_its_token_and_its_scales_filled_up_to_sixteen(
    hidden: int, mxfp8: int, bf16: int
) -> None:
    assert Wire("mxfp8", hidden, False).row_bytes == -(-(hidden + hidden // 32) // 16) * 16 == mxfp8
    assert Wire("bf16", hidden, True).row_bytes == 2 * hidden == bf16
    assert Wire("bf16", 33, False).row_bytes == 80


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("hidden", [32, 64, 96, 128, 160])
def test_an_mxfp8_wire_gives_tokens_rounded_to_mxfp8(hidden: int, num_tokens: int) -> None:
    tokens = make_tokens(num_tokens, hidden)
    for round_on_arrival in (False, True):
        wire = Wire("mxfp8", hidden, round_on_arrival)
        got = decode(wire, encode(wire, tokens))
        assert torch.equal(got.view(torch.int16), round_mxfp8(tokens).view(torch.int16))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("hidden", [32, 33, 96, 160])
def test_a_bf16_wire_gives_tokens_as_they_were_or_rounded_on_arrival(hidden: int, num_tokens: int) -> None:
    tokens = make_tokens(num_tokens, hidden)
    plain, rounding = Wire("bf16", hidden, False), Wire("bf16", hidden, True)
    assert torch.equal(decode(plain, encode(plain, tokens)).view(torch.int16), tokens.view(torch.int16))
    if hidden % 32:
        return
    rounded = decode(rounding, encode(rounding, tokens))
    assert torch.equal(rounded.view(torch.int16), round_mxfp8(tokens).view(torch.int16))


@pytest.mark.parametrize("dispatch_format", ["mxfp8", "bf16"])
def test_some_rows_of_many_decode_to_the_same(dispatch_format: str) -> None:
    wire = Wire(dispatch_format, 96, True)
    rows = encode(wire, make_tokens(9, 96))
    everything = decode(wire, rows)
    for part in (slice(3, 4), slice(2, 7), slice(1, 9, 2), slice(5, 5)):
        assert torch.equal(decode(wire, rows[part]), everything[part])


def test_bytes_stand_where_the_module_docstring_says() -> None:
    tokens = make_tokens(3, 64)
    wire = Wire("mxfp8", 64, False)
    rows, quantized = encode(wire, tokens), quantize_mxfp8(tokens)
    assert torch.equal(rows[:, :64], quantized.values.view(torch.uint8))
    assert torch.equal(rows[:, 64:66], quantized.scales)
    records = pair_records(torch.tensor([7, 1 << 20], dtype=torch.int32), torch.tensor([0.5, -2.0]))
    assert records.numpy().tobytes() == struct.pack("<ifif", 7, 0.5, 1 << 20, -2.0)


def test_pair_records_read_back_with_every_bit() -> None:
    weights = torch.tensor([[-0.0, 1], [float("inf"), 1], [1e-45, 1], [-3.5, 1], [float("nan"), 1]])[:, 0].contiguous()
    rows = torch.tensor([0, 2**31 - 1, 5, 5, 1], dtype=torch.int32)
    got_rows, got_weights = read_records(pair_records(rows, weights))
    assert torch.equal(got_rows, rows)
    assert torch.equal(got_weights.view(torch.int32), weights.view(torch.int32))
    assert [len(part) for part in read_records(pair_records(rows[:0], weights[:0]))] == [0, 0]


# ---- messages: every token to every rank once ----


def check_messages(shape: tuple[int, int, int], waves: int, seed: int) -> None:
    """All ranks fill the inboxes of all others; every row must then find its own token and weight there."""
    num_experts, size, topk = shape
    plan, rng = plan_waves(Placement(num_experts, size), waves), generator(num_experts, size, topk, waves, seed)
    ids = [torch.randint(-1, num_experts, (3 * rank, topk), generator=rng) for rank in range(size)]
    weights = [torch.rand(len(each), topk, generator=rng) for each in ids]
    both = [count_rows(each, plan.placement) for each in ids]
    counts, firsts = torch.stack([pairs for pairs, _ in both]), torch.stack([first for _, first in both])
    messages = Messages.of(plan, WIRE, [len(each) for each in ids], counts, firsts)
    routes = [route_rows(ids[r], weights[r], plan, r, int(counts[r].sum()), messages, Workspace()) for r in range(size)]
    inboxes = [[(r, t) for t in range(len(ids[r]))] for r in range(size)]  # (rank, token) of each row, own ones first
    sent = [0] * size
    for wave in range(plan.num_waves):
        for receiver in range(size):
            for sender, route in enumerate(routes):
                assert messages.starts[receiver, wave, sender] == len(inboxes[receiver])
                inboxes[receiver] += [(-1, -1)] * int(messages.heads[sender, wave, receiver])
                before = sum(int(messages.unique[sender, wave, r]) for r in range(receiver))
                begin = sent[sender] + before
                unique = route.unique[begin : begin + int(messages.unique[sender, wave, receiver])].tolist()
                inboxes[receiver] += [(sender, token) for token in unique]
        for sender in range(size):
            sent[sender] += int(messages.unique[sender, wave].sum())
            route, begin = routes[sender], int(messages.pairs[sender, :wave].sum())
            for receiver, pairs in enumerate(messages.pairs[sender, wave].tolist()):
                for row in range(begin, begin + pairs):  # what they point to has come by now
                    assert inboxes[receiver][int(route.token_rows[row])] == (sender, int(route.tokens[row]))
                begin += pairs
    for receiver, inbox in enumerate(inboxes):
        assert len(inbox) == len(ids[receiver]) + sum(sum(messages.incoming(receiver, w)) for w in range(waves))
        came = [row for row in inbox if row[0] >= 0]
        assert len(came) == len(set(came)), "a token came twice"
    for sender, route in enumerate(routes):
        assert sent[sender] == len(route.unique)


@pytest.mark.parametrize("waves", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 1, 2), (6, 2, 3), (7, 3, 5), (2, 3, 2), (9, 4, 1), (12, 5, 8)], ids=str)
def test_every_token_is_sent_to_a_rank_once_and_every_row_finds_it(shape: tuple[int, int, int], waves: int) -> None:
    for seed in range(4):
        check_messages(shape, waves, seed)


def test_rows_and_firsts_of_the_docstring() -> None:
    counts, firsts = count_rows(torch.tensor([[1, 0], [2, 0], [3, -1]]), Placement(4, 2))
    assert (counts.tolist(), firsts.tolist()) == ([2, 1, 1, 1], [2, 0, 1, 1])
    counts, firsts = count_rows(torch.tensor([[2, 2, 3], [-1, -1, -1]]), Placement(4, 2))
    assert (counts.tolist(), firsts.tolist()) == ([0, 0, 2, 1], [0, 0, 1, 0])


def test_a_route_sends_what_its_docstring_says() -> None:
    ids = torch.tensor([[2, 0], [3, 2], [1, -1]])
    got, messages = routed(ids, torch.ones(3, 2), plan_waves(Placement(4, 2), 1), 0)
    begin = int(messages.starts[1, 0, 0] + messages.heads[0, 0, 1])
    assert got.unique.tolist() == [0, 1]
    assert got.token_rows.tolist() == [begin, begin + 1, begin + 1, 0, 2]


# ---- reduce_slots ----


def sum_ascending(rows: Tensor, positions: Tensor) -> Tensor:
    """Slot by slot in numpy's float32, one token and one value at a time"""
    out = torch.empty(len(positions), rows.shape[1])
    for token, row in enumerate(positions.tolist()):
        for column in range(rows.shape[1]):
            total = np.float32(0.0)
            for place in row:
                total = np.float32(total + np.float32(float(rows[place, column])))
            out[token, column] = float(total)
    return out.to(torch.bfloat16)


def one_token(*slots: float) -> float:
    """The sum of one token's slots"""
    rows = torch.tensor([*slots, 0.0], dtype=torch.bfloat16).unsqueeze(1)
    return float(reduce_slots(rows, torch.arange(len(slots)).unsqueeze(0)))


def test_slots_are_summed_in_ascending_order() -> None:
    assert one_token(2.0**30, -(2.0**30), 1) == 1  # descending: 0
    assert one_token(1, -(2.0**30), 2.0**30) == 0  # descending: 1


def test_slots_are_summed_in_float32_and_rounded_once() -> None:
    assert one_token(256, 1, 1) == 258  # BF16 would stay at 256
    assert one_token(2.0**24, 1, 1, -(2.0**24)) == 0  # FP64 would give 2
    assert one_token(256, 1) == 256  # one rounding, ties to even
    assert one_token(256, 3) == 260


def test_the_order_is_that_of_the_slots_not_of_the_rows() -> None:
    rows = torch.tensor([1.0, -(2.0**30), 2.0**30, 0.0], dtype=torch.bfloat16).unsqueeze(1)
    positions = torch.tensor([[2, 1, 0], [0, 1, 2], [1, 2, 0]])
    assert reduce_slots(rows, positions).flatten().tolist() == [1, 0, 1]


def test_a_sum_is_never_minus_zero() -> None:
    rows = torch.tensor([-0.0, -0.0, 0.0], dtype=torch.bfloat16).unsqueeze(1)
    for positions in ([[0, 1]], [[0, 2]], [[2, 0]], [[2, 2]]):
        got = reduce_slots(rows, torch.tensor(positions))
        assert got.eq(0).all()
        assert not got.signbit().any()


def test_a_masked_slot_changes_no_bit() -> None:
    rng = generator(1)
    rows = torch.randn(7, 40, generator=rng).to(torch.bfloat16)
    rows[-1] = 0
    rows[:, 0] = -0.0
    without = reduce_slots(rows, torch.tensor([[4, 2, 0]]))
    for masked in ([[6, 4, 2, 0]], [[4, 6, 2, 0]], [[4, 2, 0, 6]], [[6, 4, 6, 2, 6, 0, 6]]):
        assert torch.equal(reduce_slots(rows, torch.tensor(masked)).view(torch.int16), without.view(torch.int16))


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129, 300])
def test_sums_are_those_of_a_loop_over_single_values(num_tokens: int) -> None:
    rng = generator(num_tokens)
    num_rows = 3 * num_tokens
    # large values often cancel, and what FP32 lost of the small ones until then depends on the order
    rows = torch.randn(num_rows + 1, 5, generator=rng)
    large = rows.sign() * torch.randint(24, 27, rows.shape, generator=rng).exp2()
    rows = torch.where(rows.abs() > 0.5, large, rows).to(torch.bfloat16)
    rows[-1] = 0
    positions = torch.randint(0, num_rows + 1, (num_tokens, 6), generator=rng)
    got = reduce_slots(rows, positions)
    assert torch.equal(got.view(torch.int16), sum_ascending(rows, positions).view(torch.int16))
    if num_tokens > 100:  # the check can tell the orders apart
        assert not torch.equal(got, sum_ascending(rows, positions.flip(1)))


def test_a_token_without_slots_is_zero() -> None:
    assert reduce_slots(torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int64)).eq(0).all()
