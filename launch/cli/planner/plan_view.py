"""A plan as tables in the terminal: figures to the right, units in the headings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.text import Text

from megamoe.launch.terminal import stderr, stdout

if TYPE_CHECKING:
    from megamoe.planner.answer import Answer
    from megamoe.planner.layer.plan import Plan

STYLES = {"HIDDEN": "bold green", "EXPOSED": "bold red", "DOES NOT FIT": "bold red", "MISSES": "bold red"}
_ROOM = 30  # columns that words should have beside figures; with fewer they stand below them
PARTS = {
    "experts": "routed experts",
    "weights": "other weights",
    "cache": "cache",
    "activations": "activations",
}


def say(line: str) -> None:
    """A line as it is, however long; a verdict at its beginning in colour."""
    text = Text(line)
    for word, style in STYLES.items():
        if line.startswith(word):
            text.stylize(style, 0, len(word))
    stdout.print(text, soft_wrap=True)


def note(line: str) -> None:
    stderr.print(Text(line), soft_wrap=True)


def show(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,), folds: bool = False
) -> None:
    """A table as wide as it needs to be, closer together where the terminal is narrow.

    left: columns of words, all others are figures; an empty row is a rule.
    folds: the last column is words that go on in the next line where the terminal ends, or under the row where that
    leaves too little room.
    """
    body = [tuple(row) for row in rows]
    table = [row for row in (tuple(headings), *body) if row]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    gap = 2 if folds or sum(widths) + 2 * (len(widths) - 1) <= stdout.width else 1
    room = stdout.width - sum(widths[:-1]) - gap * len(widths[:-1])
    under = folds and room < min(_ROOM, widths[-1])
    if folds:
        widths[-1] = len(headings[-1]) if under else min(widths[-1], room)
    dash = "\u2500" if stdout.encoding.startswith("utf") else "-"
    line = dash * (sum(widths) + gap * (len(widths) - 1))
    lines = [title] if title else []
    lines += [*_cells(tuple(headings), widths, left, gap), line]
    for row in body:
        if not row:
            lines.append(line)
        elif under:
            lines += _cells((*row[:-1], ""), widths, left, gap)
            lines += [f"    {each}" for each in wrap(row[-1], max(stdout.width - 4, 20), break_on_hyphens=False)]
        else:
            lines += _cells(row, widths, left, gap)
    stdout.print(Text("\n".join(lines)), soft_wrap=True)


def _cells(row: tuple[str, ...], widths: Sequence[int], left: Sequence[int], gap: int) -> list[str]:
    """The lines of a row: more than one where its last cell does not fit."""
    last = wrap(row[-1], widths[-1], break_on_hyphens=False) if widths[-1] else []
    cells = [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip((*row[:-1], last[0] if last else ""), widths, strict=True))
    ]
    indent = " " * (sum(widths[:-1]) + gap * len(widths[:-1]))
    return [(" " * gap).join(cells).rstrip(), *(indent + each for each in last[1:])]


def figure(value: float | None, digits: int = 1) -> str:
    """1234567.8 -> '1,234,567.8'    None -> '-'"""
    return "-" if value is None else f"{value:,.{digits}f}"


def short(value: float | None) -> str:
    """About four digits: 12345.6 -> '12,346'    1.2345 -> '1.234'    0.012345 -> '0.0123'    8.0 -> '8'"""
    if value is None:
        return "-"
    size = abs(value)
    if size < 1e-3 and size:
        return f"{value:.3g}"
    if size >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.{1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4}f}"


# ---- megamoe plan ----


def print_answer(found: Answer) -> None:
    """The verdict, then the rule, the layer, the memory and the serving."""
    say(found.verdict)
    if not found.fits:
        say(found.plan.sentence)
    for missed in found.missed:
        say(f"MISSES  {missed}")
    _print_rules(found.plan)
    _print_layer(found)
    _print_memory(found)
    if found.serving is not None:
        _print_step(found)
        _print_serving(found)


def _print_rules(planned: Plan) -> None:
    from megamoe.planner.answer import counts
    from megamoe.planner.layer.rule import hides_tflops

    if planned.binding is None:
        return
    headings = ("tier", "count", "TFLOP/s", "GB/s", "C/B", "threshold", "margin", "needs", "verdict")
    rows = [
        (
            rule.tier,
            name,
            f"{rule.tflops:,.0f}",
            f"{rule.gb_s:,.0f}",
            f"{rule.ratio:,.0f}",
            f"{rule.threshold:,.0f}",
            f"{rule.margin:.2f}",
            f"{rule.required_gb_s:,.0f}",
            "hidden" if rule.hidden else "exposed",
        )
        for name, rule in counts(planned)
    ]
    show("\nthe rule: C/B and threshold in FLOPs/Byte, links in GB/s one way", headings, rows, left=(0, 1, 8))
    expert = planned.request.expert
    hides = hides_tflops(expert.intermediate, expert.gated)
    say(f"1 GB/s hides {hides:.1f} TFLOP/s by the paper's count, fp8 there and bf16 back")
    say("paper: no scales, every pair leaves; counted: scales, pairs that leave; achieved: rates of the profile")
    for rule, reached in zip(planned.rules, planned.achieved, strict=True):
        enough = reached.required_gb_s * rule.gb_s / reached.gb_s
        needed = f"{rule.required_gb_s:,.0f} GB/s, {enough:,.0f} as achieved"
        say(f"beyond {needed}, more {rule.tier} bandwidth brings nothing")


def _print_layer(found: Answer) -> None:
    planned, layer = found.plan, found.plan.layer
    request = planned.request
    title = f"\none layer: {request.tokens_per_rank} tokens a rank, {request.routing}, {layer.waves} waves, "
    title += f"{layer.rows:,.0f} rows in {layer.experts_touched:.4g} experts"
    parts = (
        ("fixed: kernel, barriers, staging", layer.fixed_us),
        ("waves, first dispatch to last result", layer.core_us),
        ("  compute and memory, without links", layer.alone_us),
        ("  exposed", layer.exposed_us),
        ("slot sum", layer.sum_us),
        ("layer", layer.layer_us),
        None,
        ("alone: compute", layer.compute_us),
        ("alone: memory", layer.memory_us),
        ("alone: dispatch", layer.dispatch_us),
        ("alone: combine", layer.combine_us),
        ("played: head", layer.head_us),
        ("played: stalls, head included", layer.stalls_us),
        ("played: tail", layer.tail_us),
    )
    rows = [(part[0], figure(part[1]), figure(100 * part[1] / layer.layer_us)) if part else () for part in parts]
    show(title, ("part", "us", "% of layer"), rows)
    say(f"{100 * layer.hidden:.1f} % of the communication's {layer.communication_us:,.1f} us is hidden")


def _print_memory(found: Answer) -> None:
    held = found.memory
    rows: list[tuple[str, ...]] = [
        (name, figure(getattr(held, f"{part}_gb"), 2), figure(100 * getattr(held, f"{part}_gb") / held.capacity_gb))
        for part, name in PARTS.items()
        if found.serving is not None or part != "cache"
    ]
    rows += [("all", figure(held.total_gb, 2), figure(100 * held.total_gb / held.capacity_gb))]
    rows += [("usable", figure(held.capacity_gb, 2), figure(100.0))]
    without = "" if found.serving is not None else "; caches come with a workload"
    show(f"\nmemory of a device, 1 GB is 1e9 bytes{without}", ("part", "GB", "% of usable"), rows)


def _print_step(found: Answer) -> None:
    assert found.serving is not None
    step = found.serving.step
    parts = {name.removesuffix("_us"): us for name, us in asdict(step).items()}
    rows: list[tuple[str, ...]] = [
        (name, figure(us / 1e3, 3), figure(100 * us / step.total_us)) for name, us in parts.items() if us
    ]
    rows.append(("step", figure(step.total_us / 1e3, 3), figure(100.0)))
    show("\na step of the whole model", ("part", "ms", "% of step"), rows)


def _print_serving(found: Answer) -> None:
    served = found.serving
    assert served is not None
    d = served.deployment
    what = "sequences" if d.phase == "decode" else "prompts"
    title = f"\n{d.phase}: {d.devices} devices, EP{d.ep}, {d.batch_per_device} {what} a device, {d.context} tokens, "
    title += "attention DP" if d.attention_tp == 1 else f"attention TP{d.attention_tp}"
    title += (f", MTP{d.mtp}" if d.mtp else "") + (f", {d.microbatches} micro-batches" if d.microbatches > 1 else "")
    rate = served.tokens_per_s_per_device
    results = (
        ("tokens/s", "device", short(rate)),
        ("tokens/s", "all devices", short(rate * d.devices)),
        ("tokens/s", "user" if d.phase == "decode" else "prompt", short(served.tokens_per_s_per_user)),
        ("ms", "per output token", served.tpot_ms and short(served.tpot_ms)),
        ("ms", "to the first token", served.ttft_ms and short(served.ttft_ms)),
        ("$", "per million tokens", served.usd_per_million_tokens and short(served.usd_per_million_tokens)),
        ("tokens/s", "megawatt", served.tokens_per_s_per_mw and short(served.tokens_per_s_per_mw)),
    )
    show(title, ("for", "result", "unit"), [(name, value, unit) for unit, name, value in results if value], left=(0, 2))
