"""Where the time of a call of few tokens goes, in microseconds: the short way, and by one wave, in turn in one run.

    python -m benchmarks.small_calls                     # 1 and 2 ranks, 1, 8 and 64 tokens, both weight formats
    python -m benchmarks.small_calls --ranks 2 --tokens 1 --format json
    python -m benchmarks.small_calls --ranks 2 --sockets # as ranks of different hosts do

Every part is the lower quartile over the calls of the rank that is slowest in all, since other work on a machine only
adds. "agree": the exchange of pages and waiting for it; "bring": slots checked, counted and put behind the page, tokens
encoded; "index": which rows this rank computes; "products": both, with decoding what arrived; "results": waiting for
those of other ranks; "sum": of slots; "Python": all the rest, guards and turns among it. Of a call by waves the index
arithmetic, copies and Python are one figure.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.command import natural, positive, run
from megamoe.launch.bench.bench import make_expert_weights, make_workload
from megamoe.launch.output import emit, note, show
from megamoe.launch.ranks import LocalRanks
from megamoe.launch.terminal import Format
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.parallel.transport.host import HostTransport
from megamoe.shape import MoEShape

SHAPE = MoEShape(hidden=1024, intermediate=512, num_experts=16, topk=4)
FORMATS = {"mxfp4": "mxfp8", "bf16": "bf16"}
PARTS = ("agree", "bring", "index", "products", "activation", "results", "sum", "Python")
_STEPS = {"few_bring": "bring", "few_route": "index", "few_reduce": "sum"}
WARM_UP = 30
Row = dict[str, Any]


class Clock:
    """Seconds by part, of the call that is on its way."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time noted."""

        def run(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments)
            self.spent[part] += time.perf_counter() - begun
            return result

        return run


def take_apart(layer: MegaMoE, batch: tuple[torch.Tensor, ...], clock: Clock) -> Row:
    """One call: microseconds by part, and in all."""
    clock.spent.clear()
    begun = time.perf_counter()
    layer(*batch)
    whole, spent, call = time.perf_counter() - begun, dict(clock.spent), layer.last_call
    if call.small:
        assert layer._small is not None
        first, activation, second = (each / 1e9 for each in layer._small._few.stage_ns)
        spent |= {"products": first + second, "activation": activation}
    else:
        spent |= {"agree": call.counts_s, "results": call.waiting_s}
    spent["Python"] = whole - sum(spent.values())
    return {"call": whole * 1e6, "small": call.small, **{name: value * 1e6 for name, value in spent.items()}}


def watch(layer: MegaMoE, clock: Clock) -> None:
    """Has the clock see what the layer calls."""
    library = layer.experts.products.library  # type: ignore[attr-defined]
    functions = library._functions
    for name, part in (*_STEPS.items(), ("products", "products"), ("activate", "activation")):
        functions[name] = clock.timed(part, functions[name])
    transport, small = layer.group.transport, layer._small
    assert small is not None
    small._exchange_results = clock.timed("results", small._exchange_results)  # type: ignore[method-assign]
    small._expect_results = clock.timed("results", small._expect_results)  # type: ignore[method-assign]
    if isinstance(transport, HostTransport):
        transport.share = clock.timed("agree", transport.share)  # type: ignore[method-assign]


def measure(group: EPGroup, tokens: int, weight_format: str, calls: int, sockets: bool) -> list[Row]:
    """This rank's calls: the short way and by one wave in turn."""
    layers = {}
    if sockets and group.size > 1:
        group = EPGroup.of(dist.group.WORLD, deadline_s=group.deadline_s, shared_memory=False)
    for way, waves in (("small", "auto"), ("one wave", 1)):
        layers[way] = MegaMoE(
            SHAPE, group, weight_format=weight_format, dispatch_format=FORMATS[weight_format], waves=waves, name=way
        )
        layers[way].load_experts(*make_expert_weights(SHAPE))
    batch, clock = make_workload(SHAPE, group.rank, tokens), Clock()
    kept = dict(layers["small"].experts.products.library._functions)  # type: ignore[attr-defined]
    watch(layers["small"], clock)
    found = []
    for number in range(-WARM_UP, calls):
        for way, layer in layers.items():
            row = {"way": way, **take_apart(layer, batch, clock)}
            if number >= 0:
                found.append(row)
    layers["small"].experts.products.library._functions.update(kept)  # type: ignore[attr-defined]
    vars(group.transport).pop("share", None) if group.transport else None
    return found


def lower_quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


def summary(found: list[list[Row]], way: str) -> Row:
    """Of the rank that is slowest in all: the lower quartile of each part."""
    by_rank = [[row for row in rows if row["way"] == way] for rows in found]
    slowest = max(by_rank, key=lambda rows: lower_quartile([row["call"] for row in rows]))
    parts = {name: lower_quartile([row.get(name, 0.0) for row in slowest]) for name in ("call", *PARTS)}
    if way == "small" and not all(row["small"] for row in slowest):
        raise SystemExit("error: calls of few tokens went by waves: there are no kernels, or the tokens are too many")
    return {"way": way, **parts}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=natural, nargs="+", default=[1, 8, 64])
    parser.add_argument("--calls", type=positive, default=200)
    parser.add_argument("--sockets", action="store_true", help="without shared memory")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    asked = parser.parse_args(arguments)
    rows = []
    for size in asked.ranks:
        with LocalRanks(size, threads_per_rank=1, deadline_s=300.0) as ranks:
            for weight_format in FORMATS:
                for tokens in asked.tokens:
                    note(f"{size} ranks, {tokens} tokens, {weight_format} ...")
                    found = ranks.run(measure, tokens, weight_format, asked.calls, asked.sockets)
                    head = {"ranks": size, "tokens": tokens, "weights": weight_format}
                    rows += [{**head, **summary(found, way)} for way in ("small", "one wave")]
    columns = {"ranks": ">", "tokens": ">", "weights": "", "way": "", **dict.fromkeys(("call", *PARTS), ",.0f")}
    cells, title = [[row[name] for name in columns] for row in rows], "microseconds a call, lower quartiles"
    emit(Format(asked.format), rows, lambda: show(columns, cells, title))
    return 0


if __name__ == "__main__":
    run(main)
