"""The rule, routing, the schedule and the layer's time: the paper's numbers, hand arithmetic, what must not happen."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.catalog import find_profile, load_hardware, load_model, load_profile
from megamoe.planner.layer.cost import LayerTime, dispatch_us, layer_time, row_us
from megamoe.planner.layer.device import Device, compute_format, norm
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.plan import PlanRequest, plan
from megamoe.planner.layer.routing import KINDS, RankLoad, Routing, _dealt, _expected, _replicated, _spread, busiest
from megamoe.planner.layer.rule import Rule, hides_tflops, threshold, tiers, transfer_us
from megamoe.planner.layer.stacks import STACKS, own_time, stack_time
from megamoe.planner.layer.staged import contiguous_us, low_latency, masked_us, normal, reached_by, staged_time
from megamoe.planner.layer.tiles import (
    Tiling,
    expert_tile_us,
    grouped_us,
    products_us,
    reached_tflops,
    tile_us,
    tiling_of,
)
from megamoe.schedule.formats import VALUE_BYTES, value_bytes
from megamoe.schedule.schedule import Work, play

PRO = Expert.of(load_model("deepseek-v4-pro"))


def device(name: str = "gb200") -> Device:
    hardware = load_hardware(name)
    return Device.of(hardware, find_profile(hardware))


GB200 = device()


# ---- the rule ----


def test_the_papers_numbers() -> None:
    assert threshold(3072) == 6144
    assert threshold(2048) == 4096
    assert round(hides_tflops(3072), 1) == 6.1
    assert hides_tflops(3072, gated=False) == 4.096


@pytest.mark.parametrize(("gb_s", "layer_us", "token_ms"), [(50.0, 120.96, 14.76), (900.0, 6.72, 0.82)])
def test_the_isca_figures(gb_s: float, layer_us: float, token_ms: float) -> None:
    ours = transfer_us(32 * 9 * 7000, "fp8", "bf16", gb_s)
    assert round(ours, 2) == layer_us
    assert round(ours * 2 * 61 / 1e3, 2) == token_ms


def test_formats_scales_and_locality_move_the_threshold() -> None:
    assert round(threshold(3072, "nvfp4", "bf16")) == 7193
    assert threshold(3072, "nvfp4", "nvfp4") == 16384
    assert threshold(3072, gated=False) == 4096
    assert threshold(3072, f_remote=0.5) == 12288
    assert threshold(3072, f_remote=0.0) == float("inf")
    with pytest.raises(ValueError, match="nearest are mxfp8"):
        value_bytes("mxfp9")


@pytest.mark.parametrize(
    ("hardware", "ep", "sentence"),
    [
        (
            "gb200",
            16,
            "HIDDEN  deepseek-v4-pro on gb200, EP16: 5556 <= 6144 FLOPs/Byte (margin 1.11); needs 814 GB/s, has 900",
        ),
        (
            "h800",
            8,
            "EXPOSED  deepseek-v4-pro on h800, EP8: 9895 > 6144 FLOPs/Byte (margin 0.62); needs 322 GB/s, has 200",
        ),
        (
            "h100",
            16,
            "EXPOSED  deepseek-v4-pro on h100, EP16: 39580 > 12288 FLOPs/Byte over the nic (margin 0.31); "
            "needs 161 GB/s, has 50",
        ),
        ("h100", 1, "HIDDEN  deepseek-v4-pro on h100, EP1: nothing leaves the device"),
    ],
    ids=["gb200", "h800", "h100-two-nodes", "one-rank"],
)
def test_verdicts(hardware: str, ep: int, sentence: str) -> None:
    found = load_hardware(hardware)
    assert plan(PlanRequest(load_model("deepseek-v4-pro"), found, find_profile(found), ep)).sentence == sentence


@pytest.mark.parametrize(
    ("hardware", "ratio", "hidden"),
    [
        ("h100", 4398, True), ("h200", 4398, True), ("h20", 658, True), ("b200", 5000, True), ("b300", 5000, True),
        ("gb300", 5556, True), ("rubin", 9722, False), ("mi300x", 5837, True), ("mi325x", 5837, True),
        ("mi355x", 9301, False), ("mi455x", 5556, True), ("ascend-950dt", 1094, True), ("tpu7x", 7690, False),
    ],
)  # fmt: skip
def test_hardware_against_the_v4_pro_threshold(hardware: str, ratio: int, hidden: bool) -> None:
    found = load_hardware(hardware)
    rule = plan(PlanRequest(load_model("deepseek-v4-pro"), found, find_profile(found), 8)).binding
    assert rule is not None
    assert (round(rule.ratio), rule.hidden) == (ratio, hidden)


def test_required_bandwidth_is_where_the_ratio_meets_the_threshold() -> None:
    rule = Rule("scale-up", 5000, 900, 1.0, 6144)
    assert replace(rule, gb_s=rule.required_gb_s).margin == pytest.approx(1.0)
    assert [replace(rule, tflops=each, gb_s=1000).hidden for each in (6144, 6145)] == [True, False]


def test_tiers() -> None:
    assert [(tier.name, tier.f_remote) for tier in tiers(16, 900, 72, 50)] == [("scale-up", 15 / 16)]
    assert [(tier.name, tier.f_remote) for tier in tiers(16, 450, 8, 50)] == [("scale-up", 7 / 16), ("nic", 0.5)]
    assert tiers(1, 450, 8, 50) == []
    assert [(tier.name, tier.f_remote) for tier in tiers(12, 450, 8, 50)] == [("scale-up", 5 / 12), ("nic", 0.5)]
    assert [(tier.name, tier.f_remote) for tier in tiers(13, 450, 8, 50)] == [("scale-up", 6 / 13), ("nic", 7 / 13)]
    assert [tier.name for tier in tiers(4, 450, 1, 50)] == ["nic"]
    with pytest.raises(ValueError, match=r"EP16 spans 2 scale-up domains of 8"):
        tiers(16, 450, 8, None)


# ---- routing ----


def test_balanced_routing_touches_only_as_many_experts_as_there_are_pairs() -> None:
    assert busiest("balanced", 384, 6, 4, 1) == ((RankLoad(((1.0, 6),)),),)
    assert busiest("balanced", 384, 6, 4, 1024) == ((RankLoad(((64.0, 96),)),),)
    assert busiest("balanced", 16, 4, 2, 0) == ((RankLoad(()),),)


@pytest.mark.parametrize("routing", ["uniform", "zipf_1.1", "power_law_1.01", "power_law_1.2", "power_law_sampled_1.9"])
@pytest.mark.parametrize("tokens", [1, 16, 512, 32768])
def test_the_busiest_rank_has_at_least_its_share_and_at_most_everything(routing: str, tokens: int) -> None:
    for ranks in busiest(routing, 64, 6, 8, tokens):
        assert 1 <= len(ranks) <= 2
        fullest = max(rank.rows for rank in ranks)
        assert tokens * 6 * 0.99 <= fullest <= tokens * 8 * 6
        assert all(rows <= tokens * 8 for rank in ranks for rows, _ in rank.groups), "a token chooses an expert once"


def test_skew_grows_with_ep_and_redundant_experts_take_it_away() -> None:
    shares = {ep: busiest("power_law_1.2", 384, 6, ep, 8192)[0][0].rows / 8192 / 6 for ep in (4, 8, 16, 32)}
    assert list(shares.values()) == sorted(shares.values())
    assert shares[32] == pytest.approx(5.33, abs=0.01)
    evened = busiest("power_law_1.2", 384, 6, 32, 8192, redundant=32)[0]
    assert max(rank.rows for rank in evened) < 1.2 * 8192 * 6 < shares[32] * 8192 * 6


def test_sampled_shares_reach_to_most_of_the_tokens() -> None:
    """Shares between 1 and 0.8 times the tokens, at least 512: the busiest rank's share, mean of ten draws.

    The published runs' own times imply 1.5, 1.95, 3.1 and 5.4 at thousands of tokens, between rows of known loads.
    """

    def share(ep: int, tokens: int) -> float:
        draws = busiest("power_law_sampled_1.9", 384, 6, ep, tokens)
        assert len(draws) == 10
        return sum(ranks[0].rows for ranks in draws) / 10 / tokens / 6

    assert [share(ep, 8192) for ep in (4, 8, 16, 32)] == pytest.approx([1.51, 1.97, 3.08, 5.30], rel=0.01)
    assert share(32, 20) < 4.6, "640 tokens: shares up to 512"


def test_the_largest_share_may_be_given() -> None:
    assert Routing.parse("power_law_sampled_1.9_1024") == Routing("power_law_sampled", 1.9, 1024.0)
    draws = busiest("power_law_sampled_1.9_1024", 384, 6, 32, 8192)
    assert sum(ranks[0].rows for ranks in draws) / 10 / 8192 / 6 == pytest.approx(4.39, rel=0.01)
    assert len(busiest("power_law_1.2", 384, 6, 32, 64, draws=5)) == 5
    assert busiest("power_law_1.2", 384, 6, 32, 64)[0][0].experts == 12


def test_copies_go_to_the_most_loaded_and_ranks_are_filled_evenly() -> None:
    ranks = _replicated([8, 1, 1, 2], 2, 2)
    assert sorted(sum(rank) for rank in ranks) == pytest.approx([5.667, 6.333], abs=1e-3)
    assert all(len(rank) == 3 for rank in ranks)


def test_fewer_pairs_than_experts_are_dealt_around_the_ranks() -> None:
    """8 ranks of a token, top-6, 384 experts: 48 pairs, nearly all shares round to 0, and no rank has many more."""
    (ranks,) = busiest("power_law_1.01", 384, 6, 8, 1)
    assert max(load.rows for load in ranks) <= 8
    assert sum(load.rows for load in ranks[:1]) >= 6


@given(
    shares=st.lists(st.floats(0.01, 100), min_size=4, max_size=40),
    tokens=st.integers(1, 500),
    topk=st.integers(1, 4),
    ep=st.integers(1, 4),
)
@settings(deadline=None)
def test_dealt_rows_are_whole_sum_to_the_pairs_and_stay_below_the_tokens(
    shares: list[float], tokens: int, topk: int, ep: int
) -> None:
    counts = _dealt(np.array(shares), tokens * topk, tokens, ep)
    assert sum(counts) == tokens * topk
    assert all(0 <= rows <= tokens and rows == int(rows) for rows in counts)


def test_rows_are_spread_as_if_one_by_one() -> None:
    rng = random.Random(0)
    for _ in range(200):
        most = rng.randint(1, 9)
        ranks = [[float(rng.randint(0, most)) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
        number = rng.randint(0, int(sum(most - rows for rank in ranks for rows in rank)))
        slow, left = [list(rank) for rank in ranks], number
        while left:
            for rank in slow:
                if left and min(rank) < most:
                    rank[rank.index(min(rank))] += 1
                    left -= 1
        found = _spread(ranks, number, float(most))
        cut = 0
        for rank in slow:
            assert sorted(found[cut : cut + len(rank)]) == sorted(rank)
            cut += len(rank)


def test_chance_counts_less_the_more_tokens_there_are() -> None:
    """The busiest of 8 ranks, over the mean: 4096 tokens of all ranks, 64 times as many."""
    few, many = (
        sum(draw[0].rows for draw in busiest("uniform", 256, 8, 8, tokens)) / 8 / (tokens * 8) - 1
        for tokens in (512, 32768)
    )
    assert many == pytest.approx(few / 8, rel=0.05)
    assert sum(_expected(np.geomspace(1, 1024, 384), 6)) == pytest.approx(6)


@pytest.mark.parametrize(
    "text",
    [
        "even",
        "zipf",
        "zipf_",
        "zipf_x",
        "balanced_2",
        "power_law_-1",
        "power_law_99",
        "power_law_1.2_8",
        "power_law_sampled_1.9_x",
        "",
    ],
)
def test_routings_that_are_not_known(text: str) -> None:
    with pytest.raises(ValueError, match="is not known; there are balanced"):
        Routing.parse(text)


def test_routings_that_are_known() -> None:
    texts = ["balanced", "uniform", "zipf_1", "power_law_sampled_1.9", "power_law_1.2"]
    assert tuple(Routing.parse(text).kind for text in texts) == KINDS


# ---- the schedule ----


def test_schedules_played_by_hand() -> None:
    serial = play([Work(0, 300)], [100], [200])
    assert (serial.total, serial.head, serial.tail, serial.stalls) == (600, 100, 200, 100)
    halves = play([Work(0, 150), Work(1, 150)], [50, 50], [100, 100])
    assert (halves.total, halves.head, halves.tail, halves.stalls) == (450, 50, 100, 50)
    local_first = play([Work(0, 60, arrived=False), Work(0, 300)], [100], [200])
    assert (local_first.total, local_first.stalls) == (600, 40)


@given(
    times=st.lists(st.tuples(*[st.floats(0, 1e3)] * 3), min_size=1, max_size=12),
    lookahead=st.integers(1, 4),
)
@settings(deadline=None)
def test_a_schedule_is_at_least_its_compute_its_link_and_at_most_their_sum(
    times: list[tuple[float, float, float]], lookahead: int
) -> None:
    there, compute, back = (list(column) for column in zip(*times, strict=True))
    played = play([Work(wave, time) for wave, time in enumerate(compute)], there, back, lookahead)
    link = sum(there) + sum(back)
    assert max(sum(compute), link) - 1e-6 <= played.total <= sum(compute) + link + 1e-6
    for lane in ("dispatch", "compute", "combine"):
        spans = [span for span in played.spans if span.lane == lane]
        assert [span.wave for span in spans] == list(range(len(times)))
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans))


# ---- the layer ----


def test_the_parts_of_a_layer_add_up() -> None:
    time = layer_time(PRO, GB200, ep=16, tokens_per_rank=4096)
    assert time.layer_us == pytest.approx(time.fixed_us + time.core_us + time.sum_us)
    assert time.core_us == pytest.approx(time.alone_us + time.exposed_us)
    assert time.alone_us >= max(time.compute_us, time.memory_us)
    whole, last = (48 * tile_us(GB200, rows, 7168, 0.5) + 56 * tile_us(GB200, rows, 3072, 0.5) for rows in (192, 64))
    assert time.compute_us == pytest.approx(24 * (5 * whole + last) / 152), "1024 rows of each expert: 5 x 192 + 64"
    assert time.fixed_us == pytest.approx(time.kernel_us + time.graph_us + time.stack_us)
    sent = 4096 * 6 * 15 / 16 * 7168 * (1 + 1 / 32 + 2)
    assert time.communication_us == pytest.approx(sent / GB200.link_bytes_s(16, fused=True) * 1e6)
    assert time.rows == 4096 * 6
    assert time.experts_touched == 24


def test_memory_is_what_few_tokens_take() -> None:
    time = layer_time(PRO, GB200, ep=4, tokens_per_rank=16)
    weights = 96 * 3 * 7168 * 3072 * (0.5 + 1 / 32)
    assert time.memory_us == pytest.approx(weights / (8e12 * GB200.memory_efficiency) * 1e6, rel=0.01)
    assert time.memory_us < time.alone_us < 1.03 * time.memory_us


def test_rows_come_in_whole_tiles() -> None:
    one, tile = (layer_time(PRO, GB200, ep=4, tokens_per_rank=tokens).compute_us for tokens in (16, 256))
    assert one == pytest.approx(tile), "1 row of an expert computes as long as 16"


def test_one_rank_sends_nothing() -> None:
    time = layer_time(PRO, GB200, ep=1, tokens_per_rank=1024)
    assert (time.communication_us, time.hidden, time.waves) == (0.0, 1.0, 1)


def test_more_waves_hide_more_than_one() -> None:
    one, eight = (layer_time(PRO, GB200, ep=16, tokens_per_rank=8192, waves=waves) for waves in (1, 8))
    assert eight.layer_us < one.layer_us
    assert eight.hidden > one.hidden
    assert layer_time(PRO, GB200, ep=16, tokens_per_rank=8192).layer_us <= eight.layer_us


def test_across_nodes_the_slowest_tier_counts_and_what_stays_inside_does_not() -> None:
    h100 = device("h100")
    inside, across = (layer_time(PRO, h100, ep=ep, tokens_per_rank=4096) for ep in (8, 16))
    assert across.communication_us > 4 * inside.communication_us
    sent = 4096 * 6 * (1 - 8 / 16) * 7168 * (1 + 1 / 32 + 2)
    assert across.communication_us == pytest.approx(sent / h100.nic_bytes_s * 1e6)
    overlapping = replace(h100, overlap=3.0)
    inside, across = (layer_time(PRO, overlapping, ep=ep, tokens_per_rank=4096) for ep in (8, 16))
    assert across.hidden < inside.hidden


@given(
    tokens=st.sampled_from([1, 30, 512, 8192]),
    ep=st.sampled_from([2, 8, 16, 64]),
    name=st.sampled_from(["h20", "h100", "gb200", "mi355x", "l40s"]),
    routing=st.sampled_from(["balanced", "power_law_1.2"]),
)
@settings(deadline=None, max_examples=40)
def test_waves_never_take_longer_than_one_thing_after_the_other(tokens: int, ep: int, name: str, routing: str) -> None:
    on = device(name)
    time = layer_time(PRO, on, ep=ep, tokens_per_rank=tokens, routing=routing)
    latency = 2 * on.exchange_us if ep > on.scaleup_domain else 0.0
    serial = time.alone_us + time.communication_us + on.wave_us + latency
    assert time.core_us <= serial * (1 + 1e-9)


def test_no_tokens_take_no_more_than_what_is_fixed() -> None:
    time = layer_time(PRO, GB200, ep=8, tokens_per_rank=0)
    assert time.layer_us == time.fixed_us > 0
    assert dispatch_us(PRO, GB200, ep=8, tokens_per_rank=0) == GB200.exchange_us


@given(
    tokens=st.sampled_from([1, 7, 64, 500, 4096]),
    ep=st.sampled_from([1, 4, 16, 96]),
    field=st.sampled_from(["tflops", "memory_bytes_s", "scaleup_gb_s", "nic_gb_s", "memory_efficiency"]),
    routing=st.sampled_from(["balanced", "power_law_1.2"]),
)
@settings(deadline=None, max_examples=60)
def test_a_better_device_is_never_slower(tokens: int, ep: int, field: str, routing: str) -> None:
    better = replace(GB200, **{field: getattr(GB200, field) * 1.25})
    times = [layer_time(PRO, each, ep=ep, tokens_per_rank=tokens, routing=routing).layer_us for each in (GB200, better)]
    assert times[1] <= times[0] * (1 + 1e-9)


@given(tokens=st.integers(1, 20000), ep=st.sampled_from([1, 2, 8, 24, 128]))
@settings(deadline=None, max_examples=60)
def test_more_tokens_are_never_faster(tokens: int, ep: int) -> None:
    fewer, more = (layer_time(PRO, GB200, ep=ep, tokens_per_rank=each).layer_us for each in (tokens, 2 * tokens))
    assert fewer <= more * (1 + 1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ep": 0}, "an EP size of 0 makes no sense"),
        ({"ep": 385}, "EP385 is larger than the 384 experts"),
        ({"tokens_per_rank": -1}, "must not be negative, got -1"),
        ({"redundant": -1}, "redundant experts must not be negative, got -1"),
        ({"waves": 0}, "waves must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused_with_the_numbers(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_time(PRO, GB200, **{"ep": 8, "tokens_per_rank": 64, **wrong})  # type: ignore[arg-type]


def test_copies_of_experts_are_shared_by_as_many_ranks_more() -> None:
    assert layer_time(PRO, GB200, ep=416, tokens_per_rank=64, redundant=32).layer_us > 0
    with pytest.raises(ValueError, match="EP417 is larger than the 416 experts"):
        layer_time(PRO, GB200, ep=417, tokens_per_rank=64, redundant=32)


def test_which_peak_counts() -> None:
    gb200, h100 = load_hardware("gb200"), load_hardware("h100")
    assert compute_format(gb200, "mxfp4", "mxfp8") == "fp8"
    assert compute_format(gb200, "nvfp4", "nvfp4") == "fp4"
    assert compute_format(gb200, "bf16", "mxfp8") == "bf16"
    assert compute_format(load_hardware("ascend-910c"), "mxfp4", "mxfp8") == "int8"
    assert compute_format(h100, "nvfp4", "nvfp4") == "fp8"
    assert set(VALUE_BYTES) > {"bf16", "mxfp8", "mxfp4", "nvfp4"}


# ---- tiles ----

V3 = Expert(7168, 2048, 256, 8, weight_format="fp8")
BLACKWELL = load_profile("blackwell")


def test_a_tile_by_hand() -> None:
    """2 x 128 x 128 x 1000 FLOPs on an SM of 10 TFLOP/s: 3.2768 us, more than 5 ps x 256 x 1000, 1.28; 100 ps x 16384.

    With 20 ps a byte 5.12 us count instead, 3.84 where weights have half a byte.
    """
    plain = replace(GB200, tflops=1000.0, sms=100.0, feed_ps=5.0, epilogue_ps=100.0, operand_bytes=1.0)
    epilogue = 1.6384
    assert tile_us(plain, 128, 1000) == pytest.approx((3.2768**3 + epilogue**3) ** (1 / 3))
    slow = replace(plain, feed_ps=20.0)
    assert tile_us(slow, 128, 1000) == pytest.approx((5.12**3 + epilogue**3) ** (1 / 3))
    assert tile_us(slow, 128, 1000, 0.5) == pytest.approx((3.84**3 + epilogue**3) ** (1 / 3))
    scaled = tile_us(plain, 128, 1000, scale_ps=2.0)  # 3.2768 + 2 ps x 256 x 1000, while the tensor core waits
    assert scaled == pytest.approx((3.7888**3 + epilogue**3) ** (1 / 3))
    assert tile_us(slow, 128, 1000, scale_ps=2.0) == tile_us(slow, 128, 1000), "hidden behind what feeds it"


def test_one_warp_group_scales_while_nothing_is_multiplied_two_take_turns() -> None:
    """Grouped products of Hopper in tiles of 64 rows: on H100 what feeds the tensor core hides it, on H20 nothing."""
    for name, longer in (("h100", 1.0), ("h20", 1.14)):
        on = device(name)
        unscaled = replace(on, scale_ps=0.0)
        few, without = (sum(grouped_us(V3, each, [64], [32])) for each in (on, unscaled))
        assert few / without == pytest.approx(longer, abs=0.01), name
        assert grouped_us(V3, on, [128], [78]) == pytest.approx(grouped_us(V3, unscaled, [128], [78])), name
    assert device("gb200").scale_ps == 0


def test_two_sms_of_blackwell_share_the_weights_of_a_tile_of_grouped_products() -> None:
    """FP8 weights are brought by halves, and weights of 4 bits come as bytes: 256 columns as 128 of a byte."""
    alone = replace(GB200, pair_sms=1)
    fp8, fp4 = V3, replace(V3, weight_format="mxfp4")
    assert grouped_us(fp8, GB200, [128], [152]) == grouped_us(fp4, GB200, [128], [152])
    (paired,) = grouped_us(fp8, GB200, [128], [152])
    tiles = 16 * tile_us(GB200, 128, 7168, 0.5, columns=256) + 28 * tile_us(GB200, 128, 2048, 0.5, columns=256)
    assert paired == pytest.approx(tiles / 152)
    assert paired < 0.8 * grouped_us(fp8, alone, [128], [152])[0]
    assert products_us(fp8, GB200, [128], [152], Tiling(128, 16)) == products_us(
        fp8, alone, [128], [152], Tiling(128, 16)
    )
    assert device("h200").pair_sms == 1


def test_products_add_up_their_tiles_and_wait_for_one_of_each() -> None:
    def cost(rows: int) -> float:
        return (48 * tile_us(GB200, rows, 7168, 0.5) + 56 * tile_us(GB200, rows, 3072, 0.5)) / 152

    (few,) = products_us(PRO, GB200, [16], [1], Tiling(16, 16))
    assert few == pytest.approx(max(cost(16), tile_us(GB200, 16, 7168, 0.5) + tile_us(GB200, 16, 3072, 0.5)))
    found = products_us(PRO, GB200, [16, 192, 200, 384], [90, 6, 1, 1], Tiling(192, 16))
    assert found == pytest.approx([cost(16), cost(192), cost(192) + cost(16), 2 * cost(192)])


def test_the_last_tile_of_an_expert_computes_its_rows_alone() -> None:
    """256 rows of each expert in tiles of 192: less than two whole ones, more than 4/3 of one."""
    (one,), (more,), (two,) = (products_us(PRO, GB200, [rows], [48], Tiling(192, 16)) for rows in (192, 256, 384))
    assert 4 / 3 * one < more < two == pytest.approx(2 * one)


def test_a_call_has_tiles_of_one_size_by_the_mean_rows_of_an_expert() -> None:
    found = {rows: tiling_of(GB200, rows).block for rows in (0.1, 8, 8.5, 16, 17, 32, 33, 64, 65, 96, 97, 5000)}
    assert list(found.values()) == [16, 16, 32, 32, 64, 64, 96, 96, 128, 128, 192, 192]


def test_on_hopper_many_rows_come_in_products_of_64_and_few_in_steps_of_8() -> None:
    """Up to 16 rows on average operands are swapped, from 24 on never. 160 rows: three of 64, not two of 128."""
    h200 = device("h200")
    assert [tiling_of(h200, rows).step for rows in (0.1, 8, 16, 18, 20, 22, 24, 40, 500)] == [
        *(8, 8, 8, 16, 24, 40, 64, 64, 64),
    ]
    few, eight, one, two, three = (
        products_us(V3, h200, [rows], [32], tiling_of(h200, mean))[0]
        for rows, mean in ((3, 3), (8, 8), (24, 24), (128, 128), (160, 160))
    )
    assert few == eight < one < two < three
    assert three == pytest.approx(two + one)


def test_a_small_peak_is_not_filled_up_with_rows_that_no_expert_has() -> None:
    """H20, V4-Pro in FP8 on EP8: 64 tokens a rank are 8 rows an expert, whose products take less than its weights do.

    Were tiles of 64 rows computed whole, they would take 1.3 times as long as the memory and set the layer's time.
    """
    pro = replace(PRO, weight_format="fp8")
    time = layer_time(pro, device("h20"), ep=8, tokens_per_rank=64, routing="uniform", staging=False)
    assert time.compute_us < time.memory_us < time.alone_us < 1.1 * time.memory_us
    whole = layer_time(pro, replace(device("h20"), swap_rows=0), ep=8, tokens_per_rank=64, routing="uniform")
    assert whole.compute_us > 1.3 * whole.memory_us


def test_an_sm_of_a_lower_clock_takes_longer_for_what_the_peak_does_not_say() -> None:
    """B200 and GB200 have SMs of one kind, at 1965 and 2062 MHz."""
    b200 = device("b200")
    assert b200.feed_ps / GB200.feed_ps == pytest.approx(2062 / 1965) == b200.epilogue_ps / GB200.epilogue_ps
    assert device("gb300").feed_ps < GB200.feed_ps
    assert device("h200").feed_ps == load_profile("hopper").feed_ps.value, "no clock given: the profile's own"


def test_rows_of_a_fused_kernel_reach_less_of_the_link_than_an_all_to_all() -> None:
    """What a fused kernel's link takes follows from its own share; launched exchanges and one alone from the other."""
    assert GB200.link_bytes_s(8) == 900e9 * GB200.link_efficiency
    assert GB200.link_bytes_s(8, fused=True) == 900e9 * GB200.fused_link_efficiency
    assert GB200.link_bytes_s(64) == pytest.approx(450e9, rel=0.01), "half of the link at 64 ranks, as measured"
    half = replace(GB200, fused_link_efficiency=GB200.fused_link_efficiency / 2)
    one, slower = (layer_time(PRO, each, ep=8, tokens_per_rank=4096).communication_us for each in (GB200, half))
    assert slower == pytest.approx(2 * one)
    profile = load_profile("blackwell")
    own = [own_time(PRO, each, profile, ep=8, tokens_per_rank=4096).layer_us for each in (GB200, half)]
    alone = [dispatch_us(PRO, each, ep=8, tokens_per_rank=128) for each in (GB200, half)]
    assert own[0] == own[1]
    assert alone[0] == alone[1]


def test_a_hot_expert_computes_while_the_weights_of_others_are_read() -> None:
    """The rank's sums overlap: less than the experts one after the other, and not less than the longer sum."""
    time = layer_time(PRO, GB200, ep=4, tokens_per_rank=1024, routing="power_law_1.01")
    assert max(time.compute_us, time.memory_us) < time.alone_us
    assert time.alone_us == pytest.approx(norm(time.compute_us, time.memory_us, GB200.memory_overlap))


@pytest.mark.parametrize(("power", "took"), [(1.0, 7.0), (2.0, 5.0), (math.inf, 4.0)])
def test_a_norm_goes_from_the_sum_to_the_longer(power: float, took: float) -> None:
    assert norm(3.0, 4.0, power) == pytest.approx(took)
    assert norm(0.0, 0.0, power) == 0.0


def test_grouped_products_come_in_whole_waves() -> None:
    """32 experts of 128 rows: 1024 tiles of Linear-1 and 1792 of Linear-2 in 8 and 14 waves of 132 SMs."""
    h100 = device("h100")
    (found,) = grouped_us(V3, h100, [128], [32])
    waves = 8 * tile_us(h100, 128, 7168) + 14 * tile_us(h100, 128, 2048)
    assert found == pytest.approx(waves / 32, rel=1e-6)


def test_tiles_are_narrower_where_there_are_fewer_than_sms() -> None:
    """One expert, 64 rows: 128 tiles of 32 columns for Linear-1, 112 of 64 for Linear-2, a wave of 132 SMs each."""
    h100 = device("h100")
    (found,) = grouped_us(V3, h100, [64], [1])
    scaled = {"scale_ps": h100.scale_ps}
    waves = tile_us(h100, 64, 7168, columns=32, **scaled) + tile_us(h100, 64, 2048, columns=64, **scaled)
    assert found == pytest.approx(waves, rel=1e-6)


def test_experts_without_rows_take_their_time_in_masked_products() -> None:
    few, many = (masked_us(V3, GB200, BLACKWELL, RankLoad(((1.0, 8),), experts)) for experts in (8, 128))
    assert many[0] - few[0] == pytest.approx(120 * BLACKWELL.masked_expert_us.value)
    assert many[1:] == few[1:]


def test_a_host_of_its_own_launches_prefills_kernels_faster() -> None:
    """B200's x86 CPU against GB200's Grace: the least that a prefill's products take, and what lies between them."""
    load, least = RankLoad(((1.0, 1),), 1), {}
    for name in ("b200", "b300", "gb200"):
        least[name] = contiguous_us(V3, device(name), BLACKWELL, load, 1)[0]
    assert least["b200"] == least["b300"] == 310
    assert least["gb200"] == BLACKWELL.host_us.value
    rows, sooner = RankLoad(((16384.0, 8),), 8), replace(GB200, host_us=310.0)
    saved = contiguous_us(V3, GB200, BLACKWELL, rows, 1)[0] - contiguous_us(V3, sooner, BLACKWELL, rows, 1)[0]
    assert saved == pytest.approx(BLACKWELL.contiguous_us.value * (1 - 310 / BLACKWELL.host_us.value))
    none = BLACKWELL.model_copy(update={"host_us": BLACKWELL.host_us.model_copy(update={"value": 0.0})})
    idle = contiguous_us(V3, replace(GB200, host_us=0.0), none, load, 1)[0]
    assert BLACKWELL.contiguous_us.value < idle < BLACKWELL.host_us.value, "a host that takes no time of its own"


def test_the_fused_kernels_products_follow_what_large_products_reach() -> None:
    """GB300 has GB200's SMs and clock and more power: busy_rate, of products and of rows, which SMs move."""
    gb200, rate = load_hardware("gb200"), load_hardware("gb300").busy_rate
    assert rate is not None
    fast = Device.of(gb200.model_copy(update={"busy_rate": rate}), BLACKWELL)
    slow, quick = (layer_time(PRO, each, ep=8, tokens_per_rank=8192) for each in (GB200, fast))
    assert slow.compute_us == pytest.approx(rate.value * quick.compute_us)
    assert slow.memory_us == quick.memory_us
    assert slow.dispatch_us == pytest.approx(rate.value * quick.dispatch_us)
    launched = [own_time(PRO, each, BLACKWELL, ep=8, tokens_per_rank=8192) for each in (GB200, fast)]
    assert launched[0].dispatch_us == launched[1].dispatch_us, "exchanges of their own, whose link is the limit"


def test_an_epilogue_of_situ_is_longer_where_products_are_the_limit() -> None:
    """Kimi K3's activation costs nothing while weights are read, and the first product's tiles alone."""
    k3 = Expert.of(load_model("kimi-k3"))
    plain, b200 = replace(k3, situ=False), device("b200")
    few, many = (
        layer_time(k3, b200, ep=8, tokens_per_rank=tokens).layer_us
        / layer_time(plain, b200, ep=8, tokens_per_rank=tokens).layer_us
        for tokens in (4, 8192)
    )
    assert few == pytest.approx(1, abs=0.001)
    assert 1.03 < many < 1.08
    assert expert_tile_us(k3, b200, 128, 0) > expert_tile_us(plain, b200, 128, 0)
    assert expert_tile_us(k3, b200, 128, 1) == expert_tile_us(plain, b200, 128, 1)


def test_no_busy_rate_exceeds_the_peak_or_the_link() -> None:
    """A user's device of which large products are said to reach nine times what its SMs and clock say."""
    rate = load_hardware("gb300").busy_rate
    assert rate is not None
    beyond = load_hardware("gb200").model_copy(update={"busy_rate": rate.model_copy(update={"value": 9.0})})
    fast = Device.of(beyond, BLACKWELL)
    assert fast.fused_link_efficiency == 1
    time = layer_time(PRO, fast, ep=8, tokens_per_rank=8192)
    assert time.compute_us == pytest.approx(8192 * 6 * PRO.flops / 5000e6)
    assert reached_tflops(PRO, fast) == pytest.approx(5000)


def test_grouped_products_of_a_step_that_goes_on_are_slower_where_power_limits() -> None:
    under_load = GB200.under_load()
    slower = grouped_us(V3, under_load, [4096], [8])[0] / grouped_us(V3, GB200, [4096], [8])[0]
    assert slower == pytest.approx(1.14, abs=0.005)
    assert device("gb300").under_load().feed_ps == pytest.approx(device("gb300").feed_ps, rel=1e-3)
    assert device("h100").under_load() == device("h100")


def test_low_latency_exchanges_of_many_ranks_share_switches_and_boards_of_eight_take_longer() -> None:
    few, many = (low_latency(V3, GB200, BLACKWELL, ep=ep, tokens=512) for ep in (8, 48))
    link = 512 * 8 * 7168 * 2 / (900e3 * BLACKWELL.ll_combine_efficiency.value)
    assert few.combine_us - many.combine_us == pytest.approx(
        link * (7 / 8 - 47 / 48 * (48 / 8) ** BLACKWELL.link_congestion.value), abs=0.01
    )
    later = low_latency(V3, replace(GB200, ll_us=4.5), BLACKWELL, ep=8, tokens=512)
    assert later.dispatch_us - few.dispatch_us == pytest.approx(4.5)


def test_normal_kernels_take_their_time_for_a_token_however_narrow() -> None:
    """20 SMs of GB200, top-8 of 8 ranks: 0.083 us a token of 2048 values, where the link would take 0.025."""
    wanted = reached_by(8, 8) / 8
    sent = [
        normal(replace(V3, hidden=h), GB200, BLACKWELL, ep=8, tokens=4096, rows=4096 * 8) for h in (1024, 2048, 7168)
    ]
    least = BLACKWELL.normal_dispatch_token_us.value + BLACKWELL.normal_dispatch_sent_us.value * wanted
    assert sent[0].dispatch_us == sent[1].dispatch_us == pytest.approx(4096 * least)
    assert sent[2].dispatch_us == pytest.approx(
        4096 * reached_by(8, 8) * 7 / 8 * V3.dispatch_bytes / (900e3 * BLACKWELL.normal_efficiency.value)
    )
    fewer = normal(replace(V3, hidden=1024), GB200, BLACKWELL, ep=2, tokens=4096, rows=4096 * 8)
    assert fewer.dispatch_us < 0.4 * sent[0].dispatch_us, "two ranks share the warps that eight do"


def test_a_small_tensor_peak_is_nearly_reached_and_a_large_one_is_not() -> None:
    shares = {name: reached_tflops(V3, device(name)) / device(name).tflops for name in ("h20", "h100", "b200", "gb200")}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares["h20"] > 0.9 > shares["h100"] > 0.65 > shares["gb200"] > 0.4


def test_an_eighth_of_the_peak_is_not_eight_times_as_slow() -> None:
    """H20 has 0.15 of H200's peak and 0.83 of its memory; both ratios bound the layer's."""
    flash = Expert(4096, 2048, 256, 6, weight_format="fp8")
    for tokens in (8, 256, 8192):
        h20, h200 = (layer_time(flash, device(n), ep=8, tokens_per_rank=tokens, staging=False) for n in ("h20", "h200"))
        assert 1.0 <= h20.layer_us / h200.layer_us <= 1979 / 296


@given(rows=st.floats(1, 5000), wider=st.sampled_from([1.5, 2, 4]), name=st.sampled_from(["h20", "h100", "gb200"]))
@settings(deadline=None, max_examples=60)
def test_more_rows_and_wider_experts_never_take_less(rows: float, wider: float, name: str) -> None:
    on = device(name)
    for products in (partial(products_us, tiling=tiling_of(on, rows)), grouped_us):
        (one,), (more,) = (products(V3, on, [each], [4]) for each in (rows, rows + 1))
        (wide,) = products(replace(V3, intermediate=int(2048 * wider)), on, [rows], [4])
        assert one <= more * (1 + 1e-9)
        assert one <= wide * (1 + 1e-9)
    assert tiling_of(on, rows).block in on.blocks


@given(
    tokens=st.sampled_from([1, 16, 300, 4096]),
    width=st.sampled_from([512, 1024, 2048, 4096]),
    name=st.sampled_from(["h20", "h200", "b200", "gb300", "mi300x"]),
    stack=st.sampled_from(STACKS),
)
@settings(deadline=None, max_examples=60)
def test_layers_grow_with_tokens_and_width_on_every_stack(tokens: int, width: int, name: str, stack: str) -> None:
    hardware = load_hardware(name)
    profile = find_profile(hardware)

    def us(tokens: int, width: int) -> float:
        expert = Expert(4096, width, 256, 8, weight_format="fp8")
        on = Device.of(hardware, profile)
        return stack_time(stack, expert, on, profile, ep=8, tokens_per_rank=tokens).layer_us  # type: ignore[arg-type]

    assert us(tokens, width) <= us(2 * tokens, width) * (1 + 1e-9)
    assert us(tokens, width) <= us(tokens, 2 * width) * (1 + 1e-9)


def test_a_device_whose_sms_nobody_counted_has_as_many_as_its_peak_is_worth() -> None:
    mi300x = device("mi300x")
    assert load_hardware("mi300x").sms is None
    assert mi300x.sms == pytest.approx(2615 / 32.9)
    assert reached_tflops(V3, mi300x) / 2615 == pytest.approx(reached_tflops(V3, GB200) / 5000, rel=0.02)


def test_nvfp4_runs_at_its_own_peak_and_moves_half_the_bytes() -> None:
    fp4 = Device.of(load_hardware("gb200"), load_profile("blackwell"), "fp4")
    assert 1.4 < reached_tflops(PRO, fp4) / reached_tflops(PRO, GB200) < 2


# ---- stacks ----

H100 = load_hardware("h100")
HOPPER = load_profile("hopper")


def staged(tokens: float, **more: Any) -> LayerTime:
    return staged_time(V3, device("h100"), HOPPER, ep=8, tokens_per_rank=tokens, **more)


def test_low_latency_by_hand() -> None:
    """256 experts on 132 SMs: two a group of warps, 128 SMs, of which each sends one of 128 tokens."""
    sent = low_latency(V3, device("h100"), HOPPER, ep=8, tokens=128)
    fixed = HOPPER.ll_dispatch_us.value + 256 * HOPPER.ll_dispatch_expert_us.value + HOPPER.ll_dispatch_token_us.value
    moved = 128 * 8 * (7168 * (1 + 1 / 32) + 16) * 7 / 8 / (450e3 * HOPPER.ll_dispatch_efficiency.value)
    assert sent.dispatch_us == pytest.approx(fixed + moved)
    few = replace(V3, num_experts=8, topk=2)
    slow = low_latency(few, device("h100"), HOPPER, ep=8, tokens=1024).dispatch_us
    assert slow > 128 * HOPPER.ll_dispatch_token_us.value, "8 experts: 8 SMs send 128 tokens each"


def test_a_token_goes_once_to_each_rank() -> None:
    assert reached_by(8, 6) == pytest.approx(4.41, abs=0.005)
    assert reached_by(1, 6) == 1.0
    once = normal(V3, device("h100"), HOPPER, ep=8, tokens=4096, rows=4096 * 8)
    every = normal(V3, device("h100"), HOPPER, ep=8, tokens=4096, rows=2 * 4096 * 8)
    assert every.dispatch_us > 1.9 * once.dispatch_us


def test_stages_wait_for_each_other_and_two_batches_do_not() -> None:
    one, two = staged(4096), staged(4096, two_batch=True)
    assert one.layer_us == pytest.approx(one.dispatch_us + one.alone_us + one.combine_us)
    assert (one.waves, two.waves) == (1, 2)
    assert two.exposed_us < one.exposed_us
    assert staged(64, kernels="low latency").layer_us < staged(64, kernels="normal").layer_us
    assert staged(64).layer_us == staged(64, kernels="low latency").layer_us


def test_one_rank_of_the_staged_stack_sends_nothing() -> None:
    assert staged_time(V3, device("h100"), HOPPER, ep=1, tokens_per_rank=256).communication_us == 0


def test_this_packages_layer_pays_for_its_launches() -> None:
    bf16 = Device.of(H100, HOPPER, "bf16")
    two, five = (own_time(V3, bf16, HOPPER, ep=8, tokens_per_rank=64, waves=waves) for waves in (2, 5))
    busy = [each.core_us - each.stalls_us - each.tail_us for each in (two, five)]
    assert busy[1] - busy[0] == pytest.approx(3 * 8 * HOPPER.kernel_us.value)
    assert own_time(V3, bf16, HOPPER, ep=8, tokens_per_rank=16384).waves <= 8


def test_stacks_refuse_what_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="two-batch overlap is a way to run the staged stack"):
        stack_time("fused", V3, device("h100"), HOPPER, ep=8, tokens_per_rank=8, two_batch=True)
    with pytest.raises(ValueError, match="the staged stack has no waves"):
        stack_time("staged", V3, device("h100"), HOPPER, ep=8, tokens_per_rank=8, waves=2)


def test_each_stack_has_its_own_verdict() -> None:
    request = PlanRequest(load_model("deepseek-v4-pro"), load_hardware("gb200"), load_profile("blackwell"), 16)
    found = {
        "fused": plan(request),
        "staged": plan(replace(request, stack="staged")),
        "two": plan(replace(request, stack="staged", two_batch=True)),
        "megamoe": plan(replace(request, stack="megamoe")),
    }
    assert [found[name].verdict for name in found] == ["hidden", "exposed", "hidden", "hidden"]
    assert "EP16, staged: each stage waits for the one before, " in found["staged"].sentence
    assert "staged with two-batch overlap: 5556 <= 6144" in found["two"].sentence
    assert found["megamoe"].request.compute_format == "bf16"
    times = {name: each.layer.layer_us for name, each in found.items()}
    assert times["fused"] < times["two"] < times["staged"]


def test_a_rank_that_all_others_send_to_waits_longer_for_each_row() -> None:
    """16 rows, 4 pairs of its own: (16 / 4)^0.5 times as long a row; no rank takes less than where all are even."""

    def both(rows: float, incast: float) -> tuple[float, float]:
        row = row_us(replace(GB200, link_incast=incast), 8, rows, 4.0, 100.0, 200.0, GB200.tiers(8))
        return row.there_us, row.back_us

    assert [hot / plain for hot, plain in zip(both(16, 0.5), both(16, 0), strict=True)] == pytest.approx([2.0, 2.0])
    assert both(4, 0.5) == both(4, 0)
    assert both(2, 0.5) == both(2, 0)
