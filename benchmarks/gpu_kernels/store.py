"""The folder of results: results.json, a log of each stage, tables of tiles; each written whole or not at all.

Results of an earlier command stay until their stage is run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_kernels.findings import Ceilings, Check, Fact, Finding, Row, Table, from_dict
from benchmarks.gpu_kernels.goals import goals
from benchmarks.gpu_kernels.plan import Stage

RESULTS = "results.json"
GPU, REHEARSAL = "gpu", "rehearsal"
_NOTES = {GPU: "", REHEARSAL: "run on a CPU in Triton's interpreter with tiny shapes: its times mean nothing"}
_LOG_BYTES = 60_000  # of a stage's log, half from its beginning and half from its end
_NOT_RUN = ("skipped", "no time")
RUNNING, PASSED, CANNOT = "running", "passed", "cannot"


@dataclass(slots=True)
class Record:
    """What is known of one stage.

    state      running, passed, failed, crashed, timed out, skipped, no time, interrupted, or cannot: nothing to run on
    said       why
    seconds    that it took
    command    which command it is of; date, when it began
    """

    state: str = RUNNING
    said: str = ""
    seconds: float = 0.0
    command: str = ""
    date: str = ""
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    ceilings: list[Ceilings] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.state in (PASSED, CANNOT)

    def put(self, finding: Finding) -> None:
        """Rows have their shares of the mean of the ceilings before and after them, as far as those are known."""
        if isinstance(finding, Row):
            mean = Ceilings.mean(self.ceilings)
            self.rows = [row for row in self.rows if row.key != finding.key]
            self.rows.append(finding.under(mean) if mean else finding)
        elif isinstance(finding, Check):
            self.checks.append(finding)
        elif isinstance(finding, Ceilings):
            self.ceilings.append(finding)
            mean = Ceilings.mean(self.ceilings)
            assert mean is not None
            self.rows = [row.under(mean) for row in self.rows]
        elif isinstance(finding, Fact):
            self.facts[finding.name] = finding.value
        else:
            self.tables = sorted({*self.tables, finding.name})

    @classmethod
    def of(cls, data: dict[str, Any]) -> Record:
        """What asdict() gave. ValueError or TypeError for anything else."""
        kinds: tuple[tuple[str, type[Any]], ...] = (("rows", Row), ("checks", Check), ("ceilings", Ceilings))
        lists = {name: [from_dict(kind, each) for each in data[name]] for name, kind in kinds}
        return cls(**{**data, **lists})


class Store:
    """Everything that is known, and the folder where it is kept.

    kind    GPU or REHEARSAL: of one folder all results are of one kind
    """

    def __init__(self, folder: Path, kind: str, records: dict[str, Record]) -> None:
        self.folder, self.kind, self.records = folder, kind, records

    @classmethod
    def opened(cls, folder: Path, kind: str | None = None) -> Store:
        """With the results that are there; kind None takes theirs. ValueError for others, and for none where kind is
        None."""
        file = folder / RESULTS
        if not file.exists():
            if kind is None:
                raise ValueError(f"{folder} has no {RESULTS}")
            return cls(folder, kind, {})
        try:
            data = json.loads(file.read_text())
            found = str(data["kind"])
            records = {str(name): Record.of(each) for name, each in data["stages"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as wrong:
            raise ValueError(f"{file} is not what this command writes: {wrong!r}; give another folder") from None
        if kind is not None and found != kind:
            raise ValueError(f"{file} is of a {found} run, and this is a {kind} run; give another folder")
        return cls(folder, found, records)

    @classmethod
    def merged(cls, folders: Sequence[Path]) -> Store:
        """Of several folders: of a stage that is in more than one, the later folder's, unless it did not run there.

        ValueError where one has no results, or they are not all of one kind.
        """
        first, *others = map(cls.opened, folders)
        for other in others:
            if other.kind != first.kind:
                raise ValueError(f"{other.folder} is of a {other.kind} run, and {first.folder} of a {first.kind} run")
            ran = {name: each for name, each in other.records.items() if each.state not in _NOT_RUN}
            first.records = {**other.records, **first.records, **ran}
        return first

    def rows(self) -> Iterator[Row]:
        for record in self.records.values():
            yield from record.rows

    def facts(self, name: str) -> Any:
        """The value of a name, None where no stage has found it."""
        return next((each.facts[name] for each in self.records.values() if name in each.facts), None)

    def put(self, stage: Stage, finding: Finding) -> None:
        self.records[stage.name].put(finding)
        if isinstance(finding, Table):
            self._replace(Path("tables") / Path(finding.name).name, finding.text)

    def write(self) -> None:
        self._replace(Path(RESULTS), json.dumps(self.as_dict(), indent=1) + "\n")

    def write_log(self, stage: Stage, log: Path) -> None:
        """The beginning and the end of a stage's log."""
        if log.exists():
            data = log.read_bytes()
            if len(data) > _LOG_BYTES:
                half = _LOG_BYTES // 2
                data = data[:half] + b"\n[...]\n" + data[-half:]
            self._replace(Path("logs") / f"{stage.name}.txt", data.decode(errors="replace"))

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "note": _NOTES[self.kind],
            "commands": {name: each.command for name, each in self.records.items()},
            "goals": [{**asdict(goal), "reached": goal.reached} for goal in goals(list(self.rows()))],
            "stages": {name: asdict(record) for name, record in self.records.items()},
        }

    def _replace(self, name: Path, text: str) -> None:
        """Readers see the old file or the new one."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        draft.write_text(text)
        os.replace(draft, path)
