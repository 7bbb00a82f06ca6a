"""Every architecture of transformers that has experts: a plan with the right layers, or a refusal by name."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.models
from transformers import PreTrainedConfig

from megamoe.catalog import Model, find_profile, load_hardware, parameters
from megamoe.catalog.huggingface import model_from_config
from megamoe.planner.layer.plan import PlanRequest, plan
from megamoe.planner.serving.deployment import Deployment
from megamoe.planner.serving.serving import serve

PLANNED: dict[str, tuple[int, float, int]] = {
    # config class: layers with experts, 10^9 routed parameters (counted in transformers' models), layers with a cache
    "AfmoeConfig": (31, 17.16, 32),
    "AriaTextConfig": (32, 12.88, 32),
    "AXK1Config": (60, 507.34, 61),
    "BailingHybridConfig": (40, 120.80, 7),
    "BeamConfig": (49, 493.25, 52),
    "Cohere2MoeConfig": (40, 177.17, 40),
    "DeepseekV3Config": (58, 653.91, 61),
    "DeepseekV4Config": (43, 277.03, 43),
    "Ernie4_5_MoeConfig": (27, 20.38, 28),
    "ExaoneMoeConfig": (31, 24.96, 32),
    "FlexOlmoConfig": (32, 30.30, 32),
    "FlintConfig": (47, 37.85, 49),
    "Glm4MoeConfig": (45, 99.66, 46),
    "Glm4MoeLiteConfig": (46, 27.78, 47),
    "GlmMoeDsaConfig": (75, 724.78, 78),
    "GptOssConfig": (36, 114.66, 36),
    "GraniteMoeConfig": (32, 34.63, 32),
    "GraniteMoeHybridConfig": (32, 34.63, 0),
    "HYV3Config": (79, 286.29, 80),
    "HYV4Config": (33, 54.81, 34),
    "JambaConfig": (16, 45.10, 4),
    "KimiLinearConfig": (26, 47.11, 6),
    "Kolibri1Config": (50, 75.50, 50),
    "LagunaConfig": (39, 31.41, 40),
    "Llama4TextConfig": (48, 96.64, 48),
    "MiMoV2FlashConfig": (47, 302.80, 48),
    "MiniMaxConfig": (32, 45.10, 16),
    "MiniMaxM2Config": (62, 224.68, 62),
    "MiniMaxM3VLTextConfig": (60, 434.87, 60),
    "MixtralConfig": (32, 45.10, 32),
    "MuseSparkTextConfig": (62, 798.86, 62),
    "NemotronHConfig": (1, 0.50, 1),
    "OlmoeConfig": (16, 12.88, 16),
    "PhimoeConfig": (32, 40.27, 32),
    "Qwen2MoeConfig": (24, 12.46, 24),
    "Qwen3_5MoeTextConfig": (40, 32.21, 10),
    "Qwen3MoeConfig": (24, 14.50, 24),
    "Qwen3NextConfig": (48, 77.31, 12),
    "SolarOpenConfig": (48, 96.64, 48),
    "Step3p7TextConfig": (42, 190.25, 45),
}
REFUSED = {
    # config class: what the refusal names
    "DeepseekV2Config": "num_experts_per_tok",
    "DogeConfig": "is_moe",
    "Dots1Config": "n_routed_experts",
    "Dots3NoteTextConfig": "kv_lora_rank",
    "Ernie4_5_VLMoeTextConfig": "moe_intermediate_size",
    "Gemma4TextConfig": "enable_moe_block",
    "Glm5NextTextConfig": "qk_rope_head_dim",
    "HunYuanMoEV1Config": "num_experts",
    "InklingTextConfig": "layer_types",
    "JetMoeConfig": "model_type 'jetmoe'",
    "Lfm2MoeConfig": "conv_L_cache",
    "LongcatFlashConfig": "model_type 'longcat_flash'",
    "MistralLarge4TextConfig": "q_lora_rank",
    "Qwen4ExpTextConfig": "indexed_attention",
    "ZayaConfig": "layer_types",
}
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "base_model_ep_plan")


def architectures() -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Name, whether it is run expert-parallel, and default keys of each config class that may have experts."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = package.name
        file = Path(transformers.models.__path__[0]) / name / f"configuration_{name}.py"
        if not file.is_file() or not any(word in file.read_text(encoding="utf-8") for word in EXPERTS):
            continue
        module = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
        for config in vars(module).values():
            own = (
                inspect.isclass(config)
                and issubclass(config, PreTrainedConfig)
                and config.__module__ == module.__name__
            )
            if own and "__init__" not in vars(config).get("__deprecated__", ()):
                parallel = bool(getattr(config, "base_model_ep_plan", None))
                yield config.__name__, parallel, json.loads(json.dumps(config().to_dict(), default=str))


NAMED = re.compile(r"[a-z0-9]+_[a-z0-9_]+")  # a key or a model_type, which no plain word of a refusal looks like


def _plans_at_every_ep_size(model: Model) -> None:
    """A verdict, a layer and a device's memory on one rank, on the domain and beyond it."""
    hardware = load_hardware("h100")
    for ep in (1, 2, model.num_experts):
        request = PlanRequest(model, hardware, find_profile(hardware), ep, tokens_per_rank=64)
        planned = plan(request)
        assert planned.verdict in ("hidden", "exposed"), model.name
        assert 0 < planned.layer.layer_us < 1e7, model.name
    assert serve(Deployment(model, hardware, find_profile(hardware), 1, 1, 1, 128)).memory.total_gb > 0


def test_every_architecture_of_transformers_gives_a_plan_or_a_refusal_by_name() -> None:
    plans: dict[str, Model] = {}
    refusals: dict[str, str] = {}
    parallel = set()
    for name, is_parallel, config in architectures():
        parallel |= {name} if is_parallel else set()
        try:
            plans[name] = model_from_config(config, name=name, source="a test")
        except ValueError as error:
            refusals[name] = str(error)
    assert len(parallel) >= 65
    assert parallel <= set(plans) | set(refusals)
    for name in parallel & set(plans):
        _plans_at_every_ep_size(plans[name])
    for name in parallel & set(refusals):
        assert NAMED.search(refusals[name]), (name, refusals[name])
    assert not [error for error in refusals.values() if "validation error" in error]
    for name, (moe_layers, routed, cached) in PLANNED.items():
        model = plans[name]
        with_cache = sum(entry.layers for entry in model.attention if entry.kind != "linear")
        assert (name, model.moe_layers, with_cache) == (name, moe_layers, cached)
        assert parameters(model).routed / 1e9 == pytest.approx(routed, abs=0.006), name
    for name, said in REFUSED.items():
        assert said in refusals[name], name
