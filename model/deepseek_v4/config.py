"""What a DeepSeek-V4 config.json says that the expert layers need, checked by pydantic, and DeepSeek's tensor names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from megamoe.model.loading.files import config_file
from megamoe.shape import MoEShape

# of config.json, where experts are in FP4; what is dense and has a scale is in FP8
FP4_EXPERTS: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "expert_dtype": "fp4",
}
_NAMES = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
)


class DeepSeekV4Config(BaseModel):
    """The expert layers' part of a config.json; everything else in the file is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model_type: Literal["deepseek_v4"]
    hidden_size: PositiveInt
    moe_intermediate_size: PositiveInt
    n_routed_experts: PositiveInt
    n_shared_experts: Literal[0, 1]
    num_experts_per_tok: PositiveInt
    num_hidden_layers: PositiveInt
    num_hash_layers: int
    vocab_size: PositiveInt
    routed_scaling_factor: PositiveFloat
    swiglu_limit: PositiveFloat
    rms_norm_eps: PositiveFloat
    scoring_func: Literal["sqrtsoftplus"]
    topk_method: Literal["noaux_tc"]
    norm_topk_prob: Literal[True]
    expert_dtype: Literal["fp4"]

    @classmethod
    def read(cls, path: Path) -> DeepSeekV4Config:
        """Reads path/config.json. ValueError names the file and every key that is missing or has another value."""
        file = config_file(path)
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as wrong:
            for each in wrong.errors():
                if each["loc"] == ("model_type",) and each["type"] == "literal_error":  # the rest follows from it
                    raise ValueError(
                        f"{file} is of a model of type {each['input']!r}, and this runs those of deepseek_v4; "
                        "megamoe.model.load() and megamoe generate take the others"
                    ) from wrong
            found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in wrong.errors())
            raise ValueError(f"{file}: {found}") from wrong

    @property
    def shape(self) -> MoEShape:
        """Sizes of one expert layer."""
        return MoEShape(
            hidden=self.hidden_size,
            intermediate=self.moe_intermediate_size,
            num_experts=self.n_routed_experts,
            topk=self.num_experts_per_tok,
            swiglu_limit=self.swiglu_limit,
        )

    def is_hash_routed(self, layer: int) -> bool:
        """The first layers choose experts by token id."""
        return layer < self.num_hash_layers


def native_name(name: str) -> str:
    """DeepSeek's name of a tensor that transformers calls so.    model.embed_tokens.weight -> embed.weight"""
    for pattern, own in _NAMES:
        name = re.sub(pattern, own, name)
    return name
