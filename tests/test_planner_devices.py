"""What the layer model says of devices that nobody measured: those of the catalog and made-up ones around them.

A device has 1/8 to 4 times the peak, memory, SMs and links of one in the catalog; experts are 256 to 8192 wide.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.catalog import Profile, find_profile, load_hardware, names
from megamoe.planner.layer.device import Device
from megamoe.planner.layer.device import compute_format as format_of
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.stacks import STACKS, Stack, stack_time
from megamoe.planner.layer.staged import LOW_LATENCY_TOKENS
from megamoe.planner.layer.tiles import GROUPED_BLOCKS, products_us, tiling_of

NARROW, WIDE = 256, 8192
SHAPES = {
    "narrow, many experts": Expert(4096, NARROW, 512, 10, weight_format="fp8"),
    "narrow, bf16": Expert(2048, NARROW, 128, 8, weight_format="bf16"),
    "middling": Expert(7168, 2048, 256, 8, weight_format="fp8"),
    "middling, 4 bits": Expert(7168, 3072, 384, 6, weight_format="mxfp4"),
    "wide, few experts": Expert(6144, WIDE, 16, 2, weight_format="fp8"),
}
TOKENS = (1, 2, 3, 5, 8, 12, 16, 24, 32, 50, 64, 96, 128, 200, 256, 400, 512, 768, 1024, 1500, 2048, 4096, 8192, 16384)
NEARLY = 1 + 1e-9


@cache
def _catalog(name: str, bits: str) -> tuple[Device, Profile]:
    hardware = load_hardware(name)
    profile = find_profile(hardware)
    return Device.of(hardware, profile, format_of(hardware, bits, "mxfp8")), profile


def _took(device: Device, profile: Profile, expert: Expert, tokens: float, ep: int, stack: Stack) -> float:
    """Microseconds; of a device whose domains nothing joins, within one of them."""
    ep = ep if device.nic_gb_s else min(ep, device.scaleup_domain)
    return stack_time(stack, expert, device, profile, ep=ep, tokens_per_rank=tokens).layer_us


def _made_up(name: str, expert: Expert, factors: tuple[float, ...]) -> tuple[Device, Profile]:
    device, profile = _catalog(name, expert.weight_format)
    peak, memory, sms, link, nic = factors
    return replace(
        device,
        tflops=device.tflops * peak,
        memory_bytes_s=device.memory_bytes_s * memory,
        sms=device.sms * sms,
        scaleup_gb_s=device.scaleup_gb_s * link,
        nic_gb_s=device.nic_gb_s and device.nic_gb_s * nic,
    ), profile


FACTORS = st.tuples(*[st.sampled_from([0.125, 0.5, 1.0, 2.0, 4.0])] * 5)
NAMES = sorted(names("hardware"))
CASES = {
    "name": st.sampled_from(NAMES),
    "factors": FACTORS,
    "shape": st.sampled_from(sorted(SHAPES)),
    "ep": st.sampled_from([1, 2, 8, 16]),
    "stack": st.sampled_from(STACKS),
}


@given(**CASES, tokens=st.sampled_from(TOKENS), times=st.floats(1.01, 4))
@settings(deadline=None, max_examples=150)
def test_more_of_any_resource_is_never_slower(
    name: str, factors: tuple[float, ...], shape: str, ep: int, stack: Stack, tokens: int, times: float
) -> None:
    """SMs with what each of them computes; of the same peak, more SMs are each slower."""
    expert = SHAPES[shape]
    device, profile = _made_up(name, expert, factors)
    took = _took(device, profile, expert, tokens, ep, stack)
    for figures in (("tflops",), ("memory_bytes_s",), ("scaleup_gb_s",), ("nic_gb_s",), ("tflops", "sms")):
        if all(getattr(device, figure) for figure in figures):
            better = replace(device, **{figure: getattr(device, figure) * times for figure in figures})
            assert _took(better, profile, expert, tokens, ep, stack) <= took * NEARLY, figures


def _tiles(expert: Expert, device: Device, rows: float, stack: Stack) -> float:
    """What the tiles of an expert's rows take, of many experts; of grouped products, how many tiles."""
    if stack == "staged":
        return math.ceil(rows / min(GROUPED_BLOCKS))
    return products_us(expert, device, [rows], [1 << 20], tiling_of(device, rows))[0]


@given(**CASES)
@settings(deadline=None, max_examples=40)
def test_time_grows_with_tokens_and_never_faster_than_they_do_but_for_a_tile(
    name: str, factors: tuple[float, ...], shape: str, ep: int, stack: Stack
) -> None:
    """Between neighbours time grows by their ratio at most, or by that of the tiles that an expert's rows take.

    The staged stack changes its kernels above LOW_LATENCY_TOKENS, where DeepEP's low-latency buffers end.
    """
    expert = SHAPES[shape]
    device, profile = _made_up(name, expert, factors)
    took = {tokens: _took(device, profile, expert, tokens, ep, stack) for tokens in TOKENS}
    for fewer, more in pairwise(TOKENS):
        assert took[fewer] <= took[more] * NEARLY
        if stack == "staged" and fewer <= LOW_LATENCY_TOKENS < more:
            continue
        ranks = ep if device.nic_gb_s else min(ep, device.scaleup_domain)
        rows = [max(1.0, tokens * ranks * expert.topk / expert.num_experts) for tokens in (fewer, more)]
        small, large = (_tiles(expert, device, each, stack) for each in rows)
        waves = 2 if stack == "staged" else 1
        assert took[more] <= took[fewer] * max(more / fewer, waves * large / small) * NEARLY


@given(**CASES, tokens=st.sampled_from(TOKENS))
@settings(deadline=None, max_examples=150)
def test_no_layer_is_shorter_than_its_roofline(
    name: str, factors: tuple[float, ...], shape: str, ep: int, stack: Stack, tokens: int
) -> None:
    """Products at the peak, every touched weight read once, and in the fused kernel every row sent over each tier."""
    expert = SHAPES[shape]
    device, profile = _made_up(name, expert, factors)
    ep = ep if device.nic_gb_s else min(ep, device.scaleup_domain)
    took, rows = _took(device, profile, expert, tokens, ep, stack), tokens * expert.topk
    own, _ = _catalog(name, "bf16" if stack == "megamoe" else expert.weight_format)
    assert rows * expert.flops / (device.tflops * 1e6) <= took, own.name
    touched = min(expert.num_experts // ep, rows)
    assert touched * expert.weight_bytes / device.memory_bytes_s * 1e6 <= took
    if stack == "fused":
        there_and_back = rows * (expert.dispatch_bytes + expert.combine_bytes)
        assert all(tier.f_remote * there_and_back / (tier.gb_s * 1e3) <= took for tier in device.tiers(ep))


@given(**CASES, tokens=st.sampled_from(TOKENS))
@settings(deadline=None, max_examples=60)
def test_time_grows_with_the_width_of_experts(
    name: str, factors: tuple[float, ...], shape: str, ep: int, stack: Stack, tokens: int
) -> None:
    expert = SHAPES[shape]
    device, profile = _made_up(name, expert, factors)
    widths = [NARROW << power for power in range(6)]
    took = [_took(device, profile, replace(expert, intermediate=each), tokens, ep, stack) for each in widths]
    assert widths[-1] == WIDE
    assert all(one <= wider * NEARLY and wider <= 2 * one * NEARLY for one, wider in pairwise(took))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", ["b200", "gb300", "h20", "h200"])
def test_chance_smooths_what_tiles_round(name: str, stack: Stack) -> None:
    """Where tokens choose by chance, no jump between neighbours, 7 % apart, is larger than a fifth on top of that."""
    expert, (device, profile) = SHAPES["middling"], _catalog(name, "fp8")
    tokens = [round(16 * 1.07**step) for step in range(60)]

    def took(each: int) -> float:
        return stack_time(stack, expert, device, profile, ep=8, tokens_per_rank=each, routing="uniform").layer_us

    if stack == "staged":
        tokens = [each for each in tokens if each <= LOW_LATENCY_TOKENS]
    for fewer, more in pairwise(tokens):
        assert 0.97 * took(fewer) <= took(more) <= 1.2 * took(fewer) * more / fewer, (fewer, more)
