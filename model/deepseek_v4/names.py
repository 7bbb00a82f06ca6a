"""DeepSeek's own names of tensors, from those that transformers writes."""

from __future__ import annotations

import re

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
