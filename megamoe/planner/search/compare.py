"""Several devices, models or EP sizes beside each other: a row each, in the order in which they were given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megamoe.planner.answer import Answer, answer, finite
from megamoe.planner.layer.traffic import Traffic, traffic
from megamoe.planner.question import Question, Subject, ask

TWO_BATCH = "staged-two-batch"
By = Literal["hardware", "model", "stack"]


@dataclass(frozen=True, slots=True)
class Row:
    """One combination; answer is None and refusal says why where the planner cannot plan it."""

    name: str
    ep: int | None
    answer: Answer | None
    refusal: str = ""

    @property
    def traffic(self) -> Traffic | None:
        return traffic(self.answer.plan.request) if self.answer else None

    def as_dict(self, by: By) -> dict[str, Any]:
        if self.answer is None:
            return {by: self.name, "ep": self.ep, "verdict": None, "refusal": self.refusal}
        return self.answer.as_dict()


def compare(keys: dict[str, Any], names: list[str], by: By, eps: list[int | None]) -> list[Row]:
    """One row per name and EP size (None: the best). ValueError for an unknown name, or if nothing can be planned."""
    rows = []
    for name in names:
        question = ask({**keys, **_named(by, name)})
        subject = Subject.of(question)
        rows += [_row(name, question.but(ep=ep), subject) for ep in eps]
    if all(row.answer is None for row in rows):
        raise ValueError(rows[0].refusal)
    return rows


def _named(by: By, name: str) -> dict[str, Any]:
    """ "staged-two-batch" -> the staged stack in two halves"""
    if by == "stack" and name == TWO_BATCH:
        return {"stack": "staged", "two_batch": True}
    return {by: name}


def _row(name: str, question: Question, subject: Subject) -> Row:
    try:
        return Row(name, question.ep, answer(question, subject))
    except ValueError as refusal:
        return Row(name, question.ep, None, str(refusal))


def as_dicts(rows: list[Row], by: By) -> list[dict[str, Any]]:
    return [finite(row.as_dict(by)) for row in rows]
