"""Figures that cannot be, on any device, expert, format and stack: beyond a peak, falling with tokens, not finite."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megamoe.catalog import Figure, find_profile, load_hardware, names
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.stacks import STACKS, Stack, stack_time
from megamoe.schedule.formats import WIRE_FORMATS

EXPERTS = st.builds(
    Expert,
    hidden=st.sampled_from([2048, 4096, 7168]),
    intermediate=st.sampled_from([512, 768, 2048, 3072, 8192, 16384]),
    num_experts=st.sampled_from([8, 64, 256, 896]),
    topk=st.sampled_from([1, 2, 8]),
    gated=st.booleans(),
    weight_format=st.sampled_from(["bf16", "fp8", "int8", "mxfp4", "nvfp4"]),
    dispatch_format=st.sampled_from(WIRE_FORMATS),
    combine_format=st.sampled_from(WIRE_FORMATS),
)


@given(
    name=st.sampled_from(sorted(names("hardware"))),
    expert=EXPERTS,
    stack=st.sampled_from(STACKS),
    ep=st.sampled_from([1, 2, 8, 64, 256]),
    tokens=st.sampled_from([1, 8, 100, 4096, 32768]),
    routing=st.sampled_from(["balanced", "power_law_1.2"]),
    busy=st.sampled_from([None, 0.5, 3.0]),
)
@settings(deadline=None, max_examples=150)
def test_no_layer_is_faster_than_its_device_or_falls_with_tokens_or_width(
    name: str, expert: Expert, stack: Stack, ep: int, tokens: int, routing: str, busy: float | None
) -> None:
    hardware = load_hardware(name)
    if busy is not None:
        rate = Figure(value=busy, tag="assumed", source="a user's")
        hardware = hardware.model_copy(update={"busy_rate": rate})
    assume(ep <= expert.num_experts and (ep <= hardware.scaleup_domain.value or hardware.nic_gb_s is not None))
    products = "bf16" if stack == "megamoe" and "bf16" in hardware.formats else None
    profile = find_profile(hardware)
    device = Device.of(
        hardware, profile, products or compute_format(hardware, expert.weight_format, expert.dispatch_format)
    )
    time, more, wider = (
        stack_time(stack, each, device, profile, ep=ep, tokens_per_rank=number, routing=routing)
        for each, number in (
            (expert, tokens),
            (expert, 2 * tokens),
            (replace(expert, intermediate=2 * expert.intermediate), tokens),
        )
    )
    assert math.isfinite(time.layer_us)
    assert time.rows * expert.flops <= device.tflops * 1e6 * time.layer_us
    assert time.experts_touched * expert.weight_bytes <= device.memory_bytes_s * 1e-6 * time.layer_us
    own = tokens * expert.topk
    # under a skewed routing the rank that is last may be one of few rows on many experts: its link carries less
    if stack == "fused" and ep <= hardware.scaleup_domain.value and time.rows >= own * (1 - 1e-9):
        sent = own * (ep - 1) / ep * (expert.dispatch_bytes + expert.combine_bytes)
        assert sent <= device.scaleup_gb_s * 1e3 * time.communication_us * (1 + 1e-9)
    assert 0 <= time.hidden <= 1
    assert time.exposed_us >= 0
    assert time.layer_us <= wider.layer_us * (1 + 1e-9)
    if routing == "balanced":
        assert time.layer_us <= more.layer_us * (1 + 1e-9)


FASTER = ("memory_tb_s", "scaleup_gb_s", "nic_gb_s", "busy_rate", "sms", "sm_ghz", "host_us", "ll_us")


@given(
    name=st.sampled_from(sorted(names("hardware"))),
    expert=EXPERTS,
    stack=st.sampled_from(STACKS),
    ep=st.sampled_from([1, 2, 8, 64, 256]),
    tokens=st.sampled_from([1, 8, 100, 4096, 32768]),
    key=st.sampled_from(FASTER),
    times=st.sampled_from([1.05, 1.5, 3.0]),
)
@settings(deadline=None, max_examples=150)
def test_more_of_a_devices_figure_never_takes_longer(
    name: str, expert: Expert, stack: Stack, ep: int, tokens: int, key: str, times: float
) -> None:
    """More SMs have more of the peak with them; of a host's and a journey's time less is more."""
    hardware = load_hardware(name)
    assume(ep <= expert.num_experts and (ep <= hardware.scaleup_domain.value or hardware.nic_gb_s is not None))
    figure = getattr(hardware, key) or Figure(value=1.0, tag="assumed", source="a user's")
    value = figure.value / times if key in ("host_us", "ll_us") else figure.value * times
    more = {key: figure.model_copy(update={"value": float(math.ceil(value)) if key == "sms" else value})}
    less = {key: figure}
    if key == "sms":
        for peak in (f"{fmt}_tflops" for fmt in hardware.formats):
            was = getattr(hardware, peak)
            more[peak] = was.model_copy(update={"value": was.value * more["sms"].value / figure.value})
    took = []
    for figures in (less, more):
        changed = hardware.model_copy(update=figures)
        profile = find_profile(changed)
        products = "bf16" if stack == "megamoe" and "bf16" in hardware.formats else None
        fmt = products or compute_format(changed, expert.weight_format, expert.dispatch_format)
        device = Device.of(changed, profile, fmt)
        took.append(stack_time(stack, expert, device, profile, ep=ep, tokens_per_rank=tokens).layer_us)
    assert took[1] <= took[0] * (1 + 1e-9)
