"""megamoe compare: several devices, models or EP sizes beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.cli.planner.plan_flags import asks, keys_of
from megamoe.launch.output import Output, emit, note, say, show
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.planner.answer import Answer
    from megamoe.planner.search.compare import Row

NAMES = "Devices; --by model: models; --by stack: fused, staged, staged-two-batch, megamoe."


class By(str, Enum):
    """What the names are of."""

    hardware = "hardware"
    model = "model"
    stack = "stack"


@asks
def compare(
    given: dict[str, Any],
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help=NAMES,
        ),
    ],
    by: Annotated[By, typer.Option(help="What the names are of.")] = By.hardware,
    ep: Annotated[str | None, typer.Option(help="EP sizes, such as 8,16,32; the best of each by default.")] = None,
    output: Output = Format.table,
) -> None:
    """Plan the same on several devices, models or stacks, at one EP size or several, and print a row for each."""
    with exit_codes():
        keys = keys_of(given)
        if keys.get(by.value) is not None:
            raise ValueError(f"the names are those of the {by.value}: leave --{by.value} out")
        from megamoe.planner.search.compare import as_dicts
        from megamoe.planner.search.compare import compare as rows_of

        rows = rows_of(keys, list(dict.fromkeys(names)), by.value, _sizes(ep, keys))
        emit(output, as_dicts(rows, by.value), lambda: _print_rows(rows, by))
        for row in rows:
            if row.answer is None:
                note(f"{row.name}: {row.refusal}")


def _sizes(ep: str | None, keys: dict[str, Any]) -> list[int | None]:
    if ep is None:
        return [keys.get("ep")]
    try:
        return list(dict.fromkeys(int(part) for part in ep.split(",")))
    except ValueError:
        raise ValueError(f"ep {ep!r} is no list of EP sizes such as 8,16,32") from None


def _print_rows(rows: list[Row], by: By) -> None:
    """Where ranks lie and what a token sends, then what that needs; rates where there is a workload."""
    answers = [(row.name, row.answer) for row in rows if row.answer is not None]
    _print_question([found for _, found in answers], by)
    columns = {by.value: "", "EP": ">", "lie in": "", **dict.fromkeys(("devices", "domains"), ",.1f")}
    columns |= {"link us": ",.1f", "layer us": ",.1f", "verdict": "", "margin": ".2f"}
    title = "\nKB that a token sends in a layer, there and back: across devices, across domains"
    show(columns, [(name, *_sent(found)) for name, found in answers], title)
    serves = answers[0][1].serving is not None
    columns = {by.value: "", "EP": ">", "needs": ",.0f", "has": ",.0f", "over": "", "GB": ",.1f", "fits": ""}
    columns |= {"batch": ">", "tok/s/dev": ",.0f", "$/M tok": "~"} if serves else {}
    title = "\nGB/s one way that would hide it, and over which link; GB of a device's memory"
    show(columns, [(name, *_needed(found)) for name, found in answers], title)
    say_serial([found for _, found in answers])


def say_serial(answers: Iterable[Answer]) -> None:
    """Why a layer is exposed whose rule holds."""
    if any(found.plan.request.serial for found in answers):
        say("staged is exposed on any link: each of its stages waits for the one before")


def _sent(found: Answer) -> tuple[Any, ...]:
    from megamoe.planner.layer.traffic import traffic

    sent, layer, rule = traffic(found.plan.request), found.plan.layer, found.binding
    kilobytes = (sent.across_devices_bytes / 1e3, sent.leaves_domain_bytes / 1e3)
    times = (layer.communication_us, layer.layer_us)
    if found.training is not None:
        back = found.training.backward
        times = (layer.communication_us + back.communication_us, found.training.step_us)
    where = f"{sent.domains} of {sent.domain}"
    return (sent.ep, where, *kilobytes, *times, "hidden" if found.hidden else "exposed", rule.margin if rule else None)


def _needed(found: Answer) -> tuple[Any, ...]:
    keys = found.as_dict()
    link = (keys["required_link_gb_s"], keys["link_gb_s"], keys["binding_tier"])
    cells = (keys["ep"], *link, keys["memory_gb"], "yes" if keys["fits"] else "no")
    served = ("batch", "tokens_per_s_per_device", "usd_per_million_tokens") if found.serving is not None else ()
    return (*cells, *(keys[key] for key in served))


def _print_question(answers: list[Answer], by: By) -> None:
    """What all rows have in common."""
    request = answers[0].plan.request
    expert = request.expert
    sizes = f"{expert.num_experts} experts {expert.hidden} x {expert.intermediate}, top-{expert.topk}"
    said = [f"{request.model.name}: {sizes}"] if by is not By.model else []
    said += [request.hardware.name] if by is not By.hardware else []
    if all(each.plan.request.tokens_per_rank == request.tokens_per_rank for each in answers):
        said.append(f"{plural(request.tokens_per_rank, 'token')} a rank")
    say(", ".join([*said, f"{expert.dispatch_format} there, {expert.combine_format} back"]))
