"""Words for users: counted things, sizes, the nearest names to a wrong one, and pydantic's complaints in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError


def nearest(wrong: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """'the nearest are a, b, c', an alias standing for its name; the whole list where nothing is near."""
    meant = {name: (aliases or {}).get(name, name) for name in known}
    close = difflib.get_close_matches(wrong, list(meant), n=6, cutoff=0.45)
    close = list(dict.fromkeys(meant[name] for name in close))[:3]
    if not close:
        return f"there is {', '.join(sorted(set(meant.values())))}"
    return f"the nearest {'is' if len(close) == 1 else 'are'} {', '.join(close)}"


def plural(number: int, one: str, several: str = "") -> str:
    """1, "rank" -> "1 rank"    2, "rank" -> "2 ranks"    2, "batch", "batches" -> "2 batches" """
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def size(num_bytes: int) -> str:
    """12_345_678 -> '12.3 MB'    9_876_543_210 -> '9.88 GB'    98_765_432_100 -> '98.8 GB'; a MB is 1e6 bytes"""
    if num_bytes < 1e9:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e9:.{2 if num_bytes < 1e10 else 1}f} GB"


def plain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first complaint in one line, with the nearest key for one that is not known, and how many more there are."""
    # a misspelt key is also a missing one; what was written comes first
    complaints = sorted(error.errors(include_url=False), key=lambda complaint: complaint["type"] != "extra_forbidden")
    first, more = complaints[0], len(complaints) - 1
    where, message = ".".join(str(part) for part in first["loc"]), first["msg"]
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{where}'; {nearest(str(first['loc'][-1]), keys_at(schema, first['loc'][:-1]))}"
    elif first["type"] == "missing":
        text = f"'{where}' is missing"
    elif first["type"] == "value_error":
        text = f"{where}: {first['ctx']['error']}" if where else str(first["ctx"]["error"])
    else:
        given = repr(first["input"])
        given = given if len(given) <= 40 else f"{given[:37]}..."
        text = f"{where} is {given}; {message[0].lower()}{message[1:]}"
    return f"{text} (and {more} more)" if more else text


def keys_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that exist at a place of the schema: of the entry itself, of a figure or of an attention."""
    for part in location:
        field = schema.model_fields.get(str(part))
        inner = [kind for kind in alternatives(field.annotation) if isinstance(kind, type)] if field else []
        schema = next((kind for kind in inner if issubclass(kind, BaseModel)), schema)
    return list(schema.model_fields)


def alternatives(annotation: Any) -> list[Any]:
    """Figure | None -> [Figure, NoneType];  tuple[Attention, ...] -> [Attention, ...]"""
    if get_origin(annotation) in (Union, UnionType, tuple):
        return list(get_args(annotation))
    return [annotation]
