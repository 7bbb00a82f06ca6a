"""The page and the JSON beside it, of a run or of none: what was not measured says so in every cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_kernels.results import OVER, PARTS, Goal, Results, Row

NOT_RUN = "not run"
TITLES = {"linear1": "Linear-1", "linear2": "Linear-2", "both": "Linear-1, then Linear-2", "layer": "The layer at EP 1"}
COLUMNS = ("rows an expert", "experts", "what", "us (least-most)", "TFLOP/s", "GB/s", "share of ceiling", "error")
OVER_COLUMNS = {"over_grouped_mm": "x grouped_mm", "over_bf16": "x BF16", "over_unfused": "x unfused"}
HEAD = """# Kernels on a GPU

    python -m benchmarks.gpu_kernels --write docs/gpu_kernels.md           checks, then times; some eight minutes
    python -m benchmarks.gpu_kernels --tune                                finds tiles for the device, before and after
    python -m benchmarks.gpu_kernels --only linear1,layer --rows 1,2048 --shapes V4-Pro

A GPU that torch sees and Triton compiles for is needed; nothing else is installed or downloaded. The numbers of this
page are in `data/gpu_kernels.json` as well. Tiles that are found go to `megamoe/kernels/tables`, into a file called
after the device, and from then on the layer takes them on devices of that name.

- mxfp4: the kernels that the layer runs, rows rounded to MXFP8 by MXFP4 weights. Linear-1 reads each token where it is,
  through an index, and ends in the activation and its rounding. Chips that multiply BF16 have the rounded rows as BF16.
- bf16: the same kernels with BF16 rows and weights.
- grouped_mm: torch's own product of the same rows and BF16 weights. The rows were gathered for it beforehand, and no
  activation is part of it; in the layer both are.
- unfused: Linear-1 by the same MXFP8 x MXFP4 product with its 2I columns written to memory as BF16, torch's activation
  in BF16 in place of FP32, and the same rounding.
- The layer: one rank that has all its experts, every expert as many rows on average; eager as a caller has it, and
  replayed as a CUDA graph. grouped_mm there: sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum in torch.

Times are medians over {repeats} repeats in which what is compared takes turns; each times a batch of launches between
two events of the device, which begins once all are launched, except for the eager layer. Copies of the weights take
turns, so that none are in a cache. TFLOP/s count 2 a multiply-add; GB/s the weights of experts that have rows, rows
read and rows written, each once. The share is of the ceiling that would take longer, a copy of 1 GiB or a BF16 matmul
of 8192^3 on the same device. x: how many times as fast. Errors are against FP64, at most 64 rows of two experts, and
must be below 5e-3; what fails its check is not timed.
"""


def page(results: Results, repeats: int) -> str:
    """Markdown."""
    return "\n".join(_lines(results, repeats)) + "\n"


def _lines(results: Results, repeats: int) -> Iterator[str]:
    yield HEAD.format(repeats=repeats)
    yield f"`{results.command}`, {results.date}, device {_device(results)}."
    yield ""
    yield from _table(("ceiling", "measured"), _ceilings(results))
    yield from _table(("asked on an H100 or H200", "at least", "the worst", "where", "reached"), _goals(results))
    yield from _table(("checked", "", "what was found"), _checks(results))
    rows = list(results.rows.values())
    for shape in dict.fromkeys(row.shape for row in rows):
        for part in PARTS:
            here = [row for row in rows if (row.shape, row.part) == (shape, part)]
            if here:
                yield f"## {shape}: {TITLES[part]}\n"
                over = [name for name in OVER if name != "over_unfused" or part == "linear1"]
                heading = (*COLUMNS, *(OVER_COLUMNS[name] for name in over), "note")
                yield from _table(heading, [cells(row, over) for row in here])


def _device(results: Results) -> str:
    if results.device is None:
        return "none"
    versions = f"torch {results.torch}, Triton {results.triton}"
    return f"{results.device} ({results.chip}), {versions}, tiles {results.tiles}"


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield "|---" * len(heading) + "|"
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    yield ""


def _ceilings(results: Results) -> list[tuple[str, ...]]:
    found = results.ceilings
    return [
        ("BF16 matmul of 8192^3", f"{found.tflop_s:.0f} TFLOP/s" if found else NOT_RUN),
        ("copy of 1 GiB, read and written", f"{found.gb_s:.0f} GB/s" if found else NOT_RUN),
    ]


def _goals(results: Results) -> list[tuple[str, ...]]:
    asked = [f"below {goal.asked:g}" if goal.below else f"{goal.asked:g}" for goal in results.goals]
    return [(goal.name, wanted, *_worst(goal)) for goal, wanted in zip(results.goals, asked, strict=True)]


def _worst(goal: Goal) -> tuple[str, str, str]:
    if goal.worst is None:
        return NOT_RUN, NOT_RUN, NOT_RUN
    return f"{goal.worst:.3g}", goal.where, "yes" if goal.reached else "NO"


def _checks(results: Results) -> list[tuple[str, ...]]:
    if not results.checks:
        return [("all codes, rounding, the layer's bits, waits and memory", NOT_RUN, NOT_RUN)]
    return [(check.name, "passed" if check.passed else "FAILED", check.said or "-") for check in results.checks]


def cells(row: Row, over: list[str]) -> tuple[str, ...]:
    """A row of the table; over: which of its ratios have a column."""
    which = (str(row.rows_per_expert), str(row.num_experts), row.what)
    if row.us is None:
        blank = "-" if row.problem else NOT_RUN
        return (*which, *(blank for _ in (*COLUMNS[3:], *over)), row.problem or NOT_RUN)
    numbers = (
        f"{row.us:.1f} ({row.us_min:.1f}-{row.us_max:.1f})",
        f"{row.tflop_s:.1f}",
        f"{row.gb_s:.0f}",
        f"{row.share:.0%} of {row.bound}",
        "-" if row.error is None else f"{row.error:.2g}",
    )
    ratios = ("-" if getattr(row, name) is None else f"{getattr(row, name):.2f}" for name in over)
    return (*which, *numbers, *ratios, "-")


def write(results: Results, repeats: int, path: Path) -> None:
    """The page, and the JSON in the folder data beside it."""
    path.write_text(page(results, repeats))
    beside = path.parent / "data" / f"{path.stem}.json"
    beside.parent.mkdir(exist_ok=True)
    beside.write_text(json.dumps(results.as_dict(), indent=1, allow_nan=False) + "\n")
