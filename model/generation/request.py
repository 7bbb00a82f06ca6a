"""What is to be generated, and what comes out, token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from megamoe.catalog.wording import plural
from megamoe.model.generation.sampling import Sampling, check_integer

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids. id: its own, which its draws depend on."""

    id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """Prompts, how their texts are chosen, and where they end.

    stop_ids          tokens that end a text, which are not part of it
    max_sequences     texts that a rank works on at the same time
    max_step_tokens   tokens of prompts that a rank takes in one step, unless one prompt alone has more
    """

    prompts: tuple[Prompt, ...]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    max_sequences: int = 32
    max_step_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_sequences", "max_step_tokens"):
            check_integer(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.prompts:
            raise ValueError("there are no prompts")
        stop_ids: object = self.stop_ids
        if not isinstance(stop_ids, Iterable):
            raise ValueError(f"stop_ids must be tokens, got {stop_ids!r}")
        for token in stop_ids:
            check_integer("a token of stop_ids", token)
        for prompt in self.prompts:
            for token in prompt.token_ids:
                if type(token) is not int:  # which is quick, and there are many
                    check_integer(f"a token of prompt {prompt.id}", token)
        empty = [prompt.id for prompt in self.prompts if not len(prompt.token_ids)]
        if empty:
            raise ValueError(f"prompt {empty[0]} has no tokens")
        seen: set[str] = set()
        for prompt in self.prompts:
            if prompt.id in seen:
                raise ValueError(f"two prompts have the id {prompt.id}")
            seen.add(prompt.id)


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a text.

    prompt   place of its prompt in the request
    index    place in the text, from 0
    finish   "stop" or "length" where the text ends with it, else ""
    """

    prompt: int
    index: int
    token: int
    finish: str = ""


def digest(request: GenerationRequest) -> int:
    """64 bits by which ranks tell whether they were asked the same."""
    hashed = hashlib.sha256()
    for prompt in request.prompts:
        hashed.update(f"{prompt.id!r} {len(prompt.token_ids)} ".encode(errors="backslashreplace"))
        hashed.update(np.array(prompt.token_ids, np.int64).tobytes())
    limits = request.max_new_tokens, request.max_sequences, request.max_step_tokens
    hashed.update(repr((request.sampling, sorted(map(int, request.stop_ids)), [int(each) for each in limits])).encode())
    return int.from_bytes(hashed.digest()[:8], "little", signed=True)


def check_fits(request: GenerationRequest, vocab_size: int, max_positions: int | None) -> None:
    """ValueError for a prompt with tokens that a model has no embedding of, or that is too long for it."""
    for prompt in request.prompts:
        outside = [token for token in prompt.token_ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {prompt.id} has token {outside[0]}, outside of the model's vocabulary of {vocab_size}"
            )
        length = len(prompt.token_ids)
        if max_positions is not None and length + request.max_new_tokens > max_positions:
            most = max_positions - length
            cure = f"at most {most} new tokens fit" if most > 0 else "shorten it"
            raise ValueError(
                f"prompt {prompt.id} has {plural(length, 'token')}, and with {request.max_new_tokens} new ones that is "
                f"more than the {max_positions} that the model takes: {cure}"
            )
