"""The CPU's kernels: what the first compilation takes, and products of packed weights beside the memory and torch.

python -m benchmarks.cpu_kernels                  # the path that layers take here; a minute
python -m benchmarks.cpu_kernels --path avx2      # another that this CPU runs

One core. Few rows: every expert gets so many, its weights come from memory, and packed bytes per second stand
beside those of a plain read of the same memory. Many rows: one expert, beside torch's product of the same rows in FP32
and, where the CPU has BF16 instructions, in BF16. What is compared takes turns; median (min to max) over the repeats.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as FilePath
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from benchmarks.command import positive, run
from benchmarks.turns import in_turn
from megamoe.execution.products import multiply_dtype
from megamoe.kernels.cpu import build as building
from megamoe.kernels.cpu.layout import bf16_shape, mxfp4_shapes
from megamoe.kernels.cpu.library import Library, Rows, load
from megamoe.kernels.cpu.paths import Path, runnable
from megamoe.schedule.kept import processor

FEW, MANY = (1, 2, 4, 8), 512
SIZE, EXPERTS = 2048, 64  # 64 matrices of 2048 x 2048: 143 MB in MXFP4, so that no cache holds them


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables. Exit code 2 for a path that this CPU does not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [path.name for path in runnable()]
    parser.add_argument("--path", choices=names, default=names[0], help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=9)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    date = datetime.date.today().isoformat()
    print(f"{processor()}, one core, torch {torch.__version__}, {date}, {asked.repeats} repeats")
    for path in runnable():
        if path.name == asked.path:
            print(f"\n{path.name} ({path.arithmetic})\n\n  compiled from a clean cache in {compile_s(path):.1f} s")
            library = load(path)
            few_rows(library, asked.repeats)
            many_rows(library, asked.repeats)


def compile_s(path: Path) -> float:
    """Seconds that the path takes to compile where no cache has it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(building, "_caches", return_value=[FilePath(folder)] * 2),
    ):
        begun = time.perf_counter()
        building.build(path)
        return time.perf_counter() - begun


def rates(times: list[float], amount: float) -> str:
    """amount / time as median (min to max).    [0.5, 1.0, 0.25], 1.0 -> "2.00 (1.00 to 4.00)" """
    return f"{amount / median(times):.2f} ({amount / max(times):.2f} to {amount / min(times):.2f})"


def few_rows(library: Library, repeats: int) -> None:
    """Weights out of memory, few rows for each expert."""
    print("\n  rows an expert | weights | GB/s of packed bytes  | GFLOP/s | share of a plain read")
    for name, stacks in (("MXFP4", packed_stacks(EXPERTS)), ("BF16", (dense_stack(EXPERTS // 4),))):
        experts, num_bytes = len(stacks[0]), sum(each.numel() * each.element_size() for each in stacks)
        weights = (stacks[0], stacks[1]) if len(stacks) == 2 else stacks[0]
        for rows in FEW:
            x = random(rows * experts)
            out = torch.empty(len(x), SIZE, dtype=torch.bfloat16)
            given = Rows(x, torch.full((experts,), rows))
            found = in_turn(
                {
                    "product": partial(library.products, given, weights, SIZE, out),
                    "read": partial(read_all, library, stacks),
                },
                repeats,
            )
            gflops = 2 * len(x) * SIZE * SIZE / median(found["product"]) / 1e6
            share = median(read / product for read, product in zip(found["read"], found["product"], strict=True))
            speed = rates(found["product"], num_bytes / 1e6)
            print(f"  {rows:>14} | {name:<7} | {speed:<21} | {gflops:>7.1f} | {share:.2f}")


def read_all(library: Library, stacks: Sequence[Tensor]) -> None:
    for stack in stacks:
        library.read(stack)


def many_rows(library: Library, repeats: int) -> None:
    """One expert with many rows, beside torch's product of as many."""
    x, dense = random(MANY), random(SIZE)
    out = torch.empty(MANY, SIZE, dtype=torch.bfloat16)
    given, flops = Rows(x, torch.tensor([MANY])), 2 * MANY * SIZE * SIZE
    (packed, scales), blocks = packed_stacks(1), dense_stack(1)
    runs: dict[str, Callable[[], object]] = {
        "MXFP4": partial(library.products, given, (packed, scales), SIZE, out),
        "BF16": partial(library.products, given, blocks, SIZE, out),
    }
    for dtype in dict.fromkeys((torch.float32, multiply_dtype(torch.device("cpu")))):
        operands = x.to(dtype), dense.to(dtype).t()
        runs[f"torch {str(dtype).removeprefix('torch.')}"] = partial(torch.mm, *operands)
    found = in_turn(runs, repeats)
    print(f"\n  {MANY} rows       | GFLOP/s                  | beside {list(runs)[-1]}")
    for name, times in found.items():
        beside = median(peer / own for peer, own in zip(found[list(runs)[-1]], times, strict=True))
        print(f"  {name:<14} | {rates(times, flops / 1e6):<24} | {beside:.2f}")


def random(rows: int) -> Tensor:
    return torch.randn(rows, SIZE).to(torch.bfloat16)


def packed_stacks(experts: int) -> tuple[Tensor, Tensor]:
    """Random codes and scales near one, as the products read them."""
    values, scales = mxfp4_shapes(SIZE, SIZE)
    return (
        torch.randint(0, 256, (experts, *values), dtype=torch.uint8),
        torch.randint(118, 124, (experts, *scales), dtype=torch.uint8),
    )


def dense_stack(experts: int) -> Tensor:
    return torch.randn(experts, *bf16_shape(SIZE, SIZE)).to(torch.bfloat16)


if __name__ == "__main__":
    run(main)
