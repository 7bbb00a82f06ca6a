"""megamoe plan and explain: does communication hide, what does a layer take, does it fit, what does it serve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.cli.planner.plan_flags import asks, question_of
from megamoe.launch.cli.planner.plan_view import print_answer
from megamoe.launch.output import Output, check_folder, emit, note, say, show, write
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.planner.answer import Answer
    from megamoe.planner.serving.flops import Term


@asks
def plan(
    given: dict[str, Any],
    report: Annotated[Path | None, typer.Option(help="Also write one self-contained HTML page here.")] = None,
    output: Output = Format.table,
) -> None:
    """Say whether a model's communication hides on a device, and why: rule, layer, memory, serving of a workload."""
    with exit_codes():
        if report is not None:
            check_folder(report)
            if report.suffix.lower() not in ("", ".html", ".htm"):
                raise ValueError(f"report {report} must end in .html")
        found = answered(given)
        if report is not None:  # before anything is printed: whoever reads that may close the pipe
            write_report(found, report)
        emit(output, found.as_dict(), lambda: print_answer(found))
        if not found.fits or found.missed:
            raise typer.Exit(1)


@asks
def explain(given: dict[str, Any], output: Output = Format.table) -> None:
    """Print every term of a plan with its formula and its numbers."""
    with exit_codes():
        found = answered(given)
        from megamoe.planner.explain import explain as terms_of

        terms = terms_of(found)
        keys = ("name", "formula", "numbers", "value", "unit")
        report = {"sentence": found.verdict, "terms": [{key: getattr(t, key) for key in keys} for t in terms]}
        emit(output, report, lambda: _print_terms(found.verdict, terms))


def _print_terms(verdict: str, terms: list[Term]) -> None:
    say(verdict)
    rows = [(term.name, term.value, term.unit, f"{term.formula} = {term.numbers}") for term in terms]
    show({"term": "", "value": "~", "unit": "", "formula = the same in numbers": ""}, rows, folds=True)


def answered(given: dict[str, Any]) -> Answer:
    """The answer to what was asked; what was picked for it is said."""
    question = question_of(given)
    from megamoe.planner.answer import answer  # what makes no sense is refused before anything is read

    found = answer(question)
    say_picked(found)
    return found


def say_picked(found: Answer) -> None:
    """What was picked, and which of what was given changes nothing."""
    question, choice = found.question, found.choice
    crossed = {"nic" if rule.tier == "nic" else "scaleup" for rule in found.plan.rules}
    for tier in sorted({text.partition("=")[0].strip() for text in question.links or ()} - crossed):
        note(f"links of {tier} change nothing: no row crosses one at EP{found.plan.request.ep}")
    if choice.picked:
        values = ", ".join(f"{key} {getattr(question, key)}" for key in choice.picked)
        note(f"picked {values}: {choice.why}")
    for thing in (found.subject.hardware, found.subject.model):
        if thing.announced:
            note(f"{thing.name} is announced: its figures are nobody's measurement")
    if found.serving is not None and question.tokens_per_rank is not None:
        note(
            f"the layer shown is that of {plural(question.tokens_per_rank, 'token')} a rank, whatever the workload has"
        )


def write_report(found: Answer, path: Path) -> None:
    from megamoe.planner.page import page
    from megamoe.planner.report.render import render

    write(path, render(page(found, command=" ".join(["megamoe", *sys.argv[1:]]))))
