"""Typed reading of the keys of a config.json. Every key that is read is marked, so that unread ones can be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

MOST = 2**40  # of any size; more is a slip of the pen, and too much for floating point further on


class Config(dict[str, Any]):
    """The keys of a config.json or of a section of it, and the names of those that were read.

    `mtp_layers`: so many entries may stand behind those of the layers in a list that has one for each.
    """

    def __init__(self, keys: Mapping[str, Any], mtp_layers: int = 0) -> None:
        super().__init__(keys)
        self.read: set[str] = set()
        self.mtp_layers = mtp_layers


def given(config: Config, *names: str) -> str | None:
    """The first name that is there and is not null, which is then read; None where none is."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is not None:
        config.read.add(name)
    return name


def first(config: Config, *names: str) -> Any:
    """The value of the first name that is there and is not null; None where none is."""
    name = given(config, *names)
    return None if name is None else config[name]


def count(config: Config, *names: str) -> int:
    """The first name's value as a whole number above 0; of a list, one number per layer, the number of all layers.

    ValueError names the key and what it holds, or what is missing.
    """
    found = optional_count(config, *names)
    if found is None:
        raise ValueError(f"{' or '.join(names)} is missing")
    return found


def optional_count(config: Config, *names: str) -> int | None:
    """As count; None where no name is there."""
    name = given(config, *names)
    if name is None:
        return None
    value = config[name]
    return _common(config, name, value) if isinstance(value, list) else _whole(name, value, 1)


def whole(config: Config, *names: str) -> int | None:
    """The first name's value as a whole number of 0 or more; None where no name is there."""
    name = given(config, *names)
    return None if name is None else _whole(name, config[name], 0)


def number(config: Config, *names: str) -> float | None:
    """The first name's value as a number; None where no name is there."""
    name = given(config, *names)
    if name is None:
        return None
    value = config[name]
    if type(value) not in (int, float) or not -MOST <= value <= MOST:
        raise ValueError(f"{name} is {_short(value)}; it must be a number of at most {MOST}")
    return float(value)


def switch(config: Config, name: str) -> bool | None:
    """A key that is true or false; None where it is absent or null."""
    value = first(config, name)
    if value not in (None, True, False):
        raise ValueError(f"{name} is {_short(value)}; it must be true or false")
    return None if value is None else bool(value)


def flag(config: Config, name: str) -> bool:
    """A switch; off where it is absent or null."""
    return switch(config, name) or False


def text_of(config: Config, *names: str) -> str | None:
    """The first name's value as text; None where no name is there."""
    name = given(config, *names)
    if name is not None and not isinstance(config[name], str):
        raise ValueError(f"{name} is {_short(config[name])}; it must be text")
    return None if name is None else str(config[name])


def section(config: Config, name: str) -> Config:
    """The keys below a key, marked apart as they are read; empty where it is absent or null."""
    value = first(config, name)
    if value is None:
        return Config({})
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {_short(value)}; it must be an object of keys")
    if not isinstance(value, Config):
        config[name] = value = Config(value, config.mtp_layers)
    return value


def per_layer(config: Config, name: str, layers: int) -> list[Any]:
    """A list with a word or number for each layer, MTP layers behind left out; ValueError for other lengths."""
    entries = first(config, name)
    if not isinstance(entries, list) or len(entries) not in (layers, layers + config.mtp_layers):
        has = f"{len(entries)} entries" if isinstance(entries, list) else _short(entries)
        raise ValueError(f"{name} has {has} for {layers} layers")
    if wrong := [entry for entry in entries if not isinstance(entry, str | int)]:
        raise ValueError(f"{name} has {_short(wrong[0])} for a layer; it must be a word or a whole number")
    return entries[:layers]


def marks(config: Config, name: str, layers: int) -> list[bool]:
    """A list that holds 0 or 1, or false or true, for each layer."""
    entries = per_layer(config, name, layers)
    if wrong := [entry for entry in entries if entry not in (0, 1)]:
        raise ValueError(f"{name} has {_short(wrong[0])} for a layer; it must be 0 or 1")
    return [bool(entry) for entry in entries]


def numbers(config: Config, name: str, layers: int, *, start: int = 0) -> set[int]:
    """Layers by number, counted from `start` in the file and from 0 here: [2, 5], or "2,5"."""
    value = first(config, name)
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list):
        raise ValueError(f"{name} is {_short(value)}; it must be a list of layers")
    found: list[Any] = [int(item) if isinstance(item, str) and item.strip().isdecimal() else item for item in items]
    if wrong := [item for item in found if type(item) is not int or not start <= item < layers + start]:
        raise ValueError(f"{name} has {_short(wrong[0])}; the layers are {start} to {layers + start - 1}")
    return {int(item) - start for item in found}


def periodic(config: Config, period_key: str, offset_key: str, layers: int) -> list[bool]:
    """The layers whose number leaves `offset` when divided by `period`.    period 2, offset 1: layers 1, 3, 5 ..."""
    period, offset = count(config, period_key), whole(config, offset_key)
    if offset is None:
        raise ValueError(f"{period_key} is given without {offset_key}")
    if offset >= period:
        raise ValueError(f"{offset_key} {offset} is not below {period_key} {period}")
    return [layer % period == offset for layer in range(layers)]


def agreed(statements: Mapping[str, list[T]], what: str) -> list[T] | None:
    """What all statements say of each layer; None without a statement. ValueError names two that contradict."""
    if not statements:
        return None
    (key, said), *others = statements.items()
    for other, differently in others:
        for layer, (one, two) in enumerate(zip(said, differently, strict=True)):
            if one != two:
                raise ValueError(f"{key} and {other} contradict each other on {what}, first in layer {layer}")
    return said


def _whole(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(
            f"{name} is {_short(value)}; it must be a whole number {'above 0' if least else 'of 0 or more'}"
        )
    if value > MOST:
        raise ValueError(f"{name} is {_short(value)}; it can be {MOST} at most")
    return value


def _common(config: Config, name: str, entries: list[Any]) -> int:
    """The number that a list gives for all layers alike."""
    if any(type(entry) is not int or entry < 1 for entry in entries) or len(entries) != config.get("num_hidden_layers"):
        layers = config.get("num_hidden_layers")
        each = f", or one of them for each of {layers} layers" if type(layers) is int else ""
        raise ValueError(f"{name} is {_short(entries)}; it must be a whole number above 0{each}")
    if len(set(entries)) > 1:
        few = ", ".join(str(entry) for entry in sorted(set(entries))[:4])
        raise ValueError(f"{name} differs from layer to layer ({few}); only one number for all layers is planned")
    return _whole(name, entries[0], 1)


def _short(value: Any) -> str:
    if type(value) is int and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
