"""What is asked of the planner: the keys of a plan file and of the command line, checked once, nothing computed.

{"model": "deepseek-v4-pro", "hardware": "gb200", "ep": 16} -> Question -> Subject (catalog entries, overridden)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megamoe.catalog import (
    Hardware,
    Model,
    Profile,
    find_profile,
    load_hardware,
    load_model,
    override,
    split_overrides,
)
from megamoe.catalog.wording import nearest
from megamoe.planner.links import with_links

# beyond these nothing is known to exist, and playing or drawing a layer would not end
LARGEST = {
    "ep": 65_536,
    "redundant": 65_536,
    "waves": 4096,
    "attention_tp": 65_536,
    "devices": 10**7,
    "tokens_per_rank": 10**8,
    "batch": 10**8,
    "context": 10**9,
    "mtp": 64,
}
SMALLEST = {key: 0 if key in ("redundant", "mtp") else 1 for key in LARGEST} | {
    "cached": 0,
    "head_split": 1,
    "chunk": 1,
}
WORKLOAD = (
    *("phase", "batch", "context", "devices", "mtp", "accept", "cached", "attention_tp", "microbatches"),
    *("head_split", "chunk"),
    *("target_tps", "tpot_ms", "ttft_ms"),
)
TRAINING = ("saved", "gradient_format")


class Question(BaseModel):
    """None is left to the planner: formats to the model, waves, EP size and batch to what is best.

    `settings` (in files: set) are overrides of the catalog, such as hardware.scaleup_gb_s=450. Without any key of
    WORKLOAD one layer is asked for, and no serving. batch is sequences (prefill: prompts) of one device. phase "train"
    asks for a step of a layer, forward and backward, of tokens_per_rank; saved and gradient_format are of it alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)

    model: str
    hardware: str
    profile: str | None = None
    settings: tuple[str, ...] = Field((), alias="set")
    ep: int | None = None
    tokens_per_rank: int | None = None
    routing: str = "balanced"
    redundant: int = 0
    waves: int | None = None
    weight_format: str | None = None
    dispatch_format: str = "mxfp8"
    combine_format: str = "bf16"
    stack: Literal["fused", "staged", "megamoe"] = "fused"
    two_batch: bool = False
    node_limited: bool = False
    links: tuple[str, ...] = ()
    phase: Literal["decode", "prefill", "train"] | None = None
    batch: int | None = None
    context: int | None = None
    cached: int | None = None
    devices: int | None = None
    attention_tp: int | None = None
    mtp: int | None = None
    accept: float | None = None
    microbatches: int | None = None
    head_split: int | None = None
    chunk: int | None = None
    dense_format: str | None = None
    kv_format: str = "fp8"
    index_format: str | None = None
    target_tps: float | None = None
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    saved: Literal["tokens", "activations", "dispatch-again"] | None = None
    gradient_format: Literal["bf16", "mxfp8"] | None = None

    @field_validator("links", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        """A list or one text.    "nic=50,25" -> ("nic=50,25",)"""
        return (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given

    @field_validator("settings", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        """A mapping or a list of texts, as one likes to write them.    {"model.topk": 8} -> ("model.topk=8",)"""
        if isinstance(given, dict):
            return tuple(f"{key}={value}" for key, value in given.items())
        return tuple(given) if isinstance(given, list) else given

    @property
    def has_workload(self) -> bool:
        return not self.trains and any(getattr(self, key) is not None for key in WORKLOAD)

    @property
    def trains(self) -> bool:
        return self.phase == "train"

    def but(self, **changes: Any) -> Question:
        """The same question with other values, checked again."""
        return ask({**self.model_dump(), **changes})


def ask(keys: dict[str, Any]) -> Question:
    """A question from the keys of a file or of the command line. ValueError of one line for what is wrong with them."""
    keys = {key: value for key, value in keys.items() if value != "" or key not in ("model", "hardware")}
    if keys.get("phase") == "train":
        keys = {"stack": "megamoe", **keys}  # what a training step is planned of
    try:
        question = Question.model_validate(keys)
    except ValidationError as error:
        raise ValueError(_plain(error)) from None
    for key, least in SMALLEST.items():
        value = getattr(question, key)
        if value is not None and value < least:
            raise ValueError(f"{key} is {value}; it must be {least} or more")
        if value is not None and value > LARGEST.get(key, value):
            raise ValueError(f"{key} is {value}; the planner goes up to {LARGEST[key]}")
    for key in ("target_tps", "tpot_ms", "ttft_ms"):
        value = getattr(question, key)
        if value is not None and value <= 0:
            raise ValueError(f"{key} is {value:g}; a target is above 0")
    return question


def check_load(key: str, load: float, of_device: float, group: int) -> None:
    """ValueError where a load of that key takes more devices than the planner goes up to.

    of_device: what a device of a group carries, which is asked for whole
    """
    most = LARGEST["devices"]
    carried = most // group * group * of_device
    if load > carried:
        raise ValueError(
            f"{key} {load:g} takes more devices than the planner goes up to: {most} of them carry {carried:.3g}"
        )


def check_phase(question: Question) -> None:
    """ValueError for keys of serving in training, and the other way round."""
    others = WORKLOAD if question.trains else TRAINING
    wrong = [key for key in others if key != "phase" and getattr(question, key) is not None]
    if wrong and question.trains:
        raise ValueError(f"{wrong[0]} is of serving; phase train plans one layer's step of tokens_per_rank")
    if wrong:
        raise ValueError(f"{wrong[0]} is of training: give --phase train")


def keys_of_questions() -> list[str]:
    """What a plan file may say."""
    return [field.alias or name for name, field in Question.model_fields.items()]


def _plain(error: ValidationError) -> str:
    """The first complaint in one line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {nearest(key, keys_of_questions())}"
    if first["type"] == "missing":
        other = "" if key == "hardware" else ", a config.json"
        return f"no {key} is given: a name of the catalog{other} or a .yaml file; megamoe catalog list shows the names"
    message = str(first["msg"])
    return f"{key} is {first['input']!r}; {message[0].lower()}{message[1:]}"


@dataclass(frozen=True, slots=True)
class Subject:
    """The catalog's entries that a question is about, with its overrides."""

    model: Model
    hardware: Hardware
    profile: Profile

    @classmethod
    def of(cls, question: Question) -> Subject:
        """ValueError names the nearest where there is no such model, hardware, profile or key."""
        changes = split_overrides(question.settings)
        hardware = override(load_hardware(question.hardware), changes["hardware"])
        hardware = with_links(hardware, question.links, question.ep)
        model = override(load_model(question.model), changes["model"])
        return cls(model, hardware, override(find_profile(hardware, question.profile), changes["profile"]))

    def but(self, setting: str) -> Subject:
        """With one more override, such as "hardware.nic_gb_s=100"."""
        changes = split_overrides([setting])
        return Subject(
            override(self.model, changes["model"]),
            override(self.hardware, changes["hardware"]),
            override(self.profile, changes["profile"]),
        )
