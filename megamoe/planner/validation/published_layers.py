"""Published measurements of single layers, and what the planner says to them.

DeepGEMM pull request 316: its fused kernel alone (no staging), EP8 on a Blackwell that is not named (taken for GB200),
uniform routing, mean of 8 ranks. DeepEP V1: the low-latency dispatch and combine alone, H800 with one 50 GB/s NIC a
device, 128 tokens of 7168 values, top-8, FP8 there and BF16 back. ISCA 2025, "Insights into DeepSeek-V3", section
2.3.2: arithmetic, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.catalog import find_profile, load_hardware, load_model
from megamoe.planner.layer.cost import dispatch_us
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.rule import transfer_us
from megamoe.planner.layer.staged import low_latency
from megamoe.planner.validation.tables import Measured
from megamoe.planner.validation.validate import Compared, compare

PULL_REQUEST_316 = {
    "deepseek-v4-flash": {1: 56.5, 512: 146.5, 8192: 1283.1, 32768: 4855.5},
    "deepseek-v4-pro": {1: 108.1, 512: 369.6, 8192: 2818.5, 32768: 10655.2},
}
DEEPEP_DISPATCH = {8: 77.0, 16: 118.0, 32: 155.0, 64: 173.0, 128: 192.0, 256: 194.0}
DEEPEP_COMBINE = {8: 114.0, 16: 195.0, 32: 273.0, 64: 314.0, 128: 369.0, 256: 360.0}
ISCA_VALUES = 32 * 9 * 7000  # tokens x experts x hidden, "7K"
ISCA_LAYERS = 61
ISCA = {50.0: (120.96, 14.76), 900.0: (6.72, 0.82)}  # GB/s: us a layer, ms a token


@dataclass(frozen=True, slots=True)
class Figure:
    """A published figure and ours, in the same unit."""

    what: str
    published: float
    ours: float
    unit: str

    @property
    def error_pct(self) -> float:
        return 100 * (self.ours / self.published - 1)


def pull_request_316() -> list[Compared]:
    """The fused kernel's 8 rows."""
    return compare(pull_request_316_rows())


def pull_request_316_rows() -> list[Measured]:
    return [
        Measured("gb200", model, Expert.of(load_model(model)), 8, tokens, "uniform", latency, "kernel")
        for model, column in PULL_REQUEST_316.items()
        for tokens, latency in column.items()
    ]


def deepep_dispatch() -> list[Figure]:
    """DeepEP's dispatch column, EP8 to EP256."""
    hardware = load_hardware("h800")
    device = Device.of(hardware, find_profile(hardware))
    expert = Expert(7168, 2048, 256, 8, weight_format="fp8")
    return [
        Figure(f"EP{ep}", published, dispatch_us(expert, device, ep=ep, tokens_per_rank=128), "us")
        for ep, published in DEEPEP_DISPATCH.items()
    ]


def deepep_low_latency() -> list[Figure]:
    """Both columns by the staged stack's constants, of which none was fitted to H800."""
    hardware = load_hardware("h800")
    profile = find_profile(hardware)
    device, expert = Device.of(hardware, profile), Expert(7168, 2048, 256, 8, weight_format="fp8")
    planned = {ep: low_latency(expert, device, profile, ep=ep, tokens=128) for ep in DEEPEP_DISPATCH}
    dispatches = [
        Figure(f"dispatch, EP{ep}", published, planned[ep].dispatch_us, "us")
        for ep, published in DEEPEP_DISPATCH.items()
    ]
    combines = [
        Figure(f"combine, EP{ep}", published, planned[ep].combine_us, "us") for ep, published in DEEPEP_COMBINE.items()
    ]
    return dispatches + combines


def isca() -> list[Figure]:
    """Two links, each a layer and, of two micro-batches in turn over all layers, a token."""
    found = []
    for gb_s, (layer, token) in ISCA.items():
        ours = transfer_us(ISCA_VALUES, "fp8", "bf16", gb_s)
        found.append(Figure(f"{gb_s:g} GB/s, one layer", layer, ours, "us"))
        found.append(Figure(f"{gb_s:g} GB/s, one token", token, ours * 2 * ISCA_LAYERS / 1e3, "ms"))
    return found
