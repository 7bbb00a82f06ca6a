"""The planner against everything that was measured; prints the tables, and writes them with --write.

python -m benchmarks.accuracy --write docs/accuracy.md      # reads docs/data; a few seconds
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.command import new_file, run
from megamoe.catalog import figures, find_profile, load_machine, load_model
from megamoe.planner.serving.flops import ASSUMPTIONS, efficiency
from megamoe.planner.validation.ascend_guides import guides, median_of
from megamoe.planner.validation.attention_kernels import attention_kernels
from megamoe.planner.validation.calibrate import calibrate, check, median_error
from megamoe.planner.validation.published import published
from megamoe.planner.validation.published_layers import deepep_dispatch, deepep_low_latency, isca, pull_request_316
from megamoe.planner.validation.tables import read_table
from megamoe.planner.validation.validate import Compared, Errors, compare, quantile
from megamoe.schedule.machine import read_runs

try:
    from benchmarks.accuracy_words import (
        ATTENTION,
        HEAD,
        HELD_OUT,
        NORMAL,
        OTHER_DEVICES,
        OWN_KERNELS,
        PAIRS,
        SERVING,
        WORST,
    )
    from benchmarks.fit_kernels import KERNELS, rows_of
    from benchmarks.fit_layer import (
        EXCHANGES,
        FUSED,
        NORMAL_EXCHANGES,
        PRODUCTS,
        PRODUCTS_ON_GB200,
        halves,
        staged_h200,
        table,
    )
except ModuleNotFoundError:  # run as a file, which has its own folder on the path
    from accuracy_words import ATTENTION, HEAD, HELD_OUT, NORMAL, OTHER_DEVICES, OWN_KERNELS, PAIRS, SERVING, WORST  # type: ignore[import-not-found, no-redef]
    from fit_kernels import KERNELS, rows_of  # type: ignore[import-not-found, no-redef]
    from fit_layer import EXCHANGES, FUSED, NORMAL_EXCHANGES, PRODUCTS, PRODUCTS_ON_GB200, halves, staged_h200, table  # type: ignore[import-not-found, no-redef]

DATA = Path(__file__).parents[1] / "docs" / "data"
V4_EFFICIENCY = {"deepseek-v4-pro": (27, 10), "deepseek-v4-flash": (10, 7)}


def lines() -> Iterator[str]:
    yield HEAD
    yield from _gb200()
    yield from _layers()
    yield from _halves()
    yield from _staged()
    yield from _left_out()
    yield from _other_devices()
    yield from _kernels()
    yield from _holdouts()
    yield from _efficiency()
    yield from _serving()
    yield from _attention()
    yield from _guides()
    yield from _machine()


def _errors(name: str, compared: list[Compared]) -> str:
    found = Errors.of(compared)
    values = (found.median_abs_pct_error, found.p95_abs_pct_error, found.max_abs_pct_error)
    return f"| {name} | {found.rows} | {' | '.join(f'{value:.1f} %' for value in values)} |"


def _gb200() -> Iterator[str]:
    compared = compare(read_table(DATA / "mega_moe_gb200_deepseek_v4_pro.csv"))
    routings = sorted({each.row.routing for each in compared})
    yield "## One layer of DeepSeek-V4-Pro on GB200\n"
    yield "`docs/data/mega_moe_gb200_deepseek_v4_pro.csv`: 256 rows from ai-dynamo/aiconfigurator (Apache-2.0),"
    yield "measured with SGLang 0.5.10 and DeepGEMM's fused kernel under CUDA graphs; the routed module alone.\n"
    yield "| rows | number | median | 95th percentile | largest |"
    yield "|---|---|---|---|---|"
    for routing in routings:
        yield _errors(routing, [each for each in compared if each.row.routing == routing])
    skewed = [each for each in compared if each.row.routing != "balanced"]
    yield _errors("skewed, one constant fitted: the first, the third, ...", skewed[::2])
    yield _errors("skewed, **kept**: the second, the fourth, ...", skewed[1::2])
    for ep in sorted({each.row.ep_size for each in compared}):
        yield _errors(f"EP{ep}, all routings", [each for each in compared if each.row.ep_size == ep])
    yield _errors("all", compared)
    tokens = sorted({each.row.tokens_per_rank for each in compared})
    for routing in routings:
        yield f"\nError in percent, {routing}, by EP size and tokens per rank:\n"
        yield f"| | {' | '.join(str(each) for each in tokens)} |"
        yield f"|---|{'---|' * len(tokens)}"
        for ep in sorted({each.row.ep_size for each in compared}):
            row = {
                each.row.tokens_per_rank: each
                for each in compared
                if (each.row.routing, each.row.ep_size) == (routing, ep)
            }
            yield f"| EP{ep} | {' | '.join(f'{row[each].error_pct:+.0f}' for each in tokens)} |"
    yield WORST


def _layers() -> Iterator[str]:
    yield "## The fused kernel alone: DeepGEMM pull request 316, EP8\n"
    yield "| model | tokens per rank | measured us | planned us | error |"
    yield "|---|---|---|---|---|"
    for each in pull_request_316():
        row = each.row
        numbers = f"{row.latency_us:.1f} | {each.planned_us:.1f} | {each.error_pct:+.1f} %"
        yield f"| {row.model} | {row.tokens_per_rank} | {numbers} |"
    for title, found in (
        ("DeepEP V1's low-latency dispatch on H800, 128 tokens, top-8, FP8", deepep_dispatch()),
        ("Communication of DeepSeek-V3 as the ISCA 2025 paper counts it", isca()),
    ):
        yield f"\n## {title}\n"
        yield "| | published | planned | error |"
        yield "|---|---|---|---|"
        for figure in found:
            numbers = (
                f"{figure.published:g} {figure.unit} | {figure.ours:.2f} {figure.unit} | {figure.error_pct:+.1f} %"
            )
            yield f"| {figure.what} | {numbers} |"
    yield ""


TABLES = {
    FUSED[1]: (
        "The fused kernel alone on GB200, EP4: FlashInfer's tuning page",
        "flashinfer-ai/flashinfer, TUNING page of moe_ep (Apache-2.0): DeepSeek-V3 and Qwen3.5-397B, 8 to 8192 tokens; "
        "DeepGEMM's FP8 x FP4, NVFP4 with results home in BF16 and in MXFP8",
    ),
    FUSED[2]: ("The fused kernel with FP8 weights on H200, EP8", "DeepGEMM pull request 383: DeepSeek-V4-Flash"),
    PRODUCTS[0]: (
        "Grouped FP8 products on H100, decode",
        "ai-dynamo/aiconfigurator, SGLang 0.5.10: DeepSeek-V3, one rank's experts of EP4 to EP256",
    ),
    PRODUCTS[1]: ("Grouped FP8 products on H100, prefill", "the same, EP2 to EP256"),
    PRODUCTS_ON_GB200[0]: (
        "Grouped FP8 products on GB200, decode",
        "ai-dynamo/aiconfigurator 0.12, SGLang 0.5.10: DeepSeek-V3, one rank's experts of EP2 to EP256",
    ),
    PRODUCTS_ON_GB200[1]: ("Grouped FP8 products on GB200, prefill", "the same"),
    EXCHANGES[0]: (
        "DeepEP's low-latency kernels on H100, one node",
        "ai-dynamo/aiconfigurator, SGLang 0.5.12: 16 models, 1 to 1024 tokens; dispatch and combine",
    ),
    EXCHANGES[1]: ("DeepEP's low-latency kernels on GB200, 8 ranks", "the same"),
    EXCHANGES[2]: (
        "DeepEP's low-latency kernels on H100, one to eight nodes",
        "ai-dynamo/aiconfigurator, SGLang 0.5.6.post2: DeepSeek-V3",
    ),
    NORMAL_EXCHANGES[0]: (
        "DeepEP's normal kernels on GB200, 8 ranks",
        "ai-dynamo/aiconfigurator 0.12 (Apache-2.0), SGLang 0.5.12: 19 layers of 2048 to 7168 values, top-1 to top-22; "
        "of its rows those with 20 SMs and 4096 to 131072 tokens, as they are",
    ),
    NORMAL_EXCHANGES[1]: ("DeepEP's normal kernels on H200, one node", "the same, 18 layers"),
}


def _halves() -> Iterator[str]:
    """Every table of which half was fitted: that half, the half that was kept, and the parts it has."""
    for name, (title, source) in TABLES.items():
        fitted, kept = (compare(rows) for rows in halves(name))
        yield f"## {title}\n"
        yield f"`docs/data/{name}.csv`: {source}.\n"
        yield from ("| rows | number | median | 95th percentile | largest |", "|---|---|---|---|---|")
        yield _errors("fitted: the first, the third, ...", fitted)
        yield _errors("**kept**: the second, the fourth, ...", kept)
        yield _errors("all", [*fitted, *kept])
        yield from _parts(name, [*fitted, *kept])
        yield {PRODUCTS_ON_GB200[1]: PAIRS, NORMAL_EXCHANGES[1]: NORMAL}.get(name, "")


def _parts(name: str, compared: list[Compared]) -> Iterator[str]:
    if name in FUSED:
        models = sorted({each.row.model for each in compared})
        for model in models if len(models) > 1 else []:
            yield _errors(model, [each for each in compared if each.row.model == model])
        for tokens in sorted({each.row.tokens_per_rank for each in compared}):
            yield _errors(f"{tokens} tokens", [each for each in compared if each.row.tokens_per_rank == tokens])
        return
    keys = sorted({each.row.routing for each in compared})
    for routing in keys if len(keys) > 1 else []:
        yield _errors(routing, [each for each in compared if each.row.routing == routing])
    for ep in sorted({each.row.ep_size for each in compared}) if name in PRODUCTS_ON_GB200 else []:
        yield _errors(f"EP{ep}", [each for each in compared if each.row.ep_size == ep])
    stacks = sorted({each.row.stack for each in compared})
    for stack in stacks if len(stacks) > 1 else []:
        yield _errors(stack, [each for each in compared if each.row.stack == stack])


def _staged() -> Iterator[str]:
    """DeepEP's normal kernels with grouped products, which DeepGEMM timed beside its own."""
    yield "## The staged stack on H200, EP8: DeepEP's normal kernels with grouped products\n"
    yield "The other column of `docs/data/deepgemm_pr383_h200_fp8_flash.csv`; one constant was fitted to every other"
    yield "row. Launched by the host without a graph, which took longer where its 398 us were fitted.\n"
    yield from ("| tokens per rank | measured us | planned us | error |", "|---|---|---|---|")
    for each in compare(staged_h200()):
        numbers = f"{each.row.latency_us:.1f} | {each.planned_us:.1f} | {each.error_pct:+.1f} %"
        yield f"| {each.row.tokens_per_rank} | {numbers} |"
    yield ""


def _left_out() -> Iterator[str]:
    """What fit_layer.py found without one device after the other."""
    found = json.loads((DATA / "layer_fit.json").read_text())
    yield "## One device left out\n"
    yield "Every constant fitted to the other devices' rows alone; all rows of the device that was left out. What only"
    yield "that device tells of its generation (its links in DeepEP) is the other one's; links of its fused"
    yield "kernel are taken to overlap as well as memory does.\n"
    yield from ("| without | table | number | median | 95th percentile | largest |", "|---|---|---|---|---|---|")
    for device, tables in found["left_out"].items():
        for name, errors in tables.items():
            values = (errors[f"{key}_abs_pct_error"] for key in ("median", "p95", "max"))
            yield f"| {device} | {name} | {errors['rows']} | {' | '.join(f'{value:.1f} %' for value in values)} |"
    yield "\nThe constants of an SM, of memory and of grouped products carry over, and so does how much of its link a"
    yield "fused kernel reaches, as a share of what DeepEP's low-latency kernels reach of it: H200's rows are"
    yield "planned with Blackwell's share of what H100 reached. With an all-to-all's rate in its place the rows of"
    yield "512 tokens and more were a third too short. Without GB200 no module is known: its kernels' time and the"
    yield "passes over its tokens that nobody can count are left out, a tenth of a small layer, where an earlier"
    yield "state of this page had let them in from GB200 itself. Fits go on until nothing moves: while they ended"
    yield "sooner, near constants that know GB200, FlashInfer's rows without it stood at 12.1 %. Without H100 what a"
    yield "launch takes in its tables is still theirs, and without GB200 the host's part of prefill is H100's."
    yield "Since a power law of products is the mean of five draws, H100's rows tell a little else of an SM:"
    yield "without GB200 its own table went from 5.7 to 7.2 % and FlashInfer's largest error from 47 to 51 %,"
    yield "without H100 its prefill from 8.8 to 6.4 %.\n"


# of tables that were found after the constants had been fitted: median and 95th percentile in percent, as the planner
# stood when they were first read
FIRST = {
    "mega_moe_gb300_deepseek_v4_pro": (12.0, 32.3),
    "mega_moe_b200_kimi_k3": (12.2, 24.4),
    "sglang_grouped_gemm_h200_fp8_decode": (4.0, 35.7),
    "sglang_grouped_gemm_h200_fp8_prefill": (7.2, 23.3),
    "sglang_grouped_gemm_b200_fp8_decode": (10.8, 46.3),
    "sglang_grouped_gemm_b200_fp8_prefill": (21.4, 69.8),
    "sglang_grouped_gemm_b300_fp8_decode": (11.2, 36.1),
    "sglang_grouped_gemm_b300_fp8_prefill": (20.8, 62.2),
    "sglang_grouped_gemm_gb300_fp8_decode": (8.3, 34.0),
    "sglang_grouped_gemm_gb300_fp8_prefill": (14.3, 39.6),
    "deepep_ll_h200_1node": (9.8, 22.3),
    "deepep_ll_h200_nodes": (3.4, 14.5),
    "deepep_ll_b200_1node": (20.0, 33.3),
    "deepep_ll_b300_1node": (21.5, 35.7),
    "deepep_ll_gb300_1node": (3.8, 16.5),
    "deepep_normal_b200_1node": (38.8, 72.1),
    "deepep_normal_b300_1node": (37.9, 71.5),
    "deepep_normal_gb300_1node": (36.6, 69.0),
    "deepep_normal_h100_1node": (16.7, 55.9),
}
ONE_FIGURE = {"sglang_grouped_gemm_b200_fp8_prefill": "host_us", "deepep_ll_b200_1node": "ll_us"}


def _other_devices() -> Iterator[str]:
    """Tables of devices that no constant was fitted to: as they were first met, and now."""
    yield "## Other devices: tables found on 2026-11-30 and 2026-12-01, first read as the planner stood\n"
    yield "ai-dynamo/aiconfigurator 0.12 (Apache-2.0): the fused module in SGLang 0.5.11 on GB300 (EP4 to EP32) and in"
    yield "0.5.16 on B200 (Kimi K3, EP8), grouped products in SGLang 0.5.10, DeepEP's kernels in 0.5.12."
    yield "Median and 95th percentile before anything was changed; then those of today and the largest.\n"
    yield "| table, `docs/data/*.csv` | rows | first | | now | | | fitted to it |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, (middle, most) in FIRST.items():
        found = Errors.of(compare(read_table(DATA / f"{name}.csv")))
        now = (found.median_abs_pct_error, found.p95_abs_pct_error, found.max_abs_pct_error)
        figure = f"{ONE_FIGURE[name]}, every other row" if name in ONE_FIGURE else "nothing"
        cells = " | ".join(f"{value:.1f} %" for value in (middle, most, *now))
        yield f"| {name} | {found.rows} | {cells} | {figure} |"
    yield OTHER_DEVICES


def _kernels() -> Iterator[str]:
    """Kernels that have a profile: what was fitted, what was kept, and that by the profile of the device."""
    yield "## Kernels with a profile of their own\n"
    yield "`python -m benchmarks.fit_kernels` prints their constants. Rows of `docs/data/holdouts.csv`, whose column"
    yield "`profile` names the kernel; of each kernel the first, the third, ... row is fitted, the others are kept, and"
    yield "planned by the profile of the device too. Which constants to fit was decided with all rows in sight.\n"
    columns = ("profile", "fitted rows", "median", "largest", "**kept** rows", "median", "largest")
    yield f"| {' | '.join((*columns, 'by the device: median', 'largest'))} |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in KERNELS:
        fitted, kept = rows_of(name)
        cells = [name]
        for rows, own in ((fitted, False), (kept, False), (kept, True)):
            errors = Errors.of(compare(rows, find_profile if own else None)) if rows else None
            number = [] if own else [str(len(rows))]
            cells += [*number, *_median_and_largest(errors)]
        yield f"| {' | '.join(cells)} |"
    yield OWN_KERNELS


def _median_and_largest(errors: Errors | None) -> tuple[str, str]:
    if errors is None:
        return "-", "-"
    return f"{errors.median_abs_pct_error:.1f} %", f"{errors.max_abs_pct_error:.1f} %"


def _holdouts() -> Iterator[str]:
    """Published times of which no row was fitted: a line for every source, device and kind of kernels."""
    path = DATA / "holdouts.csv"
    with path.open(newline="") as file:
        sources = [line["source"] for line in csv.DictReader(file)]
    fitted = {id(row) for name in KERNELS for row in rows_of(name)[0]}
    found: dict[tuple[str, str, int, str, str], list[Compared]] = {}
    for source, row in zip(sources, table("holdouts"), strict=True):
        if id(row) not in fitted:
            key = (source, row.hardware, row.ep_size, row.stack, row.profile or "-")
            found.setdefault(key, []).extend(compare([row]))
    yield "## Held out: published times that nothing was fitted to\n"
    yield "`docs/data/holdouts.csv`, collected on 2026-11-30 from pull requests and pages of deepseek-ai/DeepGEMM,"
    yield "sgl-project/DeepGEMM, flashinfer-ai/flashinfer and mhoqueanik/moe_ep_benchmark. Last: the row that is"
    yield "furthest off, its model, tokens per rank, and us measured and planned. Rows that fitted a kernel's profile"
    yield "are left out.\n"
    everything = Errors.of(each for rows in found.values() for each in rows)
    shares = f"{everything.median_abs_pct_error:.1f} %, 95th percentile {everything.p95_abs_pct_error:.1f} %"
    yield f"All {everything.rows} rows: median {shares}, largest {everything.max_abs_pct_error:.1f} %."
    own = Errors.of(compare([each.row for rows in found.values() for each in rows], find_profile))
    shares = f"{own.median_abs_pct_error:.1f} %, {own.p95_abs_pct_error:.1f} % and {own.max_abs_pct_error:.1f} %"
    yield f"The same by the profiles of their devices alone: {shares}.\n"
    yield "| source | device, EP | what | profile | rows | median | largest | the largest | measured | planned |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for (source, hardware, ep, stack, profile), rows in found.items():
        errors, worst = Errors.of(rows), max(rows, key=lambda each: abs(each.error_pct))
        off = f"{worst.row.model}, {worst.row.tokens_per_rank} | {worst.row.latency_us:g} | {worst.planned_us:.1f}"
        shares = f"{errors.median_abs_pct_error:.1f} % | {worst.error_pct:+.1f} %"
        yield f"| {source} | {hardware}, EP{ep} | {stack} | {profile} | {errors.rows} | {shares} | {off} |"
    yield HELD_OUT
    yield "DeepEP V1's low-latency kernels on H800, 128 tokens, top-8, from its README; planned by the staged stack's"
    yield "constants, which are those of H100. The dispatch further up is planned as an exchange alone, of no stack.\n"
    yield "| | published | planned | error |"
    yield "|---|---|---|---|"
    for figure in deepep_low_latency():
        yield f"| {figure.what} | {figure.published:g} us | {figure.ours:.1f} us | {figure.error_pct:+.1f} % |"
    yield ""


def _efficiency() -> Iterator[str]:
    yield "## DeepSeek-V4 against V3.2 at 1,048,576 tokens of context\n"
    yield "| model | FLOPs per token, report | planned | KV cache, report | planned |"
    yield "|---|---|---|---|---|"
    for name, (flops, cache) in V4_EFFICIENCY.items():
        found = efficiency(load_model(name), load_model("deepseek-v3.2"))
        yield f"| {name} | {flops} % | {100 * found.flops_share:.1f} % | {cache} % | {100 * found.cache_share:.1f} % |"
    yield "\nAssumed, and not tuned:\n"
    yield from (f"- {each}" for each in ASSUMPTIONS)
    yield ""


def _serving() -> Iterator[str]:
    yield "## Serving: tokens per second and device\n"
    yield "Conditions as published; what their sources leave open is in the last column. Judged: not fitted to.\n"
    yield "| what | published | planned | error | | assumed of the conditions |"
    yield "|---|---|---|---|---|---|"
    for each in published():
        numbers = f"{each.published:.0f} | {each.ours:.0f} | {each.error_pct:+.1f} %"
        yield f"| {each.result.what} | {numbers} | {each.result.role} | {each.result.assumed or '-'} |"
    yield "\nNo host time between steps is taken for any, and balanced routing but on H20. V3 decode on EP72 was +52"
    yield "% while the links of a half were taken to hide behind all that the other half computes. In a decode they"
    yield "hide behind its attention alone: the engines of these runs cut attention in two, and an expert's rows of"
    yield "one half are sent while the other half's attention runs. V3 decode on EP144 has a third of the tokens"
    yield "and waits for no link."
    yield SERVING


def _attention() -> Iterator[str]:
    found = attention_kernels(DATA / "mla_decode_kernels.csv")
    yield "## Attention of DeepSeek-V3 in decode, kernel by kernel\n"
    yield "`docs/data/mla_decode_kernels.csv`: ai-dynamo/aiconfigurator 0.12 (Apache-2.0), one layer, 128 heads, 32"
    yield "sequences and more of 1024 to 65536 tokens. The core of SGLang 0.5.14 and TensorRT-LLM 1.3.0rc20, and the"
    yield "latter's attention from hidden state to hidden state with projections in FP8.\n"
    yield "| what | device | cache | number | median | 95th percentile | largest |"
    yield "|---|---|---|---|---|---|---|"
    for part, name in (("core", "core"), ("attention", "attention, **kept**")):
        for hardware, kv_format in sorted({(each.hardware, each.kv_format) for each in found}):
            rows = [each for each in found if (each.part, each.hardware, each.kv_format) == (part, hardware, kv_format)]
            errors = sorted(abs(each.error_pct) for each in rows)
            numbers = f"{median(errors):.1f} % | {quantile(errors, 0.95):.1f} % | {errors[-1]:.1f} %"
            yield f"| {name} | {hardware} | {kv_format} | {len(rows)} | {numbers} |"
    yield ATTENTION


def _guides() -> Iterator[str]:
    found = guides()
    yield "## The same decode runs in two editions of one guide\n"
    yield "DeepSeek-V4 on 16 Ascend 950DT, `cann-recipes-infer`: ms per token in the guide of April 2026, whose rows"
    yield "the table above has and 11 of which fitted five constants, and in that of 2026-08-07, whose Flash runs are"
    yield "faster. Nothing was fitted to August's: the planner stands where April's runs put it.\n"
    yield "| what | April | August | planned | error, April | error, August |"
    yield "|---|---|---|---|---|---|"
    for each in found:
        times = " | ".join(f"{ms:.2f} ms" for ms in (each.april_ms, each.august_ms, each.planned_ms))
        yield f"| {each.what} | {times} | {each.april_pct:+.1f} % | {each.august_pct:+.1f} % |"
    yield f"\nMedian error of tokens per second: {median_of(found, 'april_pct'):.1f} % of April's rows,"
    yield f"{median_of(found, 'august_pct'):.1f} % of August's.\n"


def _machine() -> Iterator[str]:
    fit, unseen = (read_runs(DATA / name) for name in ("lab_runs.json", "lab_unseen.json"))
    source = f"{len(fit)} runs of megamoe bench: lab_runs.json"
    machine = calibrate(fit, load_machine("cpu"), name="cpu", cores=2, source=source)
    fitted, held = check(fit, machine), check(unseen, machine)
    yield "## This package's own layer, in the lab\n"
    yield "`megamoe calibrate docs/data/lab_runs.json --check docs/data/lab_unseen.json`: two ranks of one thread on"
    yield "two cores of a Zen 4 CPU without BF16 instructions over gloo, 2026-11-29, runs made by"
    yield "`python -m benchmarks.lab_runs`. Median error"
    yield f"of the overlapped layer: {median_error(fitted):.1f} % over the {len(fitted)} runs of the fit,"
    yield f"**{median_error(held):.1f} %** over {len(held)} that it did not see. Before links took a share of a"
    yield "core that was 4.2 %, and two runs were met better then: the first and the fifteenth (1.4, 0.2 %).\n"
    yield "| not seen: tokens, H x I, experts, top-k, weights | link | waves | measured ms | planned ms | error |"
    yield "|---|---|---|---|---|---|"
    for each in held:
        run = each.run
        sizes = f"{run.tokens_per_rank}, {run.hidden} x {run.intermediate}, {run.num_experts}, {run.topk}"
        link = f"{run.link_gb_s * 8:g} Gbit/s" if run.link_gb_s else "loopback"
        numbers = f"{each.overlapped_ms:.1f} | {each.predicted.overlapped_ms:.1f} | {each.error_pct:+.1f} %"
        yield f"| {sizes}, {run.weight_format} | {link} | {run.waves} | {numbers} |"
    constants = ", ".join(f"{key} {figure.value:g}" for key, figure in figures(machine).items())
    yield f"\nThe constants, which ship as `megamoe/catalog/machines/cpu.yaml`: {constants}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=new_file, help="the Markdown file to write")
    asked = parser.parse_args(arguments)
    text = "\n".join(lines()) + "\n"
    if asked.write:
        asked.write.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    run(main)
