"""Constants of this machine: kept whole, found again, refused where they are another's; the probe that finds them."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megamoe.catalog import load_machine
from megamoe.launch.bench import probe, small_probe
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.schedule import kept
from megamoe.schedule.kept import Setting
from megamoe.schedule.machine import intervals, predict
from megamoe.schedule.training import backward_work, predict_step
from tests.test_planner_machine import machine

SETTING = Setting("a CPU", 2, "fma", "0.1", 1, 2, shaped=True)
CPU = load_machine("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_kept_is_found_for_its_setting_alone() -> None:
    assert kept.find(SETTING) is None
    assert kept.keep(SETTING, CPU) == ""
    assert kept.find(SETTING) == CPU
    other: dict[str, Any]
    for other in (
        {"cpu": "b"},
        {"cores": 3},
        {"kernels": "amx"},
        {"version": "0.2"},
        {"ranks": 3},
        {"shaped": False},
        {"shared_memory": False},
    ):
        assert kept.find(replace(SETTING, **other)) is None, other
    assert [path.suffix for path in SETTING.path.parent.iterdir()] == [".json"], "nothing half written stays"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 1}', "\0", '{"setting": {}, "machine": {}}'], ids=repr)
def test_a_damaged_file_counts_as_none_and_is_replaced(text: str) -> None:
    kept.keep(SETTING, CPU)
    SETTING.path.write_text(text)
    assert kept.find(SETTING) is None
    kept.keep(SETTING, CPU)
    assert kept.find(SETTING) == CPU


def test_a_file_of_before_calls_without_waves_were_measured_is_measured_again_and_never_read() -> None:
    """Earlier settings had no shared_memory, and so had the names of their files."""
    earlier = {key: value for key, value in asdict(SETTING).items() if key != "shared_memory"}
    text = json.dumps({"setting": earlier, "machine": CPU.model_dump(exclude_defaults=True)})
    SETTING.path.parent.mkdir(parents=True)
    digest = hashlib.sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()
    earlier_path = SETTING.path.with_name(f"{digest[:16]}.json")
    earlier_path.write_text(text)
    assert earlier_path != SETTING.path
    assert kept.find(SETTING) is None
    SETTING.path.write_text(text)
    assert kept.find(SETTING) is None
    kept.keep(SETTING, CPU)
    assert kept.find(SETTING) == CPU


def test_constants_that_no_machine_has_count_as_none() -> None:
    kept.keep(SETTING, CPU)
    found = json.loads(SETTING.path.read_text())
    found["machine"]["product_gflops"]["value"] = 0
    SETTING.path.write_text(json.dumps(found))
    assert kept.find(SETTING) is None


def test_a_folder_that_takes_no_file_is_named_and_nothing_raises(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "megamoe").write_text("a file where a folder should be")
    assert str(cache) in kept.keep(SETTING, CPU)
    assert kept.find(SETTING) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kept.folder() == Path.home() / ".cache" / "megamoe" / "machines"


def test_writers_and_readers_at_once_see_a_whole_file() -> None:
    machines = [machine(wave_us=us) for us in (100, 200)]
    kept.keep(SETTING, machines[0])

    def work(number: int) -> bool:
        kept.keep(SETTING, machines[number % 2])
        return kept.find(SETTING) in machines

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(64)))


# ---- the probe ----


def as_measured(behind: Any, link_gb_s: float) -> list[list[dict[str, float]]]:
    """What two ranks would find of SMALL on a machine that does exactly as predicted."""
    found = []
    for small in probe.SMALL:
        run = small.run(2, link_gb_s, 1)
        said = asdict(predict(run, behind))
        said["compute_ms"] += len(intervals(run, behind, run.waves)) * behind.wave_us.value / 1e3
        times = {key: value for key, value in said.items() if key.endswith("_ms")}
        if small.backward:
            times["backward_ms"] = backward_work(run, behind).total / 1e3
        found.append(times | {"wall_ms": said["compute_ms"], "agreement": 1.0})
    return [found, found]


@pytest.mark.parametrize(
    "behind", [machine(), machine(product_gflops=400, value_ns=0.6, weight_ns=0.1, link_share=0.44, gradient_ns=0.4)]
)
def test_the_fit_predicts_larger_layers_than_it_saw(behind: Any) -> None:
    here = probe.fitted(as_measured(behind, 0.125), replace(SETTING, cores=behind.cores), 0.125)
    assert "this machine, measured" in here.title
    assert here.gradient_ns.value == pytest.approx(behind.gradient_ns.value, rel=0.05)
    for small in probe.SMALL:
        for link in (0.0625, 0.125, 0.25):
            run = replace(small.run(2, link, 1), tokens_per_rank=2048, hidden=1024, intermediate=512, waves=4)
            assert predict(run, here).overlapped_ms == pytest.approx(predict(run, behind).overlapped_ms, rel=0.05)
            step, wanted = (predict_step(replace(run, backward=True), each) for each in (here, behind))
            assert step.overlapped_ms == pytest.approx(wanted.overlapped_ms, rel=0.05)


def test_a_machine_is_measured_once_and_a_busy_one_is_not_kept(
    ranks: LocalRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "fitted", lambda *_: CPU)
    for taken, times in (("others were at work", 2), ("", 1)):
        measured: list[object] = []
        said: list[str] = []
        monkeypatch.setattr(probe, "disturbed", lambda _, taken=taken: taken)
        monkeypatch.setattr(
            ranks, "run", lambda work, measured=measured: measured.append(work) or as_measured(CPU, 0.1)
        )
        titles = [probe.machine_here(ranks, 0.1, said.append).title for _ in range(2)]
        assert len(measured) == len(said) == times
        assert ["not kept: others were at work" in title for title in titles] == [bool(taken)] * 2


def test_calls_of_few_tokens_are_measured_where_they_are_asked_for_and_others_stay_kept(
    ranks: LocalRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    few = CPU.model_copy(update={"small_call_us": CPU.call_us})
    monkeypatch.setattr(probe, "fitted", lambda *_: CPU)
    monkeypatch.setattr(probe, "with_small", lambda *_: few)
    monkeypatch.setattr(probe, "disturbed", lambda _: "")
    monkeypatch.setattr(ranks, "run", measured.append)
    assert probe.machine_here(ranks, 0.1).small_call_us is None
    for taken, times in (("times varied", 2), ("", 1)):
        del measured[:]
        monkeypatch.setattr(small_probe, "disturbed", lambda _, taken=taken: taken)
        found = [probe.machine_here(ranks, 0.1, few=True) for _ in range(2)]
        assert measured == [small_probe.measure_small] * times, "waves are not measured again"
        assert [each.small_call_us for each in found] == [few.small_call_us] * 2
        assert ["not kept: times varied" in each.title for each in found] == [bool(taken)] * 2
        assert probe.machine_here(ranks, 0.1).title == CPU.title


def test_times_of_few_tokens_that_vary_do_not_cost_the_others_their_place(
    ranks: LocalRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of which nothing was kept before."""
    measured: list[object] = []
    monkeypatch.setattr(probe, "fitted", lambda *_: CPU)
    monkeypatch.setattr(probe, "with_small", lambda *_: CPU.model_copy(update={"small_call_us": CPU.call_us}))
    monkeypatch.setattr(probe, "disturbed", lambda _: "")
    monkeypatch.setattr(small_probe, "disturbed", lambda _: "times varied")
    monkeypatch.setattr(ranks, "run", measured.append)
    assert "not kept: times varied" in probe.machine_here(ranks, 0.1, few=True).title
    assert probe.machine_here(ranks, 0.1) == CPU
    assert measured == [probe.measure_rank, small_probe.measure_small]


def test_disturbance_is_what_went_by_beyond_core_time() -> None:
    quiet, busy = ({"compute_ms": 10.0, "wall_ms": wall, "agreement": 1.0} for wall in (10.2, 30.0))
    assert not probe.disturbed([[quiet, quiet, busy], [quiet, busy, quiet]])
    assert "200% longer" in probe.disturbed([[quiet, busy, busy], [quiet, busy, busy]])


def test_disturbance_is_layers_of_which_no_two_rounds_agree() -> None:
    same, odd = ({"compute_ms": 10.0, "wall_ms": 10.0, "agreement": part} for part in (0.95, 0.7))
    assert not probe.disturbed([[odd, odd, same, same], [odd, same, same, same]])
    assert "3 of 4" in probe.disturbed([[odd, odd, same, same], [odd, same, same, odd]])


def test_rounds_agree_by_their_two_least_times() -> None:
    rounds = [{"compute_ms": ms, "overlapped_ms": 5.0, "wall_ms": 100 * ms} for ms in (14.0, 10.0, 12.5)]
    assert probe.agreement(rounds) == pytest.approx(10.1 / 12.5)
    assert probe.agreement([{"communication_ms": 0.02}, {"communication_ms": 0.09}]) == 1.0


@pytest.mark.parametrize(("odd", "rounds"), [(0, 3), (2, 3), (3, 8)])
def test_a_rank_measures_until_rounds_agree_and_no_more_than_eight(
    monkeypatch: pytest.MonkeyPatch, odd: int, rounds: int
) -> None:
    taken: list[int] = []

    class Workload:
        def __init__(self, _: object, small: probe.Small) -> None:
            self.odd, self.calls = small.tokens <= odd, 0

        def measure(self) -> dict[str, float]:
            self.calls += 1
            taken.append(self.calls)
            ms = 10.0 * 0.8**self.calls if self.odd else 10.0
            return {"overlapped_ms": ms, "compute_ms": 5.0, "communication_ms": 3.0, "wall_ms": 5.0}

    monkeypatch.setattr(probe, "_Workload", Workload)
    monkeypatch.setattr(probe, "SMALL", tuple(probe.Small("bf16", number, 64, 32, 1) for number in range(1, 5)))
    found = probe.measure_rank(EPGroup(0, 1, None, 5.0))
    assert max(taken) == rounds
    assert [each["agreement"] < probe.AGREED for each in found] == [number <= odd for number in range(1, 5)]


def test_ranks_measure_every_workload(ranks: LocalRanks) -> None:
    found = ranks.run(few_workloads, size=2)
    assert [len(each) for each in found] == [2, 2]
    for times in (*found[0], *found[1]):
        assert all(value > 0 for value in times.values())
        assert ("backward_ms" in times) == (times is found[0][0] or times is found[1][0])
        assert times["serial_ms"] == times["compute_ms"] + times["communication_ms"]


def few_workloads(group: Any) -> list[dict[str, float]]:
    every, probe.SMALL = (
        probe.SMALL,
        (probe.Small("bf16", 32, 64, 32, 2, backward=True), probe.Small("mxfp4", 16, 64, 32, 1)),
    )
    try:
        return probe.measure_rank(group)
    finally:
        probe.SMALL = every
