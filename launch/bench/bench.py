"""The same layer serial, overlapped, compute alone and communication alone, interleaved in one run on every rank.

serial         one wave, and nothing at the same time
overlapped     the layer as it is used
compute        the overlapped layer's compute, its rows already there
communication  the overlapped layer's messages, nothing computed
limit          the larger of the last two: what perfect overlap would take

Calls of few tokens go without waves (execution/small_call.py), and compute and communication are then of such a call
too: pages, tokens and results of other ranks are there already, or both exchanges are made and nothing is computed.
Serial has no meaning, since such a call overlaps nothing. Limit is what it would take if it did.
"""

# T tokens of a rank   H hidden   I intermediate   E experts   K experts per token

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from megamoe.catalog import Machine, load_machine, load_model
from megamoe.catalog.wording import plural
from megamoe.execution.checks import check_formats
from megamoe.execution.small_call import MAX_TOKENS
from megamoe.formats import dequantize_mxfp4, quantize_mxfp4
from megamoe.launch.bench.probe import machine_here
from megamoe.launch.bench.replay import together
from megamoe.launch.bench.small import own_core, stand_ins
from megamoe.launch.bench.training import expected, make_gradient, step
from megamoe.launch.bench.training import identical as is_identical
from megamoe.launch.lab.namespaces import Host, check_latency, lab, parse_rate
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.placement import Placement
from megamoe.parallel.recorder import Recording
from megamoe.reference import moe
from megamoe.routing.waves import Waves, check_waves
from megamoe.schedule.machine import Predicted, Run
from megamoe.schedule.training import predict_step
from megamoe.shape import MoEShape
from megamoe.trace.timeline import Share, Timeline
from megamoe.training import TrainableMoE

SERIAL_TRACES = 3
SETTLING = 5
_MOST_THREADS = 1024
NO_SERIAL = "a call without waves exchanges, computes and exchanges, one after the other: it overlaps nothing"
TRACED = "traced"  # the overlapped layer with a recorder in place


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """A workload, its ranks and their links. link None leaves the ranks on loopback, unshaped.

    backward: measures forward and backward together, of a layer that trains
    ranks_per_host ranks share a link and memory; node_limited: a token then goes once to each other host.
    shared_memory: ranks of a host exchange rows through memory; False has them do so over sockets.

    machine: the profile by which the run is predicted, a name of the catalog or a file that megamoe calibrate wrote;
    None takes this machine's constants, which are measured before the run where they are not kept from an earlier one.
    predict: whether the run is predicted at all.
    """

    ranks: int = 2
    link: str | None = None
    latency_ms: float = 0.0
    ranks_per_host: int = 1
    node_limited: bool = True
    shared_memory: bool = True
    tokens_per_rank: int = 1024
    hidden: int = 1024
    intermediate: int = 512
    num_experts: int = 16
    topk: int = 4
    weight_format: str = "mxfp4"
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    waves: Waves = "auto"
    threads_per_rank: int = 1
    repeats: int = 9
    check: bool = True
    trace: bool = False
    backward: bool = False
    machine: str | None = None
    predict: bool = True
    deadline_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("ranks", "ranks_per_host", "tokens_per_rank", "threads_per_rank", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads_per_rank > _MOST_THREADS:
            raise ValueError(f"threads_per_rank are at most {_MOST_THREADS}, got {self.threads_per_rank}")
        if self.link is not None:
            parse_rate(self.link)
            check_latency(self.latency_ms)
        elif self.latency_ms:
            raise ValueError(f"latency_ms {self.latency_ms} needs a link to delay, such as 1gbit")
        elif self.ranks_per_host > 1:
            raise ValueError(f"ranks_per_host {self.ranks_per_host} needs a link between hosts, such as 1gbit")
        check_waves(self.waves)
        check_formats(self.shape, self.weight_format, self.dispatch_format, self.combine_format)
        if self.machine is not None:
            predict_run(self, load_machine(self.machine))

    @property
    def shape(self) -> MoEShape:
        """Sizes of the layer."""
        return MoEShape(self.hidden, self.intermediate, self.num_experts, self.topk, 10.0)

    @property
    def link_gb_s(self) -> float | None:
        """Gigabytes a second of a link, one way."""
        return parse_rate(self.link) / 8e9 if self.link else None


def predict_run(
    request: BenchRequest, machine: Machine, waves: int = 0, dispatch_format: str | None = None, *, small: bool = False
) -> Predicted:
    """What a machine's constants say of a request. ValueError where they say nothing of it. Waves know no latency.

    waves, dispatch_format and small: as they turned out, where the layer decides. Uneven waves count by their number.
    """
    if not waves and request.waves != "auto":
        waves = request.waves if isinstance(request.waves, int) else len(request.waves)
    wire = dispatch_format or request.dispatch_format
    asked = {each.name: getattr(request, each.name) for each in fields(Run) if hasattr(request, each.name)}
    asked |= {"dispatch_format": "mxfp8" if wire == "auto" else wire, "waves": waves, "small": small}
    return predict_step(Run(**asked), machine)


@dataclass(frozen=True, slots=True)
class RankTimes:
    """One rank's milliseconds, one a repeat, and what its calls moved."""

    times: dict[str, list[float]]
    waves: int
    small: bool
    bytes_sent: int
    far_bytes: int
    rows_computed: int
    dispatch_format: str
    identical: bool | None
    recording: Recording | None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Medians over the repeats of the slowest rank, in milliseconds, with min and max; link in gigabytes a second.

    traced_ms is the overlapped layer while it is recorded, trace_cost the median over repeats of how much longer that
    took than without, as a share; hidden_percent is the share of communication that hid. predicted_ms is what the
    planner says of the overlapped layer, None where it cannot, and predicted_by whose constants it took.
    small: calls of few tokens, which the layer makes without waves (CallRecord.small). Compute alone is then such a
    call with everything there already, communication alone its two exchanges; without_serial says why no serial layer
    stands beside them, and is None where one does. unpredicted: why nothing is predicted though it was asked for.
    link_bytes_per_host: what the ranks of a host send over its link in a call, of the host that sends most; None
    without links.
    """

    ranks: int
    link_gb_s: float | None
    latency_ms: float
    ranks_per_host: int
    node_limited: bool
    shared_memory: bool
    tokens_per_rank: int
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    weight_format: str
    dispatch_format: str
    combine_format: str
    waves: int
    small: bool
    threads_per_rank: int
    backward: bool
    serial_ms: float | None
    serial_ms_min: float | None
    serial_ms_max: float | None
    without_serial: str | None
    overlapped_ms: float
    overlapped_ms_min: float
    overlapped_ms_max: float
    compute_ms: float
    compute_ms_min: float
    compute_ms_max: float
    communication_ms: float
    communication_ms_min: float
    communication_ms_max: float
    traced_ms: float | None
    traced_ms_min: float | None
    traced_ms_max: float | None
    trace_cost: float | None
    hidden_percent: float | None
    limit_ms: float
    exposed_ms: float
    speedup: float | None
    efficiency: float
    predicted_ms: float | None
    predicted_by: str | None
    unpredicted: str | None
    bytes_sent_per_rank: int
    link_bytes_per_host: int | None
    flops_per_rank: int
    identical: bool | None
    repeats: int


def run_bench(request: BenchRequest, progress: Callable[[str], None] = lambda _: None) -> BenchReport:
    """Runs the workload. ValueError for a request that cannot be met, RankFailedError or PeerError for a lost rank."""
    return run_traced(request, progress)[0]


def run_traced(
    request: BenchRequest, progress: Callable[[str], None] = lambda _: None
) -> tuple[BenchReport, Timeline | None]:
    """As run_bench(), with a serial and an overlapped call of middling length on one time axis if the request asks."""
    machine = None if request.machine is None else load_machine(request.machine)
    measured = request.predict and machine is None
    if measured and request.latency_ms and _may_be_small(request):  # delay is added to what is measured without it
        with _ranks(replace(request, latency_ms=0.0), progress) as ranks:
            machine = machine_here(ranks, request.link_gb_s, progress, few=True)
    with _ranks(request, progress) as ranks:
        if measured and not request.latency_ms:
            machine = machine_here(ranks, request.link_gb_s, progress, few=_may_be_small(request))
        progress("running")
        found = ranks.run(bench_rank, request)
    recordings = [rank.recording for rank in found if rank.recording is not None]
    timeline = _typical(Timeline.merge(recordings)) if recordings else None
    return _report(request, found, timeline, machine), timeline


@contextmanager
def _ranks(request: BenchRequest, progress: Callable[[str], None]) -> Iterator[LocalRanks]:
    """Ranks on the links that a request asks for."""
    with _hosts(request) as hosts:
        progress(f"starting {plural(request.ranks, 'rank')}")
        with LocalRanks(
            request.ranks,
            threads_per_rank=request.threads_per_rank,
            deadline_s=request.deadline_s,
            hosts=hosts,
            shared_memory=request.shared_memory,
        ) as ranks:
            yield ranks


def _may_be_small(request: BenchRequest) -> bool:
    """Whether so few tokens may go without waves."""
    in_waves = request.waves != "auto" or request.backward or request.combine_format != "bf16"
    return not in_waves and request.tokens_per_rank <= MAX_TOKENS


def _most_of_a_host(request: BenchRequest, found: list[RankTimes]) -> int:
    firsts = range(0, request.ranks, request.ranks_per_host)
    return max(sum(rank.far_bytes for rank in found[first : first + request.ranks_per_host]) for first in firsts)


def _typical(timeline: Timeline) -> Timeline:
    """Of each layer's calls the one of median length."""
    kept = []
    for layer in ("serial", "overlapped"):
        for name in (layer, f"{layer} (backward)"):
            runs = sorted((run for run in timeline.runs() if run.layer == name), key=lambda run: run.share().total_us)
            kept += [(name, run.call) for run in runs[len(runs) // 2 : len(runs) // 2 + 1]]
    return timeline.keep(kept)


def sweep_waves(request: BenchRequest) -> list[BenchRequest]:
    """The request with 1, 2, 4, ... waves, up to one expert a wave on the rank that holds most."""
    most = Placement(request.num_experts, request.ranks).most
    numbers = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    return [replace(request, waves=number) for number in numbers]


@contextmanager
def _hosts(request: BenchRequest) -> Iterator[Sequence[Host] | None]:
    if request.link is None:
        yield None
        return
    shared = {"latency_ms": request.latency_ms, "ranks_per_host": request.ranks_per_host}
    with lab(request.ranks, request.link, **shared) as hosts:  # type: ignore[arg-type]
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
    shape, group = request.shape, replace(group, node_limited=request.node_limited)
    gate_up, down = make_expert_weights(shape)
    batch = make_workload(shape, group.rank, request.tokens_per_rank)
    formats = {name: getattr(request, name) for name in ("weight_format", "dispatch_format", "combine_format")}

    def make_layer(group: EPGroup, name: str, waves: Waves = 1, overlap: bool = True) -> MegaMoE:
        made = TrainableMoE if request.backward else MegaMoE
        return made(shape, group, waves=waves, overlap=overlap, name=name, **formats)

    layer = make_layer(group, "overlapped", request.waves)
    layer.load_experts(gate_up, down)
    gradient = make_gradient(group.rank, shape, request.tokens_per_rank)

    def run(layer: MegaMoE) -> list[Tensor]:
        return step(layer, batch, gradient) if request.backward else [layer(*batch)]

    for _ in range(SETTLING):  # until it has decided what was left to it
        run(layer)
    formats["dispatch_format"] = layer.tuner.dispatch_format or request.dispatch_format
    small = layer.last_call.small  # on all ranks alike
    waves: Waves = layer.last_call.waves if request.waves == "auto" and not small else request.waves
    replay, silent = stand_ins(group.transport, small=small, copies=request.backward)
    serial = None if small else make_layer(group, "serial", overlap=False)
    recorded = make_layer(replace(group, transport=replay), "taped", waves)
    still = make_layer(replace(group, transport=silent), "still", waves)
    layers = [layer, recorded, *([serial] if serial else [])]
    for each in (*layers, still):
        each.experts = layer.experts

    outputs = [run(each) for each in layers]
    identical = None
    if request.check:
        make = partial(make_workload, shape, num_tokens=request.tokens_per_rank)
        if request.backward:
            wanted = expected(group, shape, (gate_up, down), make, formats)
        else:
            wanted = [moe(shape, *batch, gate_up, down, **formats)]
        identical = all(is_identical(output, wanted, layer.local_experts) for output in outputs)
        del wanted
    del gate_up, down
    measures: dict[str, Callable[[], object]] = {
        "overlapped": lambda: run(layer),
        "compute": lambda: run(still),
        "communication": replay.replay if replay else lambda: None,
    }
    recording = Recording(group.rank, group.host) if request.trace else None
    if recording:
        measures = {TRACED: measures["overlapped"], **measures}
    if serial is not None:
        measures = {"serial": partial(run, serial), **measures}
        if recording:
            with group.record(recording):
                for _ in range(SERIAL_TRACES):
                    together(group)
                    run(serial)
    times: dict[str, list[float]] = {name: [] for name in measures}
    with own_core(group) if request.tokens_per_rank <= MAX_TOKENS else nullcontext():
        for repeat in range(request.repeats + 1):
            for name in _in_turn(list(measures), repeat):
                measure = measures[name]
                with group.record(recording) if recording and name == TRACED else nullcontext():
                    together(group)
                    begun = time.perf_counter()
                    measure()
                    if repeat:
                        times[name].append((time.perf_counter() - begun) * 1e3)
    record = layer.last_call
    calls = [record, layer.last_backward] if isinstance(layer, TrainableMoE) else [record]
    sent, far = (sum(getattr(each, name) for each in calls) for name in ("bytes_sent", "far_bytes"))
    rows = record.rows_received + record.rows_local
    return RankTimes(
        times, record.waves, record.small, sent, far, rows, formats["dispatch_format"], identical, recording
    )


def _in_turn(names: list[str], repeat: int) -> list[str]:
    """The measures of a round: recorded and not recorded take turns in being the first of the two."""
    if TRACED in names and repeat % 2:
        first, second = names.index(TRACED), names.index("overlapped")
        names[first], names[second] = names[second], names[first]
    return names


def _predicted(request: BenchRequest, found: RankTimes, machine: Machine | None) -> tuple[Predicted | None, str | None]:
    """What is predicted of a request as it turned out, or why nothing is."""
    if not request.predict:
        return None, None
    if machine is None or (request.latency_ms and not found.small):
        return None, "what waves take over delayed links is not known"
    try:
        return predict_run(request, machine, found.waves, found.dispatch_format, small=found.small), None
    except ValueError as reason:
        return None, str(reason)


def _report(
    request: BenchRequest, found: list[RankTimes], timeline: Timeline | None, machine: Machine | None
) -> BenchReport:
    """A repeat takes as long as its slowest rank; medians over repeats."""
    slowest = {
        name: [max(times) for times in zip(*(rank.times[name] for rank in found), strict=True)]
        for name in found[0].times
    }
    middle = {name: median(times) for name, times in slowest.items()}
    milliseconds: dict[str, float | None] = {
        f"{name}_ms{end}": None for name in (TRACED, "serial") for end in ("", "_min", "_max")
    }
    for name, times in slowest.items():
        milliseconds |= {f"{name}_ms": middle[name], f"{name}_ms_min": min(times), f"{name}_ms_max": max(times)}
    pairs = zip(slowest.get(TRACED, []), slowest["overlapped"], strict=False)
    costs = [traced / untraced - 1 for traced, untraced in pairs]
    overlapped = [run.share() for run in timeline.runs() if run.layer.startswith("overlapped")] if timeline else []
    products = 18 if request.backward else 6  # FLOPs of a row; a backward has two products for each of the forward
    limit = max(middle["compute"], middle["communication"])
    predicted, unpredicted = _predicted(request, found[0], machine)
    asked = {f.name: getattr(request, f.name) for f in fields(BenchReport) if hasattr(request, f.name)}
    asked |= {
        "waves": found[0].waves,
        "small": found[0].small,
        "dispatch_format": found[0].dispatch_format,
        "identical": all(rank.identical for rank in found) if request.check else None,
    }
    return BenchReport(
        **asked,
        **milliseconds,  # type: ignore[arg-type]
        trace_cost=median(costs) if costs else None,
        hidden_percent=Share.sum(overlapped).hidden_percent if overlapped else None,
        limit_ms=limit,
        exposed_ms=middle["overlapped"] - middle["compute"],
        speedup=middle["serial"] / middle["overlapped"] if "serial" in middle else None,
        without_serial=None if "serial" in middle else NO_SERIAL,
        efficiency=limit / middle["overlapped"],
        predicted_ms=predicted.overlapped_ms if predicted else None,
        predicted_by=machine.title if machine and predicted else None,
        unpredicted=unpredicted,
        bytes_sent_per_rank=max(rank.bytes_sent for rank in found),
        link_bytes_per_host=_most_of_a_host(request, found) if request.link else None,
        flops_per_rank=products * request.hidden * request.intermediate * max(rank.rows_computed for rank in found),
    )


def preset(text: str) -> MoEShape:
    """A model's shape, or a fraction of it: hidden, intermediate and experts divided, top-k kept.

    "deepseek-v4-flash/16" -> hidden 256, intermediate 128, 16 experts, top-6

    ValueError for a name that the catalog does not know, with the nearest ones, for experts without a gate, and for a
    divisor that does not divide.
    """
    name, _, fraction = text.partition("/")
    model = load_model(name)
    if not model.gated:
        raise ValueError(f"preset {text!r}: the experts of {model.name} have no gate, and this layer's have one")
    shape = MoEShape(model.expert_hidden, model.intermediate, model.num_experts, model.topk, model.swiglu_limit)
    if not fraction:
        return shape
    sizes = {"hidden": shape.hidden, "intermediate": shape.intermediate, "num_experts": shape.num_experts}
    if not fraction.isdigit() or int(fraction) < 1:
        raise ValueError(f"preset {text!r}: {fraction!r} is not a positive whole number to divide by")
    wrong = [f"{key} {size}" for key, size in sizes.items() if size % int(fraction)]
    if wrong:
        raise ValueError(f"preset {text!r}: {fraction} does not divide {', '.join(wrong)}")
    hidden, intermediate, num_experts = (size // int(fraction) for size in sizes.values())
    if num_experts < shape.topk:
        raise ValueError(f"preset {text!r} leaves {num_experts} experts, fewer than its top-{shape.topk}")
    return MoEShape(hidden, intermediate, num_experts, shape.topk, shape.swiglu_limit)
