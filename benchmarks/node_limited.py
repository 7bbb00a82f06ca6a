"""Node-limited dispatch against dispatch to each rank, two hosts of two ranks in the lab: time, and bytes on the link.

    sudo .venv/bin/python -m benchmarks.node_limited           # needs root and iproute2; --help lists the sizes

Both layers run in one process a rank, in turn, each call begun by all ranks together. A call takes as long as its
slowest rank; bytes are what the kernel counts on the hosts' interfaces, headers and all, beside what the planner says
of the rows and what the layer has counted. Exit code 1 where an output differs from the oracle or bytes are off by more
than 6 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command import natural, positive, run
from megamoe.launch.bench.bench import make_expert_weights, make_workload
from megamoe.launch.bench.replay import together
from megamoe.launch.lab.namespaces import INTERFACE, lab, parse_rate, sent_bytes
from megamoe.launch.ranks import LocalRanks
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.reference import moe
from megamoe.schedule.machine import Run
from megamoe.shape import MoEShape

FORMATS = (("mxfp8", "bf16"), ("mxfp8", "mxfp8"), ("bf16", "bf16"))  # there and back
_SETTLING = 6
_MOST_OFF = 0.06  # headers of TCP and IP are 4.5 % of full packets, and fewer are counted where the kernel joins them


@dataclass(frozen=True, slots=True)
class Request:
    """Two hosts of ranks_per_host ranks each, and what they call."""

    link: str
    ranks_per_host: int
    tokens_per_rank: int
    shape: MoEShape
    dispatch_format: str
    combine_format: str
    repeats: int

    @property
    def ranks(self) -> int:
        return 2 * self.ranks_per_host


@dataclass(frozen=True, slots=True)
class RankFound:
    """Of one rank, for calls with and without: milliseconds, bytes on its host's link, bytes that the layer counted."""

    times: dict[bool, list[float]]
    link: dict[bool, list[int]]
    counted: dict[bool, int]
    waves: dict[bool, int]
    identical: bool


def measure(group: EPGroup, request: Request) -> RankFound:
    """A rank's part."""
    shape, there, back = request.shape, request.dispatch_format, request.combine_format
    gate_up, down = make_expert_weights(shape)
    batch = make_workload(shape, group.rank, request.tokens_per_rank)
    expected = moe(shape, *batch, gate_up, down, dispatch_format=there, combine_format=back)
    layers = {}
    for limited in (True, False):
        own = EPGroup.of(dist.group.WORLD, node_limited=limited, deadline_s=group.deadline_s)
        layers[limited] = MegaMoE(shape, own, name=f"limited {limited}", dispatch_format=there, combine_format=back)
        layers[limited].load_experts(gate_up, down)
    identical = True
    for _ in range(_SETTLING):
        for layer in layers.values():
            identical &= torch.equal(layer(*batch), expected)
    times: dict[bool, list[float]] = {True: [], False: []}
    link: dict[bool, list[int]] = {True: [], False: []}
    for repeat in range(request.repeats):
        for limited in (True, False) if repeat % 2 else (False, True):
            before = _together(group)
            begun = time.perf_counter()
            layers[limited](*batch)
            times[limited].append((time.perf_counter() - begun) * 1e3)
            link[limited].append(_together(group) - before)
    counted = {limited: layer.last_call.far_bytes for limited, layer in layers.items()}
    waves = {limited: layer.last_call.waves for limited, layer in layers.items()}
    return RankFound(times, link, counted, waves, identical)


def _together(group: EPGroup) -> int:
    """Waits for all ranks -> bytes that have left the host."""
    together(group)
    return sent_bytes(INTERFACE)


def report(request: Request, found: list[RankFound]) -> dict[str, Any]:
    """What came of it, as JSON has it."""
    told: dict[str, Any] = {**asdict(request), "shape": asdict(request.shape), "ranks": request.ranks}
    told["identical"] = all(rank.identical for rank in found)
    slowest = {limited: _by_call(max, [rank.times[limited] for rank in found]) for limited in (True, False)}
    told["ratio"] = median(a / b for a, b in zip(slowest[False], slowest[True], strict=True))
    for limited, name in ((True, "node_limited"), (False, "to_each_rank")):
        times = slowest[limited]
        links = _by_call(sum, [rank.link[limited] for rank in found[:: request.ranks_per_host]])
        told[name] = {
            "ms": median(times),
            "ms_min": min(times),
            "ms_max": max(times),
            "waves": found[0].waves[limited],
            "link_mb": median(links) / 2e6,
            "counted_mb": sum(rank.counted[limited] for rank in found) / 2e6,
            "planned_mb": planned_bytes(request, limited) / 1e6,
        }
    return told


def _by_call(together: Callable[[Iterable[float]], float], found: Sequence[Sequence[float]]) -> list[float]:
    """What several ranks found in each call, as one."""
    return [together(each) for each in zip(*found, strict=True)]


def planned_bytes(request: Request, limited: bool) -> float:
    """What the planner says that a host sends over its link in a call."""
    known = {
        each.name: getattr(place, each.name)
        for place in (request, request.shape)
        for each in fields(Run)
        if hasattr(place, each.name)
    }
    link_gb_s = parse_rate(request.link) / 8e9
    run = Run(**known, link_gb_s=link_gb_s, weight_format="mxfp4", waves=0, node_limited=limited)
    return run.link_dispatch_bytes + run.link_combine_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", default="1gbit", help="rate of each host's link")
    parser.add_argument("--ranks-per-host", type=positive, default=2)
    parser.add_argument("--tokens-per-rank", type=natural, default=1024)
    parser.add_argument("--hidden", type=positive, default=2048)
    parser.add_argument("--intermediate", type=positive, default=128)
    parser.add_argument("--num-experts", type=positive, default=16)
    parser.add_argument("--topk", type=positive, default=6)
    parser.add_argument("--repeats", type=positive, default=15)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    asked = parser.parse_args(arguments)
    shape, told = MoEShape(asked.hidden, asked.intermediate, asked.num_experts, asked.topk), []
    for formats in FORMATS:
        request = Request(asked.link, asked.ranks_per_host, asked.tokens_per_rank, shape, *formats, asked.repeats)
        with (
            lab(request.ranks, request.link, ranks_per_host=request.ranks_per_host) as hosts,
            LocalRanks(request.ranks, threads_per_rank=1, deadline_s=300.0, hosts=hosts) as ranks,
        ):
            told.append(report(request, ranks.run(measure, request)))
    if asked.format == "json":
        print(json.dumps(told))
    else:
        show(told)
    return int(any(not each["identical"] or off(each) > _MOST_OFF for each in told))


def off(told: dict[str, Any]) -> float:
    """By how much bytes on the link differ from the planner's at most, as a share."""
    ways = [told[name] for name in ("node_limited", "to_each_rank")]
    largest: float = max(abs(way["link_mb"] / way["planned_mb"] - 1) for way in ways)
    return largest


def show(told: list[dict[str, Any]]) -> None:
    """The table."""
    first = told[0]
    print(
        f"2 hosts of {first['ranks_per_host']} ranks, {first['link']} each, {first['tokens_per_rank']} tokens a rank, "
        f"{_sizes(first['shape'])}, {first['repeats']} calls each in turn; MB that a host sends in a call"
    )
    columns = ("there, back", "dispatch", "median ms", "min", "max", "waves", "MB on link", "planned", "rows alone")
    print("".join(f"{column:>13}" for column in columns))
    for each in told:
        for name in ("node_limited", "to_each_rank"):
            way: dict[str, float] = each[name]
            times = "".join(f"{way[key]:13.1f}" for key in ("ms", "ms_min", "ms_max"))
            sizes = "".join(f"{way[key]:13.3f}" for key in ("link_mb", "planned_mb", "counted_mb"))
            wire = f"{each['dispatch_format']}, {each['combine_format']}"
            print(f"{wire:>13}{name.replace('_', ' '):>13}{times}{way['waves']:13}{sizes}")
        same = "identical to the oracle" if each["identical"] else "DIFFERENT from the oracle"
        print(f"{'':13}{each['ratio']:.3f} times as fast node-limited, median of {each['repeats']} pairs; {same}")


def _sizes(shape: dict[str, Any]) -> str:
    return f"{shape['num_experts']} experts {shape['hidden']} x {shape['intermediate']}, top-{shape['topk']}"


if __name__ == "__main__":
    run(main)
