"""All layers of one workload in turn, within one run on every rank, after each has been held against FP32."""

# T tokens of this rank   H hidden   I intermediate   K experts per token   E experts in all

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.peers.peer import ExpertWeights, Peer
from benchmarks.peers.training import Step, reference_gradients, squared_errors
from benchmarks.turns import in_turn
from megamoe.launch.bench.bench import make_expert_weights, make_workload
from megamoe.launch.bench.training import make_gradient
from megamoe.launch.lab.namespaces import Host, lab
from megamoe.launch.ranks import LocalRanks
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.threads import calm_gloo_threads
from megamoe.shape import MoEShape

SHAPE = MoEShape(hidden=1024, intermediate=512, num_experts=16, topk=4)
DEADLINE_S = 600.0
WARM_UP = 4  # rounds not counted: after as many, waves="auto" stays with what it has measured


@dataclass(frozen=True, slots=True)
class Workload:
    """One table: tokens of every rank, the link between ranks (None for loopback, unshaped), sizes of the layer.

    repeats     what this workload needs where it differs from --repeats: short calls need more
    """

    name: str
    tokens: tuple[int, ...]
    link: str | None = None
    repeats: int | None = None
    shape: MoEShape = SHAPE

    @property
    def title(self) -> str:
        ranks, link = len(self.tokens), self.link or "loopback"
        tokens = f"{ranks} x {self.tokens[0]}" if len(set(self.tokens)) == 1 else " + ".join(map(str, self.tokens))
        return f"{self.name}: {tokens} tokens, {link}"


WORKLOADS = (
    Workload("prefill-1gbit", (2048, 2048), "1gbit"),
    Workload("prefill-2gbit", (512, 512), "2gbit"),
    Workload("loopback-512", (512, 512)),
    Workload("loopback-2048", (2048, 2048)),
    Workload("token-loopback", (1, 1), repeats=31),
    Workload("token-1gbit", (1, 1), "1gbit", repeats=31),
    Workload("four-ranks", (1024,) * 4, "500mbit"),
)


@dataclass(slots=True)
class RankOutcome:
    """What one rank saw of one layer: milliseconds, one a repeat, and the squares that make the relative error.

    problem says why the layer does not run, the same on every rank; the rest is then empty.
    """

    times_ms: list[float] = field(default_factory=list)
    difference_squared: float = 0.0
    norm_squared: float = 0.0
    problem: str | None = None


def run_workload(
    workload: Workload, peers: Sequence[Peer], repeats: int, *, backward: bool = False
) -> list[dict[str, RankOutcome]]:
    """Outcomes of the peers that are installed, by name, in order of rank.

    ValueError where this machine cannot shape links, RankFailedError where a rank died or hung.
    """
    present = [peer for peer in peers if peer.missing is None]
    num_ranks = len(workload.tokens)
    with (
        _hosts(workload) as hosts,
        LocalRanks(num_ranks, threads_per_rank=1, deadline_s=DEADLINE_S, hosts=hosts) as ranks,
    ):
        return ranks.run(measure_rank, workload, present, repeats, backward)


@contextmanager
def _hosts(workload: Workload) -> Iterator[Sequence[Host] | None]:
    with nullcontext() if workload.link is None else lab(len(workload.tokens), workload.link) as hosts:
        yield hosts


def measure_rank(
    group: EPGroup, workload: Workload, peers: Sequence[Peer], repeats: int, backward: bool
) -> dict[str, RankOutcome]:
    """A rank's part: builds and checks every layer, rounds to warm up, then `repeats` rounds of all in turn."""
    with torch.no_grad(), redirect_stdout(sys.stderr):  # what peers print must not stand in the table or the JSON
        weights = ExpertWeights(*make_expert_weights(workload.shape))
        task = _training(group, workload, weights) if backward else _inference(group, workload, weights)
        outcomes, calls = {peer.name: RankOutcome() for peer in peers}, {}
        for peer in peers:
            call = _checked(peer, group, workload.shape, weights, task, outcomes[peer.name])
            if call is not None:
                calls[peer.name] = call
        del weights, task

        def begin(name: str) -> None:
            calm_gloo_threads(name.startswith("megamoe"))  # peers run as they do without this package
            dist.barrier()

        for name, times_ms in in_turn(calls, repeats, WARM_UP, begin).items():
            outcomes[name].times_ms += times_ms
    return outcomes


@dataclass(frozen=True, slots=True)
class _Task:
    """What a layer is asked for: bind makes a call of it, errors gives the squares of what the call returned."""

    bind: Callable[[Any], Callable[[], Any]]
    errors: Callable[[Any], tuple[float, float]]


def _inference(group: EPGroup, workload: Workload, weights: ExpertWeights) -> _Task:
    batch = make_workload(workload.shape, group.rank, workload.tokens[group.rank])
    expected = reference(weights, *batch)

    def errors(out: Tensor) -> tuple[float, float]:
        out = out.to(torch.float64)
        if out.shape != expected.shape:
            raise ValueError(f"returned {list(out.shape)}, expected {list(expected.shape)}")
        return float((out - expected).square().sum()), float(expected.square().sum())

    return _Task(lambda layer: lambda: layer(*batch), errors)


def _training(group: EPGroup, workload: Workload, weights: ExpertWeights) -> _Task:
    shape, tokens = workload.shape, workload.tokens
    batch = make_workload(shape, group.rank, tokens[group.rank])
    gradient = make_gradient(group.rank, shape, tokens[group.rank])
    expected = reference_gradients(group, shape, weights, tokens)
    return _Task(lambda layer: Step(layer, batch, gradient), lambda found: squared_errors(found, expected))


def _checked(
    peer: Peer, group: EPGroup, shape: MoEShape, weights: ExpertWeights, task: _Task, outcome: RankOutcome
) -> Callable[[], Any] | None:
    """A call of the peer's layer, once what it returns is held against FP32; None, and outcome says why, where it does
    not run.
    """
    layer, threads = None, torch.get_num_threads()
    try:
        layer = peer.build(group, shape, weights)
    except Exception as error:  # noqa: BLE001  whatever a peer raises is what the table says of it
        outcome.problem = f"cannot be built: {_said(error)}"
    outcome.problem = _agreed(outcome.problem, group)
    if layer is None or outcome.problem is not None:
        return None
    torch.set_num_threads(threads)  # an import may have changed it
    call = task.bind(layer)
    try:
        outcome.difference_squared, outcome.norm_squared = task.errors(call())
    except Exception as error:  # noqa: BLE001
        outcome.problem = f"cannot run: {_said(error)}"
    outcome.problem = _agreed(outcome.problem, group)
    return call if outcome.problem is None else None


def _agreed(problem: str | None, group: EPGroup) -> str | None:
    """The problem of the first rank that has one, so that all ranks leave the layer out or none does."""
    found: list[str | None] = [None] * group.size
    dist.all_gather_object(found, problem)
    return next((f"{each} (rank {rank})" for rank, each in enumerate(found) if each is not None), None)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def reference(weights: ExpertWeights, hidden: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    """The function that all layers compute, on one device in FP32 from the same BF16 values -> [T, H] float32"""
    tokens = hidden.to(torch.float32)
    out = torch.zeros_like(tokens)
    for expert, (gate_up, down) in enumerate(zip(weights.gate_up, weights.down, strict=True)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = linear(tokens[token], gate_up.to(torch.float32)).chunk(2, dim=-1)
        rows = linear(silu(gate) * up, down.to(torch.float32))
        out.index_add_(0, token, rows * topk_weights[token, slot].unsqueeze(-1))
    return out
