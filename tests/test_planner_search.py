"""Claims about the search: it finds what trying everything finds, says why the rest fell out, and does so fast."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.catalog import Hardware, Model, Profile, find_profile, load_hardware, load_model
from megamoe.planner.answer import answer
from megamoe.planner.question import Subject, ask
from megamoe.planner.search.choose import deployment_of
from megamoe.planner.search.recommend import QUEUE, UTILIZATION, Load, Recommendation, recommend
from megamoe.planner.search.search import SearchResult, Space, Targets, search
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.memory import memory
from megamoe.planner.serving.serving import Serving, measure, serve
from megamoe.planner.serving.step import Costs

SMALL = Space(
    eps=(8, 16, 32),
    attention_tps=(1, 2),
    batches=(4, 32, 128, 512),
    mtps=(0, 2),
    microbatches=(1, 2),
    kv_formats=("fp8", "bf16"),
)


@cache
def subject(model: str = "deepseek-v4-pro", hardware: str = "gb200") -> tuple[Model, Hardware, Profile]:
    device = load_hardware(hardware)
    return load_model(model), device, find_profile(device)


@cache
def everything() -> list[Serving]:
    """The small space by plain loops and the public `serve`."""
    model, hardware, profile = subject()
    axes = itertools.product(
        SMALL.eps, SMALL.attention_tps, SMALL.batches, SMALL.mtps, SMALL.microbatches, SMALL.kv_formats
    )
    return [
        serve(
            Deployment(
                model, hardware, profile, ep, ep, batch, 8192,
                attention_tp=tp, mtp=mtp, microbatches=halves, kv_format=kv,
            )
        )
        for ep, tp, batch, mtp, halves, kv in axes
    ]  # fmt: skip


def found(targets: Targets | None = None) -> SearchResult:
    return search(*subject(), context=8192, space=SMALL, targets=targets)


@pytest.mark.parametrize("user", [None, 20.0, 60.0, 120.0])
def test_search_finds_what_trying_everything_finds(user: float | None) -> None:
    good = [s for s in everything() if s.fits and s.tokens_per_s_per_user >= (user or 0)]
    best = max(good, key=lambda s: s.tokens_per_s_per_device)
    result = found(Targets(tokens_per_s_per_user=user))
    assert result.tried == len(everything()) == len(SMALL)
    assert result.best == best


def test_search_says_why_the_others_fell_out() -> None:
    result = found(Targets(tpot_ms=20))
    unfit = sum(not s.fits for s in everything())
    slow = sum(s.fits and s.tpot_ms is not None and s.tpot_ms > 20 for s in everything())
    assert result.rejected == {"memory": unfit, "tpot_ms": slow}
    assert unfit > 0 < slow


def test_front_holds_those_that_no_other_beats() -> None:
    def beaten(each: Serving) -> bool:
        return any(
            other.tokens_per_s_per_user >= each.tokens_per_s_per_user
            and other.tokens_per_s_per_device > each.tokens_per_s_per_device
            for other in everything()
            if other.fits
        )

    expected = {s.tokens_per_s_per_device for s in everything() if s.fits and not beaten(s)}
    front = found().front
    assert {s.tokens_per_s_per_device for s in front} == expected
    assert len(front) >= 3
    users = [s.tokens_per_s_per_user for s in front]
    assert users == sorted(users, reverse=True)


def test_a_target_out_of_reach_leaves_the_nearest() -> None:
    result = found(Targets(tokens_per_s_per_user=1e6))
    assert result.best is None
    assert result.nearest is not None
    assert result.nearest.tokens_per_s_per_user == max(s.tokens_per_s_per_user for s in everything() if s.fits)


def test_nothing_fits_says_the_least_memory() -> None:
    model, hardware, profile = subject("deepseek-v4-pro", "h100")
    result = search(model, hardware, profile, context=8192, devices=8)
    assert result.best is None
    assert result.nearest is None
    assert result.rejected == {"memory": result.tried}
    assert result.least_gb > 80


def test_devices_are_all_used() -> None:
    model, hardware, profile = subject()
    result = search(model, hardware, profile, context=8192, devices=48)
    assert result.best is not None
    assert {s.deployment.devices for s in result.front} == {48}
    assert all(48 % s.deployment.ep == 0 for s in result.front)


def test_cheapest_is_the_one_with_most_tokens_where_all_cost_the_same() -> None:
    model, hardware, profile = subject()
    by_price = search(model, hardware, profile, context=8192, space=SMALL, objective="usd_per_million_tokens")
    assert by_price.best == found().best
    with pytest.raises(ValueError, match="ascend-950dt has no price"):
        search(*subject("deepseek-v4-pro", "ascend-950dt"), context=8192, objective="usd_per_million_tokens")


def test_prefill_is_searched_by_time_to_first_token() -> None:
    model, hardware, profile = subject()
    fast = search(model, hardware, profile, context=8192, phase="prefill", targets=Targets(ttft_ms=800))
    free = search(model, hardware, profile, context=8192, phase="prefill")
    assert fast.best is not None
    assert free.best is not None
    assert fast.best.ttft_ms is not None
    assert fast.best.ttft_ms <= 800
    assert fast.best.tokens_per_s_per_device <= free.best.tokens_per_s_per_device
    assert fast.rejected["ttft_ms"] > 0


@pytest.mark.parametrize("targets", [{"tpot_ms": 0.0}, {"ttft_ms": -1.0}, {"tokens_per_s_per_user": float("nan")}])
def test_targets_that_make_no_sense_are_refused(targets: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a target is above 0"):
        Targets(**targets)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ep": 16, "devices": 24}, "^24 devices cannot be divided into groups of EP16$"),
        ({"devices": 8, "attention_tp": 3}, "no EP size of deepseek-v4-pro divides 8 devices in attention groups of 3"),
        ({"ep": 8, "hardware": "gb300", "devices": 64, "tpot_ms": 0.001}, r"none of \d+ deployments reaches tpot_ms"),
    ],
    ids=["ep", "attention_tp", "target"],
)
def test_a_question_that_no_deployment_answers_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answer(ask({"model": "deepseek-v4-pro", "hardware": "h100", "context": 8192, **keys}))


def test_where_nothing_fits_a_target_does_not_matter() -> None:
    found = answer(ask({"model": "deepseek-v4-pro", "hardware": "h100", "context": 8192, "ep": 1, "tpot_ms": 0.001}))
    assert found.choice.why.startswith("none of ")
    assert not found.memory.fits


def test_what_a_question_says_of_serving_is_what_is_deployed() -> None:
    """All as they are asked for, and each as if it were not asked for where it is left out."""
    keys = {"ep": 16, "batch": 8, "context": 4096, "devices": 32, "attention_tp": 2, "microbatches": 2, "cached": 0}
    drafts = {"mtp": 2, "accept": 1.5, "head_split": 4, "dense_format": "bf16", "kv_format": "fp8"}
    asked = ask({"model": "deepseek-v4-pro", "hardware": "gb300", "phase": "decode", **keys, **drafts})
    of = Subject.of(asked)
    made = deployment_of(asked, of)
    for key, value in (keys | drafts).items():
        assert getattr(made, {"batch": "batch_per_device"}.get(key, key)) == value, key
    prompts = asked.but(phase="prefill", cached=1024, chunk=512, mtp=None, accept=None, microbatches=None, devices=None)
    made = deployment_of(prompts.but(attention_tp=None), of)
    assert (made.phase, made.cached, made.chunk, made.mtp) == ("prefill", 1024, 512, 0)
    assert (made.attention_tp, made.microbatches, made.devices) == (1, 1, 16)
    assert deployment_of(prompts.but(ep=6, attention_tp=4), of).devices == 12


@pytest.mark.parametrize(("share", "groups"), [(0.3, 1), (1.0, 1), (2.5, 3)])
def test_a_rate_that_is_asked_for_takes_whole_groups(share: float, groups: int) -> None:
    keys = {"model": "deepseek-v4-pro", "hardware": "gb300", "context": 8192, "ep": 8, "batch": 64}
    of_group = answer(ask({**keys, "devices": 8})).serving
    assert of_group is not None
    rate = share * 8 * of_group.tokens_per_s_per_device * (1 - 1e-9)
    assert answer(ask({**keys, "target_tps": rate})).choice.question.devices == groups * 8


def test_no_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="devices is 0"):
        search(*subject(), context=8192, devices=0)


def test_five_thousand_deployments_in_under_three_seconds() -> None:
    """About 0.1 ms each; every one in the space fits, so that none is answered by its memory alone."""
    model, hardware, profile = subject("deepseek-v4-flash", "gb300")
    space = replace(
        Space.of(model, hardware), eps=(8, 16, 32, 64, 128, 256), batches=tuple(range(2, 56)), attention_tps=(1, 2)
    )
    start = time.process_time()
    result = search(model, hardware, profile, context=8192, space=space)
    seconds = time.process_time() - start
    assert result.tried == len(space) == 10368
    assert result.rejected.get("memory", 0) < 0.05 * result.tried
    assert seconds * 5000 / result.tried < 3


def test_search_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from megamoe.catalog import *; from megamoe.planner.search.search import search\n"
        "hardware = load_hardware('gb200')\n"
        "asked = load_model('deepseek-v4-pro'), hardware, find_profile(hardware)\n"
        "assert search(*asked, context=8192, devices=16).best\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_recommendation_measures_few_of_its_deployments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is counted, which no other program on the machine changes: tried, measured, pieces that were made."""
    counted = {"tried": 0, "measured": 0, "pieces": 0}

    def counting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted_work(*args: Any, **keys: Any) -> Any:
            counted[name] += 1
            return work(*args, **keys)

        return counted_work

    monkeypatch.setattr("megamoe.planner.search.recommend.memory", counting("tried", memory))
    monkeypatch.setattr("megamoe.planner.search.recommend.measure", counting("measured", measure))
    monkeypatch.setattr(Costs, "piece", counting("pieces", Costs.piece))
    model, hardware, profile = subject()
    found = recommend(model, hardware, profile, LOAD)
    spaces = len(Space.of(model, hardware)) + len(Space.of(model, hardware, phase="prefill"))
    assert spaces > 20_000
    assert counted["tried"] < spaces / 4, "what one replica of has more devices than the best need not be looked at"
    assert counted["measured"] < counted["tried"] / 2
    assert counted["pieces"] < spaces / 2, "most pieces are the same for every EP size"
    assert found.decode.devices < 200


@pytest.mark.parametrize("tpot_ms", [None, 12.0, 30.0])
def test_what_is_not_measured_could_not_have_won(tpot_ms: float | None) -> None:
    model, hardware, profile = subject()
    load = replace(LOAD, requests_per_s=400)
    found = recommended(load, Targets(tpot_ms=tpot_ms))
    needed = load.requests_per_s * load.output_tokens
    ranks = []
    for ep, batch, mtp in itertools.product(DECODE.eps, DECODE.batches, DECODE.mtps):
        served = serve(Deployment(model, hardware, profile, ep, ep, batch, 6400, mtp=mtp))
        if served.fits and (tpot_ms is None or (served.tpot_ms or 0) <= tpot_ms):
            replicas = -(-needed // (served.tokens_per_s_per_device * ep * UTILIZATION))
            ranks.append((replicas * ep, -served.tokens_per_s_per_user))
    assert (found.decode.devices, -found.decode.serving.tokens_per_s_per_user) == min(ranks)


LOAD = Load(requests_per_s=50, input_tokens=6000, output_tokens=800)
PREFILL = Space(eps=(8, 16), batches=(1, 4))
DECODE = Space(eps=(8, 16, 32), batches=(16, 64, 128, 256), mtps=(0, 1))


def recommended(load: Load, targets: Targets | None = None) -> Recommendation:
    return recommend(*subject(), load, targets=targets, prefill_space=PREFILL, decode_space=DECODE)


def test_recommended_pools_carry_the_load_and_meet_the_targets() -> None:
    answer = recommended(LOAD, Targets(tpot_ms=25, ttft_ms=3000))
    assert answer.prefill.load_tokens_per_s == 50 * 6000
    assert answer.decode.load_tokens_per_s == 50 * 800
    for pool in (answer.prefill, answer.decode):
        assert pool.utilization <= UTILIZATION
        assert pool.replicas == 1 or (pool.replicas - 1) * pool.capacity_tokens_per_s / pool.replicas * UTILIZATION < (
            pool.load_tokens_per_s
        )
        assert pool.serving == serve(pool.serving.deployment)
    assert answer.decode.serving.tpot_ms is not None
    assert answer.decode.serving.tpot_ms <= 25
    assert answer.ttft_ms == pytest.approx(QUEUE * (answer.prefill.serving.ttft_ms or 0))
    assert answer.ttft_ms <= 3000
    assert answer.decode.serving.deployment.context == 6400
    assert answer.usd_per_hour == pytest.approx(2.75 * answer.devices)


@given(st.floats(1, 2000), st.floats(1.01, 5))
@settings(deadline=None, max_examples=10)
def test_more_load_never_needs_fewer_devices(requests_per_s: float, times: float) -> None:
    little = recommended(replace(LOAD, requests_per_s=requests_per_s))
    much = recommended(replace(LOAD, requests_per_s=requests_per_s * times))
    assert much.prefill.devices >= little.prefill.devices
    assert much.decode.devices >= little.decode.devices


def test_the_most_that_is_said_to_be_carried_is_carried_and_a_little_more_is_not() -> None:
    with pytest.raises(ValueError, match=r"^requests_per_s 1e\+11 takes more devices") as refusal:
        recommended(replace(LOAD, requests_per_s=1e11))
    most = float(str(refusal.value).rpartition(" ")[2])
    assert 9.8e6 < max(pool_sizes(0.995 * most)) <= 10**7
    with pytest.raises(ValueError, match="takes more devices"):
        recommended(replace(LOAD, requests_per_s=1.005 * most))


def pool_sizes(requests_per_s: float) -> tuple[int, int]:
    found = recommended(replace(LOAD, requests_per_s=requests_per_s))
    return found.prefill.devices, found.decode.devices


def test_cached_input_needs_no_prefill() -> None:
    half = recommended(replace(LOAD, cached_tokens=3000))
    assert half.prefill.load_tokens_per_s == 50 * 3000
    assert half.prefill.devices <= recommended(LOAD).prefill.devices


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets(ttft_ms=1), "no deployment reaches ttft_ms 1; the fastest takes"),
        (Targets(tpot_ms=0.1), "no deployment meets tpot_ms; the fastest has"),
        (Targets(tokens_per_s_per_user=1e5), "no deployment meets tokens_per_s_per_user; the fastest has"),
    ],
    ids=["ttft", "tpot", "user"],
)
def test_a_load_that_nothing_can_carry_names_the_nearest(targets: Targets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommended(LOAD, targets)


def test_a_model_too_large_for_every_deployment_says_how_large() -> None:
    one = Space(eps=(1,), batches=(1,))
    with pytest.raises(ValueError, match=r"no deployment fits; the least needs \d+\.\d GB of 171.1 a device"):
        recommend(*subject(), LOAD, prefill_space=one, decode_space=one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests_per_s": 0.0}, "requests_per_s is 0"),
        ({"requests_per_s": float("inf")}, "requests_per_s is inf; the planner goes up to 1e.12"),
        ({"input_tokens": 10**400}, "input_tokens is 10*; the planner goes up to 1000000000"),
        ({"input_tokens": 0}, "input_tokens is 0"),
        ({"output_tokens": -1}, "output_tokens is -1"),
        ({"cached_tokens": 6000}, "cached_tokens 6000 lies outside"),
    ],
    ids=["requests", "infinite", "long", "input", "output", "cached"],
)
def test_loads_that_make_no_sense_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LOAD, **changes)  # type: ignore[arg-type]
