"""Serial against overlapped over a list of workloads and links; prints the table, and writes it with --write.

python -m benchmarks.layer --write docs/overlap.md      # root and iproute2 for the shaped links; four minutes
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
from dataclasses import asdict

import torch

from benchmarks.command import new_file, positive, run
from megamoe.launch.bench.bench import BenchReport, BenchRequest, run_bench
from megamoe.schedule.kept import processor

SMALL = {"hidden": 1024, "intermediate": 512, "num_experts": 16, "topk": 4}
BF16 = {"weight_format": "bf16", "dispatch_format": "bf16"}
SQUARE = {**SMALL, **BF16, "intermediate": 1024, "tokens_per_rank": 1024}
SHARES = (0.4, 1.0)  # of its computing alone, that a square workload's messages take on two more links
WORKLOADS: list[tuple[str, dict[str, object]]] = [
    ("prefill", {**SMALL, "tokens_per_rank": 2048, "weight_format": "bf16", "link": "1gbit"}),
    ("prefill", {**SMALL, "tokens_per_rank": 2048, "weight_format": "mxfp4", "link": "1gbit"}),
    ("prefill", {**SMALL, **BF16, "tokens_per_rank": 512, "link": "2gbit"}),
    ("loopback", {**SMALL, **BF16, "tokens_per_rank": 2048}),
    ("one token", {**SMALL, **BF16, "tokens_per_rank": 1, "repeats": 61}),
    ("square experts", {**SQUARE, "link": "1gbit"}),
    ("four ranks", {**SMALL, "tokens_per_rank": 1024, "weight_format": "bf16", "link": "500mbit", "ranks": 4}),
]


def links_of(report: BenchReport) -> list[str]:
    """Links on which a run's messages would take SHARES of what it computes, from how long they took on its own."""
    assert report.link_gb_s is not None
    took = report.communication_ms / report.compute_ms
    return [f"{round(report.link_gb_s * 8000 * took / share, -1):.0f}mbit" for share in SHARES]


def row(name: str, report: BenchReport) -> str:
    link = f"{report.link_gb_s * 8000:.0f} Mbit/s" if report.link_gb_s else "loopback"
    values = asdict(report)
    places = 1 if report.overlapped_ms > 10 else 2
    times = [
        "-"
        if values[m] is None
        else f"{values[m]:.{places}f} ({values[f'{m}_min']:.{places}f}-{values[f'{m}_max']:.{places}f})"
        for m in TIMES
    ]
    work = f"{report.ranks} x {report.tokens_per_rank}, {report.hidden} x {report.intermediate}"
    formats = f"{report.weight_format}, {report.dispatch_format} wire"
    assert report.hidden_percent is not None
    assert report.trace_cost is not None
    speedup = "-" if report.speedup is None else f"{report.speedup:.2f}"
    ratios = [speedup, f"{report.efficiency:.2f}", f"{report.exposed_ms / report.compute_ms:+.0%}"]
    traced = [f"{report.hidden_percent:.0f} %", f"{report.trace_cost:+.1%}"]
    same = {True: "yes", False: "NO", None: "-"}[report.identical]
    return f"| {' | '.join((name, work, formats, link, str(report.waves), *times, *ratios, *traced, same))} |"


TIMES = ("serial_ms", "overlapped_ms", "compute_ms", "communication_ms")
COLUMNS = (
    *("what", "ranks x tokens, H x I", "weights, wire", "link", "waves", "serial", "overlapped", "compute"),
    *("communication", "speedup", "efficiency", "exposed", "hidden", "recorded", "oracle's bits"),
)
HEAD = f"""# Overlap, measured

`python -m benchmarks.layer --write docs/overlap.md`, {{date}}, {{machine}}, torch {torch.__version__}.

16 experts, top-4, one thread a rank, waves as the layer chose them. Median (min-max) in milliseconds of the slowest
rank over {{repeats}} repeats (61 for one token); the measures alternate within one run. Serial: one wave, and nothing
at the same time; none (-) for calls that go without waves, which overlap nothing. Compute: the overlapped call with its
rows there already. Communication: its messages with nothing computed. Speedup: serial over overlapped. Efficiency: the
larger of compute and communication, over overlapped.
Exposed: what overlapped takes beyond compute, as a share of compute. Hidden: the share of the time with rows on their
way in which the rank computed. Recorded: how much longer the overlapped call took while it was recorded, median of
pairs. Ranks share the cores with the system's work of moving bytes, so what a transfer costs in CPU time cannot hide
here. Square experts have two more links, on which their messages take 0.4 and all of what they compute. Times of a
shared machine are noisy: read the ratios, and the spread.

| {" | ".join(COLUMNS)} |
{"|---" * len(COLUMNS)}|"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=positive, default=15)
    names = dict.fromkeys(name for name, _ in WORKLOADS)
    parser.add_argument("--only", action="append", choices=names, help="these workloads; may be given again")
    parser.add_argument("--write", type=new_file)
    asked = parser.parse_args(arguments)
    machine = f"{os.cpu_count()} cores of {processor()}"
    today = datetime.date.today().isoformat()
    lines = HEAD.format(date=today, machine=machine, repeats=asked.repeats).splitlines()
    print("\n".join(lines[-2:]))
    for name, workload in WORKLOADS:
        if asked.only and name not in asked.only:
            continue
        links: list[str | None] = [None]
        for link in links:
            given = workload if link is None else {**workload, "link": link}
            report = run_bench(BenchRequest(**{"repeats": asked.repeats, "trace": True, **given}))
            lines.append(row(name, report))
            print(lines[-1], flush=True)
            if link is None and name == "square experts":
                links += links_of(report)
    if asked.write:
        asked.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(main)
