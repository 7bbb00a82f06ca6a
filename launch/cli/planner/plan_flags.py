"""The flags that the planner's commands share: each is a key of a plan file, and --config reads such a file.

@asks
def verb(given: dict[str, Any], ...) -> None     takes --model, --hardware, ... beside its own flags
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.launch.cli.flags import Flag, flag, takes

if TYPE_CHECKING:
    from megamoe.planner.question import Question

_LAYER, _WORKLOAD, _TARGETS = "The layer", "A workload", "Targets"
_TRAINING = "Training"


def _flag(kind: Any, help_text: str, panel: str, *names: str) -> Flag:
    return flag(kind, help_text, None, *names, rich_help_panel=panel, show_default=False)


FLAGS: dict[str, Flag] = {
    "model": _flag(str | None, "A name of the catalog, a .yaml file, or a config.json or the folder it is in.", _LAYER),
    "hardware": _flag(str | None, "A name of the catalog or a .yaml file.", _LAYER),
    "ep": _flag(int | None, "Ranks that share the experts; the best by default.", _LAYER),
    "tokens_per_rank": _flag(int | None, "Tokens that each rank brings; 4096, or those of the workload.", _LAYER),
    "routing": _flag(
        str | None, "balanced (default), uniform, zipf_S, power_law_A or power_law_sampled_A, such as zipf_1.1.", _LAYER
    ),
    "redundant": _flag(int | None, "Copies of experts beside the model's; none by default.", _LAYER),
    "waves": _flag(int | None, "Waves of the layer; the best number by default.", _LAYER),
    "weight_format": _flag(
        str | None, "Of the experts: mxfp4, nvfp4, fp8, int8, bf16; the model's by default.", _LAYER
    ),
    "dispatch_format": _flag(str | None, "Of rows on their way: mxfp8 (default), fp8, bf16, nvfp4, ...", _LAYER),
    "combine_format": _flag(
        str | None, "Of rows on their way home: bf16 (default), mxfp8, fp8, nvfp4, mxfp4, int8.", _LAYER
    ),
    "stack": _flag(
        str | None,
        "Of the layer: fused (default), staged (DeepEP, grouped products), megamoe (this package).",
        _LAYER,
    ),
    "two_batch": _flag(bool | None, "The staged stack in two halves, the links of one behind the other.", _LAYER),
    "node_limited": _flag(
        bool | None,
        "A token goes once over the NIC to each other scale-up domain; of the fused and the megamoe stack.",
        _LAYER,
    ),
    "links": _flag(
        list[str] | None, "Rates of every rank, of which the slowest counts: scaleup=450x6,225x2 or nic=50,25.", _LAYER
    ),
    "profile": _flag(str | None, "What is reached of the peaks: a name or a file; the hardware's by default.", _LAYER),
    "settings": _flag(
        list[str] | None, "Override a figure, such as hardware.scaleup_gb_s=450 or model.topk=8.", _LAYER, "--set"
    ),
    "config": _flag(
        Path | None, "A file with these keys, as `megamoe recommend --write` makes it; flags win over it.", _LAYER
    ),
    "phase": _flag(
        str | None, "decode (default) or prefill; train: a layer's forward and backward, and no workload.", _WORKLOAD
    ),
    "batch": _flag(int | None, "Sequences of one device (prefill: prompts of a step); the best by default.", _WORKLOAD),
    "context": _flag(int | None, "Tokens of a sequence in the cache; 4096 by default.", _WORKLOAD),
    "cached": _flag(int | None, "Prefill: tokens of a prompt that are in the cache already.", _WORKLOAD),
    "devices": _flag(int | None, "How many there are; one EP group, or what --target-tps needs.", _WORKLOAD),
    "attention_tp": _flag(int | None, "Devices that share the heads; 1 is data-parallel attention.", _WORKLOAD),
    "mtp": _flag(int | None, "Tokens drafted in a step; none by default.", _WORKLOAD),
    "accept": _flag(float | None, "How many of them are accepted on average; 0.7 each by default.", _WORKLOAD),
    "microbatches": _flag(int | None, "2: halves that hide each other's links; 1 by default.", _WORKLOAD),
    "head_split": _flag(
        int | None, "Devices that share embedding and output head; attention_tp by default.", _WORKLOAD
    ),
    "chunk": _flag(int | None, "Prefill: most tokens that a device takes through a layer at once; 16384.", _WORKLOAD),
    "dense_format": _flag(str | None, "Of all other weights; the model's by default.", _WORKLOAD),
    "kv_format": _flag(str | None, "Of the cache: fp8 (default), bf16, int8.", _WORKLOAD),
    "index_format": _flag(str | None, "Of index keys; the model's by default.", _WORKLOAD),
    "target_tps": _flag(float | None, "Tokens per second of all devices together.", _TARGETS),
    "tpot_ms": _flag(float | None, "Most milliseconds per output token.", _TARGETS),
    "ttft_ms": _flag(float | None, "Most milliseconds to the first token (prefill).", _TARGETS),
    "saved": _flag(
        str | None,
        "What a forward keeps for its backward: tokens (default), activations, or dispatch-again for neither.",
        _TRAINING,
    ),
    "gradient_format": _flag(str | None, "Of gradients on their way, both ways: bf16 (default), mxfp8.", _TRAINING),
}


asks = takes(FLAGS)


def keys_of(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of --config with those that were given over them. ValueError names file and line."""
    flags = {name: value for name, value in given.items() if name != "config" and value not in (None, [])}
    flags["set"] = tuple(flags.pop("settings", ()))
    if given.get("config") is None:
        return flags
    from megamoe.launch.cli.planner.plan_file import read_plan

    keys = read_plan(given["config"])
    return {**keys, **flags, "set": (*keys.get("set", ()), *flags["set"])}


def question_of(given: dict[str, Any]) -> Question:
    """ValueError of one line for what makes no sense."""
    from megamoe.planner.question import ask

    return ask(keys_of(given))
