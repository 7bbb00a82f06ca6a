"""How long this package's own layer takes on a machine that was calibrated: torch's operators over a process group.

Of one rank, on a core that it may share:

    products    6HI flops a row                                  / product_gflops
    weights     3HI values an expert that is made ready          * weight_ns, or decode_ns with mxfp4
    values      2H + 2I values a row: gathered, activated, sent  * value_ns
    rounding    H a token and H + I a row, where MXFP8 is used, and 2H a row where results are MXFP8 * round_ns
    a call                                                       call_us

The waves are then played as the layer runs them (schedule.py, cost_model.py), over a link of a nominal rate, through
which burst_us pass at once where it has rested. Every byte that is sent or received takes byte_ns of the core that
computes, and the threads that move bytes take link_share of it as long as the link carries: they wake for every packet,
and packets of a slow link come one by one. Over loopback the cores are the link. Every interval of work takes wave_us
beside its rows. What comes before the first dispatch (counting, encoding) and after the
last result (the sum of the slots) nothing covers.
"""

# T tokens of a rank   H hidden   I intermediate   E experts   K experts per token   R rows of a rank   P ranks

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

from megamoe.catalog.machine import Machine
from megamoe.paths import AnyPath, path_of
from megamoe.schedule.cost_model import CostModel, Spread, best_waves
from megamoe.schedule.formats import value_bytes
from megamoe.schedule.schedule import Link, Work, play, schedule

PAIR_BYTES = 8  # said of a token-expert pair on the wire: its token's place and its weight


@dataclass(frozen=True, slots=True)
class Run:
    """A layer on a machine: keys of `megamoe bench --format json`. waves 0 is "auto", link_gb_s None is loopback.

    With a link ranks_per_host ranks share it, and memory; node_limited: a token then goes once to each other host.
    Reports that do not say how results travel are of bf16. backward: forward and backward together, training.py.
    small: few tokens, without waves, small.py; only there counts a link's latency.
    """

    ranks: int
    link_gb_s: float | None
    tokens_per_rank: int
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    weight_format: str
    dispatch_format: str
    waves: int
    threads_per_rank: int = 1
    combine_format: str = "bf16"
    ranks_per_host: int = 1
    node_limited: bool = True
    backward: bool = False
    small: bool = False
    latency_ms: float = 0.0

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Run:
        """From a report's keys. ValueError names those that are missing, but for those that early reports lack."""
        early = {"combine_format": "bf16", "ranks_per_host": 1, "node_limited": True, "backward": False}
        known = {**early, "small": False, "latency_ms": 0.0, **found}
        missing = [key for key in cls.__slots__ if key not in known]
        if missing:
            raise ValueError(f"no report of megamoe bench --format json: it has no {', '.join(missing)}")
        return cls(**{key: known[key] for key in cls.__slots__})

    @property
    def rows(self) -> float:
        """R, as even routing gives every rank."""
        return self.tokens_per_rank * self.topk

    @property
    def spread(self) -> Spread:
        return Spread(-(-self.num_experts // self.ranks), self.ranks)

    @property
    def f_remote(self) -> float:
        return 1 - 1 / self.ranks

    @property
    def packed(self) -> bool:
        return self.weight_format == "mxfp4"

    @property
    def rounds(self) -> bool:
        """Whether tokens are rounded to MXFP8 anywhere."""
        return self.packed or self.dispatch_format == "mxfp8"

    @property
    def dispatch_bytes(self) -> float:
        """Sent by a rank: a token once to every rank that has one of its experts, and what is said of its pairs."""
        return self.gradient_tokens * self.token_bytes + self.rows * self.f_remote * PAIR_BYTES

    @property
    def gradient_tokens(self) -> float:
        """Tokens whose gradients a rank sends in a backward, once to every rank that has one of its experts."""
        return self.tokens_per_rank * (self.ranks - 1) * self._found_on(1)

    @property
    def combine_bytes(self) -> float:
        """Sent by a rank: results of other ranks' rows."""
        return self.rows * self.f_remote * self.hidden * value_bytes(self.combine_format)

    @property
    def link_dispatch_bytes(self) -> float:
        """Dispatched over a host's link by all its ranks.

        Node-limited, a token goes once to each other host that has one of its experts, and for each further rank there
        that needs it only where it is.
        """
        if self.link_gb_s is None or self.ranks_per_host == 1:
            return self.dispatch_bytes
        together = min(self.ranks_per_host, self.ranks)
        to_ranks = (self.ranks - together) * self._found_on(1)
        to_hosts = (self.ranks / together - 1) * self._found_on(together) if self.node_limited else to_ranks
        said = self._far_rows + self.tokens_per_rank * (to_ranks - to_hosts)
        return together * (self.tokens_per_rank * to_hosts * self.token_bytes + said * PAIR_BYTES)

    @property
    def link_combine_bytes(self) -> float:
        """Results that all ranks of a host send home over its link."""
        if self.link_gb_s is None or self.ranks_per_host == 1:
            return self.combine_bytes
        return min(self.ranks_per_host, self.ranks) * self._far_rows * self.hidden * value_bytes(self.combine_format)

    @property
    def _far_rows(self) -> float:
        return self.rows * max(0.0, 1 - self.ranks_per_host / self.ranks)

    @property
    def token_bytes(self) -> float:
        """Of a token on the wire."""
        return self.hidden * value_bytes(self.dispatch_format)

    def _found_on(self, ranks: int) -> float:
        """How likely a token has one of its experts on so many ranks."""
        missed = comb(max(self.num_experts - ranks * self.spread.experts_per_rank, 0), self.topk)
        return 1 - missed / comb(self.num_experts, self.topk)


@dataclass(frozen=True, slots=True)
class Amounts:
    """What one call of a run does on a rank, in units: what calibration weighs. made_ready counts experts.

    Experts whose rank-local rows are computed before or after the rest of theirs are made ready twice.
    """

    flops: float
    weights: float
    values: float
    rounded: float

    @classmethod
    def of(cls, run: Run, made_ready: float) -> Amounts:
        per_expert = 3 * run.hidden * run.intermediate
        rounded = run.tokens_per_rank * run.hidden + run.rows * run.hidden if run.rounds else 0.0
        rounded += 2 * run.rows * run.hidden if run.combine_format == "mxfp8" else 0.0
        return cls(
            flops=2 * per_expert * run.rows,
            weights=made_ready * per_expert,
            values=run.rows * 2 * (run.hidden + run.intermediate),
            rounded=rounded + (run.rows * run.intermediate if run.packed else 0.0),
        )


@dataclass(frozen=True, slots=True)
class Predicted:
    """Milliseconds, as `megamoe bench` measures them; waves as they were given or as the planner chooses them."""

    waves: int
    compute_ms: float
    communication_ms: float
    serial_ms: float
    overlapped_ms: float


def predict(run: Run, machine: Machine) -> Predicted:
    """What a forward in waves takes. ValueError where ranks have other threads than the machine was calibrated with."""
    check_threads(run, machine)
    waves = run.waves or choose_waves(run, machine)
    crowd = crowd_of(run, machine)
    steps = intervals(run, machine, waves)
    compute = compute_us(run, machine, sum(experts for _, experts in steps)) * crowd
    alone = communication_us(run, machine, waves)
    serial = compute_us(run, machine, run.spread.experts_per_rank) * crowd + communication_us(run, machine, 1)
    overlapped = _overlapped_us(run, machine, steps, crowd) if run.ranks > 1 else compute
    return Predicted(waves, *(each / 1e3 for each in (compute, alone, serial, overlapped)))


def check_threads(run: Run, machine: Machine) -> None:
    """ValueError where ranks have other threads than the machine was calibrated with."""
    if run.threads_per_rank != machine.threads_per_rank:
        raise ValueError(
            f"{machine.name} was calibrated with {machine.threads_per_rank} threads a rank, not {run.threads_per_rank}"
        )


def crowd_of(run: Run, machine: Machine) -> float:
    """How many ranks share a core, at least 1."""
    return max(1.0, run.ranks * run.threads_per_rank / machine.cores)


def choose_waves(run: Run, machine: Machine) -> int:
    """What waves="auto" comes to, once a layer knows its link and its compute."""
    if run.ranks == 1:
        return 1
    return best_waves(run.spread, run.rows, _cost_model(run, machine))


def row_us(run: Run, machine: Machine) -> float:
    """Microseconds that a row takes, its share of the weights included, as a layer measures it."""
    amounts = Amounts.of(run, run.spread.experts_per_rank)
    return weighed_us(run, machine, amounts) / max(run.rows, 1.0)


def product_row_us(machine: Machine, hidden: int, intermediate: int, *, packed: bool) -> float:
    """What a row takes where there are so many that no weight counts."""
    flops, values = 6 * hidden * intermediate, 2 * (hidden + intermediate)
    rounded = (hidden + intermediate) * machine.round_ns.value if packed else 0.0
    return (flops / machine.product_gflops.value + values * machine.value_ns.value + rounded) / 1e3


def compute_us(run: Run, machine: Machine, made_ready: float) -> float:
    """A call's compute alone: all of it but what the link takes."""
    return machine.call_us.value + weighed_us(run, machine, Amounts.of(run, made_ready))


def communication_us(run: Run, machine: Machine, waves: int) -> float:
    """A call's messages alone, both ways over a link that carries them one after the other."""
    return messages_us(run, machine, waves, run.link_dispatch_bytes + run.link_combine_bytes)


def messages_us(run: Run, machine: Machine, waves: int, num_bytes: float) -> float:
    """The same of so many bytes on the link."""
    if run.ranks == 1:
        return 0.0
    if run.link_gb_s:
        num_bytes = max(0.0, num_bytes - run.link_gb_s * machine.burst_us.value * 1e3)
    return (1 + 2 * waves) * machine.exchange_us.value + num_bytes / link_bytes_us(run, machine)


def moved_us(run: Run, machine: Machine) -> float:
    """What the core that computes spends on sending and receiving; without a link that is all there is to it."""
    num_bytes = run.dispatch_bytes + run.combine_bytes if run.ranks > 1 else 0.0
    return bytes_moved_us(run, machine, num_bytes, run.link_dispatch_bytes + run.link_combine_bytes)


def bytes_moved_us(run: Run, machine: Machine, num_bytes: float, link_bytes: float) -> float:
    """The same of so many bytes of a rank, and of so many on its host's link."""
    if not run.link_gb_s:
        return num_bytes / link_bytes_us(run, machine)
    carried = link_bytes / link_bytes_us(run, machine) if num_bytes else 0.0
    return 2 * num_bytes * machine.byte_ns.value / 1e3 + carried * machine.link_share.value


def weighed_us(run: Run, machine: Machine, amounts: Amounts) -> float:
    per_weight = machine.decode_ns.value if run.packed else machine.weight_ns.value
    nanoseconds = (
        amounts.flops / machine.product_gflops.value
        + amounts.weights * per_weight
        + amounts.values * machine.value_ns.value
        + amounts.rounded * machine.round_ns.value
    )
    return nanoseconds / 1e3


def link_bytes_us(run: Run, machine: Machine) -> float:
    if run.link_gb_s:
        return run.link_gb_s * machine.link_efficiency.value * 1e3
    return machine.loopback_gb_s.value * 1e3


def _cost_model(run: Run, machine: Machine) -> CostModel:
    remote = max(run.rows * run.f_remote, 1e-9)
    link = link_bytes_us(run, machine)
    row = row_us(run, machine)
    decode_rows = 3 * run.hidden * run.intermediate * machine.decode_ns.value / 1e3 / row if run.packed else 0.0
    return CostModel(
        row / 1e6,
        run.link_dispatch_bytes / remote / link / 1e6,
        run.link_combine_bytes / remote / link / 1e6,
        machine.wave_us.value / 1e6,
        decode_rows,
    )


def intervals(run: Run, machine: Machine, waves: int) -> list[tuple[Work, int]]:
    """The steps of a rank, each with its share of the rows as time, and how many experts it makes ready."""
    spread, cost_model = run.spread, _cost_model(run, machine)
    per_source = run.rows / spread.experts_per_rank / run.ranks
    experts = spread.waves(min(waves, spread.experts_per_rank))
    arriving = [per_source * (run.ranks - 1) * len(ids) for ids in experts]
    load = cost_model.load([round(per_source)] * spread.experts_per_rank, [round(rows) for rows in arriving])
    found = []
    for step in schedule(experts, load):
        rows = per_source * len(step.local) + (arriving[step.wave] if step.arrived else 0.0)
        made_ready = max(len(step.local), len(experts[step.wave]) if step.arrived and arriving[step.wave] else 0)
        found.append((Work(step.wave, rows, step.arrived), made_ready))
    return found


def _overlapped_us(run: Run, machine: Machine, steps: list[tuple[Work, int]], crowd: float) -> float:
    """Front, the waves played, and the sum of the slots."""
    amounts = Amounts.of(run, 0)
    front = machine.call_us.value / 2 + run.tokens_per_rank * run.hidden * machine.round_ns.value / 1e3 * run.rounds
    end = machine.call_us.value / 2 + run.rows * run.hidden * machine.value_ns.value / 1e3
    between = weighed_us(run, machine, amounts) - (front + end - machine.call_us.value)
    per_row = (max(between, 0.0) + moved_us(run, machine)) / max(run.rows, 1.0)
    per_expert = weighed_us(run, machine, Amounts(0.0, 3 * run.hidden * run.intermediate, 0.0, 0.0))
    works = [
        Work(work.wave, (work.time * per_row + made_ready * per_expert + machine.wave_us.value) * crowd, work.arrived)
        for work, made_ready in steps
    ]
    link, number = link_bytes_us(run, machine), max(work.wave for work, _ in steps) + 1
    share = [len(ids) / run.spread.experts_per_rank for ids in run.spread.waves(number)]
    message = machine.exchange_us.value
    there = [run.link_dispatch_bytes / link * part + message for part in share]
    back = [run.link_combine_bytes / link * part + message for part in share]
    return (front + end) * crowd + message + play(works, there, back, link=link_of(run, machine)).total


def link_of(run: Run, machine: Machine) -> Link:
    """The link between hosts as it is played, rested when a call begins."""
    burst = machine.burst_us.value / machine.link_efficiency.value if run.link_gb_s else 0.0
    return Link(burst, machine.exchange_us.value)


def read_runs(path: AnyPath) -> list[dict[str, Any]]:
    """The reports of megamoe bench --format json in a file, one or a list; ValueError for anything else."""
    path = path_of(path)
    if path.is_dir() or not path.exists():  # what comes through a pipe is read as well
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as wrong:
        raise ValueError(f"{path} is not JSON: {wrong}") from wrong
    reports = found if isinstance(found, list) else [found]
    for report in reports:
        if not isinstance(report, dict):
            raise ValueError(f"{path} is no report of megamoe bench --format json")
        try:
            Run.of(report)
        except ValueError as wrong:
            raise ValueError(f"{path} is {wrong}") from wrong
    return reports
