"""Keeps FP4 and FP8 experts packed while stock transformers loads a checkpoint, or has others quantised to FP4."""

# E experts   H hidden   I intermediate

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from megamoe.catalog.wording import plural
from megamoe.execution.checks import check_formats
from megamoe.model.handover import run_alone
from megamoe.model.packed import PackedExperts, packing_of
from megamoe.model.registration import refuse_old
from megamoe.model.structure import read_structure
from megamoe.paths import AnyPath, path_of

refuse_old()

from transformers import AutoConfig  # noqa: E402
from transformers.core_model_loading import WeightConverter  # noqa: E402
from transformers.quantizers.auto import register_quantization_config, register_quantizer  # noqa: E402
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "megamoe"


def packed_config(path: AnyPath, **options: Any) -> Any:
    """The configuration of a checkpoint with packed experts: `from_pretrained(path, config=..., ...)` keeps them so.

    FP4, DeepSeek-V4's own and MXFP4 as gpt-oss has it, stays FP4 on the layer; without this transformers makes BF16 of
    it where there is no GPU for it, 3.8 times the memory. FP8 with a scale for each block of values, as DeepSeek-V3 and
    Qwen3 have it, stays FP8 until a layer's first call, and is BF16 on the layer. Dense FP8 weights become BF16.
    options are those of AutoConfig.from_pretrained(). ValueError where the experts are in another format.
    """
    place = str(path_of(path))  # a name of the Hub stays one
    config = AutoConfig.from_pretrained(place, **options)
    own = getattr(config, "quantization_config", None)
    if own is None:
        raise ValueError(
            f"{place} has no quantization_config, so its experts are not packed: "
            "quantization_config=PackedExpertsConfig() quantises them at the first call"
        )
    config.quantization_config = PackedExpertsConfig(own).to_dict()
    return config


@register_quantization_config(METHOD)
class PackedExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Experts are packed: FP4 on the layer, or FP8 up to a layer's first call.

    checkpoint   the checkpoint's own quantization_config, a dict, whose packed experts are kept as they are; None for
                 experts that are not quantised, which are rounded to MXFP4 at a layer's first call

    `from_pretrained(path, quantization_config=PackedExpertsConfig())` is the second, packed_config() makes the first.

    ValueError for a checkpoint whose experts are neither FP4 nor FP8 in blocks.
    """

    def __init__(self, checkpoint: dict[str, Any] | None = None, **others: Any) -> None:
        self.quant_method = METHOD
        self.checkpoint = checkpoint
        unknown = sorted(others.keys() - {"quant_method"})
        if unknown:
            raise ValueError(f"PackedExpertsConfig takes checkpoint, got {', '.join(unknown)}")
        if checkpoint is not None:
            packing_of(checkpoint)


@register_quantizer(METHOD)
class PackedExpertsQuantizer(FineGrainedFP8HfQuantizer):  # type: ignore[misc]
    """Puts PackedExperts in the place of a model's experts before weights are read, and dequantises dense FP8."""

    quantized_element_size = None

    def __init__(self, quantization_config: PackedExpertsConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        checkpoint = quantization_config.checkpoint
        self.method = None if checkpoint is None else checkpoint["quant_method"]
        self.packing = None if checkpoint is None else packing_of(checkpoint)
        if self.method == "mxfp4" and self.packing is not None:
            suffixes = (self.packing.values, self.packing.scales)
            names = ("gate_up_proj", "up_proj", "down_proj")
            self.serialized_names = {name: [name + suffix for suffix in suffixes] for name in names}

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Any device will do."""

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:  # noqa: ARG002
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, **options: Any) -> None:  # noqa: ARG002
        """ValueError for experts that do not fit the layer, and for a model without any."""
        found = [(name, module) for name, module in model.named_modules() if _is_experts(name, module)]
        if not found:
            raise ValueError(f"{type(model).__name__} has no experts")
        for name, module in found:
            experts = module
            if self.packing is None:
                check_formats(read_structure(module).shape(topk=1), "mxfp4", "mxfp8", "bf16")
                module.weight_format = "mxfp4"
            else:
                bias = getattr(module, "down_proj_bias", None)
                dtype = torch.bfloat16 if bias is None else bias.dtype
                experts = PackedExperts(read_structure(module), self.packing, dtype)
                model.set_submodule(name, experts)
            experts.forward = partial(run_alone, experts)

    def _process_model_after_weight_loading(self, model: nn.Module, **options: Any) -> nn.Module:  # noqa: ARG002
        """ValueError where the checkpoint lacks weights of packed experts, which nothing else could be made of."""
        missing = [
            f"{name}.{each}"
            for name, module in model.named_modules()
            if isinstance(module, PackedExperts)
            for each, parameter in module.named_parameters()
            if not getattr(parameter, "_is_hf_initialized", False)
        ]
        if missing:
            raise ValueError(
                f"the checkpoint has no {', '.join(missing[:3])}: {plural(len(missing), 'tensor')} missing; MXFP4 that "
                "megamoe convert or upcycle wrote is read by megamoe.model.load()"
            )
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        if self.method != "fp8":
            return weight_conversions
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return conversions

    def get_weight_conversions(self) -> list[Any]:
        """Dense FP8 weights become BF16, whatever converter of the model they pass."""
        if self.method != "fp8":
            return []
        operation = self.get_load_operations()["dequantize"]
        return [WeightConverter(names, name, [operation(self)]) for name, names in self.serialized_names.items()]

    def is_serializable(self) -> bool:
        """Where experts keep the weights that the checkpoint had, until a call in eval mode takes them."""
        return self.packing is None

    @property
    def is_trainable(self) -> bool:
        """Where experts keep their master weights, and each step's are rounded to FP4."""
        return self.packing is None

    @property
    def is_qat_trainable(self) -> bool:
        return self.is_trainable

    @property
    def is_compileable(self) -> bool:
        return False


def _is_experts(name: str, module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return name.rpartition(".")[2] == "experts" and isinstance(down, torch.Tensor) and down.ndim == 3
