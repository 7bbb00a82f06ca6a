"""A rank's part of a generation: its prompts, step by step, in step with all ranks of the group.

A step takes every sequence of every rank one token on, and passes every MoE layer once on every rank. A rank that has
nothing left takes part with no tokens until no rank has any.
"""

# T tokens of all sequences   S of one   V vocabulary

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megamoe.model.generation.forward import (
    attending,
    fits_together,
    forward_alone,
    forward_together,
    new_cache,
)
from megamoe.model.generation.meeting import Meeting
from megamoe.model.generation.places import find_places
from megamoe.model.generation.request import LENGTH, STOP, GenerationRequest, Token, check_fits, digest
from megamoe.model.generation.sampling import choose
from megamoe.model.generation.sequences import SequenceCache
from megamoe.parallel.errors import CallRefusedError, listed
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.pairs import Label
from megamoe.parallel.turns import Turns

_WHAT = "generation"
_TURNS: WeakKeyDictionary[Any, Turns] = WeakKeyDictionary()  # of each model


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt on its way. new: the tokens that the model has not seen; done: those that came out.

    cache: a SequenceCache, or transformers' own where each sequence has a forward of its own.
    """

    number: int
    id: str
    new: list[int]
    cache: Any
    seen: int = 0
    done: list[int] = field(default_factory=list)


class Generation:
    """A request's texts on one rank of a group. All ranks make one of the same request, and then call step() alike.

    model      a causal language model of transformers whose experts have idle(): megamoe.model.load() makes such
    group      the experts' group; None is one rank
    together   whether all tokens of a step go through the model as one batch, each attending among its sequence only:
               by default where the model's products do not depend on the batch and its layers have no other state than
               keys and values. Else each sequence has a forward of its own, and they meet at the experts

    A prompt's tokens do not depend on the others nor on the number of ranks. ValueError for a prompt that does not fit.
    """

    def __init__(
        self, model: Any, group: EPGroup | None, request: GenerationRequest, *, together: bool | None = None
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        check_fits(request, config.vocab_size, getattr(config, "max_position_embeddings", None))
        self.model, self.group, self.request = model, EPGroup.of(group), request
        self.experts: list[nn.Module] = [each for each in model.modules() if callable(getattr(each, "idle", None))]
        if not self.experts:
            raise ValueError(f"{type(model).__name__} has no experts that ranks share")
        with self._own_turn():
            self.together = fits_together(model, self.experts) if together is None else together
            with attending(model, own=False):
                self._meeting = Meeting([] if self.together else find_places(model, self.experts))
        mine = range(self.group.rank, len(request.prompts), self.group.size)
        self._queue, self._active = deque(mine), list[_Sequence]()
        self.steps, self.done = 0, False
        self._interruption, self._digest = "", digest(request) if self.group.size > 1 else 0

    def step(self) -> list[Token]:
        """The next token of each text that this rank works on. Empty, and done is set, once no rank has any left.

        Generations of one model take turns, step by step, from whatever thread. Errors as the layers raise them:
        PeerError where a rank is lost; ValueError for logits that are no numbers. RuntimeError after any of them, and
        after Ctrl-C: texts would go on from what half a step has cached.
        """
        with self._own_turn():
            if self._interruption:
                raise RuntimeError(f"the generation cannot go on, a step ended in {self._interruption}: make a new one")
            try:
                with attending(self.model, self.together):
                    return self._step()
            except BaseException as interruption:
                said = str(interruption).partition("\n")[0]
                self._interruption = f"{type(interruption).__name__}{': ' * bool(said)}{said}"
                raise

    def _own_turn(self) -> AbstractContextManager[None]:
        """The turn to use the model, whose modules a step changes for as long as it takes."""
        turns = _TURNS.setdefault(self.model, Turns())
        return turns.take(f"a generation of {type(self.model).__name__}", torch.device("cpu"), math.inf)

    def _step(self) -> list[Token]:
        self._admit()
        if not self._any_active():
            self.done = True
            return []
        self.steps += 1
        with torch.no_grad():
            if not self._active:
                for each in self.experts:
                    each.idle()  # type: ignore[operator]
                return []
            logits = self._together() if self.together else self._apart()
            return [self._take(sequence, row) for sequence, row in zip(list(self._active), logits, strict=True)]

    def _admit(self) -> None:
        """Begins as many prompts as a step has room for."""
        room = self.request.max_step_tokens
        while self._queue and len(self._active) < self.request.max_sequences:
            prompt = self.request.prompts[self._queue[0]]
            if room < len(prompt.token_ids) and room < self.request.max_step_tokens:
                return
            room -= len(prompt.token_ids)
            cache = SequenceCache() if self.together else new_cache(self.model)
            self._active.append(_Sequence(self._queue.popleft(), prompt.id, list(prompt.token_ids), cache))

    def _any_active(self) -> bool:
        """Whether some rank has a sequence: all ranks learn the same.

        CallRefusedError, on every rank, where one steps another generation: prompts of either would be left out.
        """
        if self.group.transport is None:
            return bool(self._active)
        page = torch.tensor([len(self._active), self.steps, self._digest], dtype=torch.int64).view(torch.uint8)
        with self.group.turn(_WHAT, self.model.device), self.group.unbroken(_WHAT, self.steps + 1):
            pages = self.group.transport.gather(page, Label(_WHAT, "counts")).view(torch.int64).view(-1, 3)
            others = [rank for rank, each in enumerate(pages) if not torch.equal(each[1:], pages[0, 1:])]
            if others:
                who = f"{self.group.named(0)} and {listed(others, self.group.named)}"
                raise CallRefusedError(
                    f"{who} step different generations: every rank must make the same requests, each of all ranks' "
                    "prompts, and step them in the same order"
                )
        return bool(pages[:, 0].sum())

    def _together(self) -> Tensor:
        """One forward for all -> the logits of each sequence's last token, [sequences, V] float32"""
        return forward_together(self.model, [(each.new, each.seen, each.cache) for each in self._active])

    def _apart(self) -> list[Tensor]:
        """A forward for each, which meet at the experts -> the logits of each one's last token, [V] float32"""

        def alone(sequence: _Sequence) -> Callable[[], Tensor]:
            return lambda: forward_alone(self.model, sequence.new, sequence.seen, sequence.cache)

        with self._meeting.held():
            return self._meeting.run([alone(each) for each in self._active])

    def _take(self, sequence: _Sequence, logits: Tensor) -> Token:
        """The sequence's next token, and what follows for it."""
        index = len(sequence.done)
        token = choose(logits, self.request.sampling, sequence.id, index)
        sequence.done.append(token)
        sequence.seen += len(sequence.new)
        sequence.new = [token]
        finish = STOP if token in self.request.stop_ids else ""
        if not finish and len(sequence.done) == self.request.max_new_tokens:
            finish = LENGTH
        if finish:
            self._active.remove(sequence)
        return Token(sequence.number, index, token, finish)


def generate(model: Any, request: GenerationRequest, group: EPGroup | None = None) -> list[list[int]]:
    """Token ids of each prompt's text, without the stop token; in a group this rank's texts, and [] for the others."""
    generation = Generation(model, group, request)
    texts: list[list[int]] = [[] for _ in request.prompts]
    while not generation.done:
        for token in generation.step():
            if token.finish != STOP:
                texts[token.prompt].append(token.token)
    return texts
