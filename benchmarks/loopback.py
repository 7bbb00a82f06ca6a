"""Ranks of one host: the layer as it is used against the serial one, in turn in one run. Overlap must not cost there.

    python -m benchmarks.loopback                        # 2 ranks, 32 to 2048 tokens, both weight formats
    python -m benchmarks.loopback --ranks 4 --tokens 512

A repeat takes as long as its slowest rank; the ratio is the median over pairs of repeats, overlapped over serial.
Exit code 1 where a ratio is above --most.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median

from benchmarks.command import above_zero, natural, positive, run
from benchmarks.turns import in_turn
from megamoe.launch.bench.bench import make_expert_weights, make_workload
from megamoe.launch.bench.replay import together
from megamoe.launch.output import emit, note, show
from megamoe.launch.ranks import LocalRanks
from megamoe.launch.terminal import Format
from megamoe.layer import MegaMoE
from megamoe.parallel.group import EPGroup
from megamoe.shape import MoEShape

SHAPE = MoEShape(hidden=1024, intermediate=512, num_experts=16, topk=4)
FORMATS = {"mxfp4": "mxfp8", "bf16": "bf16"}
WARM_UP = 6  # after as many calls, waves="auto" stays with what it has measured


def measure(group: EPGroup, tokens: int, weight_format: str, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Milliseconds of this rank's calls, and how the overlapped layer made the last: its waves."""
    layers = {
        name: MegaMoE(
            SHAPE,
            group,
            weight_format=weight_format,
            dispatch_format=FORMATS[weight_format],
            overlap=name == "overlapped",
            name=name,
        )
        for name in ("overlapped", "serial")
    }
    weights = make_expert_weights(SHAPE)
    for layer in layers.values():
        layer.load_experts(*weights)
    batch = make_workload(SHAPE, group.rank, tokens)
    calls = {name: partial(layer, *batch) for name, layer in layers.items()}
    times = in_turn(calls, repeats, WARM_UP, lambda _: together(group))
    call = layers["overlapped"].last_call
    return times, "small" if call.small else str(call.waves)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--tokens", type=natural, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--repeats", type=positive, default=21)
    parser.add_argument("--most", type=above_zero, default=1.03, help="ratio above which the exit code is 1")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    asked = parser.parse_args(arguments)
    rows = []
    with LocalRanks(asked.ranks, threads_per_rank=1, deadline_s=300.0) as ranks:
        for weight_format in FORMATS:
            for tokens in asked.tokens:
                note(f"{asked.ranks} ranks, {tokens} tokens, {weight_format} ...")
                found = ranks.run(measure, tokens, weight_format, asked.repeats)
                slowest = {
                    name: [max(each) for each in zip(*(times[name] for times, _ in found), strict=True)]
                    for name in ("overlapped", "serial")
                }
                ratios = [one / other for one, other in zip(slowest["overlapped"], slowest["serial"], strict=True)]
                times = {f"{name} ms": median(each) for name, each in slowest.items()}
                head = {"tokens": tokens, "weights": weight_format, "waves": found[0][1]}
                rows.append({**head, **times, "ratio": median(ratios)})
    columns = {"tokens": ">", "weights": "", "waves": ">"}
    columns |= dict.fromkeys(("overlapped ms", "serial ms", "ratio"), ".2f")
    emit(Format(asked.format), rows, lambda: show(columns, [[row[name] for name in columns] for row in rows]))
    return int(any(row["ratio"] > asked.most for row in rows))


if __name__ == "__main__":
    run(main)
