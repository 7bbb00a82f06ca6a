"""How long planning takes: a plan and a recommendation from their start, a search of thousands of deployments.

    python -m benchmarks.planner

The commands take turns with `megamoe --version`, which starts the same interpreter and the same command line; their
core time stands beside what went by, since others lengthen the latter alone. torch must stay away.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.command import positive, run
from megamoe.catalog import find_profile, load_hardware, load_model
from megamoe.planner.search.search import search

ABOUT = ("--model", "deepseek-v4-pro", "--hardware", "gb200")
LOAD = ("--requests-per-s", "100", "--input-tokens", "4000", "--output-tokens", "1000")
COMMANDS = {
    "--version": ("--version",),
    "plan": ("plan", *ABOUT, "--ep", "16"),
    "plan of a workload": ("plan", *ABOUT, "--batch", "64", "--context", "8192"),
    "recommend": ("recommend", *ABOUT, *LOAD),
}


def start_up(repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds that went by and of cores, of every command as a whole, interpreter and imports included."""
    command = Path(sys.executable).with_name("megamoe")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, arguments in COMMANDS.items():
            begun, before = time.perf_counter(), _children_s()
            subprocess.run([command, *arguments], check=True, capture_output=True, timeout=60)
            found[name].append((time.perf_counter() - begun, _children_s() - before))
    return found


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def searched(repeats: int) -> tuple[int, list[float]]:
    """Deployments tried, and seconds a search, over devices until at least 5000 were tried."""
    hardware, model = load_hardware("gb200"), load_model("deepseek-v4-pro")
    profile, found, tried = find_profile(hardware), [], 0
    for _ in range(repeats):
        begun, tried = time.perf_counter(), 0
        for context in (4096, 8192, 32768, 131072, 1 << 20):
            tried += search(model, hardware, profile, context=context).tried
        found.append(time.perf_counter() - begun)
    return tried, found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=9)
    asked = parser.parse_args(arguments)
    found = start_up(asked.repeats)
    for name, seconds in found.items():
        by, own = ([each[place] for each in seconds] for place in (0, 1))
        ratio = median(each[1] / base[1] for each, base in zip(seconds, found["--version"], strict=True))
        print(f"megamoe {name}: median {median(by):.2f} s ({min(by):.2f}-{max(by):.2f}), {median(own):.2f} s of cores,")
        print(f"  {ratio:.2f} times --version")
    tried, spent = searched(asked.repeats)
    per_5000 = [each * 5000 / tried for each in spent]
    print(
        f"{tried} deployments searched: {median(spent):.2f} s; "
        f"5,000 of them {median(per_5000):.2f} s ({min(per_5000):.2f}-{max(per_5000):.2f})"
    )
    print(f"torch imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    run(main)
