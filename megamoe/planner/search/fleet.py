"""What `recommend` says to a question: its spaces limited to what was given, its pools as questions that plan again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from megamoe.planner.question import Question, Subject, ask
from megamoe.planner.search.choose import sizes
from megamoe.planner.search.recommend import Load, Pool, Recommendation, recommend
from megamoe.planner.search.search import Space, Targets

_AXES = {
    "ep": "eps",
    "attention_tp": "attention_tps",
    "mtp": "mtps",
    "microbatches": "microbatches",
    "weight_format": "weight_formats",
    "kv_format": "kv_formats",
    "dispatch_format": "dispatch_formats",
    "combine_format": "combine_formats",
}


def fleet(keys: dict[str, Any], load: Load) -> tuple[Recommendation, dict[str, Question]]:
    """The recommendation, and a question for each pool. keys: those of a question; what is left out is open."""
    question = ask(keys)
    subject = Subject.of(question)
    targets = Targets(tpot_ms=question.tpot_ms, ttft_ms=question.ttft_ms)
    found = recommend(
        subject.model,
        subject.hardware,
        subject.profile,
        load,
        targets=targets,
        prefill_space=_space(keys, question, subject, "prefill"),
        decode_space=_space(keys, question, subject, "decode"),
    )
    pools = {"prefill": found.prefill, "decode": found.decode}
    return found, {phase: _again(question, pool) for phase, pool in pools.items()}


def _space(keys: dict[str, Any], question: Question, subject: Subject, phase: Literal["prefill", "decode"]) -> Space:
    space = replace(Space.of(subject.model, subject.hardware, phase=phase), eps=tuple(sizes(question, subject)))
    given = {axis: (keys[key],) for key, axis in _AXES.items() if keys.get(key) is not None}
    if phase == "prefill":
        given.pop("mtps", None)
    return replace(space, **given)


def _again(question: Question, pool: Pool) -> Question:
    """The pool's deployment, with nothing left open."""
    d, formats = pool.serving.deployment, pool.serving.deployment.formats
    same = {key: getattr(d, key) for key in ("ep", "attention_tp", "context", "phase", "mtp", "microbatches", "accept")}
    return ask(
        {
            "model": question.model,
            "hardware": question.hardware,
            "profile": question.profile,
            "set": question.settings,
            **same,
            "batch": d.batch_per_device,
            "cached": d.cached or None,
            "devices": pool.devices,
            "weight_format": d.weight_format,
            "kv_format": formats.kv,
            "dispatch_format": formats.dispatch,
            "combine_format": formats.combine,
        }
    )
