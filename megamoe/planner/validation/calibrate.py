"""Fits a machine to runs of `megamoe bench --format json`, and holds one against runs that it did not see.

Compute and communication, each measured alone, are sums of amounts times constants: least squares of relative errors,
no constant below zero, and runs that something disturbed count less. What a byte costs the core that computes, what a
link does while it carries, and what a wave costs, show only where both run at once: they are the values that leave the
least error of the overlapped times. Links of several rates tell bytes from time on the link.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import log
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from megamoe.catalog.machine import Machine
from megamoe.catalog.schema import Figure
from megamoe.schedule.machine import Amounts, Predicted, Run, intervals
from megamoe.schedule.training import predict_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEWEST_RUNS = 8
_ROUNDS = 3  # the order of steps depends on the constants that are fitted, a little
_COMPUTE = ("product_gflops", "weight_ns", "decode_ns", "value_ns", "round_ns", "call_us")
_REWEIGHTED = 8
_NEAR = 0.03  # a run this far off counts in full; one that something disturbed, less
_BYTE_NS = [0.3 * step for step in range(11)]
_LINK_SHARES = [0.06 * step for step in range(7)]
_FINER = (-0.2, -0.1, 0.0, 0.1, 0.2)  # of both, around the best: ns, and a fifth of it as a share
_WAVES_US = [50.0 * step for step in range(11)]  # more than sweeps of the number of waves ever showed
_BURSTS_US = [500.0 * step for step in range(17)]


@dataclass(frozen=True, slots=True)
class Check:
    """One measured run and what a machine says, in milliseconds."""

    run: Run
    predicted: Predicted
    compute_ms: float
    communication_ms: float
    serial_ms: float
    overlapped_ms: float

    @property
    def error_pct(self) -> float:
        """Of the overlapped layer, which is what the layer takes."""
        return 100 * (self.predicted.overlapped_ms / self.overlapped_ms - 1)


def check(reports: Sequence[dict[str, Any]], machine: Machine) -> list[Check]:
    """ValueError for reports that lack a key, of calls without waves, or of other threads than the machine's."""
    _refuse_small(reports)
    times = ("compute_ms", "communication_ms", "serial_ms", "overlapped_ms")
    return [
        Check(Run.of(each), predict_step(Run.of(each), machine), *(float(each[key]) for key in times))
        for each in reports
    ]


def _refuse_small(reports: Sequence[dict[str, Any]]) -> None:
    if any(each.get("small") for each in reports):
        raise ValueError("runs of few tokens that went without waves make no machine: give --waves, or more tokens")


def median_error(checks: Sequence[Check]) -> float:
    """Percent, whatever the sign, of the overlapped layer."""
    return median(abs(each.error_pct) for each in checks)


def calibrate(reports: Sequence[dict[str, Any]], start: Machine, *, name: str, cores: int, source: str) -> Machine:
    """A machine that fits the reports, from the constants of `start` on.

    ValueError for fewer than 8 reports, for reports of different threads or devices or of calls without waves, and
    where nothing was shaped or everything was, so that a link's constants cannot be told apart from loopback's:
    those keep `start`'s values.
    """
    threads = {int(each["threads_per_rank"]) for each in reports}
    if len(reports) < FEWEST_RUNS:
        raise ValueError(f"{len(reports)} runs are too few to fit {len(_COMPUTE)} constants: at least {FEWEST_RUNS}")
    if any(each.get("backward") for each in reports):
        raise ValueError("runs of --backward make no machine: what they take follows from forwards and gradient_ns")
    _refuse_small(reports)
    if len(threads) > 1:
        raise ValueError(f"runs with {' and '.join(map(str, sorted(threads)))} threads a rank cannot make one machine")
    title = f"Fitted to {len(reports)} runs of megamoe bench"
    machine = start.model_copy(
        update={"name": name, "title": title, "fitted": source, "cores": cores, "threads_per_rank": threads.pop()}
    )
    for _ in range(_ROUNDS):
        machine = with_measured(machine, source, **_fit_compute(reports, machine))
        machine = _fit_link(reports, machine, source)
        machine = _fit_together(reports, machine, source)
    return machine


def as_yaml(machine: Machine) -> str:
    """A file that load_machine() reads."""
    import yaml

    return yaml.safe_dump(machine.model_dump(exclude_defaults=True), sort_keys=False, width=120)


def with_measured(machine: Machine, source: str, **values: float) -> Machine:
    """The machine with other constants, to four digits."""
    figures = {key: Figure(value=float(f"{value:.4g}"), tag="measured", source=source) for key, value in values.items()}
    return machine.model_copy(update=figures)


def _fit_compute(reports: Sequence[dict[str, Any]], machine: Machine) -> dict[str, float]:
    rows, measured = [], []
    for report in reports:
        run = Run.of(report)
        crowd = max(1.0, run.ranks * run.threads_per_rank / machine.cores)
        steps = intervals(run, machine, run.waves or 1)
        amounts = Amounts.of(run, sum(experts for _, experts in steps))
        weights = (0.0, amounts.weights) if run.packed else (amounts.weights, 0.0)
        nanoseconds = (amounts.flops, *weights, amounts.values, amounts.rounded)
        rows.append([crowd * each for each in (*(each / 1e6 for each in nanoseconds), 1e-3)])
        measured.append(float(report["compute_ms"]))
    found = dict(zip(_COMPUTE, nonnegative(np.array(rows), np.array(measured)), strict=True))
    per_flop = found.pop("product_gflops")
    kept = {} if per_flop <= 0 else {"product_gflops": 1 / per_flop}
    absent = {key for key, packed in (("weight_ns", False), ("decode_ns", True)) if not _any(reports, packed)}
    return kept | {key: value for key, value in found.items() if key not in absent}


def _any(reports: Sequence[dict[str, Any]], packed: bool) -> bool:
    return any(Run.of(report).packed == packed for report in reports)


def _fit_link(reports: Sequence[dict[str, Any]], machine: Machine, source: str) -> Machine:
    """Of all sizes of burst the one that leaves the least error of the communication that was measured alone."""

    def off(burst_us: float) -> float:
        tried = with_measured(machine, source, burst_us=burst_us)
        checks = check(reports, with_measured(tried, source, **_fit_communication(reports, tried)))
        found = [each.predicted.communication_ms / each.communication_ms for each in checks if each.run.ranks > 1]
        return sum(abs(each - 1) for each in found)

    found = with_measured(machine, source, burst_us=min(_BURSTS_US, key=off))
    return with_measured(found, source, **_fit_communication(reports, found))


def _fit_communication(reports: Sequence[dict[str, Any]], machine: Machine) -> dict[str, float]:
    rows, measured = [], []
    for report in reports:
        run = Run.of(report)
        if run.ranks == 1:
            continue
        num_bytes = run.dispatch_bytes + run.combine_bytes
        shaped = max(0.0, num_bytes / run.link_gb_s / 1e6 - machine.burst_us.value / 1e3) if run.link_gb_s else 0.0
        rows.append([shaped, 0.0 if run.link_gb_s else num_bytes / 1e6, (1 + 2 * max(run.waves, 1)) / 1e3])
        measured.append(float(report["communication_ms"]))
    if not rows:
        return {}
    shaped, loose, message = nonnegative(np.array(rows), np.array(measured))
    found = {"exchange_us": message}
    if shaped > 0:
        found["link_efficiency"] = 1 / shaped
    if loose > 0:
        found["loopback_gb_s"] = 1 / loose
    return found


def _fit_together(reports: Sequence[dict[str, Any]], machine: Machine, source: str) -> Machine:
    def off(machine: Machine) -> float:
        checks = check(reports, machine)
        return sum(abs(log(each.predicted.overlapped_ms / each.overlapped_ms)) for each in checks)

    def best(tried: Iterable[dict[str, float]]) -> dict[str, float]:
        return min(tried, key=lambda values: off(with_measured(machine, source, **values)))

    rates = {each["link_gb_s"] for each in reports if each["link_gb_s"]}
    shares = _LINK_SHARES if len(rates) > 1 else [machine.link_share.value]
    finer = [share / 5 for share in _FINER] if len(rates) > 1 else [0.0]
    found = best({"byte_ns": ns, "link_share": share} for ns, share in product(_BYTE_NS, shares))
    for _ in range(2):
        around = {
            key: [max(0.0, found[key] + by) for by in steps] for key, steps in zip(found, (_FINER, finer), strict=False)
        }
        found = best({**found, "byte_ns": ns, "link_share": share} for ns, share in product(*around.values()))
        found |= {"wave_us": best({**found, "wave_us": us} for us in _WAVES_US)["wave_us"]}
    return with_measured(machine, source, **found)


def nonnegative(amounts: NDArray[np.float64], measured: NDArray[np.float64]) -> list[float]:
    """Constants x >= 0 for which amounts @ x is nearest to measured, relative to it; runs far off count less and less.

    [[1, 0], [1, 1]], [2, 5] -> [2, 3]
    """
    relative = amounts / measured[:, None]
    weights = np.ones(len(measured))
    found = np.zeros(amounts.shape[1])
    for _ in range(_REWEIGHTED):
        found = _least_squares(relative * weights[:, None], weights)
        weights = np.sqrt(_NEAR / np.maximum(np.abs(relative @ found - 1), _NEAR))
    return [float(each) for each in found]


def _least_squares(rows: NDArray[np.float64], aim: NDArray[np.float64]) -> NDArray[np.float64]:
    """x >= 0 with rows @ x nearest to aim: one coordinate after the other."""
    size = np.linalg.norm(rows, axis=0)
    used = size > 0
    scaled = rows[:, used] / size[used]
    gram, goal = scaled.T @ scaled, scaled.T @ aim
    found = np.zeros(scaled.shape[1])
    for _ in range(20000):
        before = found.copy()
        for place in range(len(found)):
            found[place] = max(0.0, found[place] + goal[place] - gram[place] @ found)
        if np.abs(found - before).max(initial=0.0) < 1e-12:
            break
    result = np.zeros(rows.shape[1])
    result[used] = found / size[used]
    return result
