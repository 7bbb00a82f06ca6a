"""megamoe catalog: what the planner knows of devices, models, profiles and machines, each figure with its source."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.launch import output as out
from megamoe.launch.output import Output, emit, say
from megamoe.launch.terminal import Format, exit_codes
from megamoe.paths import path_of

if TYPE_CHECKING:
    from megamoe.catalog import Hardware, Machine, Model, Profile

app = typer.Typer(no_args_is_help=True, help="The devices, models, profiles and machines that the planner knows.")
_SKIPPED = (
    *("name", "title", "aliases", "attention", "notes", "source", "tag", "fitted", "note", "profile", "announced"),
    *("extends", "weight_formats", "dispatch_formats"),
)


class Kind(str, Enum):
    """What there is."""

    hardware = "hardware"
    models = "models"
    profiles = "profiles"
    machines = "machines"


# kind -> title, and heading -> key of a summary, how it is printed
_FITTED = ("fitted", "")
_TABLES = {
    "hardware": (
        "dense TFLOP/s; links in GB/s one way, to x devices in a domain",
        {
            "hardware": ("name", ""),
            "bf16": ("bf16_tflops", ",g"),
            "fp8": ("fp8_tflops", ",g"),
            "fp4": ("fp4_tflops", ",g"),
            "GB": ("memory_gb", ",g"),
            "TB/s": ("memory_tb_s", ",g"),
            "GB/s": ("scaleup_gb_s", ",g"),
            "x": ("scaleup_domain", ",g"),
            "NIC": ("nic_gb_s", ",g"),
            "": ("announced", ""),
        },
    ),
    "models": (
        "h hidden, d width of an expert, MoE layers, B billion parameters",
        {
            "model": ("name", ""),
            "h": ("hidden", ">"),
            "d": ("intermediate", ">"),
            "layers": ("layers", ">"),
            "MoE": ("moe_layers", ">"),
            "experts": ("num_experts", ">"),
            "top": ("topk", ">"),
            "weights": ("weight_format", ""),
            "B all": ("total_params_b", ",g"),
            "active": ("active_params_b", ",g"),
        },
    ),
    "profiles": ("what is reached of the peaks", {"profile": ("name", ""), "fitted to": _FITTED}),
    "machines": ("constants of this package's own layer", {"machine": ("name", ""), "fitted to": _FITTED}),
}


@app.command("list")
def list_entries(
    kind: Annotated[Kind | None, typer.Argument(help="Only these; all by default.")] = None,
    output: Output = Format.table,
) -> None:
    """List names, with the figures that matter most."""
    with exit_codes():
        from megamoe.catalog import names

        kinds = [each for each in Kind if kind in (None, each)]
        report = {each.value: [_summary(each, name) for name in names(each.value)] for each in kinds}
        emit(output, report, lambda: _print_kinds(report))


def _load(kind: Kind, name: str) -> Hardware | Model | Profile | Machine:
    from megamoe.catalog import load_hardware, load_machine, load_model, load_profile

    if kind is Kind.hardware:
        return load_hardware(name)
    if kind is Kind.models:
        return load_model(name)
    return load_profile(name) if kind is Kind.profiles else load_machine(name)


def _summary(kind: Kind, name: str) -> dict[str, Any]:
    entry: Any = _load(kind, name)
    keys: tuple[str, ...]
    plain: dict[str, Any] = {"name": entry.name, "title": entry.title}
    if kind is Kind.hardware:
        keys = ("bf16_tflops", "fp8_tflops", "fp4_tflops", "memory_gb", "memory_tb_s", "scaleup_domain")
        values = {key: getattr(entry, key) for key in keys}
        plain |= {key: figure and figure.value for key, figure in values.items()}
        plain |= {key: getattr(entry, key) and getattr(entry, key).one_way for key in ("scaleup_gb_s", "nic_gb_s")}
        return {**plain, "announced": entry.announced}
    if kind is Kind.models:
        keys = ("hidden", "intermediate", "layers", "moe_layers", "num_experts", "topk", "weight_format", "announced")
        totals = {
            key: getattr(entry, key) and getattr(entry, key).value for key in ("total_params_b", "active_params_b")
        }
        return {**plain, **{key: getattr(entry, key) for key in keys}, **totals}
    return {**plain, "fitted": entry.fitted}


def _print_kinds(report: dict[str, list[dict[str, Any]]]) -> None:
    for kind, rows in report.items():
        title, columns = _TABLES[kind]
        cells = [
            ["announced" * row[key] if key == "announced" else row[key] for key, _ in columns.values()] for row in rows
        ]
        out.show(
            {name: how for name, (_, how) in columns.items()}, cells, f"\n{kind}: {title}", folds="fitted to" in columns
        )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name, or a file: a .yaml, a config.json or the folder it is in.")],
    kind: Annotated[Kind | None, typer.Option(help="Where a name is of several kinds.")] = None,
    output: Output = Format.table,
) -> None:
    """Print an entry: each figure with its unit, whether it counts one direction or both, its tag and its source."""
    with exit_codes():
        where, entry = _found(name, kind)
        report = {"kind": where.value, **entry.model_dump(mode="json", exclude_none=True)}
        emit(output, report, lambda: _print_entry(entry))


def _found(name: str, kind: Kind | None) -> tuple[Kind, Any]:
    """The entry of that name. ValueError with the nearest of all kinds, or with what is wrong in the file."""
    from megamoe.catalog import names

    if kind is None:
        kind = next((each for each in Kind if name.lower() in names(each.value)), None)
    if kind is None and name and path_of(name).exists():
        kind = _kind_of_file(path_of(name))
    if kind is not None:
        return kind, _load(kind, name)
    for each in Kind:
        with suppress(ValueError):  # an alias, or nothing
            return each, _load(each, name)
    if not name.strip() or "://" in name:
        _load(Kind.models, name)
    every = [known for each in Kind for known in names(each.value)]
    near = get_close_matches(name.lower(), every, cutoff=0.5)
    verb = "is" if len(near) == 1 else "are"
    advice = f"the nearest {verb} {', '.join(near)}" if near else "megamoe catalog list shows all names"
    raise ValueError(f"the catalog has no '{name}'; {advice}")


def _kind_of_file(path: Path) -> Kind:
    """By the keys that only one kind has."""
    from megamoe.catalog.load import read_text

    if path.is_dir() or path.suffix == ".json":
        return Kind.models
    text = read_text(path, "replace")
    if text.lstrip().startswith("{"):
        return Kind.models
    if "memory_gb:" in text or "_tflops:" in text:
        return Kind.hardware
    if "product_gflops:" in text:
        return Kind.machines
    if "_efficiency:" in text or "extends:" in text:
        return Kind.profiles
    return Kind.machines if "fitted:" in text else Kind.models


def _print_entry(entry: Any) -> None:
    from megamoe.catalog import figures
    from megamoe.planner.page import unit_of

    say(f"{entry.name}: {entry.title}")
    for key in ("aliases", "profile", "extends", "weight_formats", "dispatch_formats", "fitted", "source", "note"):
        value = getattr(entry, key, None)
        if value:
            say(f"{key}: {', '.join(value) if isinstance(value, tuple) else value}")
    known = figures(entry)
    plain = [
        (key, str(value), getattr(entry, "notes", {}).get(key, ""))
        for key in type(entry).model_fields
        if key not in known and key not in _SKIPPED and (value := getattr(entry, key)) is not None
    ]
    if plain:
        out.show({"size": "", "value": ">", "note": ""}, plain, folds=True)
    for attention in getattr(entry, "attention", ()):
        sizes = attention.model_dump(exclude_none=True, exclude_defaults=True)
        say(f"attention: {', '.join(f'{key} {value}' for key, value in sizes.items())}")
    ways = {None: "", "one-way": " one way", "both": " both ways"}
    rows = [
        (key, f.value, unit_of(key) + ways[f.way], f.tag, f"{f.source}; {f.note}" if f.note else f.source)
        for key, f in known.items()
    ]
    if rows:
        out.show({"figure": "", "value": ",g", "unit": "", "tag": "", "source": ""}, rows, folds=True)
