"""Attention per sequence: texts share a batch of tokens, and each attends at the shapes that it would have alone."""

# T tokens of all sequences   S of one   L keys of one   D of a head   q query heads   h heads of keys and values

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

IMPLEMENTATION = "megamoe_sequences"
ARGUMENT = "megamoe_sequences"  # what the model hands on to its attention
_ROWS_AT_ONCE = 512  # queries whose scores are there at a time


class OtherAttentionError(ValueError):
    """A model whose attention does not see the keys and values that it caches, or does not say whose they are."""


class SequenceBatch(DynamicCache):  # type: ignore[misc]
    """The caches of several sequences as one: tokens lie one sequence after another, [1, h, T, D].

    update() takes new keys and values apart and gives them to each sequence's own cache, where attend() reads them.
    """

    def __init__(self, caches: Sequence[DynamicCache], lengths: Sequence[int]) -> None:
        super().__init__()
        self.caches, self.lengths = list(caches), list(lengths)
        self._found: dict[int, tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = (torch.split(states, self.lengths, dim=2) for states in (key_states, value_states))
        found = [
            cache.update(key.contiguous(), value.contiguous(), layer_idx, *args, **kwargs)
            for cache, key, value in zip(self.caches, keys, values, strict=True)
        ]
        self._found[layer_idx] = key_states, value_states, found
        return key_states, value_states

    def take(self, layer_idx: int, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys [1, h, L, D] and values of each sequence, of the layer's update with key and value."""
        new_key, new_value, found = self._found.pop(layer_idx, (None, None, []))
        if new_key is not key or new_value is not value:
            raise OtherAttentionError("attention sees other keys or values than those that are cached")
        return found


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
    queries = torch.split(query, batch.lengths, dim=2)
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = batch.take(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    with one_thread():
        out = [
            _attend(each, *states, factor, sliding_window, s_aux) for each, states in zip(queries, found, strict=True)
        ]
        return torch.cat(out, 1).to(query.dtype), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """One sequence: query [1, q, S, D], key [1, h, L, D] -> [1, S, q, Dv] float32"""
    heads, new, total = query.shape[1], query.shape[2], key.shape[2]
    keys, values = key[0].to(torch.float32), value[0].to(torch.float32)
    shared = heads // len(keys)
    parts = []
    for first in range(0, new, _ROWS_AT_ONCE):
        rows = query[0, :, first : first + _ROWS_AT_ONCE].to(torch.float32)
        count = rows.shape[1]
        grouped = rows.reshape(len(keys), shared * count, -1).contiguous()
        scores = torch.matmul(grouped, keys.transpose(1, 2)).view(heads, count, total).mul_(scaling)
        if new > 1 or (window is not None and total > window):
            scores.masked_fill_(_hidden(total - new + first, count, total, window), -torch.inf)
        if sinks is None:
            weights = torch.softmax(scores, -1)
        else:
            column = sinks.to(torch.float32).view(-1, 1, 1).expand(heads, count, 1)
            weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
        out = torch.matmul(weights.reshape(len(keys), shared * count, total), values)
        parts.append(out.view(heads, count, -1).transpose(0, 1))
    return torch.cat(parts).unsqueeze(0)


def _hidden(first: int, count: int, total: int, window: int | None) -> Tensor:
    """[count, total] bool: which of the keys each of count tokens from place `first` on must not see."""
    places, keys = torch.arange(first, first + count).unsqueeze(1), torch.arange(total)
    later = keys > places
    return later if window is None else later | (keys <= places - window)


AttentionInterface.register(IMPLEMENTATION, attend)
