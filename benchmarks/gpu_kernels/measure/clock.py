"""How long a launch takes on a device, beside others that take turns with it."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.gpu_kernels.process import first_line

MIB = 1 << 20
# run(turn) launches once, on the inputs whose turn it is
Run = Callable[[int], object]

_BATCH_US = 400.0  # events resolve about 0.5 us
_MAX_BATCH = 64
_WARM_UP = 3
_WARM_UP_US, _CALIBRATION_CYCLES, _MAX_WARM_UPS = 200_000.0, 2_000_000, 1000
_LEAST_SPIN_S, _LONGEST_SPIN_S = 50e-6, 0.1
# AMD reports the L2 of one of its dies, behind which lie 256 MiB that all of them share
_LARGEST_CACHE = 256 * MIB


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one launch over the repeats: median, least, most.

    by_host   in some repeat the device began before the host had launched all: the time may be the host's
    """

    us: float
    us_min: float
    us_max: float
    by_host: bool = False

    @classmethod
    def of(cls, values: list[float], *, by_host: bool = False) -> Times:
        return cls(statistics.median(values), min(values), max(values), by_host)


@dataclass(slots=True)
class Batch:
    """Launches that are timed together; turn counts over all batches.

    spin_s    how long the device is kept busy while they are launched
    by_host   whether that was once too short, however long
    """

    run: Run
    size: int = 1
    spin_s: float = 0.0
    turn: int = 0
    by_host: bool = False

    def launch(self) -> None:
        for _ in range(self.size):
            self.run(self.turn)
            self.turn += 1


class Clock(ABC):
    """Times launches on a device. cold_bytes: inputs that are larger than this in all are no longer in a cache."""

    def __init__(self, device: torch.device, repeats: int, cold_bytes: int) -> None:
        self.device, self.repeats, self.cold_bytes = device, repeats, cold_bytes

    def copies(self, num_bytes: int) -> int:
        """How many copies of an input take turns so that none is read from a cache.    cold 100, input 30 -> 4"""
        return max(1, math.ceil(self.cold_bytes / num_bytes))

    def compare(self, runs: Mapping[str, Run], *, ahead: bool = True) -> dict[str, Times | str]:
        """Times of every run, a batch of each in every repeat, or the first line of what it raised.

        ahead: the device does not begin before the host has launched the whole batch, so that only the device is timed
        """
        batches: dict[str, Batch] = {}
        found: dict[str, Times | str] = {}
        values: dict[str, list[float]] = {name: [] for name in runs}
        for name, run in runs.items():
            try:
                batches[name] = self._prepare(run, ahead)
            except Exception as error:  # noqa: BLE001  whatever it raises is what the table says of it
                found[name] = first_line(error)
        for _ in range(self.repeats):
            for name, batch in batches.items():
                try:
                    if name not in found:
                        values[name].append(self._time(batch, ahead))
                except Exception as error:  # noqa: BLE001
                    found[name] = first_line(error)
        sound = {name: each for name, each in batches.items() if name not in found}
        return found | {name: Times.of(values[name], by_host=each.by_host) for name, each in sound.items()}

    @abstractmethod
    def _prepare(self, run: Run, ahead: bool) -> Batch:
        """Compiles, warms up, and finds how many launches a batch needs."""

    @abstractmethod
    def _time(self, batch: Batch, ahead: bool) -> float:
        """Microseconds of one launch of a batch."""


class EventClock(Clock):
    """Between two events of the device's stream.

    The device is kept busy while the host launches: `_sleep` counts in a clock of the device's own, whose rate is found
    after it has run for a while, since a cold chip's is a fraction of a busy one's.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        super().__init__(device, repeats, 4 * max(cache, _LARGEST_CACHE))
        self._start, self._stop = _event(), _event()
        spun = 0.0
        for _ in range(_MAX_WARM_UPS):
            us = max(1.0, self._between(lambda: _sleep(_CALIBRATION_CYCLES)))
            self.cycles_per_s = _CALIBRATION_CYCLES / (us * 1e-6)
            spun += us
            if spun > _WARM_UP_US:
                break

    def _between(self, launch: Callable[[], object]) -> float:
        """Microseconds on the device."""
        self._start.record()
        launch()
        self._stop.record()
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) * 1e3

    def _prepare(self, run: Run, ahead: bool) -> Batch:
        batch = Batch(run, _WARM_UP)
        batch.launch()
        torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        batch.launch()
        issue_s = (time.perf_counter() - begun) / batch.size
        torch.cuda.synchronize(self.device)
        batch.spin_s = 1.5 * issue_s * batch.size + _LEAST_SPIN_S
        batch.size = min(_MAX_BATCH, max(1, math.ceil(_BATCH_US / self._time(batch, ahead))))
        batch.spin_s, batch.by_host = 1.5 * issue_s * batch.size + _LEAST_SPIN_S, False
        return batch

    def _time(self, batch: Batch, ahead: bool) -> float:
        """With twice the spin, and twice that, until the device has not begun when all is launched."""
        if not ahead:
            return self._between(batch.launch) / batch.size
        while True:
            us, queued = self._queued(batch)
            if queued or batch.by_host:
                return us
            if 2 * batch.spin_s > _LONGEST_SPIN_S:
                batch.by_host = True
                return us
            batch.spin_s *= 2

    def _queued(self, batch: Batch) -> tuple[float, bool]:
        """Microseconds of one launch, and whether the device had not begun when the last one was queued."""
        _sleep(int(self.cycles_per_s * batch.spin_s))
        self._start.record()
        batch.launch()
        queued = not self._start.query()  # type: ignore[no-untyped-call]
        self._stop.record()
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) * 1e3 / batch.size, queued


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _sleep(cycles: int) -> None:
    """Keeps the device busy."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


class HostClock(Clock):
    """The host's clock and one repeat: shows that what is measured runs, and says nothing of how fast."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, 1, 64 * 1024)

    def _prepare(self, run: Run, ahead: bool) -> Batch:
        del ahead
        return Batch(run)

    def _time(self, batch: Batch, ahead: bool) -> float:
        del ahead
        begun = time.perf_counter()
        batch.launch()
        return (time.perf_counter() - begun) * 1e6


def clock_of(device: torch.device, repeats: int) -> Clock:
    return HostClock(device) if device.type == "cpu" else EventClock(device, repeats)


class OnceClock(HostClock):
    """One copy of everything: for what is compiled or profiled and not timed."""

    def copies(self, num_bytes: int) -> int:
        del num_bytes
        return 1
