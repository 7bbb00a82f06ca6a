"""Lays --set overrides over what was loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ValidationError

from megamoe.catalog.schema import LINKS, Entry, Figure, Hardware, Model, Profile
from megamoe.catalog.wording import alternatives, nearest, plain

T = TypeVar("T", Hardware, Model, Profile)

BY_HAND = "set on the command line"
_THINGS: dict[str, type[Entry]] = {"hardware": Hardware, "model": Model, "profile": Profile}
_DESCRIPTIVE = (
    *("name", "title", "aliases", "note", "source", "tag", "fitted", "attention", "notes"),
    *("extends", "weight_formats", "dispatch_formats"),  # of a profile: what its figures are for
)


def override(thing: T, changes: Mapping[str, str | float]) -> T:
    """A copy with other values, each marked as set by hand. ValueError for unknown keys and nonsense.

    Link bandwidths are taken as one way; `none` takes a value away that need not be there.
    {"scaleup_gb_s": "450"} on gb200 -> gb200 whose scaleup_gb_s is 450, assumed, "set on the command line"
    """
    if not changes:
        return thing
    kind = type(thing).__name__.lower()
    hints = get_type_hints(type(thing))
    data = thing.model_dump()
    for key, text in changes.items():
        if key not in settable(type(thing)):
            raise ValueError(f"{kind} has no key '{key}' to set; {nearest(key, settable(type(thing)))}")
        data[key] = _converted(f"{kind}.{key}", key, hints[key], text)
        if "notes" in data:
            data["notes"] = {**data["notes"], key: BY_HAND}
    try:
        return type(thing).model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{kind} {thing.name}: {plain(error, type(thing))}") from None


def split_overrides(settings: Iterable[str]) -> dict[str, dict[str, str]]:
    """["hardware.nic_gb_s=100"] -> {"hardware": {"nic_gb_s": "100"}, "model": {}, "profile": {}}

    ValueError for a setting of another shape or an unknown key.
    """
    split: dict[str, dict[str, str]] = {thing: {} for thing in _THINGS}
    for setting in settings:
        left, equals, value = setting.partition("=")
        thing, dot, key = left.strip().partition(".")
        if not (equals and dot and key and value.strip()):
            raise ValueError(f"'{setting}' is not of the form hardware.KEY=VALUE, model.KEY=VALUE or profile.KEY=VALUE")
        if thing not in split:
            raise ValueError(f"'{setting}' sets '{thing}'; {nearest(thing, split)}")
        if key not in settable(_THINGS[thing]):
            raise ValueError(f"{thing} has no key '{key}' to set; {nearest(key, settable(_THINGS[thing]))}")
        split[thing][key] = value.strip()
    return split


def settable(schema: type[Entry]) -> list[str]:
    """Keys that one value can set: figures, numbers, switches and formats, and the name of a profile."""
    return [key for key in schema.model_fields if key not in _DESCRIPTIVE]


def _converted(where: str, key: str, hint: Any, given: str | float) -> Any:
    """A setting as its field wants it: a Figure for a figure, else the text for pydantic to read."""
    if str(given).lower() == "none" and type(None) in alternatives(hint):
        return None
    if Figure not in alternatives(hint):
        return given
    try:
        value = float(given)
    except ValueError:
        raise ValueError(f"{where} is '{given}', which is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{where} is {value:g}; it must be a number of 0 or more")
    way = "one-way" if key in LINKS else None
    return {"value": value, "tag": "assumed", "source": BY_HAND, "way": way}
