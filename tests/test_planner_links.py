"""What travels and over what: narrow formats both ways, host bridges, node-limited dispatch, links that differ."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megamoe.catalog import load_hardware, names
from megamoe.planner.answer import Answer, answer
from megamoe.planner.explain import explain
from megamoe.planner.layer.rule import landed, tiers
from megamoe.planner.layer.traffic import traffic
from megamoe.planner.links import Links
from megamoe.planner.question import ask


def asked(**keys: Any) -> Answer:
    return answer(ask({"model": "deepseek-v4-pro", "hardware": "h100", "ep": 8, **keys}))


# ---- formats ----


@pytest.mark.parametrize(
    ("combine", "per_value"),
    [("bf16", 2), ("fp8", 1), ("mxfp8", 33 / 32), ("mxfp4", 17 / 32), ("nvfp4", 9 / 16)],
)
def test_rows_come_home_in_any_format(combine: str, per_value: float) -> None:
    found, wide = asked(combine_format=combine, dispatch_format="nvfp4"), asked(dispatch_format="nvfp4")
    assert found.plan.request.expert.combine_bytes == 7168 * per_value
    rule = next(each for each in found.plan.counted if each.tier == "scale-up")
    assert rule.threshold == pytest.approx(6 * 3072 / (9 / 16 + per_value) / (7 / 8))
    assert found.plan.layer.combine_us == pytest.approx(wide.plan.layer.combine_us * per_value / 2)
    limit = next(term for term in explain(found) if term.name == "counted, scale-up: threshold")
    assert f"(0.5625 + {per_value:.7g})" in limit.numbers


def test_nvfp4_weights_are_counted_with_their_scales_and_run_at_the_fp4_peak() -> None:
    found = asked(hardware="gb200", weight_format="nvfp4", dispatch_format="nvfp4")
    assert found.plan.request.expert.weight_bytes == 3 * 7168 * 3072 * 9 / 16
    assert found.as_dict()["compute_format"] == "fp4"


def test_a_format_that_nobody_knows_is_named() -> None:
    with pytest.raises(ValueError, match="no format is called 'nvfp5'; the nearest are nvfp4"):
        asked(combine_format="nvfp5")


# ---- boxes without a scale-up link ----

PCIE = [name for name in names("hardware") if load_hardware(name).joined_by == "pcie"]


def test_the_catalog_knows_boxes_whose_cards_meet_at_the_host_bridge() -> None:
    assert PCIE == ["a100-pcie", "dgx-spark", "h100-pcie", "l40s", "rtx-5090", "rtx-pro-6000"]


def test_the_host_bridge_is_a_tier_under_its_own_name() -> None:
    found = asked(hardware="l40s", model="qwen3-30b-a3b", ep=16)
    keys = found.as_dict()
    assert {each["tier"] for each in keys["rules"]} == {"host bridge", "nic"}
    assert keys["binding_tier"] in ("host bridge", "nic")
    said = " ".join(term.name for term in explain(found))
    assert "paper, host bridge: threshold" in said
    assert "scale-up" not in said


def test_rows_bound_for_the_nic_cross_the_cards_own_pcie_link() -> None:
    """EP16 in boxes of 8, H100 cards: 15/16 of the rows leave a card, over 64 GB/s; 8/16 go on over the NIC.

    With NICs of 400 GB/s the link takes tokens * topk * bytes * 15/16 / (64 * efficiency), each way.
    """
    found = asked(hardware="h100-pcie", ep=16, tokens_per_rank=1024, set=["hardware.nic_gb_s=400"]).plan
    assert [(rule.tier, rule.f_remote) for rule in found.counted] == [("scale-up", 15 / 16), ("nic", 0.5)]
    efficiency = found.request.profile.fused_link_efficiency.value
    rows = 1024 * 6 * 15 / 16
    assert found.layer.dispatch_us == pytest.approx(rows * 7168 * 33 / 32 / (64 * efficiency * 1e3))
    assert found.layer.combine_us == pytest.approx(rows * 7168 * 2 / (64 * efficiency * 1e3))
    board = asked(hardware="h100", ep=16).plan
    assert [(rule.tier, rule.f_remote) for rule in board.counted] == [("scale-up", 7 / 16), ("nic", 0.5)]


@pytest.mark.parametrize("name", PCIE)
def test_more_boxes_never_take_load_off_a_cards_link(name: str) -> None:
    """The same tokens a rank over more boxes: no layer is shorter, whatever the stack, and no plan is easier."""
    domain = int(load_hardware(name).scaleup_domain.value)
    for stack in ("fused", "staged", "megamoe"):
        sizes = [domain * boxes for boxes in (1, 2, 4, 8)]
        given = {"hardware": name, "model": "qwen3-30b-a3b", "stack": stack, "set": ["hardware.nic_gb_s=400"]}
        plans = [asked(ep=ep, tokens_per_rank=1024, **given).plan for ep in sizes if ep <= 128]
        links = [each.layer.communication_us for each in plans]
        assert links == sorted(links)
        bridge = [rule.threshold for each in plans for rule in each.counted if rule.tier == "scale-up"]
        assert bridge == sorted(bridge, reverse=True)


def test_boxes_of_one_device_are_joined_by_their_nics_alone() -> None:
    tiers = {each["tier"] for each in asked(hardware="dgx-spark", model="qwen3-30b-a3b", ep=2).as_dict()["rules"]}
    assert tiers == {"nic"}


def test_more_cards_than_a_box_has_need_a_nic() -> None:
    with pytest.raises(ValueError, match=r"spans 2 scale-up domains of 4, .* give hardware.nic_gb_s"):
        asked(hardware="rtx-5090", model="qwen3-30b-a3b", ep=8)


# ---- node-limited dispatch ----


def test_node_limited_a_token_goes_once_to_each_other_domain() -> None:
    """16 experts, top-4, 4 ranks in domains of 2, every choice of four: counted, and as the planner has it."""
    chosen = list(itertools.combinations(range(16), 4))  # of a token of rank 0; experts 0 to 3 are its own
    domains = [{expert // 8 for expert in each if expert // 8 != 0} for each in chosen]
    pairs = 4 * len(chosen)
    over_the_nic = sum(map(len, domains)) / pairs
    anywhere = sum(expert // 4 != 0 for each in chosen for expert in each) / pairs
    assert landed(16, 4, 4, 2) == pytest.approx(over_the_nic)
    board = tiers(4, 450, 2, 50, once=over_the_nic)
    assert [(each.name, each.f_remote) for each in board] == [("scale-up", 0.25), ("nic", 0.5)]
    assert [each.f_dispatch for each in board] == pytest.approx([anywhere - over_the_nic, over_the_nic])
    cards = tiers(4, 64, 2, 50, host_bridge=True, once=over_the_nic)  # in and out again by the same link
    assert [each.f_dispatch for each in cards] == pytest.approx([anywhere, over_the_nic])
    sent = sum(any(expert // 4 == rank for expert in each) for each in chosen for rank in (1, 2, 3)) / pairs * 4 / 3
    own = tiers(4, 450, 2, 50, sent=sent, once=over_the_nic)  # and to each rank there once
    assert [each.f_dispatch for each in own] == pytest.approx([sent * 3 / 4 - over_the_nic, over_the_nic])


@pytest.mark.parametrize("stack", ["fused", "megamoe"])
def test_node_limited_dispatch_relieves_the_nic(stack: str) -> None:
    plain, limited = (asked(ep=32, stack=stack, node_limited=each) for each in (False, True))
    once = landed(384, 6, 32, 8)
    assert once is not None
    assert once < 0.75
    nic = next(each for each in limited.as_dict()["rules"] if (each["count"], each["tier"]) == ("counted", "nic"))
    assert (nic["f_remote"], nic["f_dispatch"]) == (0.75, once)
    assert nic["threshold_flops_per_byte"] == pytest.approx(6 * 3072 / (33 / 32 * once + 2 * 0.75))
    both = zip(limited.plan.rules, plain.plan.rules, strict=True)
    assert [rule.margin > before.margin for rule, before in both] == [False, True]
    assert limited.plan.layer.layer_us < plain.plan.layer.layer_us
    if stack == "fused":  # the link carries as many bytes as the traffic of a token says
        sent = traffic(limited.plan.request)
        share = sent.node_limited_bytes / sent.across_domains_bytes
        assert limited.plan.layer.communication_us == pytest.approx(plain.plan.layer.communication_us * share)
    assert "node-limited: " in limited.verdict
    found = limited.as_dict()
    assert found["node_limited"]
    assert found["token_bytes_across_domains"] == found["token_bytes_node_limited"]
    assert found["token_bytes_across_domains"] < plain.as_dict()["token_bytes_across_domains"]


def test_node_limited_dispatch_is_nothing_within_one_domain() -> None:
    plain, limited = (asked(ep=8, node_limited=each).plan for each in (False, True))
    assert (plain.layer, plain.rules, plain.counted) == (limited.layer, limited.rules, limited.counted)


def test_node_limited_dispatch_reaches_the_serving() -> None:
    given = {"ep": 32, "batch": 64, "context": 4096, "phase": "decode"}
    plain, limited = (asked(node_limited=each, **given).serving for each in (False, True))
    assert plain is not None
    assert limited is not None
    assert limited.tokens_per_s_per_user > plain.tokens_per_s_per_user


@pytest.mark.parametrize("given", [{"stack": "staged"}, {"stack": "staged", "batch": 8}])
def test_node_limited_dispatch_of_deepep_is_refused_by_name(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="node_limited is of the fused and the megamoe stack"):
        asked(node_limited=True, **given)


def test_node_limited_dispatch_of_training_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a layer that trains sends a token once to each rank"):
        asked(node_limited=True, phase="train")


# ---- links that differ ----


def test_the_slowest_link_counts_for_all() -> None:
    mixed = asked(links=["scaleup=450x7,225"])
    slow = asked(set=["hardware.scaleup_gb_s=225"])
    assert mixed.plan.layer == slow.plan.layer
    assert mixed.as_dict()["link_gb_s"] == 225
    term = explain(mixed)[0]
    assert (term.name, term.numbers, term.value) == ("slowest scaleup link, rank 7", "min(7 x 450, 225)", 225)
    assert asked(links="scaleup=450x8").plan.layer == asked().plan.layer


def test_tiers_have_their_own_slowest_link() -> None:
    mixed = asked(ep=16, links=["scaleup=300,450x15", "nic=50x8,25x8"])
    assert [rule.gb_s for rule in mixed.plan.rules] == [300, 25]


@pytest.mark.parametrize(
    ("links", "message"),
    [
        (["scaleup=450,225"], "links of scaleup name 2 ranks, and ep is 8: give a rate for every rank"),
        (["nvlink=450x8"], "'nvlink=450x8' is not of the form scaleup=450,225 or nic=450,225"),
        (["nic=450x7,fast"], "'fast' is no rate such as 450 or 450x6"),
        (["nic=450x7,0"], "'0' must be above 0 GB/s"),
        (["nic=450x7,-1"], "must be above 0"),
        (["nic=infx8"], "must be above 0"),
        (["nic=50x8", "nic=25x8"], "links of nic are given twice"),
    ],
)
def test_links_that_make_no_sense_are_named(links: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(links=links)


def test_links_need_an_ep_size() -> None:
    with pytest.raises(ValueError, match="and no ep is given"):
        asked(ep=None, links=["nic=50x8"])


def test_rates_that_follow_each_other_are_said_as_one() -> None:
    assert Links.parse(" nic = 50x2, 50,25").words == "3 x 50, 25"
