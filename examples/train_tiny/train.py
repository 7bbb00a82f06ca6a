"""The training loop, as every rank runs it: FP4 in the forward, AdamW on masters, biases by the sign of the load."""

# B sequences of all ranks   L tokens of a sequence

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from examples.train_tiny.model import Sizes, Trained, make_model
from examples.train_tiny.states import States
from examples.train_tiny.text import Tokens, read_text, train_tokenizer
from megamoe import EPGroup
from megamoe.model.loading.load import load_tokenizer
from megamoe.model.training.experts import dense_parameters
from megamoe.model.training.save import save_native
from megamoe.training import sum_gradients, sum_over_ranks, update_bias


@dataclass(frozen=True, slots=True)
class Recipe:
    """out: folder for the log, the states and, at the end, the checkpoint; bias_rate: a step of the routers' biases."""

    out: Path
    text: Path | None = None
    steps: int = 800
    sequences: int = 16
    length: int = 128
    rate: float = 2e-3
    warmup: int = 50
    bias_rate: float = 1e-2
    report_every: int = 20
    save_every: int = 100
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "length", "report_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.sequences * self.length

    def rate_of(self, step: int) -> float:
        """Up from 0, then down to a tenth along a cosine."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * part))


def train(group: EPGroup, recipe: Recipe) -> list[dict[str, float]]:
    """Trains, or goes on where the newest state is -> the log. ValueError for a text or a state that cannot be used."""
    if (recipe.out / "checkpoint").exists():
        raise ValueError(
            f"{recipe.out / 'checkpoint'} is there already: the run is done, give another folder for a new one"
        )
    if recipe.sequences < group.size:
        raise ValueError(f"sequences must be at least 1 for each of {group.size} ranks, got {recipe.sequences}")
    text, tokenizer = _prepare(group, recipe)
    tokens = Tokens(text, tokenizer)
    trained = make_model(recipe.sizes, tokenizer.eos_token_id, group)
    states = States(recipe.out / "states", group)
    optimizer = torch.optim.AdamW(trained.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    begin, log = states.load(trained.model, optimizer)
    since, before = time.monotonic(), log[-1]["seconds"] if log else 0.0
    for step in range(begin, recipe.steps):
        loss = _step(trained, optimizer, tokens.batch(step, recipe.sequences, recipe.length), group, recipe, step)
        if (step + 1) % recipe.report_every == 0 or step in (0, recipe.steps - 1):
            with torch.no_grad():
                test = _loss(trained.model, tokens.test(recipe.sequences, recipe.length), group)
            losses = (sum_over_ranks(torch.stack((loss, test)), group) / recipe.tokens).tolist()
            seconds = round(before + time.monotonic() - since, 1)
            row = {"step": step + 1, "loss": losses[0], "test_loss": losses[1], "busiest": _busiest(trained)}
            log.append({**row, "seconds": seconds})
            _show(log, recipe, group)
        if (step + 1) % recipe.save_every == 0 and step + 1 < recipe.steps:
            states.save(step + 1, trained.model, optimizer, log)
    save_native(trained.model, recipe.out / "checkpoint", group, tokenizer=tokenizer)
    return log


def _prepare(group: EPGroup, recipe: Recipe) -> tuple[str, Any]:
    """The text, and the tokenizer that rank 0 has trained on it, or that is there already."""
    text, folder = read_text(recipe.text), recipe.out / "tokenizer"
    if group.rank == 0 and not folder.is_dir():
        train_tokenizer(text, recipe.sizes.vocab_size).save_pretrained(folder)
    sum_over_ranks(torch.ones(1), group)  # nobody reads it before it is there
    return text, load_tokenizer(folder)


def _step(
    trained: Trained, optimizer: torch.optim.Optimizer, batch: Tensor, group: EPGroup, recipe: Recipe, step: int
) -> Tensor:
    """One step on this rank's part of the batch [B, L + 1] -> its loss, summed over tokens."""
    for each in optimizer.param_groups:
        each["lr"] = recipe.rate_of(step)
    loss = _loss(trained.model, batch, group)
    torch.autograd.backward(loss / recipe.tokens)
    sum_gradients((each for _, each in dense_parameters(trained.model)), group)  # experts' are of the batch already
    optimizer.step()
    optimizer.zero_grad()
    for router, layer in trained.routers:
        update_bias(router.e_score_correction_bias, layer.tokens_per_expert, recipe.bias_rate)
    return loss.detach()


def _loss(model: Any, batch: Tensor, group: EPGroup) -> Tensor:
    """Of this rank's part of the batch, summed over tokens in FP64, where FP32 losses add up without rounding."""
    mine = batch[len(batch) * group.rank // group.size : len(batch) * (group.rank + 1) // group.size]
    logits = model(input_ids=mine[:, :-1], use_cache=False).logits
    each = cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="none")
    return each.double().sum()


def _busiest(trained: Trained) -> float:
    """Of all layers with a bias, what the busiest expert had in the latest call, as a multiple of the mean."""
    return max(
        float(layer.tokens_per_expert.max() / layer.tokens_per_expert.double().mean()) for _, layer in trained.routers
    )


def _show(log: list[dict[str, float]], recipe: Recipe, group: EPGroup) -> None:
    if group.rank:
        return
    (recipe.out / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
    now = log[-1]
    losses = f"loss {now['loss']:.3f}, held out {now['test_loss']:.3f}, busiest expert {now['busiest']:.2f}"
    print(f"step {now['step']} of {recipe.steps}: {losses}, {now['seconds']:.0f} s", file=sys.stderr, flush=True)
