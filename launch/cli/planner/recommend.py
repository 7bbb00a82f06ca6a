"""megamoe recommend: how many devices a load needs, and how they are to be run."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.catalog.wording import plural
from megamoe.launch.cli.flags import takes
from megamoe.launch.cli.planner.plan_flags import FLAGS, keys_of
from megamoe.launch.output import Output, check_folder, emit, note, say, short, show
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.planner.question import Question
    from megamoe.planner.search.recommend import Load, Pool, Recommendation

_FLAGS = (
    *("model", "hardware", "profile", "settings", "config", "ep", "attention_tp", "mtp", "microbatches"),
    *("weight_format", "kv_format", "dispatch_format", "combine_format", "tpot_ms", "ttft_ms"),
)


@takes({name: FLAGS[name] for name in _FLAGS})
def recommend(
    given: dict[str, Any],
    requests_per_s: Annotated[float, typer.Option(help="Requests that come in a second.")],
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")],
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")],
    cached_tokens: Annotated[int, typer.Option(help="Tokens of a prompt that are in the cache already.")] = 0,
    write: Annotated[
        Path | None, typer.Option(help="Write the decode plan here, and the prefill plan beside it, for plan --config.")
    ] = None,
    output: Output = Format.table,
) -> None:
    """Say how many devices a load needs: one pool that prefills, one that decodes, each at 80 % of what it can do."""
    with exit_codes():
        if write is not None:
            for path in (write, _beside(write)):
                check_folder(path)
            if write.exists() and not write.is_file():
                raise ValueError(f"--write makes two files, and {write} is none: give the name of one")
        from megamoe.planner.search.fleet import fleet
        from megamoe.planner.search.recommend import Load

        if not isfinite(requests_per_s):
            raise ValueError(f"requests_per_s is {requests_per_s:g}; it must be a number")
        load = Load(requests_per_s, input_tokens, output_tokens, cached_tokens)
        keys = keys_of(given)
        found, plans = fleet(keys, load)
        if write is not None:  # before anything is printed: whoever reads that may close the pipe
            _write(found, plans, write)
        emit(output, _as_dict(found), lambda: _print(found))


def _as_dict(found: Recommendation) -> dict[str, Any]:
    pools = {"prefill": _pool(found.prefill), "decode": _pool(found.decode)}
    return {
        "model": found.decode.serving.deployment.model.name,
        "hardware": found.decode.serving.deployment.hardware.name,
        "devices": found.devices,
        "ttft_ms": found.ttft_ms,
        "tpot_ms": found.decode.serving.tpot_ms,
        "usd_per_hour": found.usd_per_hour,
        **pools,
    }


def _pool(pool: Pool) -> dict[str, Any]:
    d = pool.serving.deployment
    keys = ("ep", "attention_tp", "context", "cached", "mtp", "microbatches", "kv_format")
    return {
        "devices": pool.devices,
        "replicas": pool.replicas,
        "batch": d.batch_per_device,
        **{key: getattr(d, key) for key in keys},
        "memory_gb": pool.serving.memory.total_gb,
        "tokens_per_s_per_device": pool.serving.tokens_per_s_per_device,
        "load_tokens_per_s": pool.load_tokens_per_s,
        "utilization": pool.utilization,
    }


def _print(found: Recommendation) -> None:
    d, load = found.decode.serving.deployment, found.load
    price = f", {short(found.usd_per_hour)} $ an hour" if found.usd_per_hour else ""
    say(f"{plural(found.devices, 'device')}  {d.model.name} on {d.hardware.name}: {_in_words(load)}{price}")
    columns = {"pool": "", **dict.fromkeys(("devices", "EP", "TP", "batch", "MTP", "context"), ",")}
    columns |= {**dict.fromkeys(("tok/s/dev", "load", "used %"), ",.0f"), "GB": ",.1f"}
    rows = []
    for name, pool in (("prefill", found.prefill), ("decode", found.decode)):
        d = pool.serving.deployment
        sizes = (pool.devices, d.ep, d.attention_tp, d.batch_per_device, d.mtp, d.context)
        rates = (pool.serving.tokens_per_s_per_device, pool.load_tokens_per_s, 100 * pool.utilization)
        rows.append((name, *sizes, *rates, pool.serving.memory.total_gb))
    show(columns, rows, "\ntokens/s of a device and of the load; batch of a device")
    say(f"first token after {short(found.ttft_ms)} ms, then one every {short(found.decode.serving.tpot_ms)} ms")


def _beside(path: Path) -> Path:
    return path.with_stem(f"{path.stem}-prefill")


def _in_words(load: Load) -> str:
    """20 requests/s of 4000 tokens in (3000 of them cached) and 800 out"""
    cached = f" ({load.cached_tokens} of them cached)" if load.cached_tokens else ""
    tokens = plural(load.input_tokens, "token")
    return f"{load.requests_per_s:g} requests/s of {tokens} in{cached} and {load.output_tokens} out"


def _write(found: Recommendation, plans: dict[str, Question], path: Path) -> None:
    from megamoe.launch.cli.planner.plan_file import write_plan

    asked = _in_words(found.load)
    for phase, where in (("decode", path), ("prefill", _beside(path))):
        command = quote(where.name)
        write_plan(
            plans[phase],
            where,
            [f"megamoe recommend: {asked}; {phase} pool", f"megamoe plan --config {command}"],
        )
        note(f"wrote {where}")
