"""How long it takes from the command to the first layer's output, and what part of it is the launcher's own.

    python -m benchmarks.launch            # megamoe launch on 4 ranks, spawn and Ray in turn; a minute and a half

The command runs as a user runs it, in a process of its own. Parts as it reports them: the launcher's own (for Ray: its
import, a cluster, room in it), processes (starting them and importing torch in each), the group, weights, the first
batch; the rest is Python, torch in the driver and the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.command import positive, run
from megamoe.model.deepseek_v4.synthetic import write_checkpoint

LAUNCHERS = {"spawn": [], "ray": ["--ray", "local"]}
PARTS = ("launcher_s", "processes_s", "group_s", "load_s", "first_batch_s")


def launch(checkpoint: Path, ranks: int, flags: list[str]) -> dict[str, float]:
    """Seconds of each part, of all until the first output, and of the whole command."""
    line = [sys.executable, "-m", "megamoe", "launch", "--ranks", str(ranks), "--checkpoint", str(checkpoint)]
    begun = time.monotonic()
    done = subprocess.run([*line, "--format", "json", *flags], capture_output=True, text=True, timeout=300, check=False)
    whole = time.monotonic() - begun
    if done.returncode:
        raise RuntimeError(f"megamoe launch {' '.join(flags)}: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    parts = {part: report["starting"][part] for part in PARTS}
    return {**parts, "first_layer_s": report["starting"]["until_first_batch_s"], "whole_s": whole}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--repeats", type=positive, default=7)
    asked = parser.parse_args(arguments)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LAUNCHERS}
    with tempfile.TemporaryDirectory(prefix="megamoe-launch-") as place:
        checkpoint = Path(place) / "checkpoint"
        write_checkpoint(checkpoint)
        for _ in range(asked.repeats):
            for name, flags in LAUNCHERS.items():
                found[name].append(launch(checkpoint, asked.ranks, flags))
    headings = ("launcher", "processes", "group", "weights", "1st batch", "to 1st layer", "whole")
    print(f"{'':6} " + " ".join(f"{heading:>18}" for heading in headings))
    for name, times in found.items():
        cells = []
        for part in times[0]:
            values = [each[part] for each in times]
            cells.append(f"{median(values):6.2f} {f'({min(values):.2f}-{max(values):.2f})':>11}")
        share = median(each["launcher_s"] / each["first_layer_s"] for each in times)
        print(f"{name:6} {' '.join(cells)}   launcher's own share {100 * share:.0f} %")
    return 0


if __name__ == "__main__":
    run(main)
