"""Checks and measures the kernels on a GPU, in stages that cannot harm one another, within a budget.

    python -m benchmarks.gpu_kernels --budget-s 520 --out DIR      on a GPU; without one, a rehearsal on the CPU
    python -m benchmarks.gpu_kernels --budget-s 200 --out DIR --stages compile,tiles,layer
    python -m benchmarks.gpu_kernels --page DIR                    docs/gpu_kernels.md from what came back

DIR/results.json has everything that was found so far at any moment, DIR/logs what the stages printed, DIR/tables the
tiles that were found. Stages of an earlier command stay in DIR until they are run again. Exit code 0 where all passed,
1 where something failed or did not run that should have, 2 for a bad request.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu_kernels.guard import Guard
from benchmarks.gpu_kernels.page import write_page
from benchmarks.gpu_kernels.plan import PLAN, Stage, select
from benchmarks.gpu_kernels.runner import Runner, say
from benchmarks.gpu_kernels.store import GPU, REHEARSAL, Store
from benchmarks.gpu_kernels.summary import summary
from megamoe.paths import path_of

DOCS = Path(__file__).parents[2] / "docs"
_NODES = ("/dev/nvidiactl", "/dev/kfd")  # of NVIDIA's and AMD's drivers
# touches no device
PRELOADED = ("torch", "triton", "numpy", "megamoe.layer", "megamoe.kernels.grouped_linear1")
_LOOK = "import torch; found = torch.cuda.is_available(); print(torch.cuda.current_device() if found else -1)"
_LOOK_S = 120.0


def main(
    arguments: Sequence[str] | None = None,
    *,
    plan: Sequence[Stage] = PLAN,
    find_device: Callable[[], str | None] | None = None,
    preloaded: Sequence[str] = PRELOADED,
) -> int:
    """The command -> exit code. Tests give a plan, and a way to find a device and modules to preload of their own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    begun = time.monotonic()
    parser = _parser(plan)
    options = parser.parse_args(given)
    try:
        if options.page:
            print(f"wrote {write_page(Store.merged(options.page), DOCS)}")
            return 0
        stages = _check(options, plan)
        device = (find_device or partial(found_device, min(_LOOK_S, options.budget_s)))()
        kind = REHEARSAL if device is None else GPU
        store = Store.opened(options.out, kind)
    except ValueError as refusal:
        parser.error(str(refusal))
    except RuntimeError as missing:
        print(missing, file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "benchmarks.gpu_kernels", *given])
    with tempfile.TemporaryDirectory(prefix="gpu-kernels-") as folder:
        scratch = Path(folder)
        guard = Guard(scratch)
        _set_environment(scratch, rehearsal=device is None)
        until = begun + options.budget_s
        runner = Runner(store, device or "cpu", device is None, command, until, scratch, guard, preloaded)
        try:
            passed = runner.run(stages)
        finally:
            guard.end()
    say(f"\n{summary(store, command)}")
    return int(not passed)


def found_device(within_s: float = _LOOK_S) -> str | None:
    """The GPU that torch has as its current one, looked for in another process, since this one must not touch it.

    RuntimeError where torch is not to be imported, or does not see the GPU whose driver is there.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LOOK], capture_output=True, text=True, timeout=within_s, check=True
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"torch did not say within {late.timeout:g} s whether there is a GPU") from late
    except subprocess.CalledProcessError as failed:
        raise RuntimeError(f"torch does not import: {failed.stderr.strip()[-2000:]}") from failed
    number = int(done.stdout.splitlines()[-1])
    drivers = [node for node in _NODES if Path(node).exists()]
    if number < 0 and drivers:
        why = done.stderr.strip()[-2000:] or "it does not say why"
        raise RuntimeError(f"there is {drivers[0]}, and torch sees no GPU: {why}")
    return None if number < 0 else f"cuda:{number}"


def _set_environment(scratch: Path, *, rehearsal: bool) -> None:
    """Of the stages: caches and temporary files in a folder that is removed, and Triton's interpreter on a CPU."""
    folders = {"TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda", "TMPDIR": "tmp"}
    for name, folder in folders.items():
        (scratch / folder).mkdir()
        os.environ[name] = str(scratch / folder)
    tempfile.tempdir = None  # is looked up anew
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # a look for GPUs by CUDA's runtime would leave this process, and what is forked of it, without any
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"


def _check(options: argparse.Namespace, plan: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages that are to be run. ValueError for what cannot be."""
    if not options.out:
        raise ValueError("--out or --page is needed: the folder of the results")
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out: there is no folder {options.out.absolute().parent}")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: {options.out} is no folder")
    if options.budget_s <= 0:
        raise ValueError(f"--budget-s must be positive, got {options.budget_s:g}")
    return select(options.stages, plan)


def _parser(plan: Sequence[Stage]) -> argparse.ArgumentParser:
    lines = [f"  {stage.name:<18} {stage.purpose} (at most {stage.limit_s:g} s)" for stage in plan]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages, in this order; --stages decode takes all that begin with decode-:\n" + "\n".join(lines),
    )
    parser.add_argument("--budget-s", type=float, default=520.0, help="seconds for everything (default: 520)")
    parser.add_argument("--out", type=path_of, metavar="DIR", help="where results, logs and tables go")
    parser.add_argument("--stages", metavar="A,B", help="only these, by name or by what their names begin with")
    page = "writes docs/gpu_kernels.md from a GPU's results; of several folders the later one's stages count"
    parser.add_argument("--page", type=path_of, metavar="DIR", nargs="+", help=page)
    return parser
