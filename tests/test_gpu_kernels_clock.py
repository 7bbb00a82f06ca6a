"""The benchmark's clock on a device that is made up: what is timed, what is compared, when the host is too slow."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_kernels.measure import clock
from benchmarks.gpu_kernels.measure.clock import EventClock, HostClock, Times


class MadeUp:
    """A host and a device whose times pass as they are told, in microseconds.

    now        the host's; a launch costs it issue_us
    free_at    when the device has done what is queued
    log        what was launched, "sleep" among it
    spun       what the device has slept in all; below cold_us its clock has 300 MHz, from then on 2000
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, issue_us: float = 1.0, cold_us: float = 0.0) -> None:
        self.now, self.free_at, self.spun = 0.0, 0.0, 0.0
        self.issue_us, self.cold_us, self.log = issue_us, cold_us, list[str]()
        patch.setattr(clock, "_event", lambda: MadeUpEvent(self))
        patch.setattr(clock, "_sleep", self._sleep)
        patch.setattr(time, "perf_counter", lambda: self.now * 1e-6)
        patch.setattr(torch.cuda, "synchronize", lambda _: self.wait(self.free_at))
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))

    def _sleep(self, cycles: int) -> None:
        us = cycles / (300 if self.spun < self.cold_us else 2000)
        self.spun += us
        self.launch("sleep", us)

    def launch(self, name: str, us: float) -> None:
        self.now += self.issue_us
        self.free_at = max(self.now, self.free_at) + us
        self.log.append(name)

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


class MadeUpEvent:
    def __init__(self, device: MadeUp) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.now, self.device.free_at)

    def query(self) -> bool:
        return self.device.now >= self.at

    def synchronize(self) -> None:
        self.device.wait(self.at)

    def elapsed_time(self, later: MadeUpEvent) -> float:
        return (later.at - self.at) / 1000


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_compared_takes_turns_in_batches_that_events_resolve(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = MadeUp(monkeypatch, issue_us=1.0 if ahead else 0.0)
    turns: list[int] = []

    def fast(turn: int) -> None:
        turns.append(turn)
        device.launch("fast", 10.0)

    def broken(_: int) -> None:
        raise RuntimeError("no such instruction\nmore")

    events = EventClock(torch.device("cuda", 0), 7)
    device.log.clear()
    found = events.compare(
        {"fast": fast, "broken": broken, "slow": lambda _: device.launch("slow", 150.0)}, ahead=ahead
    )
    assert found["broken"] == "RuntimeError: no such instruction"
    for name, us in (("fast", 10.0), ("slow", 150.0)):
        times = found[name]
        assert isinstance(times, Times)
        assert [times.us, times.us_min, times.us_max] == pytest.approx([us] * 3)
    sleep = ["sleep"] if ahead else []
    repeat = [*sleep, *["fast"] * 40, *sleep, *["slow"] * 3]
    assert device.log[-7 * len(repeat) :] == repeat * 7
    assert turns == list(range(len(turns))), "every launch has the next copy"


def test_times_are_the_median_the_least_and_the_most() -> None:
    assert Times.of([3.0, 1.0, 9.0, 2.0, 8.0]) == Times(3.0, 1.0, 9.0)


def test_copies_are_more_than_caches_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUp(monkeypatch)
    events = EventClock(torch.device("cuda", 0), 7)
    assert events.cold_bytes == 1 << 30, "what AMD's dies share is larger than the L2"
    assert [events.copies(size) for size in (2 << 30, 1 << 30, 300 << 20)] == [1, 1, 4]


def test_the_spin_is_set_by_a_warm_chips_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    device = MadeUp(monkeypatch, cold_us=150_000.0)
    assert EventClock(torch.device("cuda", 0), 7).cycles_per_s == pytest.approx(2e9, rel=0.01)
    assert 200_000 < device.spun < 220_000


def test_a_spin_that_is_too_short_is_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches take twenty times as long as when the spin was chosen, for as long as it has not grown."""
    device = MadeUp(monkeypatch)
    events = EventClock(torch.device("cuda", 0), 7)
    launches = 0

    def run(_: int) -> None:
        nonlocal launches
        launches += 1
        device.issue_us = 1.0 if launches <= 9 else 20.0
        device.launch("run", 10.0)

    found = events.compare({"run": run})["run"]
    assert isinstance(found, Times)
    assert [found.us, found.us_max] == pytest.approx([10.0] * 2)
    assert not found.by_host


def test_what_the_host_is_too_slow_for_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch waits for the device, as torch's fallback of grouped_mm does."""
    device = MadeUp(monkeypatch)
    events = EventClock(torch.device("cuda", 0), 7)

    def waits(_: int) -> None:
        device.wait(device.free_at)
        device.launch("waits", 10.0)

    device.log.clear()
    found = events.compare({"waits": waits, "sound": lambda _: device.launch("sound", 10.0)})
    times = {name: each for name, each in found.items() if isinstance(each, Times)}
    assert {name: each.by_host for name, each in times.items()} == {"waits": True, "sound": False}
    assert times["sound"].us == pytest.approx(10.0)
    assert device.log.count("sleep") < 7 * 2 + 30, "it does not go on doubling"


@pytest.mark.parametrize("failing", [0, 3])
def test_what_raises_in_the_middle_is_a_row_and_ends_nothing(failing: int) -> None:
    calls = iter(range(100))

    def run(_: int) -> None:
        if next(calls) == failing:
            raise RuntimeError("illegal address")

    host = HostClock(torch.device("cpu"))
    host.repeats = 5
    found = host.compare({"bad": run, "good": lambda _: None})
    assert found["bad"] == "RuntimeError: illegal address"
    assert isinstance(found["good"], Times)
