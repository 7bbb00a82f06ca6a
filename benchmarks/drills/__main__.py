"""Fault drills: a rank killed, stopped, cut off, slowed, raising, or absent; who is named, and how soon.

    sudo .venv/bin/python -m benchmarks.drills --times 20        # ranks on links of their own; needs root and iproute2
    sudo .venv/bin/python -m benchmarks.drills --place hosts     # four ranks on two hosts, whose ranks share memory
    python -m benchmarks.drills --place host --times 20          # ranks that share this host's memory
    python -m benchmarks.drills --place host --faults group      # all ranks killed at once: what is left

In a lab each drill has processes of its own, about ten seconds a drill; on a host all of a kind share some, and what is
left is looked at when they have ended. Exit code 1 where one drill does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from benchmarks.command import above_zero, new_file, positive, run
from benchmarks.drills.drill import FAULTS, GROUP, Drill, Plan, drill, on_one_field
from benchmarks.drills.places import PLACES


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=positive, default=20, help="drills of each kind")
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"which kinds, {GROUP} among them")
    parser.add_argument("--place", default="lab", choices=tuple(PLACES), help="where the ranks are")
    parser.add_argument("--deadline-s", type=above_zero, default=1.5, help="deadline of the ranks' waits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file, help="where every drill is written, in full")
    asked = parser.parse_args(arguments)
    kinds = asked.faults.split(",")
    unknown = set(kinds) - {*FAULTS, GROUP}
    if unknown:
        parser.error(f"no fault is called {', '.join(sorted(unknown))}; there are {', '.join((*FAULTS, GROUP))}")
    rng = random.Random(asked.seed)
    done: list[Drill] = []
    counted = f"{'drills':>6} {'in time':>7} {'named':>6} {'hangs':>6} {'clean':>6}"
    print(f"{'fault':8} {counted} {'median s':>9} {'worst s':>8}", flush=True)
    for fault in kinds:
        these = []
        plans = [Plan.draw(fault, rng, asked.deadline_s, asked.place) for _ in range(asked.times)]
        for number, each in enumerate(on_one_field(plans) if asked.place == "host" else map(drill, plans)):
            these.append(each)
            if not each.held:
                print(f"{fault} {number}: {json.dumps(asdict(these[-1]), indent=1)}", file=sys.stderr, flush=True)
        done += these
        print(_row(fault, these), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(each) for each in done], indent=1))
    held = sum(each.held for each in done)
    print(f"{held} of {len(done)} drills held; deadline {asked.deadline_s:g} s")
    return 0 if held == len(done) else 1


def _row(fault: str, drills: list[Drill]) -> str:
    in_time, named = sum(each.in_time for each in drills), sum(each.named for each in drills)
    hangs, clean = sum(each.hung for each in drills), sum(not each.left for each in drills)
    took = [each.took_s for each in drills]
    counts = f"{len(drills):6} {in_time:7} {named:6} {hangs:6} {clean:6}"
    return f"{fault:8} {counts} {median(took):9.2f} {max(took):8.2f}"


if __name__ == "__main__":
    run(main)
