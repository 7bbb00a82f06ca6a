"""DeepSeek's own names of tensors, from those that transformers writes, and what its config.json says of FP4."""

from __future__ import annotations

import re
from typing import Any

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


def native_name(name: str) -> str:
    """model.embed_tokens.weight -> embed.weight"""
    for pattern, own in _NAMES:
        name = re.sub(pattern, own, name)
    return name
