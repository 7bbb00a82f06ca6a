"""The planner's catalog: devices, models and profiles, every figure with its source.

YAML file or config.json -> load_* -> override -> Hardware, Model, Profile (frozen)
"""

from megamoe.catalog.load import (
    find_profile,
    load_hardware,
    load_machine,
    load_model,
    load_profile,
    names,
)
from megamoe.catalog.machine import Machine
from megamoe.catalog.overrides import override, split_overrides
from megamoe.catalog.parameters import Parameters, parameters
from megamoe.catalog.schema import Attention, Figure, Hardware, Model, Profile, figures

__all__ = [
    "Attention",
    "Figure",
    "Hardware",
    "Machine",
    "Model",
    "Parameters",
    "Profile",
    "figures",
    "find_profile",
    "load_hardware",
    "load_machine",
    "load_model",
    "load_profile",
    "names",
    "override",
    "parameters",
    "split_overrides",
]
