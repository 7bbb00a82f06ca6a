"""How long a call of this package's layer takes on a machine that was calibrated, forward, backward, or of few tokens.

Forwards are machine.py's, calls of few tokens small.py's, backwards this file's.

Of one rank's backward, beside what a forward of the same rows takes (machine.py has the constants):

    recompute   4HI flops a row, 2HI weights an expert as the forward has them
    data        6HI flops a row, 3HI weights an expert in BF16
    weights     6HI flops a row, 3HI gradients an expert                          * gradient_ns
    values      twice the forward's: rows are gathered, their derivatives taken, turned into columns and packed

They are played as the layer runs them (backward.py), in the forward's waves. Gradients travel in BF16: a token's once
to each rank that has one of its experts, a row's home with that of its weight.
"""

# T tokens of a rank   H hidden   I intermediate   R rows of a rank   P ranks   W waves

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.catalog.machine import Machine
from megamoe.schedule.backward import HOME_BYTES, BackwardLoad, play_backward
from megamoe.schedule.machine import (
    PAIR_BYTES,
    Amounts,
    Predicted,
    Run,
    bytes_moved_us,
    check_threads,
    crowd_of,
    link_bytes_us,
    link_of,
    messages_us,
    predict,
    weighed_us,
)
from megamoe.schedule.small import predict_small

_VALUES = 2.0  # of a row in the backward, of those in the forward


@dataclass(frozen=True, slots=True)
class BackwardWork:
    """Microseconds of a rank's backward, computing alone. around: before the first wave and after the last."""

    recompute: float
    data: float
    weights: float
    around: float

    @property
    def total(self) -> float:
        return self.recompute + self.data + self.weights + self.around


def predict_step(run: Run, machine: Machine) -> Predicted:
    """What a run takes, forward and backward where it has one. ValueError as predict(), or predict_small()."""
    if run.small:
        check_threads(run, machine)
        return predict_small(run, machine)
    forward = predict(run, machine)
    if not run.backward:
        return forward
    crowd, waves = crowd_of(run, machine), forward.waves
    work = backward_work(run, machine)
    compute = (work.total + 3 * waves * machine.wave_us.value) * crowd
    sent = sum(_bytes(run)) * _of_a_host(run)
    alone, serial_alone = (messages_us(run, machine, number, sent) for number in (waves, 1))
    serial = work.total * crowd + serial_alone
    overlapped = _overlapped_us(run, machine, work, waves) if run.ranks > 1 else compute
    both = {"compute_ms": compute, "communication_ms": alone, "serial_ms": serial, "overlapped_ms": overlapped}
    return replace(forward, **{key: getattr(forward, key) + us / 1e3 for key, us in both.items()})


def backward_work(run: Run, machine: Machine) -> BackwardWork:
    """Products with what they read and write, by kind."""
    matrix = run.hidden * run.intermediate
    experts = run.spread.experts_per_rank
    in_bf16 = replace(run, weight_format="bf16")
    values = _VALUES * run.rows * 2 * (run.hidden + run.intermediate) / 3
    rounded = run.tokens_per_rank * run.hidden if run.rounds else 0.0

    def work(of: Run, flops: float, weights: float) -> float:
        return weighed_us(of, machine, Amounts(flops * matrix * run.rows, weights * matrix * experts, values, 0.0))

    return BackwardWork(
        recompute=work(run, 4, 2),
        data=work(in_bf16, 6, 3),
        weights=work(in_bf16, 6, 0) + 3 * matrix * experts * machine.gradient_ns.value / 1e3,
        around=weighed_us(run, machine, Amounts(0.0, 0.0, 2 * run.tokens_per_rank * run.hidden, rounded)),
    )


def _bytes(run: Run) -> tuple[float, float]:
    """Sent by a rank: gradients of outputs, and of rows on their way home."""
    remote = run.rows * run.f_remote
    out = run.gradient_tokens * 2 * run.hidden + remote * PAIR_BYTES
    return out, remote * (2 * run.hidden + HOME_BYTES)


def _of_a_host(run: Run) -> float:
    """How many times a rank's bytes its host's link carries: those that stay within the host do not leave."""
    if run.link_gb_s is None or run.ranks_per_host == 1:
        return 1.0
    together = min(run.ranks_per_host, run.ranks)
    return together * (run.ranks - together) / max(1, run.ranks - 1)


def _overlapped_us(run: Run, machine: Machine, work: BackwardWork, waves: int) -> float:
    """Front, the waves played, and the sum of the slots; what moves bytes slows all products alike."""
    crowd, message, link = crowd_of(run, machine), machine.exchange_us.value, link_bytes_us(run, machine)
    there, back = _bytes(run)
    host = _of_a_host(run)
    moved = bytes_moved_us(run, machine, there + back, (there + back) * host)
    products = work.recompute + work.data + work.weights
    slower = 1 + moved / products if products else 1.0
    spans = spread_over(run, waves)
    parts = [
        [(each * slower * part + machine.wave_us.value) * crowd for part in spans]
        for each in (work.recompute, work.data, work.weights)
    ]
    links = [[each * host / link * part + message for part in spans] for each in (there, back)]
    return work.around * crowd + message + play_backward(BackwardLoad(*parts, *links), link_of(run, machine)).total


def spread_over(run: Run, waves: int) -> list[float]:
    """Each wave's share of a rank's experts."""
    number = min(waves, run.spread.experts_per_rank)
    return [len(ids) / run.spread.experts_per_rank for ids in run.spread.waves(number)]
