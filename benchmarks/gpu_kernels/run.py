"""The command line: what is to be measured, on which device, and where it is written.

python -m benchmarks.gpu_kernels --write docs/gpu_kernels.md
python -m benchmarks.gpu_kernels --tune --minutes 20
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_kernels.clock import clock_of
from benchmarks.gpu_kernels.operands import Shape
from benchmarks.gpu_kernels.page import write
from benchmarks.gpu_kernels.results import PARTS, Results
from benchmarks.gpu_kernels.session import Asked, Session
from benchmarks.gpu_kernels.tune import tune
from megamoe.kernels.chips import tuned

# the experts of one rank of a usual deployment
SHAPES = (
    Shape.published("V4-Flash", "deepseek-v4-flash", ep_size=8),
    Shape.published("V4-Pro", "deepseek-v4-pro", ep_size=16),
    Shape.published("Qwen3-235B", "qwen3-235b-a22b", ep_size=8),
)
TUNED_ON = ("V4-Pro",)
ROWS = (1, 8, 64, 512, 2048)
LEAST_REPEATS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a check failed or something did not run; 2 for a bad request, and for no GPU and no page."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    device = found_device()
    try:
        asked = _asked(options)
        if device is not None:
            tuned.table_of(device)
    except ValueError as refusal:
        parser.error(str(refusal))
    command = shlex.join(["python", "-m", "benchmarks.gpu_kernels", *given])
    results = Results(command, datetime.date.today().isoformat(), {row.key: row for row in asked.planned()})
    if device is None:
        return _without_a_device(asked, results, options.tune)
    clock = clock_of(device, asked.repeats)
    return (
        tune(clock, asked.shapes, asked.until, tuned.FOLDER) if options.tune else Session(asked, clock, results).run()
    )


def found_device() -> torch.device | None:
    """The GPU that torch has as its current one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _without_a_device(asked: Asked, results: Results, tuning: bool) -> int:
    """Writes a page on which nothing was run, if one is asked for."""
    print("nothing was run: this needs an NVIDIA or AMD GPU that torch sees", file=sys.stderr)
    if asked.page is None or tuning:
        return 2
    write(results, asked.repeats, asked.page)
    return 0


def _asked(options: argparse.Namespace) -> Asked:
    """ValueError for what cannot be measured."""
    shapes = {shape.name: shape for shape in SHAPES}
    names = _names(options.shapes, list(shapes), "shape") or (TUNED_ON if options.tune else tuple(shapes))
    try:
        rows = tuple(int(each) for each in options.rows.split(",")) if options.rows else ROWS
    except ValueError:
        raise ValueError(f"--rows must be numbers, separated by commas, got {options.rows!r}") from None
    if options.write and not options.write.absolute().parent.is_dir():
        raise ValueError(f"--write: there is no folder {options.write.parent}")
    if min(rows) < 1:
        raise ValueError(f"--rows must be at least 1, got {min(rows)}")
    if options.repeats < LEAST_REPEATS:
        raise ValueError(f"--repeats must be at least {LEAST_REPEATS}, got {options.repeats}")
    if options.minutes <= 0:
        raise ValueError(f"--minutes must be positive, got {options.minutes:g}")
    parts = _names(options.only, list(PARTS), "part") or tuple(PARTS)
    until = time.monotonic() + 60 * options.minutes
    return Asked(tuple(shapes[name] for name in names), rows, parts, options.repeats, until, options.write)


def _names(text: str | None, known: list[str], kind: str) -> tuple[str, ...]:
    """a,b  ->  those names, in the order in which they are known. ValueError for one that is not."""
    wanted = {name.strip() for name in text.split(",")} if text else set()
    if wanted - set(known):
        raise ValueError(f"no {kind} is called {sorted(wanted - set(known))[0]!r}; there are {', '.join(known)}")
    return tuple(name for name in known if name in wanted)


def _parser() -> argparse.ArgumentParser:
    purpose = __doc__.splitlines()[0] if __doc__ else None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=purpose)
    parser.add_argument("--shapes", help=f"names, separated by commas: {', '.join(shape.name for shape in SHAPES)}")
    parser.add_argument("--rows", help=f"rows of an expert, separated by commas: {', '.join(map(str, ROWS))}")
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=9, help=f"{LEAST_REPEATS} at least")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun after so many")
    parser.add_argument("--tune", action="store_true", help="finds tiles for this device and writes them for the layer")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the Markdown page; a JSON goes to data/ beside it")
    return parser
