"""Calls of few tokens in the benchmark: stand-ins that answer as the group did, a model and its constants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from megamoe.catalog import Machine
from megamoe.execution import small_call
from megamoe.kernels.cpu.library import chosen
from megamoe.launch.bench import bench, small_probe
from megamoe.launch.bench.bench import BenchRequest, RankTimes, predict_run, run_bench
from megamoe.launch.bench.small import own_core, stand_ins
from megamoe.launch.bench.small_probe import FEW, small_constants, spread_evenly
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.symmetric import available
from megamoe.planner.validation.calibrate import check, with_measured
from megamoe.routing.agreement import PAGE_BYTES
from megamoe.schedule.machine import Run
from megamoe.schedule.small import (
    SMALL_PAGE_BYTES,
    SmallAmounts,
    missed_bytes,
    predict_small,
    small_bytes,
    small_compute_us,
)
from megamoe.schedule.training import predict_step
from megamoe.shape import MoEShape
from tests.cases import make_batch, make_layer, oracle, split
from tests.several_hosts import hosts
from tests.test_planner_machine import CPU

SHAPE = MoEShape(hidden=128, intermediate=96, num_experts=10, topk=4, swiglu_limit=3.0)
RUN = Run(2, None, 8, 1024, 512, 16, 4, "mxfp4", "mxfp8", 1, small=True)
has_small_calls = pytest.mark.skipif(
    not available() or chosen() is None, reason="few tokens go without waves on Linux and x86-64, with kernels"
)


def machine(**values: float) -> Machine:
    """CPU, which knows nothing of small calls, with constants for them."""
    known = {"call_us": 100, "gflops": 500, "packed_gflops": 400, "weight_ns": 0.05, "decode_ns": 0.01}
    known |= {"exchange_us": 30, "byte_ns": 2.0} | values
    return with_measured(CPU, "made up", **{f"small_{key}": value for key, value in known.items()})


def with_cache(cache_mb: float, **values: float) -> Machine:
    return with_measured(machine(**values), "made up", cache_mb=cache_mb)


# ---- what a call takes ----


def test_a_machine_of_before_says_nothing_of_calls_without_waves() -> None:
    with pytest.raises(ValueError, match="cpu does not say what calls without waves take"):
        predict_step(RUN, CPU)
    with pytest.raises(ValueError, match="calibrated with 1 threads"):
        predict_step(replace(RUN, threads_per_rank=2), machine())
    assert Machine.model_validate(CPU.model_dump()) == CPU
    assert Machine.model_validate(machine().model_dump(exclude_defaults=True)) == machine()


def test_a_call_without_waves_by_hand() -> None:
    matrices = 3 * 1024 * 512
    sent = 2240 + 8 * (1024 * 33 / 32 + 32) + 8 * 4 / 2 * 2048
    assert small_bytes(RUN) == pytest.approx(sent)
    found = predict_small(RUN, machine())
    amounts = SmallAmounts.of(RUN)
    compute = 100 + 2 * matrices * amounts.rows / 400e3 + matrices * amounts.experts * 0.01e-3
    assert found.compute_ms == pytest.approx(compute / 1e3)
    assert found.communication_ms == pytest.approx((60 + sent * 2e-3) / 1e3)
    assert found.overlapped_ms == pytest.approx(found.compute_ms + found.communication_ms), "nothing overlaps"
    bf16 = predict_small(replace(RUN, weight_format="bf16"), machine())
    assert bf16.compute_ms == pytest.approx(
        (100 + 2 * matrices * amounts.rows / 500e3 + matrices * amounts.experts * 0.05e-3) / 1e3
    )


def test_weights_that_no_cache_holds_come_from_memory() -> None:
    """Ranks share the cache; what is asked ahead hides behind computing, or computing behind it."""
    run = replace(RUN, weight_format="bf16")
    amounts = SmallAmounts.of(run)
    size = 3 * 1024 * 512 * amounts.experts * 2
    mb = 2 * size / 1e6
    for cache_mb, share in ((mb / 0.59, 0.0), (mb / 1.15, 0.5), (mb / 1.7, 1.0), (mb / 4, 1.0), (0.0, 1.0)):
        assert missed_bytes(run, with_cache(cache_mb), amounts) == pytest.approx(size * share, rel=1e-3)
    computed = small_compute_us(run, machine(), amounts)
    cached, slow, fast = (
        with_cache(*each, memory_ns=ns) for each, ns in (((2 * mb,), 1.0), ((1.0,), 0.1), ((1.0,), 1e-3))
    )
    assert small_compute_us(run, cached, amounts) == computed
    assert small_compute_us(run, fast, amounts) == pytest.approx(computed, rel=1e-4)
    assert small_compute_us(run, slow, amounts) == pytest.approx(
        100 + ((computed - 100) ** 3 + (size * 0.1e-3) ** 3) ** (1 / 3)
    )
    packed = replace(run, weight_format="mxfp4")
    assert missed_bytes(packed, with_cache(1.0), amounts) == pytest.approx(size / 2 * (1 / 2 + 1 / 32))


def test_a_layer_that_computes_for_longer_says_nothing_of_memory() -> None:
    """And the one of the probe is larger than a cache of 32 MB by far."""
    run, amounts = FEW[3].run(2, None, 1), FEW[3].amounts
    assert 2 * missed_bytes(run, with_cache(32), amounts) > 3 * 32e6
    found = as_measured(machine(gflops=1.0), 2)
    assert small_constants([found] * 2, [few.run(2, None, 1) for few in FEW], CPU)["small_memory_ns"] < 1e-3


def test_a_rank_alone_waits_for_nobody() -> None:
    found = predict_small(replace(RUN, ranks=1), machine())
    assert found.communication_ms == 0
    assert found.overlapped_ms == found.compute_ms


def test_latency_counts_once_an_exchange_and_a_slow_link_carries_what_it_can() -> None:
    near = predict_small(replace(RUN, link_gb_s=0.125), machine())
    far = predict_small(replace(RUN, link_gb_s=0.125, latency_ms=1.5), machine())
    assert far.overlapped_ms == pytest.approx(near.overlapped_ms + 3.0)
    slow = predict_small(replace(RUN, link_gb_s=0.0025), machine())
    assert slow.overlapped_ms == pytest.approx(small_bytes(RUN) / 2500 / CPU.link_efficiency.value)
    two_hosts = replace(RUN, ranks=4, link_gb_s=0.0025, ranks_per_host=2)
    assert predict_small(two_hosts, machine()).overlapped_ms == pytest.approx(
        2 * 2 / 3 * small_bytes(two_hosts) / 2500 / CPU.link_efficiency.value
    )


def test_more_ranks_than_cores_take_turns_in_computing() -> None:
    four = predict_small(replace(RUN, ranks=4, num_experts=32, topk=4), machine())
    amounts = SmallAmounts.of(replace(RUN, ranks=4, num_experts=32))
    once = (100 + 3 * 1024 * 512 * (2 * amounts.rows / 400e3 + amounts.experts * 0.01e-3)) / 1e3
    assert four.compute_ms == pytest.approx(2 * once)


@pytest.mark.parametrize(("ranks", "tokens", "experts", "topk"), [(2, 1, 16, 4), (2, 8, 16, 4), (4, 3, 32, 6)])
def test_rows_and_experts_of_the_fullest_rank_are_those_of_chance(
    ranks: int, tokens: int, experts: int, topk: int
) -> None:
    """Against two thousand draws."""
    run = replace(RUN, ranks=ranks, tokens_per_rank=tokens, num_experts=experts, topk=topk)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(2000, ranks * tokens, experts, generator=generator).topk(topk).indices
    ones = torch.nn.functional.one_hot(ids, experts).sum((1, 2)).view(2000, ranks, -1)
    rows, busy = ones.sum(2), (ones > 0).sum(2)
    fullest = rows.argmax(1, keepdim=True)
    found = SmallAmounts.of(run)
    assert found.rows == pytest.approx(rows.gather(1, fullest).double().mean().item(), rel=0.03)
    assert found.experts == pytest.approx(busy.gather(1, fullest).double().mean().item(), rel=0.05)


def test_the_fullest_rank_by_hand() -> None:
    found = SmallAmounts.of(replace(RUN, tokens_per_rank=1))
    assert found.rows == pytest.approx(5.05, abs=0.01)
    assert found.experts == pytest.approx(4.26, abs=0.01)


def test_all_experts_chosen_leave_nothing_to_chance() -> None:
    assert SmallAmounts.of(replace(RUN, num_experts=4, topk=4)) == SmallAmounts(32, 2)
    assert SmallAmounts.of(replace(RUN, ranks=1)) == SmallAmounts(32, 16 * (1 - 0.75**8))
    assert SmallAmounts.of(replace(RUN, ranks=1, num_experts=1, topk=1)) == SmallAmounts(8, 1)


def test_a_page_is_as_long_as_the_runtime_says() -> None:
    assert small_call._BEHIND == SMALL_PAGE_BYTES >= PAGE_BYTES


def test_delayed_links_are_known_without_waves() -> None:
    request = BenchRequest(tokens_per_rank=8, link="1gbit", latency_ms=1.0)
    near = predict_run(replace(request, latency_ms=0.0), machine(), small=True)
    assert predict_run(request, machine(), small=True).overlapped_ms == pytest.approx(near.overlapped_ms + 2)


@pytest.mark.parametrize(
    ("tokens", "small", "started"), [(8, True, [0.0, 1.0]), (8, False, [0.0, 1.0]), (300, False, [1.0])]
)
def test_constants_for_a_delayed_link_are_measured_without_the_delay(
    monkeypatch: pytest.MonkeyPatch, tokens: int, small: bool, started: list[float]
) -> None:
    delays = []

    class Ranks:
        def run(self, _: object, request: BenchRequest) -> list[RankTimes]:
            times = {"overlapped": [3.0], "compute": [0.5], "communication": [2.2]}
            return [RankTimes(times, 1, small, 100, 100, 10, "mxfp8", None, None)] * request.ranks

    @contextmanager
    def made_up(request: BenchRequest, _: object) -> Iterator[Ranks]:
        delays.append(request.latency_ms)
        yield Ranks()

    monkeypatch.setattr(bench, "_ranks", made_up)
    monkeypatch.setattr(bench, "machine_here", lambda *_, **__: machine())
    request = BenchRequest(tokens_per_rank=tokens, link="1gbit", latency_ms=1.0, check=False)
    report = run_bench(request)
    assert delays == started
    if small:
        assert report.predicted_ms == predict_run(request, machine(), small=True).overlapped_ms
        assert report.unpredicted is None
    else:
        assert report.predicted_ms is None
        assert report.unpredicted == "what waves take over delayed links is not known"


def test_runs_without_waves_neither_make_nor_check_a_machine() -> None:
    report: dict[str, Any] = {"small": True, "serial_ms": None}
    with pytest.raises(ValueError, match="went without waves"):
        check([report], CPU)


# ---- what the probe finds ----


def as_measured(behind: Machine, ranks: int) -> list[dict[str, float]]:
    """What a rank would find of FEW on a machine that does exactly as predicted."""
    found = []
    for few in FEW:
        run, amounts = few.run(ranks, None, 1), few.amounts
        us = small_compute_us(run, behind, amounts)
        alone = predict_small(run, behind).communication_ms
        found.append({"compute_ms": us / 1e3, "overlapped_ms": us / 1e3 + alone})
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "behind",
    [
        machine(),
        machine(call_us=300, gflops=50, packed_gflops=90, weight_ns=0.2, byte_ns=0.0),
        with_cache(32, memory_ns=0.04),
    ],
)
def test_the_fit_predicts_layers_that_it_did_not_see(
    behind: Machine, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_probe, "cache_bytes", lambda: 32_000_000)
    found = as_measured(behind, ranks)
    runs = [few.run(ranks, None, 1) for few in FEW]
    here = with_measured(CPU, "fitted", **small_constants([found] * ranks, runs, CPU))
    for tokens, weights in product((1, 8, 32), ("mxfp4", "bf16")):
        run = replace(RUN, ranks=ranks, tokens_per_rank=tokens, weight_format=weights)
        got, wanted = (predict_small(run, each) for each in (here, behind))
        assert got.overlapped_ms == pytest.approx(wanted.overlapped_ms, rel=0.03)


def test_the_slowest_rank_counts_and_too_little_makes_no_constants() -> None:
    found, runs = as_measured(machine(), 2), [few.run(2, None, 1) for few in FEW]
    slower = [{name: 1.5 * ms for name, ms in times.items()} for times in found]
    assert small_constants([found, slower], runs, CPU) == small_constants([slower, slower], runs, CPU)
    assert small_constants([[{}] * len(FEW)] * 2, runs, CPU) == {}, "all went by waves"
    in_bf16 = [times if few.weight_format == "bf16" else {} for few, times in zip(FEW, found, strict=True)]
    assert small_constants([in_bf16, in_bf16], runs, CPU) == {}
    without_most = [
        times if (few.tokens, few.weight_format) != (24, "mxfp4") else {} for few, times in zip(FEW, found, strict=True)
    ]
    assert set(small_constants([without_most] * 2, runs, CPU)) == set(small_constants([found] * 2, runs, CPU))


def test_times_that_vary_are_not_kept() -> None:
    odd, same = {"compute_ms": 1.0, "agreement": 0.5}, {"compute_ms": 1.0, "agreement": 0.9}
    assert not small_probe.disturbed([[odd, same, same, same, {}, odd, same], [odd, same, same, same, {}, same, same]])
    assert "on 3 of 7 layers" in small_probe.disturbed([[odd, same, odd, same], [same, same, odd, odd]])


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 1), (2, 1), (2, 6), (3, 24), (4, 6), (8, 1)])
def test_tokens_of_the_probe_are_spread_evenly(ranks: int, tokens: int) -> None:
    ids = torch.cat([spread_evenly(tokens, rank, ranks) for rank in range(ranks)])
    assert (ids[:, 0] != ids[:, 1]).all()
    counts = torch.bincount(ids.flatten(), minlength=4 * ranks).view(ranks, 4)
    amounts = small_probe.Few("bf16", tokens).amounts
    assert counts.sum(1).tolist() == [amounts.rows] * ranks
    assert (counts > 0).sum(1).tolist() == [amounts.experts] * ranks


@has_small_calls
def test_ranks_measure_what_goes_without_waves(ranks: LocalRanks) -> None:
    found = ranks.run(few_workloads, size=2)
    for first, last in found:
        assert set(first) == {"overlapped_ms", "compute_ms", "agreement"}
        assert all(ms > 0 for ms in first.values())
        assert last == {}, "so many tokens go by waves"


def few_workloads(group: EPGroup) -> list[dict[str, float]]:
    every, rounds = small_probe.FEW, small_probe.ROUNDS
    most = small_call.MAX_TOKENS
    small_probe.FEW = (small_probe.Few("bf16", 2, 64, 32), small_probe.Few("mxfp4", most + 1, 64, 32))
    small_probe.ROUNDS = 2
    try:
        return small_probe.measure_small(group)
    finally:
        small_probe.FEW, small_probe.ROUNDS = every, rounds


# ---- stand-ins ----


def alone(group: EPGroup, sizes: tuple[int, ...]) -> list[tuple[torch.Tensor, bool]]:
    """Outputs of the layer, of one whose exchanges are noted, and of one that is answered with what was noted."""
    batch = make_batch(SHAPE, 5 * group.size).part(split(5 * group.size, group.size)[group.rank])
    with hosts(group, sizes):
        layer = make_layer(SHAPE, group, name="plain")
        layer(batch.hidden, batch.ids, batch.weights)
        noted, silent = stand_ins(group.transport, small=True)
        found = []
        layers = [
            layer,
            *(
                MegaMoE(SHAPE, replace(group, transport=each), name=name)
                for name, each in (("t", noted), ("s", silent))
            ),
        ]
        for each in layers:
            each.experts = layer.experts
            found.append((each(batch.hidden, batch.ids, batch.weights), each.last_call.small))
            if noted is not None:
                noted.replay() if each is not layer else None
        found.append((layer(batch.hidden, batch.ids, batch.weights), layer.last_call.small))
    return found


@has_small_calls
@pytest.mark.parametrize("sizes", [(2,), (1, 1), (2, 1)], ids=str)
def test_a_call_whose_exchanges_are_noted_or_answered_has_the_same_bits(
    ranks: LocalRanks, sizes: tuple[int, ...]
) -> None:
    found = ranks.run(alone, sizes, size=sum(sizes))
    batch = make_batch(SHAPE, 5 * sum(sizes))
    for number, name in enumerate(("plain", "noted", "answered", "plain, after replays")):
        assert all(outputs[number][1] for outputs in found), name
        if name != "answered" or sizes == (2,):  # results of other hosts do not lie where they came to
            got = torch.cat([outputs[number][0] for outputs in found])
            assert torch.equal(got, oracle(SHAPE, batch, "mxfp4", "mxfp8")), name


def cores_of(group: EPGroup) -> tuple[set[int], set[int], set[int]]:
    before = os.sched_getaffinity(0)
    with own_core(group):
        within = os.sched_getaffinity(0)
    return before, within, os.sched_getaffinity(0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are not bound to cores here")
def test_a_rank_has_a_core_of_its_own_while_it_is_measured(ranks: LocalRanks) -> None:
    found = ranks.run(cores_of, size=2)
    enough = len(found[0][0]) >= 2
    for before, within, after in found:
        assert before == after
        assert len(within) == (1 if enough else len(before))
    assert (found[0][1] != found[1][1]) == enough
