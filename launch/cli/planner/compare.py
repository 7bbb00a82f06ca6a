"""megamoe compare: several devices, models or EP sizes beside each other."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.launch.cli.planner.plan import Output, print_json
from megamoe.launch.cli.planner.plan_flags import asks, keys_of
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.planner.answer import Answer
    from megamoe.planner.search.compare import Row


class By(str, Enum):
    """What the names are of."""

    hardware = "hardware"
    model = "model"


@asks
def compare(
    given: dict[str, Any],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Devices, or models with --by model.")],
    by: Annotated[By, typer.Option(help="What the names are of.")] = By.hardware,
    ep: Annotated[str | None, typer.Option(help="EP sizes, such as 8,16,32; the best of each by default.")] = None,
    output: Output = Format.table,
) -> None:
    """Plan the same on several devices (or of several models), at one EP size or several, and print a row for each."""
    with exit_codes():
        keys = keys_of(given)
        if keys.get(by.value) is not None:
            raise ValueError(f"the names are those of the {by.value}: leave --{by.value} out")
        from megamoe.planner.search.compare import as_dicts
        from megamoe.planner.search.compare import compare as rows_of

        rows = rows_of(keys, list(dict.fromkeys(names)), by.value, _sizes(ep, keys))
        if output is Format.json:
            print_json(as_dicts(rows, by.value))
        else:
            _print_rows(rows, by)
        _say_refusals(rows)


def _sizes(ep: str | None, keys: dict[str, Any]) -> list[int | None]:
    if ep is None:
        return [keys.get("ep")]
    try:
        return list(dict.fromkeys(int(part) for part in ep.split(",")))
    except ValueError:
        raise ValueError(f"ep {ep!r} is no list of EP sizes such as 8,16,32") from None


def _say_refusals(rows: list[Row]) -> None:
    from megamoe.launch.cli.planner.plan_view import note

    for row in rows:
        if row.answer is None:
            note(f"{row.name}: {row.refusal}")


def _print_rows(rows: list[Row], by: By) -> None:
    """Where ranks lie and what a token sends, then what that needs; rates where there is a workload."""
    from megamoe.launch.cli.planner.plan_view import show

    answers = [row.answer for row in rows if row.answer is not None]
    _print_question(answers, by)
    headings: tuple[str, ...] = (
        by.value,
        "EP",
        "lie in",
        "devices",
        "domains",
        "link us",
        "layer us",
        "verdict",
        "margin",
    )
    cells = [_sent(row.name, row.answer) for row in rows if row.answer is not None]
    show(
        "\nKB that a token sends in a layer, there and back: across devices, across domains", headings, cells, (0, 2, 7)
    )
    serves = answers[0].serving is not None
    served = ("batch", "tok/s/dev", "$/M tok") if serves else ()
    headings = (by.value, "EP", "needs", "has", "over", "GB", "fits", *served)
    cells = [_needed(row.name, row.answer) for row in rows if row.answer is not None]
    show("\nGB/s one way that would hide it, and over which link; GB of a device's memory", headings, cells, (0, 4, 6))


def _sent(name: str, found: Answer) -> tuple[str, ...]:
    from megamoe.launch.cli.planner.plan_view import figure
    from megamoe.planner.layer.traffic import traffic

    sent, layer, rule = traffic(found.plan.request), found.plan.layer, found.plan.binding
    return (
        name,
        str(sent.ep),
        f"{sent.domains} of {sent.domain}",
        figure(sent.across_devices_bytes / 1e3),
        figure(sent.across_domains_bytes / 1e3),
        figure(layer.communication_us),
        figure(layer.layer_us),
        found.plan.verdict,
        figure(rule.margin if rule else None, 2),
    )


def _needed(name: str, found: Answer) -> tuple[str, ...]:
    from megamoe.launch.cli.planner.plan_view import figure, short

    keys = found.as_dict()
    cells = (
        name,
        str(keys["ep"]),
        figure(keys["required_link_gb_s"], 0),
        figure(keys["link_gb_s"], 0),
        keys["binding_tier"] or "-",
        figure(keys["memory_gb"]),
        "yes" if keys["fits"] else "no",
    )
    if found.serving is None:
        return cells
    rate = figure(keys["tokens_per_s_per_device"], 0)
    return (*cells, str(keys["batch"]), rate, short(keys["usd_per_million_tokens"]))


def _print_question(answers: list[Answer], by: By) -> None:
    """What all rows have in common."""
    from megamoe.launch.cli.planner.plan_view import say

    request = answers[0].plan.request
    expert = request.expert
    sizes = f"{expert.num_experts} experts {expert.hidden} x {expert.intermediate}, top-{expert.topk}"
    said = [f"{request.model.name}: {sizes}" if by is By.hardware else request.hardware.name]
    if all(each.plan.request.tokens_per_rank == request.tokens_per_rank for each in answers):
        said.append(f"{request.tokens_per_rank} tokens a rank")
    say(", ".join([*said, f"{expert.dispatch_format} there, {expert.combine_format} back"]))
