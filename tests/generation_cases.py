"""Prompts for tests of generation, and texts as one rank makes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.model.generation.engine import Generation
from megamoe.model.generation.request import GenerationRequest, Prompt, Token

VOCABULARY = 256


def prompts(count: int, seed: int = 0) -> tuple[Prompt, ...]:
    """Of 1, 4, 7, ... random tokens."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [1 + 3 * number for number in range(count)]
    return tuple(
        Prompt(f"p{number}", tuple(torch.randint(VOCABULARY, (length,), generator=rng).tolist()))
        for number, length in enumerate(lengths)
    )


def texts(request: GenerationRequest, tokens: Iterable[Token]) -> list[list[Token]]:
    found: list[list[Token]] = [[] for _ in request.prompts]
    for token in tokens:
        assert token.index == len(found[token.prompt])
        found[token.prompt].append(token)
    return found


def on_one_rank(model: Any, request: GenerationRequest, *, together: bool | None = None) -> list[list[Token]]:
    generation = Generation(model, None, request, together=together)
    tokens: list[Token] = []
    while not generation.done:
        tokens += generation.step()
    return texts(request, tokens)


class Experts(nn.Module):
    """In place of a layer of its own group: every expert doubles, and calls are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self.calls.append(len(hidden_states))
        assert len(top_k_index) == len(top_k_weights) == len(hidden_states)
        return 2 * hidden_states

    def idle(self) -> None:
        self.calls.append(0)
