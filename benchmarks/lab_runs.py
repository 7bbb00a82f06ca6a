"""Runs of the layer in the lab that a machine's profile is fitted to, and others to hold it against.

python -m benchmarks.lab_runs      # root and iproute2; five minutes; writes docs/data/lab_runs.json and lab_unseen.json
megamoe calibrate docs/data/lab_runs.json --check docs/data/lab_unseen.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import psutil

from benchmarks.command import positive, run
from megamoe.launch.bench.bench import BenchReport, BenchRequest, run_bench
from megamoe.paths import path_of
from megamoe.routing.waves import Waves

Workload = tuple[str, int, int, int, int, int, str | None, Waves]

TRIES = 3
QUIET = 0.05  # of the cores; the kernel's own work for the network counts as somebody else's

NAMES = (
    *("weight_format", "hidden", "intermediate", "num_experts", "topk", "tokens_per_rank"),
    *("link", "waves"),
)
FITTED: list[Workload] = [
    ("bf16", 1024, 512, 16, 4, 2048, "1gbit", "auto"),
    ("bf16", 1024, 512, 16, 4, 512, "2gbit", 1),
    ("bf16", 1024, 512, 16, 4, 512, "2gbit", 8),
    ("mxfp4", 1024, 512, 16, 4, 2048, "1gbit", 2),
    ("mxfp4", 1024, 512, 16, 4, 512, "500mbit", 4),
    ("bf16", 1024, 1024, 16, 4, 1024, "1gbit", 8),
    ("bf16", 2048, 512, 8, 2, 1024, "4gbit", "auto"),
    ("mxfp4", 512, 512, 32, 4, 1024, "2gbit", 1),
    ("mxfp4", 2048, 1024, 8, 2, 512, "2gbit", 2),
    ("bf16", 512, 1024, 32, 6, 1024, "500mbit", 4),
    ("mxfp4", 1024, 1024, 16, 4, 1024, "4gbit", 8),
    ("bf16", 1024, 512, 16, 4, 128, "1gbit", "auto"),
    ("mxfp4", 1024, 512, 16, 4, 128, "4gbit", 1),
    ("bf16", 1024, 512, 16, 4, 1024, None, 2),
    ("mxfp4", 1024, 512, 16, 4, 1024, None, 4),
    ("bf16", 2048, 1024, 8, 2, 2048, None, 8),
    ("mxfp4", 512, 1024, 32, 6, 2048, None, "auto"),
    ("bf16", 1024, 512, 16, 4, 16, None, 1),
    ("bf16", 1024, 1024, 16, 4, 1024, "345mbit", "auto"),
    ("bf16", 1024, 512, 16, 2, 4096, "300mbit", 4),
]
UNSEEN: list[Workload] = [
    ("bf16", 1024, 512, 16, 4, 1024, "1gbit", "auto"),
    ("bf16", 1024, 768, 16, 4, 1536, "1500mbit", 3),
    ("mxfp4", 1024, 512, 16, 4, 1024, "2gbit", 4),
    ("mxfp4", 1024, 1024, 16, 4, 2048, "1gbit", 2),
    ("bf16", 1536, 512, 16, 4, 768, "700mbit", 6),
    ("mxfp4", 768, 512, 24, 4, 1024, "3gbit", "auto"),
    ("bf16", 2048, 1024, 16, 4, 512, "2gbit", 3),
    ("mxfp4", 2048, 512, 8, 2, 1024, "1gbit", 4),
    ("bf16", 1024, 512, 32, 8, 512, "2gbit", 2),
    ("mxfp4", 1024, 512, 32, 8, 512, "1gbit", 6),
    ("bf16", 1024, 512, 16, 2, 2048, "500mbit", "auto"),
    ("mxfp4", 1024, 512, 16, 4, 256, "1gbit", 3),
    ("bf16", 1024, 512, 16, 4, 3072, None, 4),
    ("mxfp4", 1024, 768, 16, 4, 1536, None, 2),
    ("bf16", 512, 512, 16, 4, 4096, "1gbit", 6),
    ("mxfp4", 1536, 768, 12, 3, 1024, "2gbit", "auto"),
]


def request(workload: Workload, repeats: int) -> BenchRequest:
    named = dict(zip(NAMES, workload, strict=True))
    return BenchRequest(**named, dispatch_format="auto", repeats=repeats, check=False)  # type: ignore[arg-type]


def busy_s() -> tuple[float, float]:
    """Seconds of cores that the machine was busy since it started, and that children of this process were."""
    times, mine = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    idle = times.idle + getattr(times, "iowait", 0.0)
    children = mine.ru_utime + mine.ru_stime + own.ru_utime + own.ru_stime
    return sum(times[:8]) - idle, children  # guests are counted as users already


def undisturbed(request: BenchRequest) -> tuple[BenchReport, float]:
    """The run of three at most that others disturbed least, and their share of the cores; a quiet run is enough."""
    tried: list[tuple[float, BenchReport]] = []
    while len(tried) < TRIES and not any(foreign < QUIET for foreign, _ in tried):
        begun, before, ours = time.monotonic(), *busy_s()
        report = run_bench(request)
        lasted, after, ours_after = time.monotonic() - begun, *busy_s()
        foreign = (after - before - (ours_after - ours)) / lasted / (psutil.cpu_count() or 1)
        tried.append((foreign, report))
    foreign, report = min(tried, key=lambda each: each[0])
    return report, foreign


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=path_of, default=Path(__file__).parents[1] / "docs" / "data")
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--runs", type=positive, help="only the first so many of each kind")
    asked = parser.parse_args(arguments)
    if not asked.folder.is_dir():
        parser.error(f"--folder: there is no folder {asked.folder}")
    reports: dict[str, list[dict[str, object]]] = {"lab_runs": [], "lab_unseen": []}
    for fitted, unseen in zip_longest(
        FITTED[: asked.runs], UNSEEN[: asked.runs]
    ):  # in turn, so that what changes meanwhile is in both
        for name, workload in (("lab_runs", fitted), ("lab_unseen", unseen)):
            if workload is None:
                continue
            report, foreign = undisturbed(request(workload, asked.repeats))
            words = " ".join(map(str, workload))
            print(
                f"{report.overlapped_ms:8.1f} ms  {words}  ({foreign:.0%} of the machine was somebody else's)",
                flush=True,
            )
            reports[name].append({key: value for key, value in asdict(report).items() if key != "predicted_ms"})
    for name, found in reports.items():
        (asked.folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
