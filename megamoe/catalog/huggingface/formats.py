"""Reads from a config.json in which formats a checkpoint holds its experts and the rest."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from megamoe.catalog.huggingface.keys import Config, first, section, text_of
from megamoe.catalog.schema import WeightFormat

ALGORITHMS: dict[str, WeightFormat] = {"nvfp4": "nvfp4", "mxfp4": "mxfp4", "mxfp8": "fp8", "fp8": "fp8", "int8": "int8"}


class Formats(NamedTuple):
    """Formats of the routed experts and of everything else; `note` where the catalog has only one near the real one."""

    experts: WeightFormat
    rest: WeightFormat
    note: str = ""


def formats_of(text: Config) -> Formats:
    """From expert_dtype and quantization_config; BF16 without them. ValueError for a quantization not known here."""
    quantization = section(text, "quantization_config")
    method = (text_of(quantization, "quant_method") or "").lower()
    rest: WeightFormat = "fp8" if method == "fp8" else "bf16"
    algorithm = text_of(quantization, "moe_quant_algo")
    if algorithm:
        return Formats(_known(algorithm), rest)
    if first(text, "expert_dtype") == "fp4":
        return Formats("mxfp4", rest)
    layers, groups = section(quantization, "quantized_layers"), section(quantization, "config_groups")
    if layers:
        return _by_layer([(name, section(layers, name)) for name in layers])
    if groups:
        return _by_group([section(groups, name) for name in groups])
    if quantization.get("bits"):
        return _packed(quantization)
    said = method if method in ALGORITHMS else text_of(quantization, "quant_algo") or method
    if not said:
        return Formats("bf16", "bf16")
    experts = _known(said)
    return Formats(experts, "bf16" if experts in ("mxfp4", "nvfp4") else experts)


def _known(algorithm: str) -> WeightFormat:
    name = next((name for name in ALGORITHMS if name in algorithm.lower()), None)
    if name is None:
        raise ValueError(f"quantization {algorithm!r} is not known here; known are {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def _by_layer(layers: list[tuple[str, Config]]) -> Formats:
    """modelopt's mixed precision: what most routed experts have, and most of the rest."""
    votes: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, layer in layers:
        votes["experts" in name and "shared" not in name][str(layer.get("quant_algo"))] += 1
    experts, rest = ([_known(algo) for algo, _ in votes[of].most_common(1)] for of in (True, False))
    return Formats(experts[0] if experts else "bf16", rest[0] if rest else "bf16")


def _by_group(groups: list[Config]) -> Formats:
    """compressed-tensors: the group that names experts, or the only one; 4 bits leave the rest as it was."""
    named = [group for group in groups if "experts" in str(group.get("targets"))]
    chosen = (named or groups)[0]
    others = [group for group in groups if group is not chosen]
    formats = _packed(section(chosen, "weights"))
    return formats._replace(rest=_packed(section(others[0], "weights")).experts) if named and others else formats


def _packed(weights: Config) -> Formats:
    """Bits, type and group size, as compressed-tensors, modelopt, gptq and awq give them."""
    bits, kind = weights.get("num_bits", weights.get("bits")), weights.get("type", "int")
    group = weights.get("group_size")
    if bits == 8:
        return Formats("fp8", "fp8") if kind == "float" else Formats("int8", "int8")
    if bits != 4:
        raise ValueError(f"weights of {bits} bits and type {kind!r} are not known here; known are 4 and 8 bits")
    if kind == "float":
        return Formats("nvfp4" if group == 16 else "mxfp4", "bf16")
    return Formats("mxfp4", "bf16", f"{kind}4 in groups of {group}, counted as mxfp4, which is about as large")
