"""What a run goes on from: a folder a step, in it a file of each rank."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from megamoe import EPGroup


class States:
    """The states of a run, of which the last two are kept: each rank has the dense weights and its own experts."""

    def __init__(self, folder: Path, group: EPGroup) -> None:
        self.folder, self.group = folder, group
        self.file = f"rank-{group.rank}-of-{group.size}.pt"

    def save(self, step: int, model: Any, optimizer: torch.optim.Optimizer, log: list[dict[str, float]]) -> None:
        path = self.folder / f"{step:06d}" / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        if self.group.rank == 0:
            for old in sorted(self.folder.iterdir())[:-2]:
                shutil.rmtree(old)

    def load(self, model: Any, optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, float]]]:
        """The newest state that every rank has saved -> the step to go on with, and the log until there."""
        size = self.group.size
        folders = sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else []
        whole = [each for each in folders if len(list(each.glob(f"rank-*-of-{size}.pt"))) == size]
        if not whole:
            others = [file.name for each in folders for file in each.glob("*.pt") if f"-of-{size}." not in file.name]
            if others:
                raise ValueError(f"{self.folder} is of another number of ranks ({others[0]}), and there are {size}")
            return 0, []
        state = torch.load(whole[0] / self.file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["log"]
