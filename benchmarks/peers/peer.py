"""What a peer is: a layer of experts spread over ranks, called with tokens and where each of them goes."""

# T tokens of this rank   H hidden   I intermediate   K experts per token   E experts in all   e experts of this rank

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape

HERE = "benchmarks.peers"
INSTALL = "pip install -c constraints.txt -e '.[peers]'"
INSTALL_TORCHTITAN = f"{INSTALL} && pip install -c constraints.txt --no-deps torchtitan"
PRECISE, FP8_TOKENS, FP4_LAYER = 0.02, 0.05, 0.06  # bounds on the relative error against FP32


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of all experts, the same on every rank.

    gate_up   [E, 2I, H] bfloat16, gate rows first
    down      [E, H, I] bfloat16
    """

    gate_up: Tensor
    down: Tensor

    def part(self, experts: range) -> ExpertWeights:
        """Copies of the weights of a contiguous run of experts, which keep nothing else alive."""
        run = slice(experts.start, experts.stop)
        return ExpertWeights(self.gate_up[run].clone(), self.down[run].clone())


class Layer(Protocol):
    """A peer's layer on one rank. Called by all ranks together, under no_grad."""

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H] bfloat16, ids [T, K] int64, weights [T, K] float32 that sum to 1 -> [T, H]

        y = sum over k of weights[k] * down(silu(gate(x)) * up(x)), with the experts that ids name.
        """
        ...


class MakeLayer(Protocol):
    """Builds a peer's layer on every rank of a group that is torch.distributed's default group too."""

    def __call__(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights, *options: str) -> Layer: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """A row of the table.

    name      as the table and --peers spell it
    make      "module:callable" of a MakeLayer, imported on the ranks only
    package   what must be installed, None where megamoe itself suffices
    install   the command that installs it
    bound     what the relative error against FP32 must stay below
    ours      True for this project's layer
    options   what make gets beside group, shape and weights
    """

    name: str
    make: str
    package: str | None = None
    install: str = INSTALL
    bound: float = PRECISE
    ours: bool = False
    options: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """Why the peer cannot be tried here and how to change that; None where its package is there."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"not installed: {self.install}"

    def build(self, group: EPGroup, shape: MoEShape, weights: ExpertWeights) -> Layer:
        """Builds the layer; raises what the peer raises."""
        module, _, name = self.make.partition(":")
        make: MakeLayer = getattr(importlib.import_module(module), name)
        return make(group, shape, weights, *self.options)


OUR_FORMATS = (("bf16", "bf16"), ("bf16", "mxfp8"), ("mxfp4", "mxfp8"))  # of weights and of rows on the wire


def ours(make: str, bounds: tuple[float, float, float]) -> Iterator[Peer]:
    """This project's layer in its formats, of which the first has the bytes and the arithmetic of the peers."""
    names = ("megamoe bf16, bf16 wire", "megamoe bf16, mxfp8 wire", "megamoe mxfp4")
    for name, bound, formats in zip(names, bounds, OUR_FORMATS, strict=True):
        yield Peer(name, make, bound=bound, ours=True, options=formats)


PEERS = (
    Peer("torch by hand", f"{HERE}.plain_torch:PlainTorch"),
    Peer("torch by hand fp32", f"{HERE}.plain_torch:PlainTorchFP32"),
    Peer("transformers eager", f"{HERE}.transformers_ep:Eager", "transformers"),
    Peer("transformers eager fp32", f"{HERE}.transformers_ep:EagerFP32", "transformers"),
    Peer("transformers grouped_mm", f"{HERE}.transformers_ep:GroupedMM", "transformers"),
    Peer("torchtitan", f"{HERE}.torchtitan_ep:TorchTitan", "torchtitan", INSTALL_TORCHTITAN),
    Peer("deepspeed.moe", f"{HERE}.deepspeed_ep:DeepSpeedMoE", "deepspeed"),
    Peer("deepspeed AutoEP", f"{HERE}.deepspeed_ep:DeepSpeedAutoEP", "deepspeed"),
    *ours(f"{HERE}.megamoe_ep:make", (PRECISE, FP8_TOKENS, FP4_LAYER)),
)


def choose(text: str | None, among: Sequence[Peer] = PEERS) -> list[Peer]:
    """The peers of a comma-separated list, in the table's order; all for None. A part of a name stands for all that
    begin with it. ValueError for a part that fits none.

    "deepspeed,megamoe mxfp4" -> deepspeed.moe, deepspeed AutoEP, megamoe mxfp4
    """
    if text is None:
        return list(among)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not any(peer.name.startswith(part) for peer in among):
            raise ValueError(f"no peer is called {part!r}; there are {', '.join(peer.name for peer in among)}")
    return [peer for peer in among if peer.name.startswith(tuple(parts))]
