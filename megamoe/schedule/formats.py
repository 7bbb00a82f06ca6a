"""Bytes per value of the number formats that travel and that weights are kept in."""

from __future__ import annotations

from difflib import get_close_matches

# With their scales: OCP microscaling formats have one byte per 32 values, NVFP4 one per 16.
VALUE_BYTES = {
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "mxfp8": 1 + 1 / 32,
    "mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
WIRE_FORMATS = ("bf16", "fp8", "int8", "mxfp8", "mxfp4", "nvfp4")


def element_bytes(name: str) -> float:
    """Bytes per value without scales.    "mxfp8" -> 1.0    "nvfp4" -> 0.5"""
    return int(2 * value_bytes(name)) / 2


def value_bytes(name: str) -> float:
    """Bytes per value, scales included.    "bf16" -> 2.0    "mxfp8" -> 1.03125    ValueError names the nearest"""
    if name not in VALUE_BYTES:
        near = get_close_matches(name, VALUE_BYTES, n=3, cutoff=0.3) or list(VALUE_BYTES)
        raise ValueError(f"no format is called {name!r}; the nearest are {', '.join(near)}")
    return VALUE_BYTES[name]
