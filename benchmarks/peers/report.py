"""From the ranks' outcomes to a table: medians of the slowest rank, ratios to the fastest peer, errors, problems."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from statistics import median

from benchmarks.peers.measure import RankOutcome, Workload
from benchmarks.peers.peer import INSTALL_TORCHTITAN, Peer
from megamoe.schedule.kept import processor

PACKAGES = ("torch", "transformers", "torchtitan", "deepspeed")
COLUMNS = ("layer", "median ms", "min", "max", "speed, fastest peer = 1", "error against FP32", "note")


@dataclass(frozen=True, slots=True)
class Row:
    """One layer on one workload. Times are those of the slowest rank, in milliseconds; None where nothing was timed.

    speed     the fastest peer's median over this one: 2.0 is twice as fast as the fastest peer
    error     ||a - b|| / ||b|| over the tokens of all ranks, against FP32; must be below `bound`
    problem   why there is no time, or what is wrong with the output
    failed    whether the command has to fail for it
    """

    name: str
    ours: bool
    ms: float | None
    ms_min: float | None
    ms_max: float | None
    speed: float | None
    error: float | None
    bound: float
    problem: str | None
    failed: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows of one workload."""

    workload: Workload
    repeats: int
    fastest_peer: str | None
    rows: tuple[Row, ...]

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows)

    def table(self) -> str:
        """Markdown whose columns line up, with a line on each of our layers below."""
        return "\n".join([*aligned([COLUMNS, *(_cells(row) for row in self.rows)]), "", *self.verdicts()])

    def verdicts(self) -> list[str]:
        """What the ratios say in words, a line for each of our layers that was timed."""
        ours = [row for row in self.rows if row.ours and row.speed is not None]
        return [f"{row.name}: {_words(row.speed or 0.0)} than the fastest peer, {self.fastest_peer}  " for row in ours]


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns line up; the first cells are its head."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def compare(
    workload: Workload, peers: Sequence[Peer], repeats: int, outcomes: Sequence[dict[str, RankOutcome]]
) -> Comparison:
    """A repeat takes as long as its slowest rank; a row whose output is wrong is no yardstick for the others."""
    seen = {peer.name: [rank[peer.name] for rank in outcomes if peer.name in rank] for peer in peers}
    slowest = {name: _slowest(ranks) for name, ranks in seen.items()}
    errors = {name: _error(ranks) for name, ranks in seen.items() if slowest[name]}
    right = {
        peer.name: median(slowest[peer.name])
        for peer in peers
        if not peer.ours and slowest[peer.name] and errors[peer.name] < peer.bound
    }
    fastest = min(right, key=lambda name: right[name], default=None)
    rows = []
    for peer in peers:
        times, error = slowest[peer.name], errors.get(peer.name)
        wrong = error is not None and not error < peer.bound
        problem = peer.missing or next((rank.problem for rank in seen[peer.name] if rank.problem), None)
        if wrong:
            problem = f"WRONG: the error is not below {peer.bound:g}"
        rows.append(
            Row(
                name=peer.name,
                ours=peer.ours,
                ms=median(times) if times else None,
                ms_min=min(times, default=None),
                ms_max=max(times, default=None),
                speed=right[fastest] / median(times) if times and fastest is not None and not wrong else None,
                error=error,
                bound=peer.bound,
                problem=problem,
                failed=wrong or (peer.ours and problem is not None),
            )
        )
    return Comparison(workload, repeats, fastest, tuple(rows))


def _slowest(ranks: Sequence[RankOutcome]) -> list[float]:
    """Milliseconds of every repeat"""
    return [max(times) for times in zip(*(rank.times_ms for rank in ranks), strict=True)]


def _error(ranks: Sequence[RankOutcome]) -> float:
    """Relative error over all ranks; NaN, which is below no bound, where there was nothing to compare."""
    norm = sum(rank.norm_squared for rank in ranks)
    return float((sum(rank.difference_squared for rank in ranks) / norm) ** 0.5) if norm else float("nan")


def _cells(row: Row) -> tuple[str, ...]:
    times = ["-" if ms is None else f"{ms:.2f}" if ms < 100 else f"{ms:.1f}" for ms in (row.ms, row.ms_min, row.ms_max)]
    speed = f"{row.speed:.2f}" if row.speed is not None else "-"
    error = f"{row.error:.4f} (< {row.bound:g})" if row.error is not None else "-"
    return (row.name, *times, speed, error, row.problem or "")


def _words(speed: float) -> str:
    """1.5 -> "1.50 x faster"    0.8 -> "1.25 x slower" """
    return f"{speed:.2f} x faster" if speed >= 1 else f"{1 / speed:.2f} x slower"


def versions() -> dict[str, str]:
    """What is installed of the packages that are compared; a package that is not is not in it."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def machine() -> str:
    """Cores, and what the system calls the processor."""
    return f"{os.cpu_count()} cores of {processor()}"


PROSE = """Every layer computes y = sum over k of w_k * down(silu(gate(x)) * up(x)) for the same tokens, BF16 weights
and routing, on the same ranks, one thread each, over gloo. Only the experts are timed: routing is given, never
computed. The layers take turns within every repeat, each begun by all ranks together; a repeat takes as long as its
slowest rank. Median, min and max are over the repeats. Speed is the fastest peer's median over the layer's own. The
error is ||a - b|| / ||b|| against FP32 on one device; rows and products of MXFP8 round more, so their bounds are
wider, and "bf16 wire" is the row whose formats and arithmetic are those of the peers. This package has gloo's threads
wait for their turn; for the peers that is undone, so that all run as they do on their own. Times of a shared machine
are noisy: read the ratios, and the spread.

- torch by hand: all_to_all_single with splits, grouped_mm, all_to_all_single, and an embedding_bag as weighted sum.
- transformers: Qwen3-MoE's experts under its expert-parallel plan, all_to_all; two implementations of the experts.
- torchtitan: RoutedExperts with AllToAllTokenDispatcher, SPMD backend "partial_dtensor"; gloo refuses the default one.
- deepspeed.moe: MoE with drop_tokens=False, its gate given the routing.
- deepspeed AutoEP: the layer that AutoEP makes of Qwen3-MoE's block, its router given the routing.
- megamoe: this project's layer, waves="auto", in three formats. Over loopback its ranks share memory; in
  the lab each is a host of its own and its rows go through gloo, as everybody's do everywhere."""


def document(command: str, comparisons: Sequence[Comparison]) -> str:
    """The Markdown page of a run."""
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    shape = comparisons[0].workload.shape if comparisons else None
    sizes = f"H {shape.hidden}, I {shape.intermediate}, {shape.num_experts} experts, top-{shape.topk}." if shape else ""
    head = f"# Beside other layers\n\n`{command}`, {datetime.date.today().isoformat()}, {machine()}; {packages}.\n\n"
    tables = [f"## {each.workload.title}\n\n{each.repeats} repeats.\n\n{each.table()}".rstrip() for each in comparisons]
    install = f"To install what is compared, in this repository:\n\n    {INSTALL_TORCHTITAN}"
    return f"{head}{sizes}\n\n{PROSE}\n\n{install}\n\n" + "\n\n".join(tables) + "\n"
