"""Which token comes next: the most likely, or a draw that depends on its seed, its prompt and its place alone."""

# V vocabulary

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 takes the most likely token; else a draw from the top_k most likely (0: all) that make up top_p.

    seed   of the draws; a prompt's draws depend on it, on the prompt's id and on nothing else
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("top_k", "seed"):
            check_integer(name, getattr(self, name))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (the most likely token) or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")


def choose(logits: Tensor, sampling: Sampling, prompt: str, index: int) -> int:
    """The index-th token of a prompt's text, of logits [V]. Equal logits go to the smaller token id.

    ValueError for logits that no token can be chosen by: NaN, infinite, or -inf for all.
    """
    if not sampling.temperature:
        token = int(logits.numpy(force=True).argmax())  # NumPy promises the first of equal ones, or of NaN
        _check(float(logits[token]), prompt, index)
        return token
    order = torch.sort(logits.to(torch.float64), descending=True, stable=True)
    _check(float(order.values[0]), prompt, index)
    probabilities = torch.softmax((order.values - order.values[0]) / sampling.temperature, 0)
    if sampling.top_k:
        probabilities = probabilities[: sampling.top_k]
    sums = probabilities.cumsum(0)
    # the fewest tokens that make up top_p
    kept = int((sums < sampling.top_p * float(sums[-1])).sum()) + 1 if sampling.top_p < 1 else len(sums)
    sums = sums[:kept]
    drawn = draw(sampling.seed, prompt, index) * float(sums[-1])
    return int(order.indices[min(int((sums <= drawn).sum()), kept - 1)])


def _check(most_likely: float, prompt: str, index: int) -> None:
    if not math.isfinite(most_likely):
        raise ValueError(f"prompt {prompt}: the model gives {most_likely} as the largest logit of token {index}")


def check_integer(name: str, value: object) -> None:
    """ValueError for what is no integer, NumPy's among them; True is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def draw(seed: int, prompt: str, index: int) -> float:
    """A number in [0, 1) for the index-th token of a prompt's text, the same on any rank and at any time."""
    digest = hashlib.sha256(f"{seed}/{index}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
