"""Which modules of a model sequences can meet at: those that do the same to each token, to the bit, in any company.

The model is asked: two short prompts pass it, and what each module made of each must be what it makes of both.
"""

# S tokens of a sequence   H hidden   K experts per token

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megamoe.model.generation.forward import PROBES, forward_alone, new_cache, replaced_forwards, silenced
from megamoe.model.generation.meeting import Call, Place, join, split

_log = logging.getLogger(__name__)


def find_places(model: Any, experts: Sequence[nn.Module]) -> list[Place]:
    """Where a model's sequences meet, in the order of a forward.

    A module is a place where every forward calls it, and once, with tensors of tokens, [1, S, .], and nothing else that
    differs between sequences, and where it gives the same bits for two sequences together as for each alone. Of modules
    within each other the outermost counts. Routed experts are always met at, by themselves or in a module around them.
    """
    if getattr(model, "megamoe_loading", None) is None or model.device.type != "cpu":
        return [Place(each, 0, all=True) for each in experts]
    asked = _Asked(model, experts)
    for number in range(len(PROBES)):
        asked.pass_through(number)
    unfit = asked.unfit | {module for module in asked.order if not asked.always(module)}
    places: list[Place] = []
    covered: set[nn.Module] = set()
    for module in asked.order:  # a module comes before what it calls
        if module in covered:
            continue
        if module in experts:
            places.append(Place(module, 0, all=True))
        elif module not in unfit:
            below = set(module.modules())
            covered |= below
            places.append(Place(module, 1, all=any(each in below for each in experts)))
    return places


class _Asked:
    """Modules as they were called by each prompt, and those among them that are no places."""

    def __init__(self, model: Any, experts: Sequence[nn.Module]) -> None:
        self.order: dict[nn.Module, None] = {}
        self.unfit: set[nn.Module] = set()
        self._model, self._experts = model, experts
        self._first: dict[tuple[nn.Module, int], tuple[Call, Any]] = {}  # of the first prompt, by module and step
        self._called: dict[tuple[nn.Module, int, int], int] = {}
        self._trying = False

    def pass_through(self, prompt: int) -> None:
        """A prompt, and then one more token."""
        tokens, cache = PROBES[prompt], new_cache(self._model)
        with silenced(self._experts, _stand_in):
            for step, (new, before) in enumerate(((tokens, 0), ([1], len(tokens)))):
                with self._noted(prompt, step, len(new)):
                    forward_alone(self._model, new, before, cache)

    def always(self, module: nn.Module) -> bool:
        """Whether every forward called it."""
        return all((module, prompt, step) in self._called for prompt in range(len(PROBES)) for step in range(2))

    @contextmanager
    def _noted(self, prompt: int, step: int, length: int) -> Iterator[None]:
        """For the block, every module but the whole model notes its calls."""
        modules = [each for each in self._model.modules() if each is not self._model]
        with replaced_forwards((each, self._noting(each, each.forward, prompt, step, length)) for each in modules):
            yield

    def _noting(
        self, module: nn.Module, forward: Callable[..., Any], prompt: int, step: int, length: int
    ) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._trying:
                return forward(*args, **kwargs)
            self.order.setdefault(module)
            out = forward(*args, **kwargs)
            at = prompt, step, length
            if module not in self.unfit and not self._fits(module, forward, Call(args, kwargs), out, at):
                self.unfit.add(module)
            return out

        return noted

    def _fits(
        self, module: nn.Module, forward: Callable[..., Any], call: Call, out: Any, at: tuple[int, int, int]
    ) -> bool:
        prompt, step, length = at
        self._called[module, prompt, step] = self._called.get((module, prompt, step), 0) + 1
        if self._called[module, prompt, step] > 1 or not _of_tokens(call, length):
            return False
        if not _has_tokens(out, call.length(1)):
            return False
        if prompt == 0:
            self._first[module, step] = call, out
            return True
        if (module, step) not in self._first:
            return False
        first, theirs = self._first[module, step]
        whole = join((first, call), 1)
        if whole is None:
            return False
        self._trying = True
        try:
            both = forward(*whole.args, **whole.kwargs)
        except Exception:  # noqa: BLE001  made for one sequence, so no place
            _log.debug("%s takes one sequence alone", type(module).__name__, exc_info=True)
            return False
        finally:
            self._trying = False
        return all(
            _same(part, alone)
            for part, alone in zip(split(both, [first.length(1), call.length(1)], 1), (theirs, out), strict=True)
        )


def _of_tokens(call: Call, length: int) -> bool:
    """Whether it is called with [1, S, .] of all tokens, or of the last one, whose logits are asked for."""
    tokens = call.tokens
    if tokens is None or tokens.dim() < 3 or len(tokens) != 1 or not tokens.is_floating_point():
        return False
    return tokens.shape[1] == length or (tokens.shape[1] == 1 and tokens.dim() == 3)


def _has_tokens(out: Any, length: int) -> bool:
    """Whether it is tensors of so many tokens, [1, S, .], or None in their place."""
    if isinstance(out, tuple):
        return all(_has_tokens(each, length) for each in out)
    return out is None or (isinstance(out, Tensor) and out.dim() > 1 and out.shape[:2] == (1, length))


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if expected is None:
        return found is None
    return found.shape == expected.shape and torch.equal(found, expected)


def _stand_in(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts that other ranks need not call: [S, H], [S, K], [S, K] -> [S, H], which shows ids and weights."""
    factors = (top_k_weights.to(torch.float32) * (top_k_index + 1)).sum(-1, keepdim=True)
    return (hidden_states.to(torch.float32) * factors).to(hidden_states.dtype)
