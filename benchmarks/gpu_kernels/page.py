"""docs/gpu_kernels.md and docs/data/gpu_kernels.json, from the results of a GPU and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_kernels.findings import OVER, PARTS, Row
from benchmarks.gpu_kernels.goals import Goal, goals
from benchmarks.gpu_kernels.store import GPU, Record, Store

NOT_RUN = "not run"
TITLES = {"linear1": "Linear-1", "linear2": "Linear-2", "both": "Linear-1, then Linear-2", "layer": "The layer at EP 1"}
COLUMNS = ("rows an expert", "experts", "what", "us (least-most)", "TFLOP/s", "GB/s", "share of ceiling", "error")
OVER_COLUMNS = {"over_grouped_mm": "x grouped_mm", "over_bf16": "x BF16", "over_unfused": "x unfused"}
HEAD = """# Kernels on a GPU

    python -m benchmarks.gpu_kernels --budget-s 520 --out DIR     checks, then times, in stages
    python -m benchmarks.gpu_kernels --page DIR                   makes this page of what came back

The numbers are in `data/gpu_kernels.json` as well. [testing.md](testing.md) says how to run it.

- mxfp4: the kernels that the layer runs, rows rounded to MXFP8 by MXFP4 weights. Linear-1 reads each token where it is,
  through an index, and ends in the activation and its rounding. Chips that multiply BF16 have the rounded rows as BF16.
- bf16: the same kernels with BF16 rows and weights.
- grouped_mm: torch's own product of the same rows and BF16 weights. The rows were gathered for it beforehand, and no
  activation is part of it; in the layer both are.
- unfused: Linear-1 by the same MXFP8 x MXFP4 product with its 2I columns written to memory as BF16, torch's activation
  in BF16 in place of FP32, and the same rounding.
- The layer: one rank that has all its experts, every expert as many rows on average; as a caller has it (eager, the
  host's time where the host takes longer than the device) and replayed as a CUDA graph. grouped_mm there: sort, gather,
  grouped_mm, SwiGLU, grouped_mm, weighted sum in torch.

Times are medians over repeats in which what is compared takes turns; each times a batch of launches between two events
of the device, which begins once all are launched, but for the eager layer. A row whose batch began before all of it was
launched says "bound by the host". Copies of the weights take turns, so that none are in a cache. TFLOP/s count 2 a
multiply-add; GB/s the weights of experts that have rows, rows read and rows written, each once. Ceilings are a BF16
matmul of 8192^3 and a copy of 1 GiB, both of random values, measured before and after the rows of each stage in its own
process; the share is of the mean of the two, and of the ceiling that would take longer. x: how many times as fast.
Errors are against FP64, at most 64 rows of two experts, and must be below 5e-3; what fails its check is not timed.
"""


def write_page(store: Store, docs: Path) -> Path:
    """Writes both files -> the page. ValueError for a rehearsal, and where nothing was measured."""
    if store.kind != GPU:
        raise ValueError(f"{store.folder} is of a {store.kind} run: a page is made from a GPU's results alone")
    if not any(True for _ in store.rows()):
        raise ValueError(f"{store.folder} has no row that was measured")
    path, data = docs / "gpu_kernels.md", docs / "data" / "gpu_kernels.json"
    data.parent.mkdir(exist_ok=True)
    path.write_text(page(store))
    data.write_text(json.dumps(store.as_dict(), indent=1, allow_nan=False) + "\n")
    return path


def page(store: Store) -> str:
    """Markdown."""
    return "\n".join(_lines(store)) + "\n"


def _lines(store: Store) -> Iterator[str]:
    yield HEAD
    facts = {name: store.facts(name) for name in ("device", "chip", "torch", "triton", "table")}
    yield "; ".join(f"{name} {value}" for name, value in facts.items() if value is not None) + "."
    yield ""
    yield from _table(("asked on an H100 or H200", "", "the worst", "where", "reached"), list(map(_goal, _of(store))))
    yield from _table(("stage", "state", "s", "date", "command"), _stages(store))
    yield from _table(("ceilings of", "when", "TFLOP/s", "GB/s"), _ceilings(store.records))
    yield from _table(("checked", "", "what was found"), _checks(store.records))
    rows = list(store.rows())
    for shape in dict.fromkeys(row.shape for row in rows):
        for part in PARTS:
            here = sorted((row for row in rows if (row.shape, row.part) == (shape, part)), key=_place)
            if here:
                yield f"## {shape}: {TITLES[part]}\n"
                over = [name for name in OVER if name != "over_unfused" or part == "linear1"]
                heading = (*COLUMNS, *(OVER_COLUMNS[name] for name in over), "note")
                yield from _table(heading, [cells(row, over) for row in here])


def _of(store: Store) -> list[Goal]:
    return goals(list(store.rows()))


def _place(row: Row) -> tuple[int, int]:
    return row.rows_per_expert, PARTS[row.part].index(row.what)


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if not rows:
        return
    yield f"| {' | '.join(heading)} |"
    yield "|---" * len(heading) + "|"
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    yield ""


def _goal(goal: Goal) -> tuple[str, ...]:
    if goal.worst is None:
        return goal.name, goal.wanted, NOT_RUN, NOT_RUN, NOT_RUN
    return goal.name, goal.wanted, f"{goal.worst:.3g}", goal.where, "yes" if goal.reached else "NO"


def _stages(store: Store) -> list[tuple[str, ...]]:
    return [
        (name, ": ".join(filter(None, (each.state, each.said))), f"{each.seconds:.0f}", each.date, each.command)
        for name, each in store.records.items()
    ]


def _ceilings(records: dict[str, Record]) -> list[tuple[str, ...]]:
    return [
        (name, found.when, f"{found.tflop_s:.0f}", f"{found.gb_s:.0f}")
        for name, record in records.items()
        for found in record.ceilings
    ]


def _checks(records: dict[str, Record]) -> list[tuple[str, ...]]:
    found = [check for record in records.values() for check in record.checks]
    return [(check.name, "passed" if check.passed else "FAILED", check.said or "-") for check in found]


def cells(row: Row, over: Sequence[str]) -> tuple[str, ...]:
    """A row of the table; over: which of its ratios have a column."""
    which = (str(row.rows_per_expert), str(row.num_experts), row.what)
    if row.us is None:
        return (*which, *("-" for _ in (*COLUMNS[3:], *over)), row.problem or NOT_RUN)
    numbers = (
        f"{row.us:.1f} ({row.us_min:.1f}-{row.us_max:.1f})",
        f"{row.tflop_s:.1f}",
        f"{row.gb_s:.0f}",
        "-" if row.share is None else f"{row.share:.0%} of {row.bound}",
        "-" if row.error is None else f"{row.error:.2g}",
    )
    ratios = ("-" if getattr(row, name) is None else f"{getattr(row, name):.2f}" for name in over)
    return (*which, *numbers, *ratios, row.note or "-")
