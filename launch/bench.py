"""The same layer serial, overlapped, compute alone and communication alone, interleaved in one run on every rank.

serial         one wave, and nothing at the same time
overlapped     the layer as it is used
compute        the overlapped layer's compute, its rows already there
communication  the overlapped layer's messages, nothing computed
limit          the larger of the last two: what perfect overlap would take
"""

# T tokens of a rank   H hidden   I intermediate   E experts   K experts per token

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megamoe.formats import dequantize_mxfp4, quantize_mxfp4
from megamoe.launch.lab import Host, lab, parse_rate
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.transport import Label, Transfer, Transport
from megamoe.reference import moe
from megamoe.shape import MoEShape
from megamoe.waves import Waves, check_waves

MEASURES = ("serial", "overlapped", "compute", "communication")


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A workload, its ranks and their links. link None leaves the ranks on loopback, unshaped."""

    ranks: int = 2
    link: str | None = None
    latency_ms: float = 0.0
    tokens_per_rank: int = 1024
    hidden: int = 1024
    intermediate: int = 512
    num_experts: int = 16
    topk: int = 4
    weight_format: str = "mxfp4"
    dispatch_format: str = "mxfp8"
    waves: Waves = "auto"
    threads_per_rank: int = 1
    repeats: int = 9
    check: bool = True
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("ranks", "threads_per_rank", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens_per_rank < 0:
            raise ValueError(f"tokens_per_rank must not be negative, got {self.tokens_per_rank}")
        if self.link is not None:
            parse_rate(self.link)
        elif self.latency_ms:
            raise ValueError(f"latency_ms {self.latency_ms} needs a link to delay, such as 1gbit")
        check_waves(self.waves)
        MegaMoE(self.shape, weight_format=self.weight_format, dispatch_format=self.dispatch_format, device="meta")

    @property
    def shape(self) -> MoEShape:
        """Sizes of the layer."""
        return MoEShape(self.hidden, self.intermediate, self.num_experts, self.topk, 10.0)


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One rank's milliseconds, one a repeat, and what its calls moved."""

    times: dict[str, list[float]]
    waves: int
    bytes_sent: int
    rows_computed: int
    identical: bool | None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Medians over the repeats of the slowest rank, in milliseconds, with min and max; link in gigabytes a second."""

    ranks: int
    link_gb_s: float | None
    latency_ms: float
    tokens_per_rank: int
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    weight_format: str
    dispatch_format: str
    waves: int
    threads_per_rank: int
    serial_ms: float
    serial_ms_min: float
    serial_ms_max: float
    overlapped_ms: float
    overlapped_ms_min: float
    overlapped_ms_max: float
    compute_ms: float
    compute_ms_min: float
    compute_ms_max: float
    communication_ms: float
    communication_ms_min: float
    communication_ms_max: float
    limit_ms: float
    exposed_ms: float
    speedup: float
    efficiency: float
    predicted_ms: float | None
    bytes_sent_per_rank: int
    flops_per_rank: int
    identical: bool | None
    repeats: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def run_bench(request: BenchRequest, progress: Callable[[str], None] = lambda _: None) -> BenchReport:
    """Runs the workload. ValueError for a request that cannot be met, RankFailedError or PeerError for a lost rank."""
    with _hosts(request) as hosts:
        progress(f"starting {request.ranks} ranks")
        with LocalRanks(
            request.ranks, threads_per_rank=request.threads_per_rank, deadline_s=request.deadline_s, hosts=hosts
        ) as ranks:
            progress("running")
            found = ranks.run(bench_rank, request)
    return _report(request, found)


def sweep_waves(request: BenchRequest) -> list[BenchRequest]:
    """The request with 1, 2, 4, ... waves, up to one expert a wave on the rank that holds most."""
    most = Placement(request.num_experts, request.ranks).most
    numbers = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    return [replace(request, waves=number) for number in numbers]


@contextmanager
def _hosts(request: BenchRequest) -> Iterator[Sequence[Host] | None]:
    holder = nullcontext() if request.link is None else lab(request.ranks, request.link, latency_ms=request.latency_ms)
    with holder as hosts:
        yield hosts


def make_workload(shape: MoEShape, rank: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, H] bfloat16, ids [T, K] int64 (K different experts a token), weights [T, K] float32 that sum to 1."""
    rng = torch.Generator().manual_seed(1000 + rank)
    hidden = torch.randn(num_tokens, shape.hidden, generator=rng).to(torch.bfloat16)
    ids = torch.rand(num_tokens, shape.num_experts, generator=rng).topk(shape.topk).indices
    weights = torch.rand(num_tokens, shape.topk, generator=rng) + 0.1
    return hidden, ids, weights / weights.sum(1, keepdim=True)


def make_expert_weights(shape: MoEShape) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2I, H] and down [E, H, I], bfloat16 values that MXFP4 holds exactly, the same on every rank."""
    rng = torch.Generator().manual_seed(0)
    gate_up = torch.randn(shape.num_experts, 2 * shape.intermediate, shape.hidden, generator=rng) / shape.hidden**0.5
    down = torch.randn(shape.num_experts, shape.hidden, shape.intermediate, generator=rng) / shape.intermediate**0.5
    return dequantize_mxfp4(quantize_mxfp4(gate_up)), dequantize_mxfp4(quantize_mxfp4(down))


def bench_rank(group: EPGroup, request: BenchRequest) -> RankTimes:
    """A rank's part: the four measures in turn, after one round to warm up, each begun by all ranks together."""
    shape = request.shape
    gate_up, down = make_expert_weights(shape)
    batch = make_workload(shape, group.rank, request.tokens_per_rank)
    formats = {"weight_format": request.weight_format, "dispatch_format": request.dispatch_format}

    def make_layer(group: EPGroup, name: str, waves: Waves = 1, overlap: bool = True) -> MegaMoE:
        return MegaMoE(shape, group, waves=waves, overlap=overlap, name=name, **formats)  # type: ignore[arg-type]

    layer = make_layer(group, "overlapped", request.waves)
    layer.load_experts(gate_up, down)
    serial = make_layer(group, "serial", overlap=False)
    tape = Tape(group.transport)
    taped = make_layer(replace(group, transport=tape if group.transport else None), "taped", request.waves)
    still = make_layer(
        replace(group, transport=StillTransport(tape) if group.transport else None), "still", request.waves
    )
    serial.experts = taped.experts = still.experts = layer.experts

    outputs = [each(*batch) for each in (layer, serial, taped)]
    identical = None
    if request.check:
        hidden, ids, weights = batch
        expected = moe(shape, hidden, ids, weights, gate_up, down, **formats)
        identical = all(torch.equal(output, expected) for output in outputs)
    del gate_up, down
    measures: dict[str, Callable[[], object]] = {
        "serial": lambda: serial(*batch),
        "overlapped": lambda: layer(*batch),
        "compute": lambda: still(*batch),
        "communication": tape.replay,
    }
    times: dict[str, list[float]] = {name: [] for name in MEASURES}
    for repeat in range(request.repeats + 1):
        for name, measure in measures.items():
            _together(group)
            begun = time.perf_counter()
            measure()
            if repeat:
                times[name].append((time.perf_counter() - begun) * 1e3)
    record = layer.last_call
    return RankTimes(times, record.waves, record.bytes_sent, record.rows_received + record.rows_local, identical)


def _together(group: EPGroup) -> None:
    """Returns when all ranks have come here."""
    if group.transport is not None:
        group.transport.gather(torch.zeros(1, dtype=torch.uint8), Label("bench", "counts"))


class Tape:
    """A transport that notes everything it is asked for, so that a call's messages can be sent again without it."""

    def __init__(self, transport: Transport | None) -> None:
        self._transport = transport
        self.pages: dict[str, Tensor] = {}
        self._events: list[tuple[str, int, tuple[Any, ...]]] = []
        self._num_transfers = 0

    def gather(self, page: Tensor, label: Label) -> Tensor:
        assert self._transport is not None
        self._events.append(("gather", 0, (page, label)))
        self.pages[label.phase] = self._transport.gather(page, label)
        return self.pages[label.phase]

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        assert self._transport is not None
        transfer = _TapedTransfer(self._transport.expect(receive, counts, label), self._num_transfers, self._events)
        # a buffer of its own: the one of the call belongs to the call
        self._events.append(("expect", self._num_transfers, (torch.zeros_like(receive), counts, label)))
        self._num_transfers += 1
        return transfer

    def replay(self) -> None:
        """Sends and receives once more what was noted, in the same order, waiting where the call waited."""
        transfers: dict[int, Transfer] = {}
        for action, number, arguments in self._events:
            if self._transport is None:
                return
            if action == "gather":
                self._transport.gather(*arguments)
            elif action == "expect":
                transfers[number] = self._transport.expect(*arguments)
            else:
                getattr(transfers[number], action)(*arguments)


class _TapedTransfer:
    def __init__(self, transfer: Transfer, number: int, events: list[tuple[str, int, tuple[Any, ...]]]) -> None:
        self._transfer, self._number, self._events = transfer, number, events

    def send(self, rows: Tensor, counts: Sequence[int]) -> None:
        self._events.append(("send", self._number, (rows.clone(), counts)))
        self._transfer.send(rows, counts)

    def wait(self) -> None:
        self._events.append(("wait", self._number, ()))
        self._transfer.wait()

    def finish(self) -> None:
        self._events.append(("finish", self._number, ()))
        self._transfer.finish()


class StillTransport:
    """A transport that moves nothing and answers with the pages of a taped call: what the layer computes alone.

    The buffers are those of the group's workspace, which hold the rows of the last call that had a transport.
    """

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def gather(self, page: Tensor, label: Label) -> Tensor:
        del page
        return self._tape.pages[label.phase]

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        del receive, counts, label
        return _NoTransfer()


class _NoTransfer:
    def send(self, rows: Tensor, counts: Sequence[int]) -> None: ...

    def wait(self) -> None: ...

    def finish(self) -> None: ...


def _report(request: BenchRequest, found: list[RankTimes]) -> BenchReport:
    """A repeat takes as long as its slowest rank; medians over repeats."""
    slowest = {
        name: [max(times) for times in zip(*(rank.times[name] for rank in found), strict=True)] for name in MEASURES
    }
    middle = {name: median(times) for name, times in slowest.items()}
    spread = {f"{name}_ms_min": min(times) for name, times in slowest.items()}
    spread |= {f"{name}_ms_max": max(times) for name, times in slowest.items()}
    limit = max(middle["compute"], middle["communication"])
    asked = {f.name: getattr(request, f.name) for f in fields(BenchReport) if hasattr(request, f.name)}
    asked |= {
        "link_gb_s": parse_rate(request.link) / 8e9 if request.link else None,
        "waves": found[0].waves,
        "identical": all(rank.identical for rank in found) if request.check else None,
    }
    return BenchReport(
        **asked,
        **{f"{name}_ms": time for name, time in middle.items()},
        **spread,
        limit_ms=limit,
        exposed_ms=middle["overlapped"] - middle["compute"],
        speedup=middle["serial"] / middle["overlapped"],
        efficiency=limit / middle["overlapped"],
        predicted_ms=None,
        bytes_sent_per_rank=max(rank.bytes_sent for rank in found),
        flops_per_rank=6 * request.hidden * request.intermediate * max(rank.rows_computed for rank in found),
    )
