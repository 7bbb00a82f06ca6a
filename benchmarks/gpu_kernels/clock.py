"""How long a launch takes on a device, beside others that take turns with it, and what the device can do at most."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIB = 1 << 20
# run(turn) launches once, on the inputs whose turn it is
Run = Callable[[int], object]

_BATCH_US = 400.0  # events resolve about 0.5 us
_MAX_BATCH = 64
_WARM_UP = 3
# AMD reports the L2 of one of its dies, behind which lie 256 MiB that all of them share
_LARGEST_CACHE = 256 * MIB


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one launch over the repeats: median, least, most."""

    us: float
    us_min: float
    us_max: float

    @classmethod
    def of(cls, values: list[float]) -> Times:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Batch:
    """Launches that are timed together. issue_s is what the host needs for one; turn counts over all batches."""

    run: Run
    size: int = 1
    issue_s: float = 0.0
    turn: int = 0

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
        for name, run in runs.items():
            try:
                batches[name] = self._prepare(run, ahead)
            except Exception as error:  # noqa: BLE001  whatever it raises is what the table says of it
                found[name] = first_line(error)
        values: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(self.repeats):
            for name, batch in batches.items():
                values[name].append(self._time(batch, ahead))
        return found | {name: Times.of(each) for name, each in values.items()}

    @abstractmethod
    def _prepare(self, run: Run, ahead: bool) -> Batch:
        """Compiles, warms up, and finds how many launches a batch needs."""

    @abstractmethod
    def _time(self, batch: Batch, ahead: bool) -> float:
        """Microseconds of one launch of a batch."""


class EventClock(Clock):
    """Between two events of the device's stream."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        super().__init__(device, repeats, 4 * max(cache, _LARGEST_CACHE))
        self._start, self._stop = _event(), _event()
        self._cycles_per_s = 0.0  # of _sleep(), which counts in a clock of the device's own
        for _ in range(2):
            self._cycles_per_s = 2e6 / (max(1.0, self._between(lambda: _sleep(2_000_000))) * 1e-6)

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
        batch.issue_s = (time.perf_counter() - begun) / batch.size
        torch.cuda.synchronize(self.device)
        batch.size = min(_MAX_BATCH, max(1, math.ceil(_BATCH_US / self._time(batch, ahead))))
        return batch

    def _time(self, batch: Batch, ahead: bool) -> float:
        if ahead:
            _sleep(int(self._cycles_per_s * (1.5 * batch.issue_s * batch.size + 50e-6)))
        return self._between(batch.launch) / batch.size


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
        batch = Batch(run)
        batch.launch()
        return batch

    def _time(self, batch: Batch, ahead: bool) -> float:
        del ahead
        begun = time.perf_counter()
        batch.launch()
        return (time.perf_counter() - begun) * 1e6


def clock_of(device: torch.device, repeats: int) -> Clock:
    return HostClock(device) if device.type == "cpu" else EventClock(device, repeats)


def first_line(error: BaseException) -> str:
    """ValueError: what it said, up to the first line's end"""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reached in a large BF16 matmul and in a large copy, bytes read and bytes written both counted."""

    tflop_s: float
    gb_s: float


def measure_ceilings(clock: Clock) -> Ceilings:
    """A matmul of 8192^3, a copy of 1 GiB. RuntimeError where one does not run."""
    size, num_bytes = (8192, 1024 * MIB) if clock.device.type != "cpu" else (64, MIB)
    left, right, product = (torch.randn(size, size, device=clock.device).to(torch.bfloat16) for _ in range(3))
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=clock.device) for _ in range(2))
    times = clock.compare(
        {"matmul": lambda _: torch.mm(left, right, out=product), "copy": lambda _: target.copy_(source)}
    )
    matmul, copy = times["matmul"], times["copy"]
    if isinstance(matmul, str) or isinstance(copy, str):
        raise RuntimeError(f"no ceilings: {matmul if isinstance(matmul, str) else copy}")
    return Ceilings(2 * size**3 / matmul.us * 1e-6, 2 * num_bytes / copy.us * 1e-3)
