"""Figures that cannot be, on any device, expert, format and stack: beyond a peak, falling with tokens, not finite."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megamoe.catalog import find_profile, load_hardware, names
from megamoe.planner.layer.device import Device, compute_format
from megamoe.planner.layer.expert import Expert
from megamoe.planner.layer.stacks import STACKS, Stack, stack_time
from megamoe.schedule.formats import WIRE_FORMATS

EXPERTS = st.builds(
    Expert,
    hidden=st.sampled_from([2048, 4096, 7168]),
    intermediate=st.sampled_from([512, 768, 2048, 8192, 12288]),
    num_experts=st.sampled_from([8, 64, 256, 512]),
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
    ep=st.sampled_from([2, 8, 64, 256]),
    tokens=st.sampled_from([8, 100, 4096, 65536]),
    routing=st.sampled_from(["balanced", "power_law_1.2"]),
)
@settings(deadline=None, max_examples=150)
def test_no_layer_is_faster_than_its_device_or_falls_with_tokens_or_width(
    name: str, expert: Expert, stack: Stack, ep: int, tokens: int, routing: str
) -> None:
    hardware = load_hardware(name)
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
    assert 0 <= time.hidden <= 1
    assert time.exposed_us >= 0
    assert time.layer_us <= wider.layer_us * (1 + 1e-9)
    if routing == "balanced":
        assert time.layer_us <= more.layer_us * (1 + 1e-9)
