"""How long a plan takes from the command's start, and a search of thousands of deployments; torch must stay away.

python benchmarks/planner.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from megamoe.catalog import find_profile, load_hardware, load_model
from megamoe.planner.search.search import search

PLAN = ("plan", "--model", "deepseek-v4-pro", "--hardware", "gb200", "--ep", "16")
REPEATS = 9


def start_up() -> list[float]:
    """Seconds of the whole command, interpreter and imports included."""
    command = Path(sys.executable).with_name("megamoe")
    found = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        subprocess.run([command, *PLAN], check=True, capture_output=True, timeout=60)
        found.append(time.perf_counter() - begun)
    return found


def searched() -> tuple[int, list[float]]:
    """Deployments tried, and seconds a search, over devices until at least 5000 were tried."""
    hardware, model = load_hardware("gb200"), load_model("deepseek-v4-pro")
    profile, found, tried = find_profile(hardware), [], 0
    for _ in range(REPEATS):
        begun, tried = time.perf_counter(), 0
        for context in (4096, 8192, 32768, 131072, 1 << 20):
            tried += search(model, hardware, profile, context=context).tried
        found.append(time.perf_counter() - begun)
    return tried, found


def main() -> None:
    seconds = start_up()
    print(f"megamoe {' '.join(PLAN)}: median {median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")
    tried, seconds = searched()
    per_5000 = [each * 5000 / tried for each in seconds]
    print(
        f"{tried} deployments searched: {median(seconds):.2f} s; "
        f"5,000 of them {median(per_5000):.2f} s ({min(per_5000):.2f}-{max(per_5000):.2f})"
    )
    print(f"torch imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    main()
