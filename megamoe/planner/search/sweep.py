"""One input varied, all others as they are: a row per value, each a whole answer.

Question, "ep", [4, 8, 16] -> sweep -> [Point(4, Answer), ...]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from megamoe.catalog.wording import nearest
from megamoe.planner.answer import Answer, answer
from megamoe.planner.question import Question, Subject, keys_of_questions
from megamoe.planner.search.choose import choose

_NOT_SWEPT = ("model", "hardware", "profile", "set")
_OF_THE_CATALOG = ("hardware", "model", "profile")
MOST_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Point:
    """A value of what is swept, and the answer there."""

    value: float | str
    answer: Answer


def sweep(question: Question, key: str, values: list[float | str]) -> list[Point]:
    """ValueError for a key or value that makes no sense."""
    check_key(key)
    if not values:
        raise ValueError(f"no values of {key} are given, such as 4,8,16")
    if len(values) > MOST_POINTS:
        raise ValueError(f"{len(values)} values of {key} are more than {MOST_POINTS}")
    subject = Subject.of(question)
    question = settled(question, subject, key)
    return [Point(value, answer(*vary(question, subject, key, value))) for value in values]


def settled(question: Question, subject: Subject, key: str) -> Question:
    """What the question leaves open, picked once for all values but for the one that varies."""
    if key == "ep" or question.ep is not None:
        return question
    picked = choose(question, subject)
    return question.but(**{each: getattr(picked.question, each) for each in picked.picked if each != key})


def vary(question: Question, subject: Subject, key: str, value: float | str) -> tuple[Question, Subject]:
    """The question with one other value, whether it is one of its keys or of the catalog's."""
    if "." in key:
        setting = f"{key}={value}"
        return question.but(settings=(*question.settings, setting)), subject.but(setting)
    return question.but(**{key: value}), subject


def check_key(key: str) -> None:
    """ValueError unless it is a key of a question, or of the catalog such as hardware.scaleup_gb_s."""
    known = [each for each in keys_of_questions() if each not in _NOT_SWEPT]
    if "=" in key:
        name, _, values = key.partition("=")
        raise ValueError(f"'{key}' is more than a key: --over {name} --values {values or '...'}")
    if "." in key:
        thing = key.partition(".")[0]
        if thing not in _OF_THE_CATALOG:
            raise ValueError(f"'{key}' is of '{thing}'; there is {', '.join(_OF_THE_CATALOG)}")
    elif key not in known:
        raise ValueError(f"no key is called '{key}'; {nearest(key, [*known, 'hardware.KEY', 'model.KEY'])}")


def parse_values(key: str, text: str) -> list[float | str]:
    """ "4,8,16" -> [4, 8, 16] for a key that counts, texts for formats and for keys of the catalog"""
    check_key(key)
    return [_parsed(key, part.strip()) for part in text.split(",")]


def spread(key: str, low: float, high: float, steps: int, log: bool = False) -> list[float | str]:
    """So many values from low to high, even steps or even factors; whole and without repeats for a key that counts.

    ep, 4 to 64 in 5 steps by factors -> 4, 8, 16, 32, 64
    """
    check_key(key)
    if not 2 <= steps <= MOST_POINTS:
        raise ValueError(f"steps is {steps}; it lies between 2 and {MOST_POINTS}")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"a sweep goes from one number to another, not from {low:g} to {high:g}")
    if log and (low <= 0 or high <= 0):
        raise ValueError(f"factors need values above 0, not {low:g} to {high:g}")
    shares = [step / (steps - 1) for step in range(steps)]
    values = [low * (high / low) ** share if log else low + (high - low) * share for share in shares]
    if "." in key:
        return [float(f"{value:.6g}") for value in values]
    if _kinds(key) & {float}:
        return list(values)
    if not _kinds(key) & {int}:
        raise ValueError(f"{key} is no number: give its values as {key} A,B,C")
    return list(dict.fromkeys(round(value) for value in values))


def _parsed(key: str, text: str) -> float | str:
    kinds: set[Any] = set() if "." in key else _kinds(key)
    if not kinds & {int, float}:
        return text
    try:
        return int(text) if int in kinds else float(text)
    except ValueError:
        raise ValueError(f"{key} {text!r} is no {'whole ' if int in kinds else ''}number") from None


def _kinds(key: str) -> set[Any]:
    """int | None -> {int, NoneType}"""
    annotation: Any = Question.model_fields[key].annotation
    return set(get_args(annotation)) or {annotation}
