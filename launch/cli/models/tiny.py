"""megamoe tiny: a small random checkpoint of a family's full shape."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megamoe.launch.output import Output, emit, say
from megamoe.launch.terminal import Format, exit_codes


def tiny(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    like: Annotated[
        str, typer.Option(help="deepseek-v4-flash, deepseek-v3, gpt-oss, mixtral or qwen3-moe.")
    ] = "deepseek-v4-flash",
    num_experts: Annotated[int, typer.Option(help="Experts of a layer.")] = 16,
    topk: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the weights: the same seed gives the same checkpoint.")] = 0,
    output: Output = Format.table,
) -> None:
    """Write a small random checkpoint with all that is special about a family, and a tokenizer of bytes, for tests."""
    with exit_codes():
        from megamoe.model.making.tiny import write_tiny  # brings transformers, which --help does not need

        parameters = write_tiny(destination, like, seed=seed, num_experts=num_experts, topk=topk)
        size = sum(file.stat().st_size for file in destination.iterdir())
        report = {"path": str(destination), "like": like, "seed": seed, "parameters": parameters, "bytes": size}
        said = f"{destination}: {parameters / 1e6:.2f} M random parameters shaped like {like}, {size / 1e6:.1f} MB"
        emit(output, report, lambda: say(said))
