"""Finds and reads the catalog's files and a user's own.

    load_hardware("gb200")   load_hardware("mine.yaml")   load_model("config.json")   load_profile("blackwell")

Everything a user can get wrong is a ValueError of one line: the file, the key, what was given, what there is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from megamoe.catalog.machine import Machine
from megamoe.catalog.schema import Hardware, Model, Profile
from megamoe.catalog.wording import nearest, plain
from megamoe.paths import AnyPath, path_of

if TYPE_CHECKING:
    from yaml import SafeLoader as _Loader
else:
    # libyaml's parser is ten times as fast, and not in every build
    _Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Kind = Literal["hardware", "models", "profiles", "machines"]
T = TypeVar("T", Hardware, Model, Profile, Machine)

_HERE = Path(__file__).parent
_PIPES: dict[tuple[Path, int, int], bytes] = {}
_SINGULAR = {"hardware": "hardware", "models": "model", "profiles": "profile", "machines": "machine"}


class _StrictLoader(_Loader):
    """YAML that refuses a key written twice, of which plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def names(kind: Kind) -> list[str]:
    """The names of the catalog's hardware, models or profiles, sorted."""
    return sorted(path.stem for path in (_HERE / kind).glob("*.yaml"))


def load_hardware(name_or_path: AnyPath) -> Hardware:
    """A device by the catalog's name or alias, or from a .yaml file. ValueError names the nearest."""
    path = _find("hardware", name_or_path)
    hardware = _read(Hardware, path)
    beside = path.parent / hardware.profile
    if hardware.profile.endswith((".yaml", ".yml")) and beside.is_file():
        return hardware.model_copy(update={"profile": str(beside)})
    return hardware


def load_model(name_or_path: AnyPath) -> Model:
    """A model by name or alias, or from a .yaml file, a Hugging Face config.json or a folder that has one.

    Like all that is loaded here, also from a pipe, such as bash's <(...).
    """
    path = _find("models", name_or_path)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ValueError(f"{path.parent} has no config.json")
    is_config = path.suffix == ".json" or (path.is_fifo() and read_text(path).lstrip().startswith("{"))
    return _read_config(path) if is_config else _read(Model, path)


def load_profile(name_or_path: AnyPath) -> Profile:
    """A profile by the catalog's name, or from a .yaml file; one that extends another has its figures too."""
    path = _find("profiles", name_or_path)
    data = _mapping(Profile, path)
    base = data.get("extends")
    if base is not None:
        if base not in names("profiles"):
            raise ValueError(f"{path}: extends '{base}', which is no profile; {nearest(str(base), names('profiles'))}")
        shipped = _mapping(Profile, _HERE / "profiles" / f"{base}.yaml")
        if "extends" in shipped:
            raise ValueError(f"{path}: extends {base}, which extends {shipped['extends']} itself; name that one")
        data = {**shipped, **data}
    return _validated(Profile, data, path)


def load_machine(name_or_path: AnyPath) -> Machine:
    """A machine by the catalog's name, or from a .yaml file, such as megamoe calibrate writes."""
    return _read(Machine, _find("machines", name_or_path))


def find_profile(hardware: Hardware, name_or_path: AnyPath | None = None) -> Profile:
    """The profile asked for, or else the one that the hardware names.

    ValueError where it is of a kernel that no device of this kind runs.
    """
    found = load_profile(hardware.profile if name_or_path is None else name_or_path)
    others = set(names("profiles")) - {found.name, found.extends} if found.one_kernel else set()
    if hardware.profile in others:
        raise ValueError(
            f"profile {found.name} is of a kernel for devices of profile {found.extends}; "
            f"{hardware.name} is one of {hardware.profile}"
        )
    return found


def _find(kind: Kind, name_or_path: AnyPath) -> Path:
    """The file behind a name, an alias or a path: the catalog first, so that a folder called gb200 hides nothing."""
    text = os.fsdecode(name_or_path)
    if not text.strip():
        raise ValueError(f"an empty name is no {_SINGULAR[kind]}'s; megamoe catalog list shows the names")
    if "://" in text:
        raise ValueError(f"{text} is an address, and nothing is downloaded: give a file")
    name = text.lower().replace("_", "-").replace(" ", "-")
    shipped = _HERE / kind / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        return shipped
    path = path_of(text)
    if path.is_file() or path.is_fifo() or (kind == "models" and path.is_dir()):
        return path
    aliases = _aliases(kind)
    if name in aliases:
        return _HERE / kind / f"{aliases[name]}.yaml"
    if path.suffix in (".yaml", ".yml", ".json") or text.startswith(("/", "./", "../", "~/")):
        raise ValueError(f"there is no file {text}")
    raise ValueError(f"no {_SINGULAR[kind]} is called '{text}'; {nearest(name, [*names(kind), *aliases], aliases)}")


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's text; of a pipe such as bash's <(...) what came through it first, since it comes once."""
    if not path.is_fifo():
        return path.read_text(encoding="utf-8-sig", errors=errors)
    there = path.stat()
    pipe = (path, there.st_dev, there.st_ino)
    if pipe not in _PIPES:
        _PIPES[pipe] = path.read_bytes()
    return _PIPES[pipe].decode("utf-8-sig", errors)


def _aliases(kind: Kind) -> dict[str, str]:
    """alias -> name, from the line of each file that starts with `aliases:` (the whole file would take too long)."""
    found: dict[str, str] = {}
    for path in sorted((_HERE / kind).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        line = next((line for line in lines if line.startswith("aliases:")), "aliases: []")
        found.update(dict.fromkeys(yaml.safe_load(line)["aliases"], path.stem))
    return found


def _read(schema: type[T], path: Path) -> T:
    return _validated(schema, _mapping(schema, path), path)


def _mapping(schema: type[T], path: Path) -> dict[str, Any]:
    """The keys of a YAML file."""
    try:
        data = yaml.load(read_text(path), Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no keys; a {schema.__name__.lower()} starts with name: and title:")
    return data


def _validated(schema: type[T], data: dict[str, Any], path: Path) -> T:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"{path}: {plain(error, schema)}") from None


def _read_config(path: Path) -> Model:
    """A Model from a config.json, and from the hf_quant_config.json that some checkpoints have beside it."""
    from megamoe.catalog.huggingface import model_from_config  # of no use to names of the catalog, which start sooner

    config, beside = _json(path), path.with_name("hf_quant_config.json")
    if isinstance(config, dict) and "quantization_config" not in config and beside.is_file():
        quantization = _json(beside)
        if not isinstance(quantization, dict):
            raise ValueError(f"{beside} holds an object of keys, not {type(quantization).__name__}")
        config["quantization_config"] = quantization.get("quantization", {})
    name = path.resolve().parent.name if path.name == "config.json" else "piped" if path.is_fifo() else path.stem
    try:
        return model_from_config(config, name=name.lower(), source=str(path))
    except ValidationError as error:
        raise ValueError(f"{path}: {plain(error, Model)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise ValueError(f"{path} is not JSON: {error}") from None
