"""torchrun --nproc-per-node 2 -m examples.train_tiny --out DIR, or python -m examples.train_tiny --launcher ray ..."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from examples.train_tiny.model import Sizes
from examples.train_tiny.train import Recipe, train
from megamoe import MegaMoECluster, RestartPolicy, init_group
from megamoe.launch.terminal import exit_codes, with_homes

_DAY_S = 24 * 3600.0
_RECIPE, _SIZES = Recipe(Path()), Sizes()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the log, the states and the checkpoint; goes on where it was.")],
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file to train on; the World English Bible by default.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Where torchrun does not start them.")] = 2,
    launcher: Annotated[str, typer.Option(help="spawn or ray; under torchrun it is torchrun.")] = "spawn",
    restarts: Annotated[int, typer.Option(help="How often a rank that is lost is started again.")] = 0,
    deadline_s: Annotated[float, typer.Option(help="Seconds that any wait may take.")] = 120.0,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = _RECIPE.steps,
    sequences: Annotated[int, typer.Option(help="Of a batch, over all ranks.")] = _RECIPE.sequences,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = _RECIPE.length,
    save_every: Annotated[int, typer.Option(help="Steps from one state to the next.")] = _RECIPE.save_every,
    vocab_size: Annotated[int, typer.Option(help="Tokens that the tokenizer is trained to.")] = _SIZES.vocab_size,
    hidden: Annotated[int, typer.Option(help="Width of a token, and inside an expert.")] = _SIZES.hidden,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = _SIZES.layers,
) -> None:
    """Train a small DeepSeek-V4 with FP4 experts over ranks, and save it in FP4."""
    with exit_codes():
        sizes = Sizes(vocab_size=vocab_size, hidden=hidden, intermediate=hidden, layers=layers)
        recipe = Recipe(
            out.absolute(), text and text.absolute(), steps, sequences, length, save_every=save_every, sizes=sizes
        )
        if "RANK" in os.environ:  # torchrun's
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            with init_group(rank=rank, size=size, init_method="env://", deadline_s=deadline_s) as group:
                train(group, recipe)
            return
        policy = RestartPolicy(restarts=restarts)
        with MegaMoECluster(
            ranks, launcher=launcher, deadline_s=deadline_s, batch_deadline_s=_DAY_S, policy=policy
        ) as cluster:
            cluster.run(train, recipe)


if __name__ == "__main__":
    typer.run(with_homes(main))
