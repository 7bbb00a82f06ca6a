"""The command line: runs the workloads, prints a table or JSON for each, writes the page, fails where a check failed.

python -m benchmarks.peers                                   # all; root and iproute2 for the shaped links
python -m benchmarks.peers --only loopback-512 --peers torch,megamoe
python -m benchmarks.peers --backward                        # forward and backward of those that train
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.command import new_file, positive, run
from benchmarks.peers.measure import WORKLOADS, run_workload
from benchmarks.peers.peer import PEERS, choose
from benchmarks.peers.report import Comparison, compare, document, machine, versions
from benchmarks.peers.training import TRAINING_PEERS
from megamoe.planner.answer import finite

TRAINED = ("prefill-1gbit", "loopback-2048")


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 where a layer's output is wrong, one of ours does not run or a rank is lost; 2 for a bad request."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    asked = parser.parse_args(given)
    comparisons: list[Comparison] = []
    try:
        peers = choose(asked.peers, TRAINING_PEERS if asked.backward else PEERS)
        for workload in WORKLOADS:
            if asked.only and workload.name not in asked.only:
                continue
            if asked.backward and not asked.only and workload.name not in TRAINED:
                continue
            print(f"{workload.title} ...", file=sys.stderr, flush=True)
            repeats = max(asked.repeats, workload.repeats or 0)
            comparisons.append(
                compare(workload, peers, repeats, run_workload(workload, peers, repeats, backward=asked.backward))
            )
            if asked.format == "table":
                print(f"\n{workload.title}, {repeats} repeats\n\n{comparisons[-1].table()}", flush=True)
    except ValueError as refusal:
        parser.error(str(refusal))
    except RuntimeError as lost:
        raise SystemExit(f"error: {lost}") from lost
    command = shlex.join(["python", "-m", "benchmarks.peers", *given])
    if asked.format == "json":
        print(json.dumps(_json(command, comparisons), indent=2))
    if asked.write:
        asked.write.write_text(document(command, comparisons))
    raise SystemExit(int(any(each.failed for each in comparisons)))


def _parser() -> argparse.ArgumentParser:
    purpose = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=purpose)
    parser.add_argument("--repeats", type=positive, default=9, help="rounds; workloads of one token take at least 31")
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--only", action="append", choices=names, help="this workload; may be given again")
    parser.add_argument("--peers", help="names or beginnings of names, separated by commas")
    parser.add_argument(
        "--backward",
        action="store_true",
        help=f"time forward and backward together; by default of {' and '.join(TRAINED)}",
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--write", type=new_file, help="writes the tables as a Markdown page")
    return parser


def _json(command: str, comparisons: Sequence[Comparison]) -> dict[str, object]:
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "results": [finite(asdict(each)) for each in comparisons],
    }


if __name__ == "__main__":
    run(main)
