"""Fits the constants of the layer model to the tables in docs/data, and leaves one device out after the other.

python -m benchmarks.fit_layer                                      # prints the constants; two minutes
python -m benchmarks.fit_layer --write docs/data/layer_fit.json     # also for benchmarks/accuracy.py

Every other row of a table is fitted (the first, the third, ...), the rest is kept for docs/accuracy.md. Of the SGLang
table the 64 balanced rows are fitted, and all 8 of DeepGEMM's; to every other skewed row link_incast alone. Errors
are relative; a row far off counts less (least absolute errors, by reweighted least squares).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import new_file, run
from megamoe.catalog import Hardware, Profile, load_profile
from megamoe.catalog.schema import Figure
from megamoe.planner.validation.published_layers import pull_request_316_rows
from megamoe.planner.validation.tables import Measured, hardware_of, read_table
from megamoe.planner.validation.validate import Errors, compare, planned_us
from megamoe.schedule.formats import value_bytes

DATA = Path(__file__).parents[1] / "docs" / "data"
FUSED = "mega_moe_gb200_deepseek_v4_pro", "flashinfer_fused_gb200_ep4", "deepgemm_pr383_h200_fp8_flash"
PRODUCTS = "sglang_grouped_gemm_h100_fp8_decode", "sglang_grouped_gemm_h100_fp8_prefill"
PRODUCTS_ON_GB200 = "sglang_grouped_gemm_gb200_fp8_decode", "sglang_grouped_gemm_gb200_fp8_prefill"
EXCHANGES = "deepep_ll_h100_1node", "deepep_ll_gb200_1node", "deepep_ll_h100_nodes"
NORMAL_EXCHANGES = "deepep_normal_gb200_1node", "deepep_normal_h200_1node"
# what a table weighs in all, in rows: few rows of another device say as much as many of one
WEIGHTS = {"pull request 316": 26.0, FUSED[0]: 80.0, FUSED[1]: 40.0, FUSED[2]: 20.0}
SHARED = ("feed_ps", "epilogue_ps", "memory_efficiency", "memory_overlap", "fixed_us", "staging_us", "staging_bytes")
# blackwell.overlap is none of them: fitted, it grows without end, since that kernel's links and products wait for none
CORE = (*(f"*.{key}" for key in SHARED), "hopper.overlap", "blackwell.fused_link_efficiency")
STAGED = ("*.masked_us", "*.masked_expert_us")
STAGED_OF = {name: (f"{name}.contiguous_us", f"{name}.host_us") for name in ("hopper", "blackwell")}
LOW_LATENCY = (
    *("*.ll_dispatch_us", "*.ll_dispatch_token_us", "*.ll_combine_us", "*.ll_combine_token_us", "*.ll_node_us"),
    *(f"{name}.ll_{way}_expert_us" for name in ("hopper", "blackwell") for way in ("dispatch", "combine")),
    *(f"{name}.ll_{way}_efficiency" for name in ("hopper", "blackwell") for way in ("dispatch", "combine")),
)
NORMAL = ("hopper.normal_efficiency",)  # Blackwell's was measured
# Hopper's combine takes nothing for a row that it sends: fitted, that shrinks without end
NORMAL_SMS = (
    *(f"blackwell.normal_{way}_{each}_us" for way in ("dispatch", "combine") for each in ("token", "sent")),
    *("hopper.normal_dispatch_token_us", "hopper.normal_dispatch_sent_us", "hopper.normal_combine_token_us"),
)
INCAST = ("*.link_incast",)
# GB200 alone tells of modules and of skewed rows: no kernels around the layer's, bytes that can be counted, no incast
UNTOLD_WITHOUT_GB200 = {"*.link_incast": 0.0, "*.staging_us": 0.0, "*.staging_bytes": 13.0}
GENERATION = {"gb200": "blackwell", "h200": "hopper", "h100": "hopper"}
Constants = dict[str, float]
_NEAR, _ROUNDS, _STEP = 0.02, 60, 0.02


@dataclass(frozen=True, slots=True)
class Sample:
    """A row, and how much it weighs."""

    row: Measured
    weight: float


@cache
def table(name: str) -> tuple[Measured, ...]:
    """All rows of a table, those of pull request 316 among them."""
    return tuple(pull_request_316_rows() if name == "pull request 316" else read_table(DATA / f"{name}.csv"))


def halves(name: str) -> tuple[list[Measured], list[Measured]]:
    """The rows that are fitted and those that are kept. An exchange's two ways lie side by side and stay together."""
    rows = table(name)
    if name == FUSED[0]:
        return [row for row in rows if row.routing == "balanced"], [row for row in rows if row.routing != "balanced"]
    if name == "pull request 316":
        return list(rows), []
    lines = 2 if name in (*EXCHANGES, *NORMAL_EXCHANGES) else 1
    chosen = [number // lines % 2 == 0 for number in range(len(rows))]
    kept = [row for row, fitted in zip(rows, chosen, strict=True) if not fitted]
    return [row for row, fitted in zip(rows, chosen, strict=True) if fitted], kept


def samples(names: Sequence[str], without: str = "") -> list[Sample]:
    """What is fitted of these tables, no row of the device `without`."""
    found = []
    for name in names:
        rows = [row for row in halves(name)[0] if row.hardware != without]
        weight = WEIGHTS.get(name, float(len(rows))) / max(1, len(rows))
        found += [Sample(row, weight) for row in rows]
    return found


def profiles(constants: Constants) -> Callable[[Hardware], Profile]:
    """The shipped profiles with these constants in place: "*.feed_ps" in all of them, "hopper.overlap" in one."""

    @cache
    def changed(name: str) -> Profile:
        keys = {key.split(".")[1]: value for key, value in constants.items() if key.split(".")[0] in ("*", name)}
        figures = {key: Figure(value=value, tag="derived", source="fitted") for key, value in keys.items()}
        return load_profile(name).model_copy(update=figures)

    return lambda hardware: changed(hardware.profile)


def values(keys: Sequence[str]) -> Constants:
    """As they ship."""
    shipped = {key: key.replace("*", "blackwell").split(".") for key in keys}
    return {key: float(getattr(load_profile(name), figure).value) for key, (name, figure) in shipped.items()}


def fit(
    keys: Sequence[str],
    data: Sequence[Sample],
    fixed: Constants | None = None,
    of: Callable[[Constants], Callable[[Hardware], Profile]] = profiles,
) -> Constants:
    """Constants above zero that leave the least error: Levenberg-Marquardt in their logarithms. of: whose they are."""
    start = values(keys)
    measured = np.log([each.row.latency_us for each in data])
    weights = np.array([each.weight for each in data])

    least = np.array([0.0 if key.endswith("overlap") else -np.inf for key in keys])  # a norm's power is 1 or more

    def off(point: NDArray[np.float64]) -> NDArray[np.float64]:
        profile_of = of({**(fixed or {}), **dict(zip(keys, np.exp(point).tolist(), strict=True))})
        planned = [planned_us(each.row, profile_of(hardware_of(each.row.hardware))) for each in data]
        return np.log(planned) - measured

    def loss(errors: NDArray[np.float64]) -> float:
        return float((weights * np.sqrt(errors**2 + _NEAR**2)).sum())

    point = np.log([start[key] for key in keys])
    errors, damping = off(point), 1e-2
    for _ in range(_ROUNDS):
        slopes = np.stack([(off(point + _STEP * axis) - errors) / _STEP for axis in np.eye(len(keys))], axis=1)
        near = weights / np.sqrt(errors**2 + _NEAR**2)
        gram, goal = slopes.T @ (slopes * near[:, None]), slopes.T @ (near * errors)
        before = loss(errors)
        for _ in range(6):
            step = np.linalg.solve(gram + damping * np.diag(np.diag(gram) + 1e-6), -goal).clip(-0.4, 0.4)
            there = np.maximum(point + step, least)
            moved = off(there)
            if loss(moved) < before:
                point, errors, damping = there, moved, damping / 3
                break
            damping *= 5
        if before - loss(errors) < 1e-6 * before:
            break
    return {key: float(f"{value:.3g}") for key, value in zip(keys, np.exp(point).tolist(), strict=True)}


def fit_all() -> Constants:
    """The fused kernel first; what it says of an SM and of memory holds for grouped products too."""
    found = fit(CORE, samples(("pull request 316", *FUSED)))
    found |= fit(INCAST, [Sample(row, 1.0) for row in halves(FUSED[0])[1][::2]], found)
    staged = (*STAGED, *STAGED_OF["hopper"], *STAGED_OF["blackwell"])
    found |= fit(staged, samples((*PRODUCTS, *PRODUCTS_ON_GB200)), found)
    found |= fit(LOW_LATENCY, samples(EXCHANGES), found)
    found |= fit(NORMAL, [Sample(row, 1.0) for row in staged_h200()[::2]], found)
    return found | fit(NORMAL_SMS, samples(NORMAL_EXCHANGES), found)


def staged_h200() -> list[Measured]:
    """The column of DeepGEMM's table that timed DeepEP's normal kernels with grouped products."""
    import csv
    from dataclasses import replace

    name = FUSED[2]
    with (DATA / f"{name}.csv").open(newline="") as file:
        times = [float(line["deepep_ht_us"]) for line in csv.DictReader(file)]
    return [
        replace(row, latency_us=us, stack="staged normal", drawn=None)
        for row, us in zip(table(name), times, strict=True)
    ]


# ---- one device left out ----


def left_out(device: str) -> dict[str, dict[str, float]]:
    """Errors of one device's rows with every constant fitted to the other devices' rows alone.

    What only the device itself would tell of its generation is taken from the other generation, or left out; of the
    links in its fused kernel, that they overlap as well as memory does.
    """
    other = {"hopper": "blackwell", "blackwell": "hopper"}
    data = samples(("pull request 316", *FUSED, *PRODUCTS), without=device)
    untold = UNTOLD_WITHOUT_GB200 if device == "gb200" else {}
    keys = [key for key in CORE if not _own(device, key) and key not in untold]
    staged = (*STAGED, *STAGED_OF["hopper"]) if device != "h100" else ()  # H100 alone tells of them here
    found = untold | fit([*keys, *staged], data, untold)
    links = [key for key in LOW_LATENCY if not _own(device, key, links=True)]
    found |= fit(links, samples(EXCHANGES, without=device), found) if device != "h200" else {}
    for key in (*CORE, "blackwell.overlap", *LOW_LATENCY, *STAGED_OF["blackwell"]):
        if _own(device, key, links=True):
            name, figure = key.split(".")
            same = "*.memory_overlap" if figure == "overlap" else f"{other[name]}.{figure}"
            found[key] = found.get(same, values([same])[same])
    found |= _links_of_h200(found) if device == "h200" else {}
    errors = {}
    for name in ("pull request 316", *FUSED, *PRODUCTS, *PRODUCTS_ON_GB200, *EXCHANGES):
        rows = [row for row in table(name) if row.hardware == device]
        if rows:
            errors[name] = Errors.of(compare(rows, profiles(found))).as_dict()
    return errors


def _links_of_h200(found: Constants) -> Constants:
    """What a fused kernel reaches of Hopper's link, if that is the share of what DeepEP's kernels reach that it is on
    Blackwell."""
    share = found["blackwell.fused_link_efficiency"] / _exchanges_reach("blackwell")
    return {"hopper.fused_link_efficiency": share * _exchanges_reach("hopper")}


def _exchanges_reach(name: str) -> float:
    """Of the link, by DeepEP's low-latency kernels, of a row that goes out in MXFP8 and comes home in BF16."""
    there, back = value_bytes("mxfp8"), value_bytes("bf16")
    profile = load_profile(name)
    slower = there / profile.ll_dispatch_efficiency.value + back / profile.ll_combine_efficiency.value
    return (there + back) / slower


def _own(device: str, key: str, links: bool = False) -> bool:
    """Whether no other device tells this constant: a generation's links in the fused kernel, and in DeepEP."""
    generation = GENERATION[device]
    alone = {"gb200": ("overlap", "fused_link", "ll_", "contiguous", "host"), "h200": ("overlap",), "h100": ("ll_",)}[
        device
    ]
    figure = key.split(".")[1]
    return key.startswith(generation) and any(figure.startswith(each) for each in alone if links or each != "ll_")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=new_file, help="the JSON file to write")
    asked = parser.parse_args(arguments)
    begin = time.process_time()
    constants = fit_all()
    for key, value in constants.items():
        print(f"{key:38} {value:g}")
    out = {device: left_out(device) for device in ("gb200", "h200", "h100")}
    for device, errors in out.items():
        for name, found in errors.items():
            print(f"without {device}: {name}: median {found['median_abs_pct_error']:.1f} % of {found['rows']} rows")
    print(f"{time.process_time() - begin:.0f} s of CPU")
    if asked.write:
        asked.write.write_text(json.dumps({"constants": constants, "left_out": out}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
