"""Attention per sequence: texts share a batch of tokens, and each attends at the shapes that it would have alone."""

# T tokens of all sequences   S of one   L keys of one   D of a head   q query heads   h heads of keys and values

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from megamoe.parallel.private import without_function_modes

IMPLEMENTATION = "megamoe_sequences"
ARGUMENT = "megamoe_sequences"  # what the model hands on to its attention
_ROWS_AT_ONCE = 512  # queries whose scores are there at a time
_LEAST = 64  # tokens that a layer has room for from the beginning


class OtherAttentionError(ValueError):
    """A model whose attention sees other tokens than those that it caches, or does not say whose they are."""


class _Kept:
    """Keys and values of one sequence in one layer, [h, L, D], with room for more behind them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._stacks = [states.new_empty(len(states), _LEAST, states.shape[2]) for states in (keys, values)]
        self._begin = self._end = 0

    def append(self, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Takes those of new tokens, [h, S, D] -> all that one of the new tokens may see."""
        new = keys.shape[1]
        if window is not None:  # the first of the new tokens sees itself and window - 1 before
            self._begin = max(self._begin, self._end - window + 1)
        if self._end + new > self._stacks[0].shape[1]:
            self._move(new)
        place = slice(self._end, self._end + new)
        for stack, states in zip(self._stacks, (keys, values), strict=True):
            stack[:, place] = states
        self._end += new
        first, second = (stack[:, self._begin : self._end] for stack in self._stacks)
        return first, second

    def _move(self, new: int) -> None:
        """To where there is room for as many tokens again; those that no window holds any more stay behind."""
        held = slice(self._begin, self._end)
        length = self._end - self._begin
        room = 2 * (length + new)
        for number, stack in enumerate(self._stacks):
            larger = stack.new_empty(len(stack), room, stack.shape[2])
            larger[:, :length] = stack[:, held]
            self._stacks[number] = larger
        self._begin, self._end = 0, length


class SequenceCache:
    """What one sequence keeps from step to step, by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, _Kept] = {}

    def append(self, layer: int, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """As _Kept.append()."""
        if layer not in self.layers:
            self.layers[layer] = _Kept(keys, values)
        return self.layers[layer].append(keys, values, window)


class SequenceBatch(DynamicCache):  # type: ignore[misc]
    """The caches of several sequences as one: tokens lie one sequence after another, [1, h, T, D].

    update() keeps nothing: attend() does, which gets keys and values as attention sees them. So a model may cache what
    they are made from (DeepSeek-V3), as long as each is made from its own token's.
    """

    def __init__(self, caches: Sequence[SequenceCache], lengths: Sequence[int]) -> None:
        super().__init__()
        self.caches, self.lengths = list(caches), list(lengths)
        self._updated: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self._updated.add(layer_idx)
        return key_states, value_states

    def take(self, layer: int, key: Tensor, value: Tensor, window: int | None) -> list[tuple[Tensor, Tensor]]:
        """Keys [h, L, D] and values of each sequence, with the new ones. OtherAttentionError as attend() has it."""
        if layer not in self._updated or key.shape[2] != sum(self.lengths) or len(key) != 1:
            raise OtherAttentionError("attention sees other tokens than those that are cached")
        self._updated.remove(layer)
        keys, values = (torch.split(states[0], self.lengths, dim=1) for states in (key, value))
        new = zip(self.caches, keys, values, strict=True)
        return [cache.append(layer, new_key, new_value, window) for cache, new_key, new_value in new]


@contextmanager
def one_thread() -> Iterator[None]:
    """A block of small products, which torch's libraries may sum otherwise with another number of threads."""
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, q, T, D] of sequences one after another -> [1, T, q, D of values], causal, in FP32.

    A function of transformers' attention interface. sliding_window counts the token itself; s_aux [q] are sinks.
    OtherAttentionError where the model has not handed on whose tokens they are, or changes what is cached.
    """
    del attention_mask, dropout  # each sequence is causal
    batch = kwargs.get(ARGUMENT)
    if not isinstance(batch, SequenceBatch):
        raise OtherAttentionError(f"{type(module).__name__} was not told of which sequences its tokens are")
    with without_function_modes(), one_thread():
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        queries = torch.split(query[0].to(torch.float32) * factor, batch.lengths, dim=1)
        found = batch.take(int(module.layer_idx), key, value, sliding_window)  # type: ignore[arg-type]
        out = [_attend(each, *states, sliding_window, s_aux) for each, states in zip(queries, found, strict=True)]
        return torch.cat(out).to(query.dtype).unsqueeze(0), None


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """One sequence: query [q, S, D] float32, scaled, key [h, L, D] -> [S, q, Dv] float32"""
    heads, new, total = query.shape[0], query.shape[1], key.shape[1]
    keys, values = key.to(torch.float32), value.to(torch.float32)
    shared = heads // len(keys)
    parts = []
    for first in range(0, new, _ROWS_AT_ONCE):
        rows = query[:, first : first + _ROWS_AT_ONCE]
        count = rows.shape[1]
        grouped = rows.reshape(len(keys), shared * count, -1)
        scores = torch.bmm(grouped, keys.transpose(1, 2)).view(heads, count, total)
        if new > 1:
            scores.masked_fill_(_hidden(total - new + first, count, total, window), -torch.inf)
        if sinks is None:
            weights = torch.softmax(scores, -1)
        else:
            column = sinks.to(torch.float32).view(-1, 1, 1).expand(heads, count, 1)
            weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
        out = torch.bmm(weights.reshape(len(keys), shared * count, total), values)
        parts.append(out.view(heads, count, -1).transpose(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _hidden(first: int, count: int, total: int, window: int | None) -> Tensor:
    """[count, total] bool: which of the keys each of count tokens from place `first` on must not see."""
    places, keys = torch.arange(first, first + count).unsqueeze(1), torch.arange(total)
    later = keys > places
    return later if window is None else later | (keys <= places - window)


AttentionInterface.register(IMPLEMENTATION, attend)
