"""megamoe convert: a checkpoint with its experts in another format, going on where it was cut off."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megamoe.catalog.wording import plural, size
from megamoe.launch.output import Output, emit, note, say
from megamoe.launch.terminal import Bar, Format, Terminated, exit_codes

if TYPE_CHECKING:
    from megamoe.model.loading.convert import Conversion


class Experts(str, Enum):
    """Formats of experts that a checkpoint can be written in."""

    mxfp4 = "mxfp4"
    bf16 = "bf16"


class Scales(str, Enum):
    """How a block's scale is found."""

    contract = "contract"
    best = "best"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a checkpoint: config.json and safetensors.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; after an interruption, the one that was begun.")
    ],
    experts: Annotated[Experts, typer.Option(help="Format of the routed experts; all else is copied.")],
    scales: Annotated[
        Scales, typer.Option(help="mxfp4: the contract's scale, or the better of it and half of it for each block.")
    ] = Scales.contract,
    output: Output = Format.table,
) -> None:
    """Write a checkpoint with its experts in MXFP4 or BF16, as megamoe.model.load() reads it."""
    with exit_codes():
        with Bar("looking through the checkpoint") as bar:
            from megamoe.model.loading.convert import convert as convert_checkpoint  # brings torch and transformers

            def show(done: int, total: int) -> None:
                bar.follow(f"read {done / 1e9:.2f} of {total / 1e9:.2f} GB", done, total)

            try:
                done = convert_checkpoint(source, target, experts=experts.value, scales=scales.value, progress=show)
            except (KeyboardInterrupt, Terminated, OSError):
                if target.is_dir():
                    note(f"{target} keeps the shards that are whole: the same command goes on from there")
                raise
        emit(output, done, lambda: _print(done))


def _print(done: Conversion) -> None:
    kept = f", {done.shards_kept} of them kept from an earlier run" if done.shards_kept else ""
    say(
        f"{done.target}: {size(done.bytes_written)} in {plural(done.shards, 'shard')}{kept}; read "
        f"{size(done.bytes_read)}, {plural(done.tensors_converted, 'tensor')} became {done.experts}"
    )
    if done.quantization_error:
        errors = done.quantization_error.values()
        least = f"{min(errors):.2%} to " if len(errors) > 1 else ""
        say(f"the experts of a shard were rounded by {least}{max(errors):.2%} (scales {done.scales})")
