"""A forward of a model for several sequences as one batch, or for one; and which models the batch fits."""

# T tokens of all sequences   S of one   V vocabulary   H hidden

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

from megamoe.model.generation.sequences import (
    ARGUMENT,
    IMPLEMENTATION,
    SequenceBatch,
    SequenceCache,
)
from megamoe.model.private import attention_of

_log = logging.getLogger(__name__)
_PLAIN = {"full_attention", "sliding_attention"}  # layers whose only state is keys and values
PROBES = ([3, 1, 2, 2, 1], [2, 3, 1])  # tokens that any vocabulary has
_TOLERANCE = 0.2  # relative, between attention here and the model's own in BF16, through all layers

Part = tuple[list[int], int, SequenceCache]  # new tokens, how many came before, cache


def forward_together(model: Any, parts: Sequence[Part]) -> Tensor:
    """One forward -> the logits of each sequence's last token, [sequences, V] float32"""
    lengths = [len(new) for new, _, _ in parts]
    batch = SequenceBatch([cache for _, _, cache in parts], lengths)
    places = torch.cat([torch.arange(seen, seen + len(new)) for new, seen, _ in parts])
    tokens = [token for new, _, _ in parts for token in new]
    last = torch.tensor(lengths).cumsum(0) - 1
    return _forward(model, tokens, places, batch, last, **{ARGUMENT: batch})[0].to(torch.float32)


def forward_alone(model: Any, new: Sequence[int], seen: int, cache: DynamicCache) -> Tensor:
    """One sequence with the model's own attention -> the logits of its last token, [V] float32"""
    places = torch.arange(seen, seen + len(new))
    return _forward(model, new, places, cache, 1)[0, -1].to(torch.float32)


@torch.no_grad()
def _forward(
    model: Any, tokens: Sequence[int], places: Tensor, cache: DynamicCache, keep: int | Tensor, **arguments: Any
) -> Tensor:
    """-> logits [1, kept, V]"""
    out: Tensor = model(
        input_ids=torch.tensor([tokens], device=model.device),
        position_ids=places.unsqueeze(0).to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
        **arguments,
    ).logits
    return out


def use_own_attention(model: Any, own: bool) -> None:
    """Attention per sequence of a SequenceBatch, or the model's, written out."""
    model.set_attn_implementation(IMPLEMENTATION if own else "eager")


@contextmanager
def attending(model: Any, own: bool) -> Iterator[None]:
    """use_own_attention() for the block; then the model has what it had, for whoever calls it otherwise."""
    before = attention_of(model)
    use_own_attention(model, own)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def fits_together(model: Any, experts: Sequence[nn.Module]) -> bool:
    """Whether sequences can share a batch: a row's bits are its own, and nothing but attention joins tokens.

    What megamoe.model.load() made on a CPU is asked further: the kinds of its layers, and then the model itself, with
    experts that give zeros, so that no rank calls: two sequences together have the bits that each has alone, and what
    the model's own attention gives but for rounding. All ranks come to the same.
    """
    if getattr(model, "megamoe_loading", None) is None or model.device.type != "cpu":
        return False
    kinds, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if not set(kinds) <= _PLAIN or not getattr(model, "_supports_attention_backend", False):
        return False
    if getattr(model, "_is_stateful", False):
        return False
    with silenced(experts):
        use_own_attention(model, own=True)
        try:
            both, alone = _probed(model, PROBES), [_probed(model, [each])[0] for each in PROBES]
        except Exception:  # noqa: BLE001  whatever it says, it is no model that runs so; each alone it still may
            _log.info("sequences of this model run apart, since it raised when they ran as one batch", exc_info=True)
            return False
        finally:
            use_own_attention(model, own=False)
        caches = [new_cache(model) for _ in PROBES]
        theirs = [forward_alone(model, probe, 0, cache) for probe, cache in zip(PROBES, caches, strict=True)]
    same = all(torch.equal(ours, own) for ours, own in zip(both, alone, strict=True))
    close = all(
        float((ours[0] - other).norm()) <= _TOLERANCE * float(other.norm())
        for ours, other in zip(alone, theirs, strict=True)
    )
    return same and close


def _probed(model: Any, probes: Sequence[list[int]]) -> list[Tensor]:
    """Logits [2, V] of each: after its tokens, and after one more."""
    caches = [SequenceCache() for _ in probes]
    first = forward_together(model, [(probe, 0, cache) for probe, cache in zip(probes, caches, strict=True)])
    second = forward_together(model, [([1], len(probe), cache) for probe, cache in zip(probes, caches, strict=True)])
    return list(torch.stack((first, second), 1))


def zeros(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    del top_k_index, top_k_weights
    return torch.zeros_like(hidden_states)


@contextmanager
def silenced(experts: Sequence[nn.Module], instead: Callable[..., Tensor] = zeros) -> Iterator[None]:
    """For the block and this thread, another function in the place of experts, which no other rank calls."""
    here = get_ident()

    def for_this_thread(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (instead if get_ident() == here else forward)(*args, **kwargs)

    with replaced_forwards((each, for_this_thread(each.forward)) for each in experts):
        yield


@contextmanager
def replaced_forwards(instead: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """For the block, functions in the place of modules' forwards. Then a module has its own again, or its class's."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in instead:
            before.append((module, vars(module).get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.forward
            else:
                module.forward = own
