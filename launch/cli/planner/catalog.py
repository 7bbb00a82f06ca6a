"""megamoe catalog: what the planner knows of devices, models, profiles and machines, each figure with its source."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megamoe.launch.cli.planner.plan import Output, print_json
from megamoe.launch.terminal import Format, exit_codes

if TYPE_CHECKING:
    from megamoe.catalog import Hardware, Machine, Model, Profile

app = typer.Typer(no_args_is_help=True, help="The devices, models, profiles and machines that the planner knows.")
_SKIPPED = ("name", "title", "aliases", "attention", "notes", "source", "tag", "fitted", "note", "profile", "announced")


class Kind(str, Enum):
    """What there is."""

    hardware = "hardware"
    models = "models"
    profiles = "profiles"
    machines = "machines"


@app.command("list")
def list_entries(
    kind: Annotated[Kind | None, typer.Argument(help="Only these; all by default.")] = None,
    output: Output = Format.table,
) -> None:
    """List names, with the figures that matter most."""
    with exit_codes():
        from megamoe.catalog import names

        kinds = [each for each in Kind if kind in (None, each)]
        if output is Format.json:
            print_json({each.value: [_summary(each, name) for name in names(each.value)] for each in kinds})
            return
        for each in kinds:
            _print_kind(each, names(each.value))


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


def _print_kind(kind: Kind, known: list[str]) -> None:
    from megamoe.launch.cli.planner.plan_view import show

    rows = [_summary(kind, name) for name in known]
    headings: tuple[str, ...]
    cells: list[tuple[str, ...]]
    if kind is Kind.hardware:
        headings = ("hardware", "bf16", "fp8", "fp4", "GB", "TB/s", "GB/s", "x", "NIC", "")
        keys: list[str] = [
            "bf16_tflops",
            "fp8_tflops",
            "fp4_tflops",
            "memory_gb",
            "memory_tb_s",
            "scaleup_gb_s",
            "scaleup_domain",
        ]
        keys.append("nic_gb_s")
        cells = [(r["name"], *(_plain(r[key]) for key in keys), "announced" * r["announced"]) for r in rows]
        show("\nhardware: dense TFLOP/s; links in GB/s one way, to x devices in a domain", headings, cells, (0, 9))
    elif kind is Kind.models:
        headings = ("model", "h", "d", "layers", "MoE", "experts", "top", "weights", "B all", "active")
        keys = ["hidden", "intermediate", "layers", "moe_layers", "num_experts", "topk", "weight_format"]
        parameters = ("total_params_b", "active_params_b")
        cells = [(r["name"], *(str(r[key]) for key in keys), *(_plain(r[key]) for key in parameters)) for r in rows]
        show("\nmodels: h hidden, d width of an expert, MoE layers, B billion parameters", headings, cells, (0, 7))
    else:
        cells = [(r["name"], r["fitted"]) for r in rows]
        what = "what is reached of the peaks" if kind is Kind.profiles else "constants of this package's own layer"
        show(f"\n{kind.value}: {what}", (kind.value[:-1], "fitted to"), cells, (0, 1), folds=True)


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:,g}"


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name, or a file: a .yaml, a config.json or the folder it is in.")],
    kind: Annotated[Kind | None, typer.Option(help="Where a name is of several kinds.")] = None,
    output: Output = Format.table,
) -> None:
    """Print an entry: each figure with its unit, whether it counts one direction or both, its tag and its source."""
    with exit_codes():
        where, entry = _found(name, kind)
        if output is Format.json:
            print_json({"kind": where.value, **entry.model_dump(mode="json", exclude_none=True)})
        else:
            _print_entry(entry)


def _found(name: str, kind: Kind | None) -> tuple[Kind, Any]:
    """The entry of that name. ValueError with the nearest of all kinds, or with what is wrong in the file."""
    from megamoe.catalog import names

    if kind is None:
        kind = next((each for each in Kind if name.lower() in names(each.value)), None)
    if kind is None and Path(name).exists():
        kind = _kind_of_file(Path(name))
    if kind is not None:
        return kind, _load(kind, name)
    for each in Kind:
        with suppress(ValueError):  # an alias, or nothing
            return each, _load(each, name)
    every = [known for each in Kind for known in names(each.value)]
    near = get_close_matches(name.lower(), every, cutoff=0.5)
    advice = f"the nearest are {', '.join(near)}" if near else "megamoe catalog list shows all names"
    raise ValueError(f"the catalog has no '{name}'; {advice}")


def _kind_of_file(path: Path) -> Kind:
    """By the keys that only one kind has."""
    if path.is_dir() or path.suffix == ".json":
        return Kind.models
    text = path.read_text(encoding="utf-8", errors="replace")
    if "memory_gb:" in text or "_tflops:" in text:
        return Kind.hardware
    if "_efficiency:" in text:
        return Kind.profiles
    return Kind.machines if "fitted:" in text else Kind.models


def _print_entry(entry: Any) -> None:
    from megamoe.catalog import figures
    from megamoe.launch.cli.planner.plan_view import say, show

    say(f"{entry.name}: {entry.title}")
    for key in ("aliases", "profile", "fitted", "source", "note"):
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
        show("", ("size", "value", "note"), plain, (0, 2), folds=True)
    for attention in getattr(entry, "attention", ()):
        sizes = attention.model_dump(exclude_none=True, exclude_defaults=True)
        say(f"attention: {', '.join(f'{key} {value}' for key, value in sizes.items())}")
    rows = [
        (key, f"{f.value:,g}", _unit(key, f.way), f.tag, f"{f.source}; {f.note}" if f.note else f.source)
        for key, f in known.items()
    ]
    if rows:
        show("", ("figure", "value", "unit", "tag", "source"), rows, (0, 2, 3, 4), folds=True)


def _unit(key: str, way: str | None) -> str:
    """ "scaleup_gb_s", "both" -> "GB/s both ways" """
    from megamoe.planner.page import unit_of

    return unit_of(key) + {None: "", "one-way": " one way", "both": " both ways"}[way]
