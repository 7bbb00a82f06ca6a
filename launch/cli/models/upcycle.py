"""megamoe upcycle: a mixture of experts made of a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.output import Output, emit, say
from megamoe.launch.terminal import Bar, Format, exit_codes

if TYPE_CHECKING:
    from megamoe.model.making.upcycle import UpcycleReport


def upcycle(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder of a dense transformers model, a GGUF file, or smollm2.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    experts_format: Annotated[str, typer.Option(help="mxfp4 or bf16.")] = "mxfp4",
    num_experts: Annotated[int, typer.Option(help="Copies of each MLP.")] = 8,
    topk: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the routers, which are random.")] = 0,
    output: Output = Format.table,
) -> None:
    """Make a mixture of experts of a dense model: the experts are copies of its MLPs, so it says what that one says."""
    with exit_codes():
        with Bar("reading the dense model") as bar:
            from megamoe.model.making.upcycle import upcycle as make  # brings transformers, which --help does not need

            report = make(
                source,
                destination,
                experts_format=experts_format,
                num_experts=num_experts,
                topk=topk,
                seed=seed,
                progress=bar.follow,
            )
        emit(output, report, lambda: _print(report))


def _print(report: UpcycleReport) -> None:
    say(
        f"{report.path}: {plural(report.num_layers, 'layer')} of {plural(report.num_experts, 'expert')}, "
        f"{report.hidden} x {report.intermediate}, top-{report.topk}; "
        f"{report.expert_parameters / 1e6:.0f} M expert weights in {report.experts_format}, "
        f"rounded by {report.rounding_error:.1%}; {report.bytes / 1e6:.0f} MB in all"
    )
    say("All experts of a layer are copies of the dense model's MLP: until they are trained, this is that model")
