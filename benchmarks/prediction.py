"""The planner's prediction beside the measured layer on a machine without a profile, at several link rates.

python -m benchmarks.prediction      # root and iproute2; four minutes; measures the machine's constants first
python -m benchmarks.prediction --repeats 5 --links 1gbit
python -m benchmarks.prediction --backward      # forward and backward together; five minutes

The constants come from one probe at the first rate, in a cache folder of this run's own, and hold for all rows: nothing
that is predicted was fitted. Exit code 1 where a prediction is off by more than --within.

Behind them stand rows of few tokens, over loopback by memory and by sockets, over a link, and over a link with a delay
where the kernel has one to give. They are printed to the microsecond and count for no exit code: a call of a
millisecond is as long as whatever else a machine does for a moment. --few-tokens "" leaves them out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarks.command import above_zero, natural, positive, run
from megamoe.catalog import figures
from megamoe.launch.bench.bench import BenchRequest, run_bench
from megamoe.launch.bench.probe import setting_here
from megamoe.schedule.kept import find, processor

LINKS, TOKENS, WEIGHTS = "500mbit,1gbit,2gbit", "512,2048", "bf16,mxfp4"
FEW_TOKENS, FEW_REPEATS = [1, 8, 32], 25
PLACES: dict[str, dict[str, Any]] = {
    "memory": {},
    "sockets": {"shared_memory": False},
    "1gbit": {"link": "1gbit"},
    "1gbit 1ms": {"link": "1gbit", "latency_ms": 1.0},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", default=LINKS)
    parser.add_argument("--tokens-per-rank", type=token_counts, default=TOKENS)
    parser.add_argument("--weight-formats", default=WEIGHTS)
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument(
        "--within", type=above_zero, default=0.15, help="the largest share that a prediction may be off by"
    )
    parser.add_argument("--few-tokens", type=few_counts, default=FEW_TOKENS, help='of the rows behind; "" for none')
    parser.add_argument("--few-places", type=places, default=list(PLACES))
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        code = compare(asked)
        if asked.few_tokens and not asked.backward:
            compare_few(asked.few_places, asked.few_tokens, asked.weight_formats.split(","))
        return code


def token_counts(text: str) -> list[int]:
    """ "512,2048" -> [512, 2048]"""
    return [natural(each) for each in text.split(",")]


def few_counts(text: str) -> list[int]:
    """As token_counts(), and "" for none."""
    return token_counts(text) if text else []


def places(text: str) -> list[str]:
    """ "memory,1gbit" -> ["memory", "1gbit"]"""
    unknown = [each for each in text.split(",") if each not in PLACES]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(PLACES)}, got {unknown[0]!r}")
    return text.split(",")


def compare(asked: argparse.Namespace) -> int:
    """Prints a row for every workload; 1 where one is off by more than asked, else 0."""
    print(
        f"{processor()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, load {os.getloadavg()[0]:.1f}", flush=True
    )
    print("link       tokens  weights  waves  compute  commun.  measured (min to max)      predicted   off", flush=True)
    worst, by = 0.0, ""
    rows = product(asked.links.split(","), asked.tokens_per_rank, asked.weight_formats.split(","))
    for link, tokens, weights in rows:
        request = BenchRequest(
            link=link,
            tokens_per_rank=tokens,
            weight_format=weights,
            repeats=asked.repeats,
            backward=asked.backward,
            check=False,
        )
        found = run_bench(request)
        took = f"{found.overlapped_ms:.1f} ({found.overlapped_ms_min:.1f} to {found.overlapped_ms_max:.1f})"
        parts = f"{found.compute_ms:>7.1f}  {found.communication_ms:>7.1f}"
        asked_for = f"{link:<10} {tokens:>6}  {weights:<7}  {found.waves:>5}"
        if found.predicted_ms is None:
            print(f"{asked_for}  {parts}  {took:<26} not predicted: {found.unpredicted}", flush=True)
            continue
        by, off = found.predicted_by or "", found.predicted_ms / found.overlapped_ms - 1
        worst = max(worst, abs(off))
        print(f"{asked_for}  {parts}  {took:<26} {found.predicted_ms:>8.1f}  {off:+.0%}", flush=True)
    print(f"\nlargest error {worst:.0%}; by {by}" if by else "\nnone was predicted")
    kept = find(setting_here(2, 1, shaped=True))
    if kept is not None:
        print(", ".join(f"{key} {figure.value:g}" for key, figure in figures(kept).items()))
    return int(worst > asked.within)


def compare_few(where: Sequence[str], few_tokens: Sequence[int], weight_formats: Sequence[str]) -> None:
    """Prints a row for every workload of few tokens, in milliseconds."""
    print(
        "\nplace      tokens  weights  waves  compute  commun.  measured (min to max)      predicted   off", flush=True
    )
    errors: list[float] = []
    cannot: set[str] = set()
    for place, tokens, weights in product(where, few_tokens, weight_formats):
        if place in cannot:
            continue
        request = BenchRequest(
            tokens_per_rank=tokens, weight_format=weights, repeats=FEW_REPEATS, check=False, **PLACES[place]
        )
        asked_for = f"{place:<10} {tokens:>6}  {weights:<7}"
        try:
            found = run_bench(request)
        except ValueError as reason:
            print(f"{place:<10} cannot be measured: {reason}", flush=True)
            cannot.add(place)
            continue
        waves = "none" if found.small else str(found.waves)
        took = f"{found.overlapped_ms:.3f} ({found.overlapped_ms_min:.3f} to {found.overlapped_ms_max:.3f})"
        line = f"{asked_for}  {waves:>5}  {found.compute_ms:>7.3f}  {found.communication_ms:>7.3f}  {took:<26}"
        if found.predicted_ms is None:
            print(f"{line} not predicted: {found.unpredicted}", flush=True)
            continue
        off = found.predicted_ms / found.overlapped_ms - 1
        errors.append(abs(off))
        print(f"{line} {found.predicted_ms:>8.3f}  {off:+.0%}", flush=True)
    if errors:
        print(f"\nlargest error of few tokens {max(errors):.0%}")


if __name__ == "__main__":
    run(main)
