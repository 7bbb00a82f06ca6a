"""Serial against overlapped over a list of workloads and links; prints the table, and writes it with --write.

python benchmarks/layer.py --write docs/benchmarks.md      # root and iproute2 for the shaped links; four minutes
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from pathlib import Path

import torch

from megamoe.launch.bench import BenchReport, BenchRequest, run_bench

SMALL = {"hidden": 1024, "intermediate": 512, "num_experts": 16, "topk": 4}
SQUARE = {**SMALL, "intermediate": 1024, "tokens_per_rank": 1024, "weight_format": "bf16"}
WORKLOADS: list[tuple[str, dict[str, object]]] = [
    ("prefill", {**SMALL, "tokens_per_rank": 2048, "weight_format": "bf16", "link": "1gbit"}),
    ("prefill", {**SMALL, "tokens_per_rank": 2048, "weight_format": "mxfp4", "link": "1gbit"}),
    ("prefill", {**SMALL, "tokens_per_rank": 512, "weight_format": "bf16", "link": "2gbit"}),
    ("loopback", {**SMALL, "tokens_per_rank": 2048, "weight_format": "bf16"}),
    ("one token", {**SMALL, "tokens_per_rank": 1, "weight_format": "bf16", "repeats": 31}),
    ("balance", {**SQUARE, "link": "310mbit"}),
    ("twice the link", {**SQUARE, "link": "620mbit"}),
    ("half the link", {**SQUARE, "link": "155mbit"}),
    ("four ranks", {**SMALL, "tokens_per_rank": 1024, "weight_format": "bf16", "link": "500mbit", "ranks": 4}),
]


def row(name: str, report: BenchReport) -> str:
    link = f"{report.link_gb_s * 8000:.0f} Mbit/s" if report.link_gb_s else "loopback"
    values = report.as_dict()
    times = [f"{values[m]:.1f} ({values[f'{m}_min']:.1f}-{values[f'{m}_max']:.1f})" for m in TIMES]
    work = f"{report.ranks} x {report.tokens_per_rank}, {report.hidden} x {report.intermediate}, {report.weight_format}"
    ratios = f"{report.speedup:.2f} | {report.efficiency:.2f} | {report.exposed_ms / report.compute_ms:+.0%}"
    same = {True: "yes", False: "NO", None: "-"}[report.identical]
    return f"| {name} | {work} | {link} | {report.waves} | {' | '.join(times)} | {ratios} | {same} |"


TIMES = ("serial_ms", "overlapped_ms", "compute_ms", "communication_ms")
COLUMNS = (
    *("what", "ranks x tokens, H x I, weights", "link", "waves", "serial", "overlapped", "compute", "communication"),
    *("speedup", "efficiency", "exposed", "oracle's bits"),
)
HEAD = f"""# Benchmarks

`python benchmarks/layer.py --write docs/benchmarks.md`, {{date}}, {{machine}}, torch {torch.__version__}.

16 experts, top-4, mxfp8 wire, one thread a rank. Median (min-max) in milliseconds of the slowest rank; the four
measures alternate within one run. Serial: one wave, nothing at the same time. Compute: the overlapped call with its
rows there already. Communication: its messages with nothing computed. Efficiency: the larger of the two, over
overlapped. Exposed: what overlapped takes beyond compute, as a share of compute. Ranks share the cores with the
system's work of moving bytes, so what a transfer costs in CPU time cannot hide here. Times of a shared machine are
noisy: read the ratios, and the spread.

| {" | ".join(COLUMNS)} |
{"|---" * len(COLUMNS)}|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    machine = f"{os.cpu_count()} cores of {_processor()}"
    lines = HEAD.format(date=datetime.date.today().isoformat(), machine=machine).splitlines()
    print("\n".join(lines[-2:]))
    for name, workload in WORKLOADS:
        report = run_bench(BenchRequest(**{"repeats": arguments.repeats, **workload}))  # type: ignore[arg-type]
        lines.append(row(name, report))
        print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n")


def _processor() -> str:
    """What /proc/cpuinfo calls the processor, or what platform does."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
