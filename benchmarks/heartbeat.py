"""What knowing where every rank is costs: calls with heartbeat and notes against calls without, in turn, in one run.

    python -m benchmarks.heartbeat                 # loopback; --link 1gbit needs root

Prints, for a small, a middling and a large call, the median of each and of their ratio over the pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

from benchmarks.command import positive, run
from benchmarks.turns import in_turn
from megamoe.launch.bench.bench import make_expert_weights, make_workload
from megamoe.launch.bench.replay import together
from megamoe.launch.lab.namespaces import lab
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.status import OwnStatus
from megamoe.shape import MoEShape

SHAPE = MoEShape(hidden=1024, intermediate=512, num_experts=16, topk=4)
NEVER_S = 3600.0


class Nowhere(OwnStatus):
    """Status that are not noted."""

    def enter(self, layer: str, call: int) -> None: ...

    def work(self, phase: str, wave: int | None = None) -> None: ...

    def wait(self, phase: str, wave: int | None, peer: int | None) -> None: ...

    def arrived(self, phase: str, wave: int | None, took_s: float) -> None: ...

    def leave(self) -> None: ...


def measure(group: EPGroup, tokens: int, pairs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each call with and without, this rank's."""
    layer = MegaMoE(SHAPE, group, weight_format="bf16", dispatch_format="bf16")
    layer.load_experts(*make_expert_weights(SHAPE))
    batch = make_workload(SHAPE, group.rank, tokens)
    for _ in range(8):
        layer(*batch)
    monitor, clock = group.monitors[0], group.clock
    assert clock is not None
    noted, beat_s = group.own_status, monitor._beat_s

    def switch(on: bool) -> None:
        monitor._beat_s = beat_s if on else NEVER_S
        where: Any = noted if on else Nowhere()
        clock.own_status = where
        object.__setattr__(group, "own_status", where)
        monitor._wake()  # so that the change is seen now, and not after a beat
        together(group)

    times = in_turn(dict.fromkeys((True, False), partial(layer, *batch)), pairs, 0, switch)
    object.__setattr__(group, "own_status", noted)
    return times[True], times[False]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", help="rate of the ranks' links, such as 1gbit")
    parser.add_argument("--pairs", type=positive, default=101)
    asked = parser.parse_args(arguments)
    with (
        lab(2, asked.link) if asked.link else nullcontext() as hosts,
        LocalRanks(2, threads_per_rank=1, deadline_s=300.0, hosts=hosts) as ranks,
    ):
        print(f"{'tokens':>6} {'with ms':>9} {'without':>9} {'median of ratios':>17} {'quartiles':>15}")
        for tokens, pairs in ((1, 10 * asked.pairs), (128, 3 * asked.pairs), (2048, asked.pairs)):
            found = ranks.run(measure, tokens, pairs)
            on, off = ([max(each) for each in zip(*times, strict=True)] for times in zip(*found, strict=True))
            ratios = sorted(a / b for a, b in zip(on, off, strict=True))
            quartiles = f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}"
            print(f"{tokens:6} {median(on):9.2f} {median(off):9.2f} {median(ratios):17.4f} {quartiles:>15}", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
