"""Reading of keys that go by several names."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def first(config: Config, *names: str) -> Any:
    """The value of the first name that is there and is not null; None where none is."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def count(config: Config, *names: str) -> int:
    """The first name's value as a whole number above 0; of a list, one number per layer, the largest.

    ValueError names the key and what it holds, or what is missing.
    """
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        raise ValueError(f"{' or '.join(names)} is missing")
    value = config[name]
    numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int and n > 0]
    if not numbers or (isinstance(value, list) and len(numbers) != len(value)):
        raise ValueError(f"{name} is {value!r}; it must be a whole number above 0")
    return max(numbers)


def flag(config: Config, name: str) -> bool:
    """A switch; off where it is absent or null."""
    return bool(config.get(name))


def per_layer(config: Config, name: str, layers: int) -> list[Any]:
    """A list with an entry for each layer, without the entries of MTP layers behind; ValueError if it is shorter."""
    entries = config[name]
    if not isinstance(entries, list) or len(entries) < layers:
        has = f"{len(entries)} entries" if isinstance(entries, list) else f"{entries!r}"
        raise ValueError(f"{name} has {has} for {layers} layers")
    return entries[:layers]
