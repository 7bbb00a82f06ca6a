"""The stages in order of worth: what each does, how long it may take, and which checks it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHAPES = ("V4-Pro", "V4-Flash", "Qwen3-235B")
DECODE, PREFILL, MIDDLE = (1, 8), (512, 2048), (64,)
LAYER_ROWS = (1, 8, 512)
_STAGES = "benchmarks.gpu_kernels.stages"


@dataclass(frozen=True, slots=True)
class Stage:
    """One process.

    purpose     in one line, for --help
    work        "module:function", a generator that takes a Task and yields findings
    limit_s     seconds that it may take
    needs       stages without which it says nothing: it is skipped where one of them is known not to have passed
    arguments   for the work
    """

    name: str
    purpose: str
    work: str
    limit_s: float
    needs: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """What a stage's work is told.

    device      as torch calls it: "cuda:0", "cpu"
    rehearsal   on the CPU, in Triton's interpreter, with tiny shapes
    until       in time.monotonic(): the process is ended then
    selected    names of all stages that were asked for
    earlier     what is known of other stages: their records, as in results.json
    """

    device: str
    rehearsal: bool
    until: float
    selected: tuple[str, ...] = ()
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


class CannotRunError(Exception):
    """A stage has nothing to run on here, and that is no failure: no CUDA graphs on a CPU, no profiler."""


def _products(family: str, shape: str, rows: tuple[int, ...], limit_s: float, unit: str) -> Stage:
    purpose = f"{shape}: Linear-1, Linear-2 and both at {unit} rows an expert, checked, then timed"
    arguments = {"shape": shape, "rows": rows}
    return Stage(f"{family}-{shape}", purpose, f"{_STAGES}.times:products", limit_s, ("device-checks",), arguments)


PLAN: tuple[Stage, ...] = (
    Stage("probe", "versions, the device, its clocks, what grouped_mm and the clock do", f"{_STAGES}.probe:probe", 60),
    Stage(
        "compile",
        "the variants that the chosen stages launch, side by side into one cache",
        f"{_STAGES}.compiling:compile_all",
        150,
        ("probe",),
    ),
    Stage(
        "device-checks",
        "all codes and the rounding against the host",
        f"{_STAGES}.verify:device",
        60,
        ("probe",),
    ),
    Stage("layer-checks", "the layer's error, bits, waits and memory", f"{_STAGES}.verify:layer", 60, ("probe",)),
    Stage("rank-checks", "two ranks in threads: the bits of one", f"{_STAGES}.verify:ranks", 60, ("probe",)),
    *(_products("decode", shape, DECODE, 60, "1 and 8") for shape in SHAPES),
    *(_products("prefill", shape, PREFILL, 70, "512 and 2048") for shape in SHAPES),
    Stage(
        "tiles",
        "V4-Pro: a list of tiles for decode and for prefill, the best of which make a table",
        f"{_STAGES}.tiles:tune",
        90,
        ("device-checks",),
        {"shape": "V4-Pro"},
    ),
    Stage(
        "layer",
        "the layer, eager and as a CUDA graph, beside torch's own operations",
        f"{_STAGES}.times:layer",
        60,
        ("layer-checks",),
        {"shapes": SHAPES, "rows": LAYER_ROWS},
    ),
    Stage(
        "profiler",
        "V4-Pro: where the products' time goes, by ncu or else torch.profiler",
        f"{_STAGES}.profiling:profile",
        60,
        ("device-checks",),
        {"shape": "V4-Pro", "rows": (8, 512)},
    ),
    Stage(
        "mega-checks",
        "the mega-kernel on 2, 4 and 8 virtual ranks: the staged kernels' bits, 1,000 calls",
        "benchmarks.gpu_kernels.mega.stage:check_all",
        120,
        ("layer-checks",),
        {"ranks": (2, 4, 8), "calls": 1000},
    ),
    Stage(
        "mega-times",
        "V4-Pro: the mega-kernel beside the staged layer at 1, 8, 64 and 512 tokens, eager and as a graph",
        "benchmarks.gpu_kernels.mega.stage:time_all",
        120,
        ("mega-checks",),
        {"shape": "V4-Pro", "rooms": ((1, 64, (1, 8, 64)), (8, 64, (1, 8, 64)), (1, 512, (512,)), (2, 64, (8, 64)))},
    ),
    *(_products("middle", shape, MIDDLE, 45, "64") for shape in SHAPES),
    Stage(
        "one-rank",
        "the all-to-all transport over NCCL with one rank: the lone rank's bits",
        f"{_STAGES}.one_rank:check_all",
        60,
        ("layer-checks",),
    ),
    Stage(
        "two-processes",
        "two ranks in processes that share the device's memory: the lone rank's bits",
        f"{_STAGES}.processes:check_all",
        60,
        ("layer-checks",),
    ),
)


def select(wanted: str | None, plan: Sequence[Stage]) -> tuple[Stage, ...]:
    """ "decode,tiles" -> the stages of these names, and those whose names begin so, in the plan's order; None: all.

    ValueError that names what is called so nowhere.
    """
    if wanted is None:
        return tuple(plan)
    chosen: set[str] = set()
    for name in filter(None, (each.strip() for each in wanted.split(","))):
        found = {stage.name for stage in plan if stage.name == name or stage.name.startswith(f"{name}-")}
        if not found:
            raise ValueError(f"no stage is called {name!r}; there are {', '.join(stage.name for stage in plan)}")
        chosen |= found
    if not chosen:
        raise ValueError(f"--stages names none; there are {', '.join(stage.name for stage in plan)}")
    return tuple(stage for stage in plan if stage.name in chosen)
