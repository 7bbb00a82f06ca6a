"""What would hide a plan, what moves it, how it adds up: inverses plan again to where they say, terms multiply out."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest

from megamoe.planner.answer import Answer, answer
from megamoe.planner.explain import explain, rule_terms, traffic_terms
from megamoe.planner.layer.require import Requirement, require
from megamoe.planner.layer.traffic import traffic
from megamoe.planner.layer_terms import layer_terms
from megamoe.planner.page import page, unit_of
from megamoe.planner.question import Question, ask
from megamoe.planner.search.sensitivity import result_of, sensitivity
from megamoe.planner.search.sweep import parse_values, spread, sweep

HIDDEN = {"model": "deepseek-v4-pro", "hardware": "gb200", "ep": 16}
EXPOSED = {"model": "qwen3-30b-a3b", "hardware": "h100", "ep": 8}
TWO_TIERS = {"model": "deepseek-v3", "hardware": "h800", "ep": 32}


def question(keys: dict[str, Any], **more: Any) -> Question:
    return ask({**keys, **more})


def needs(keys: dict[str, Any], **more: Any) -> dict[str, Requirement]:
    return {need.key: need for need in require(answer(question(keys, **more)).plan)}


# ---- require ----


def test_what_the_facts_say_is_needed() -> None:
    assert needs(HIDDEN)["hardware.scaleup_gb_s"].paper == pytest.approx(813.8, abs=0.1)
    assert needs(HIDDEN, hardware="h100", ep=8)["hardware.scaleup_gb_s"].paper == pytest.approx(322.1, abs=0.1)


@pytest.mark.parametrize("keys", [HIDDEN, EXPOSED, TWO_TIERS], ids=["hidden", "exposed", "two_tiers"])
@pytest.mark.parametrize("count", ["paper", "counted", "achieved"])
def test_the_bandwidth_that_is_needed_hides_and_less_does_not(keys: dict[str, Any], count: str) -> None:
    links = {key: getattr(need, count) for key, need in needs(keys).items() if key.endswith("_gb_s")}
    for factor, hides in ((1.001, True), (0.999, False)):
        settings = tuple(f"{key}={gb_s * factor}" for key, gb_s in links.items())
        planned = answer(question(keys, set=settings)).plan
        rules = {"paper": planned.rules, "counted": planned.counted, "achieved": planned.achieved}[count]
        assert [rule.hidden for rule in rules] == [hides] * len(links)


def test_the_largest_ep_size_that_hides() -> None:
    need = needs(EXPOSED)["ep"]
    assert (need.paper, need.counted) == (1, 2)
    for ep in (2, 4):
        counted = answer(question(EXPOSED, ep=ep)).plan.counted
        assert all(rule.hidden for rule in counted) == (ep <= 2)


def test_up_to_so_many_tokens_links_take_no_longer_than_weights_and_products() -> None:
    tokens = needs(TWO_TIERS)["tokens_per_rank"].achieved
    assert isinstance(tokens, int)
    for number, hides in ((tokens, True), (tokens + max(1, tokens // 50), False)):
        layer = answer(question(TWO_TIERS, tokens_per_rank=number)).plan.layer
        assert (layer.communication_us <= layer.alone_us) == hides
    assert needs(HIDDEN)["tokens_per_rank"].achieved == "any"


def test_the_widest_format_that_hides() -> None:
    need = needs(EXPOSED)["combine_format"]
    assert (need.has, need.paper) == ("bf16", "mxfp8")
    assert answer(question(EXPOSED, combine_format="mxfp8")).plan.hidden
    assert not answer(question(EXPOSED, combine_format="bf16")).plan.hidden
    assert needs(EXPOSED)["dispatch_format"].paper is None
    assert not answer(question(EXPOSED, dispatch_format="mxfp4")).plan.hidden


def test_the_expert_and_the_compute_that_would_hide() -> None:
    need = needs(EXPOSED)
    width = need["model.intermediate"].paper
    assert isinstance(width, int)
    assert answer(question(EXPOSED, set=(f"model.intermediate={width}",))).plan.hidden
    assert not answer(question(EXPOSED, set=(f"model.intermediate={width - 1}",))).plan.hidden
    peak = need["hardware.bf16_tflops"].paper
    assert isinstance(peak, float)
    assert answer(question(EXPOSED, set=(f"hardware.bf16_tflops={peak * 0.999}",))).plan.hidden


def test_nothing_is_needed_where_nothing_is_sent() -> None:
    assert needs(HIDDEN, ep=1) == {}


# ---- explain ----


def evaluate(numbers: str) -> float:
    """The arithmetic of a term done again.    "2 x (3 + 1)^2" -> 32"""
    text = numbers.replace(" x ", " * ").replace("^", "**")
    return float(eval(text, {"__builtins__": {}}, {"log2": math.log2, "ceil": math.ceil, "max": max}))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tokens_per_rank": 1},
        {"ep": 1},
        {"ep": 48, "hardware": "h100"},
        {"model": "mixtral-8x7b", "ep": 8},
        {"routing": "zipf_1.1"},
        {"routing": "power_law_1.2", "redundant": 16, "ep": 8, "hardware": "h100"},
        {"combine_format": "nvfp4", "waves": 5, "set": ("model.gated=false",)},
        {"ep": 32, "hardware": "h100", "node_limited": True},
        {"ep": 32, "hardware": "h100", "node_limited": True, "stack": "megamoe", "routing": "zipf_0.5"},
        {"ep": 16, "hardware": "h100-pcie", "node_limited": True, "set": ("hardware.nic_gb_s=400",)},
        {"hardware": "gb300"},
        {"hardware": "gb300", "stack": "megamoe"},
        {"model": "kimi-k3", "ep": 8, "hardware": "b200"},
        {"hardware": "gb300", "tokens_per_rank": 16384, "set": ("hardware.busy_rate=9",)},
    ],
    ids=[
        *("balanced", "one_token", "one_rank", "two_tiers", "bf16", "zipf", "redundant", "formats", "node_limited"),
        *("node_limited_own", "node_limited_pcie", "busy_rate", "busy_rate_own", "situ", "busy_rate_beyond"),
    ],
)
def test_every_term_multiplies_out_to_the_plan(more: dict[str, Any]) -> None:
    planned = answer(question(HIDDEN, **more)).plan
    terms = [*rule_terms(planned), *traffic_terms(planned), *layer_terms(planned)]
    for term in terms:
        assert evaluate(term.numbers) == pytest.approx(term.value, rel=2e-6, abs=1e-6), term
    values = {term.name: term.value for term in terms}
    layer = planned.layer
    assert values["layer"] == layer.layer_us
    assert values["compute"] == layer.compute_us
    assert values["waves"] == layer.core_us
    if planned.binding is not None:
        tier = planned.request.hardware.tier_names[planned.binding.tier]
        assert values[f"paper, {tier}: margin"] == planned.binding.margin
        assert values["communication"] == layer.communication_us


def test_serving_terms_end_in_the_rate() -> None:
    found = answer(question(HIDDEN, batch=96, context=8192, mtp=1))
    terms = {term.name: term for term in explain(found)}
    assert found.serving is not None
    assert terms["TPOT"].value == found.serving.tpot_ms
    assert terms["tokens per second and device"].value == found.serving.tokens_per_s_per_device
    assert not [name for name in terms if name.startswith("routed: ")]  # the layer's own terms stand for them


def test_terms_multiply_out_where_the_inner_tier_is_the_slower_one() -> None:
    slow = ("hardware.scaleup_gb_s=7",)
    test_every_term_multiplies_out_to_the_plan({"ep": 48, "hardware": "h100", "routing": "zipf_1.1", "set": slow})


# ---- traffic ----


def test_a_tokens_bytes_by_hand() -> None:
    """2 k h b f: 2 x 4 x 6144 x 2 bytes x 7/8 = 84 KiB."""
    keys = {**HIDDEN, "set": ("model.topk=4", "model.hidden=6144"), "dispatch_format": "bf16"}
    sent = traffic(answer(question(keys, ep=8)).plan.request)
    assert (sent.across_devices_bytes, sent.across_domains_bytes, sent.domains) == (84 * 1024, 0, 1)
    sent = traffic(answer(question(keys, ep=16, hardware="h100")).plan.request)
    assert (sent.across_devices_bytes, sent.across_domains_bytes, sent.where) == (
        90 * 1024,
        48 * 1024,
        "2 domains of 8",
    )


def test_a_token_goes_once_to_each_other_domain_that_has_one_of_its_experts() -> None:
    """Against all ways to choose 3 of 12 experts, on 3 domains of 4 experts; results come home one by one."""
    sizes = ("model.topk=3", "model.hidden=6144", "model.num_experts=12", "hardware.scaleup_domain=4")
    keys = {**HIDDEN, "set": sizes, "dispatch_format": "bf16"}
    sent = traffic(answer(question(keys, ep=12, hardware="h100")).plan.request)
    chosen = list(combinations(range(12), 3))
    once = sum(len({e // 4 for e in each} - {0}) for each in chosen) / len(chosen)
    home = sum(e >= 4 for each in chosen for e in each) / len(chosen)
    assert sent.domains == 3
    assert sent.node_limited_bytes == pytest.approx((once + home) * 6144 * 2)
    assert sent.node_limited_bytes < sent.across_domains_bytes
    assert traffic(answer(question(HIDDEN, ep=8)).plan.request).node_limited_bytes == 0


# ---- sweep and sensitivity ----


def test_values_are_spread_by_steps_or_factors() -> None:
    assert spread("ep", 4, 64, 5, log=True) == [4, 8, 16, 32, 64]
    assert spread("ep", 1, 3, 5) == [1, 2, 3]
    assert spread("hardware.nic_gb_s", 50, 100, 3) == [50, 75, 100]
    assert parse_values("ep", "4, 8") == [4, 8]
    assert parse_values("tpot_ms", "1.5") == [1.5]
    assert parse_values("routing", "balanced,zipf_1") == ["balanced", "zipf_1"]


def test_what_is_open_is_picked_once_for_all_values() -> None:
    keys = {"model": "deepseek-v4-pro", "hardware": "gb200", "batch": 64}
    points = sweep(question(keys), "hardware.memory_tb_s", [4, 8, 16])
    assert len({point.answer.question.ep for point in points}) == 1
    rates = [result_of(point.answer)[1] for point in points]
    assert rates == sorted(rates)


@pytest.mark.parametrize("more", [{}, {"batch": 1024}], ids=["layer", "serving"])
def test_each_input_moves_the_result_its_own_way(more: dict[str, Any]) -> None:
    found = answer(question(HIDDEN, **more))
    moved = {each.key: each for each in sensitivity(found)}
    base = result_of(found)[1]
    assert {each.base for each in moved.values()} == {base}
    sign = -1 if more else 1  # a rate falls where a time rises
    for key in ("model.hidden", "model.topk", "profile.fixed_us"):
        assert sign * (moved[key].high - base) > 0 > sign * (moved[key].low - base)
    for key in ("hardware.memory_tb_s", "hardware.scaleup_gb_s"):
        assert sign * (moved[key].low - base) > 0
        assert sign * (moved[key].high - base) <= 1e-12 * base, "no worse, but for a sum's last digit"
    spans = [each.span for each in moved.values()]
    assert spans == sorted(spans, reverse=True)


def test_a_bandwidth_that_counts_both_ways_is_varied_as_it_counts() -> None:
    """h800's 400 GB/s count both directions, an override counts one: 25 % more is 250 one way."""
    found = answer(question(TWO_TIERS, ep=8))
    moved = {each.key: each for each in sensitivity(found)}["hardware.scaleup_gb_s"]
    more = answer(question(TWO_TIERS, ep=8, set=("hardware.scaleup_gb_s=250",)))
    assert moved.high == pytest.approx(more.plan.layer.layer_us)


# ---- the page ----


def full_page(found: Answer) -> Any:
    return page(found, "megamoe plan")


def test_the_timeline_is_as_long_as_the_layer() -> None:
    for more in ({}, {"hardware": "h100", "ep": 48}):
        found = answer(question(HIDDEN, **more))
        line = full_page(found).timeline
        assert line.layer_us == pytest.approx(found.plan.layer.layer_us)
        assert max(span.end_us for span in line.spans) == pytest.approx(line.layer_us)
        assert min(span.start_us for span in line.spans) == 0
        waves = {span.label for span in line.spans if span.lane == "linear" and span.kind == "busy"}
        assert len(waves) == found.plan.layer.waves


def test_the_front_holds_the_plan_and_nothing_beats_it() -> None:
    found = answer(question({"model": "deepseek-v4-pro", "hardware": "gb200", "devices": 16, "context": 8192}))
    data = full_page(found)
    chosen = [point for point in data.pareto if point.chosen]
    assert len(chosen) == 1
    assert found.serving is not None
    assert chosen[0].y == found.serving.tokens_per_s_per_device
    front = [point for point in data.pareto if point.on_front]
    for point in data.pareto:
        assert point in front or any(other.x >= point.x and other.y >= point.y for other in [*front, *chosen])


def test_warnings_and_sources_are_on_the_page() -> None:
    data = full_page(answer(question(HIDDEN, ep=2, set=("hardware.scaleup_gb_s=450",))))
    assert data.verdict == "EXPOSED"
    assert data.warnings[0].startswith("DOES NOT FIT")
    set_by_hand = [source for source in data.sources if source.source == "set on the command line"]
    assert [(source.name, source.value, source.tag) for source in set_by_hand] == [
        ("hardware.scaleup_gb_s", 450, "assumed")
    ]
    assert "Set by hand: hardware.scaleup_gb_s=450." in data.assumptions


def test_units_are_read_off_names() -> None:
    assert [unit_of(key) for key in ("scaleup_gb_s", "memory_gb", "memory_tb_s", "fp8_tflops", "tile_rows")] == [
        "GB/s",
        "GB",
        "TB/s",
        "TFLOP/s",
        "",
    ]
