"""What a run came to, on one screen of 24 lines by 100 columns."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu_kernels.goals import goals
from benchmarks.gpu_kernels.store import REHEARSAL, RESULTS, Store

LINES, COLUMNS = 24, 100
_REASONS = 4  # of stages that did not pass


def summary(store: Store, command: str) -> str:
    """Stages with state and seconds, why some did not pass, goals with their worst, and where the files are."""
    return "\n".join(line.rstrip()[:COLUMNS] for line in _lines(store, command))


def _lines(store: Store, command: str) -> Iterator[str]:
    records = store.records
    passed = sum(record.passed for record in records.values())
    place = "REHEARSAL on a CPU, times mean nothing" if store.kind == REHEARSAL else f"{store.facts('device')}"
    yield f"{place}: {passed} of {len(records)} stages passed, {sum(each.seconds for each in records.values()):.0f} s"
    cells = [
        f"{name[:18]:<18} {record.state:<11} {record.seconds:6.1f} s{'' if record.command == command else ' earlier'}"
        for name, record in records.items()
    ]
    half = -(-len(cells) // 2)
    for left, right in zip(cells[:half], [*cells[half:], ""], strict=False):
        yield f"{left:<50}{right}"
    wrong = [f"! {name}: {record.said or record.state}" for name, record in records.items() if not record.passed]
    yield from wrong[:_REASONS] if len(wrong) <= _REASONS else [*wrong[: _REASONS - 1], f"! and {len(wrong) - 3} more"]
    for goal in goals(list(store.rows())):
        worst = "not run" if goal.worst is None else f"{goal.worst:.3g}"
        reached = {None: "", True: "yes", False: "NO"}[None if store.kind == REHEARSAL else goal.reached]
        yield f"{goal.name:<44} {goal.wanted:<8} {worst:<8} {reached:<4}{goal.where}"
    tables = [f"tables/{name}" for record in records.values() for name in record.tables]
    yield f"{store.folder / RESULTS}, logs/ beside it{', '.join(['', *tables])}"
