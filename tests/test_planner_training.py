"""A training step as the planner has it: its rule, its parts, its memory, and what it refuses by name."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from megamoe.catalog import find_profile, load_hardware, load_model
from megamoe.planner.answer import answer
from megamoe.planner.explain import explain
from megamoe.planner.layer.plan import PlanRequest
from megamoe.planner.layer.rule import found_among
from megamoe.planner.layer.stacks import sent_once
from megamoe.planner.layer.tiles import matrix_us, tile_us
from megamoe.planner.page import page
from megamoe.planner.question import ask
from megamoe.planner.training.memory import kept_bytes
from megamoe.planner.training.plan import TrainingPlan, backward_flops, plan_training
from megamoe.schedule.backward import HOME_BYTES, SAVED, Saved

ABOUT = {"model": "deepseek-v4-pro", "hardware": "gb200", "ep": 64, "phase": "train"}


def request(hardware: str = "gb200", ep: int = 64, **more: Any) -> PlanRequest:
    device = load_hardware(hardware)
    return PlanRequest(load_model("deepseek-v4-pro"), device, find_profile(device), ep, stack="megamoe", **more)


def step(saved: Saved = "tokens", gradient_format: str = "bf16", **more: Any) -> TrainingPlan:
    return plan_training(request(**more), saved, gradient_format)


def test_the_backwards_rule_by_hand() -> None:
    """V4-Pro, d 3072: 16 h d FLOPs of a pair over 4 h bytes; 12 if nothing is computed again; 2 h bytes in 8 bits."""
    limits = {
        ("tokens", "bf16"): 16 * 3072 / 4,
        ("activations", "bf16"): 12 * 3072 / 4,
        ("tokens", "mxfp8"): 16 * 3072 / 2,
        ("dispatch-again", "bf16"): 16 * 3072 / 5,
    }
    for (saved, fmt), limit in limits.items():
        rule = step(saved, fmt).rules[0]  # type: ignore[arg-type]
        assert rule.threshold == pytest.approx(limit), (saved, fmt)
        assert rule.ratio == pytest.approx(2500e3 / 900)
    assert [backward_flops(gated, "tokens") for gated in (True, False)] == [16, 10]


def test_both_passes_have_to_hide() -> None:
    """Between 2d and 4d FLOPs a byte the forward is exposed, the backward hidden, and so the step is exposed."""
    found = answer(ask({**ABOUT, "set": ("hardware.scaleup_gb_s=300",)}))
    assert found.training is not None
    assert (found.training.backward_hidden, found.plan.hidden, found.hidden) == (True, False, False)
    keys = found.as_dict()
    assert keys["verdict"] == "exposed"
    assert keys["training"]["backward_verdict"] == "hidden"
    assert keys["required_link_gb_s"] == pytest.approx(2500e3 / 6144)
    assert "backward 8333 <= 12288 FLOPs/Byte (margin 1.47), forward 8333 > 6144" in found.sentence
    assert found.sentence.endswith("needs 407 GB/s, has 300")


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("routing", ["balanced", "zipf_1.1"])
def test_the_parts_of_a_backward_add_up(saved: Saved, routing: str) -> None:
    found = step(saved, routing=routing).backward
    products = found.recompute_us + found.data_us + found.weights_us
    assert found.backward_us == pytest.approx(found.fixed_us + found.core_us + found.sum_us)
    assert found.core_us >= max(found.alone_us, found.communication_us)
    assert found.core_us < found.alone_us + 2 * found.communication_us
    launches, profile = found.waves * (7 + (saved != "activations")), request().profile
    assert found.alone_us == pytest.approx(products + launches * profile.kernel_us.value)
    assert found.fixed_us == pytest.approx(3 * profile.kernel_us.value)
    assert (found.recompute_us == 0) == (saved == "activations")
    assert 0 < found.hidden <= 1


def test_products_of_a_backward_take_their_flops() -> None:
    """With rows enough every product runs at the rate of its tiles; data and weight gradients have the same FLOPs."""
    found, device = step(tokens_per_rank=32768).backward, request().device
    rows = 32768 * 6 / 6
    by_hand = 6 * (matrix_us(device, rows, 6144, 7168))
    assert found.recompute_us == pytest.approx(by_hand, rel=0.02)
    assert found.data_us == pytest.approx(found.weights_us, rel=0.1)
    flops = 6 * rows * 16 * 7168 * 3072
    assert flops / (device.tflops * 1e6) < found.recompute_us + found.data_us + found.weights_us
    assert matrix_us(device, 192, 256, 64) == pytest.approx(2 * tile_us(device, 192, 64) / device.sms)


@pytest.mark.parametrize("routing", ["balanced", "zipf_1.1"])
@pytest.mark.parametrize("saved", SAVED)
def test_links_of_a_backward_carry_gradients_and_tokens_that_are_sent_again(saved: Saved, routing: str) -> None:
    found, expert = step(saved, routing=routing).backward, request().expert
    again = expert.dispatch_bytes if saved == "dispatch-again" else 0
    there, home = (2 * 7168 + again) * sent_once(expert, 64), 2 * 7168 + HOME_BYTES
    assert found.dispatch_us / found.combine_us == pytest.approx(there / home)


def test_two_exchanges_between_hosts_begin_late() -> None:
    device = request(hardware="h100").device
    near, far = (step(hardware="h100", ep=ep).backward for ep in (8, 16))
    assert (near.latency_us, far.latency_us) == (0, 2 * device.exchange_us)
    assert far.core_us == pytest.approx(far.played.total + far.latency_us)


def test_weight_gradients_hide_what_a_forward_cannot() -> None:
    found = step(tokens_per_rank=4096)
    assert found.backward.hidden > found.forward.layer.hidden
    slow = step(hardware="h100", ep=256)
    assert slow.backward.exposed_us > 0
    assert slow.verdict == "exposed"


@pytest.mark.parametrize(("name", "low", "high"), [("tokens_per_rank", 1024, 2048), ("ep", 48, 32)])
def test_more_work_is_never_faster(name: str, low: int, high: int) -> None:
    less, more = (plan_training(request(**{name: value})) for value in (low, high))  # type: ignore[arg-type]
    assert less.step_us < more.step_us


def test_a_rank_alone_sends_nothing() -> None:
    found = step(ep=1, tokens_per_rank=64)
    assert found.backward.communication_us == 0
    assert found.backward.exposed_us == pytest.approx(0, abs=1e-6)
    assert found.rules == ()
    assert found.sentence.endswith("nothing leaves the device")


def test_what_a_forward_keeps_is_the_table_of_the_docs() -> None:
    """DeepSeek-V4-Pro, 4096 tokens on each of 64 ranks: 0.20 and 0.50 GB a layer, 12 and 30 over 60 layers."""
    kept = {saved: step(saved).memory for saved in SAVED}
    assert [kept[saved].kept_layer_gb for saved in SAVED[:2]] == pytest.approx([0.20, 0.50], abs=0.01)
    assert [kept[saved].kept_gb for saved in SAVED[:2]] == pytest.approx([12, 30], rel=0.05)
    expert = request().expert
    assert kept_bytes(expert, ep=64, tokens=4096, rows=24576, saved="dispatch-again") == 8 * 64 * (1 + 2 * 384) + 8
    weights = 61 * 6 * 3 * 7168 * 3072
    held = kept["tokens"]
    assert held.masters_gb == held.gradients_gb == held.optimizer_gb / 2 == pytest.approx(weights * 4 / 1e9)
    assert held.packed_gb == pytest.approx(weights * (0.53125 + 2) / 1e9)


def test_a_token_goes_once_to_each_rank() -> None:
    """Against all ways to choose 4 of 16 experts on 4 ranks."""
    chosen = [len({expert // 4 for expert in each}) for each in itertools.combinations(range(16), 4)]
    expert = replace(request().expert, num_experts=16, topk=4)
    assert sent_once(expert, 4) == pytest.approx(sum(chosen) / len(chosen) / 4)
    assert found_among(16, 4, 0.5) == pytest.approx(1 - 70 / 1820)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"stack": "fused"},
            "phase train plans stack megamoe, this package's layer, not fused: no table of the backward",
        ),
        ({"stack": "staged"}, "not staged: no table of the backward of DeepEP and grouped products is published"),
        ({"batch": 8}, "batch is of serving; phase train plans one layer's step of tokens_per_rank"),
        ({"weight_format": "nvfp4"}, "weight_format nvfp4 does not train; there is mxfp4 and bf16"),
        ({"dispatch_format": "nvfp4"}, "dispatch_format nvfp4 does not train; there is bf16 and mxfp8"),
        ({"phase": None, "saved": "tokens"}, "saved is of training: give --phase train"),
        ({"phase": "decode", "gradient_format": "mxfp8"}, "gradient_format is of training: give --phase train"),
        ({"saved": "nothing"}, "saved is 'nothing'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_does_not_train_is_refused_by_name(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        answer(ask({**ABOUT, **keys}))


def test_weights_that_do_not_train_are_trained_in_bf16_and_the_best_ep_size_is_picked() -> None:
    found = answer(ask({"model": "qwen3-30b-a3b", "hardware": "h200", "phase": "train"}))
    assert found.fits
    assert found.choice.picked == ("ep",)
    smaller = answer(ask({"model": "deepseek-v3", "hardware": "h200", "ep": 32, "phase": "train"}))
    assert smaller.plan.request.expert.weight_format == "bf16"
    assert smaller.training is not None
    serves = answer(ask({"model": "deepseek-v3", "hardware": "h200", "ep": 32}))
    assert serves.plan.request.expert.weight_format == "fp8"


def test_what_has_no_room_says_which_ep_size_would() -> None:
    found = answer(ask(ABOUT))
    assert not found.fits
    assert found.smallest_ep == 192
    assert found.verdict.startswith("DOES NOT FIT  training the routed experts of deepseek-v4-pro on gb200, EP64")


def test_every_term_and_the_page_say_what_the_step_says() -> None:
    found = answer(ask(ABOUT))
    assert found.training is not None
    terms = {term.name: term.value for term in explain(found)}
    assert terms["step"] == found.training.step_us
    assert terms["backward"] == found.training.backward.backward_us
    assert terms["kept by a forward of the layer"] == found.training.memory.kept_layer_gb
    drawn = page(found)
    assert drawn.timeline is not None
    assert drawn.timeline.layer_us == pytest.approx(found.training.step_us)
    assert {"data gradients", "weight gradients"} <= {span.lane for span in drawn.timeline.spans}
    assert drawn.sentence in found.training.sentence
    assert drawn.pareto is None
