"""A device as the planner calculates with it: peaks and links of the catalog, and the constants of its profile."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megamoe.catalog import Hardware, Profile
from megamoe.planner.layer.rule import Tier, tiers
from megamoe.schedule.formats import element_bytes, value_bytes

# dense TFLOP/s of one SM of GB200 (5000, 10000, 2500 of 152): the unit of a device whose SMs nobody counted
_SM_TFLOPS = {"fp8": 32.9, "int8": 32.9, "fp4": 65.8, "bf16": 16.4}
_OPERAND_BYTES = {"fp4": 0.5} | {name: element_bytes(name) for name in ("fp8", "int8", "bf16")}
_BLOCKS = (1, 2, 4, 6, 8, 12)  # rows of a tile, in steps of the smallest: DeepGEMM's 16, 32, 64, 96, 128, 192


@dataclass(frozen=True, slots=True)
class Device:
    """Peaks, one-way bandwidths per second, and the profile's constants, whose names it shares.

    tflops          dense peak of the format that products run in
    operand_bytes   of one value of that format, without its scale
    host_bridge     whether devices meet over PCIe, which then carries what goes to the NIC too
    sms             SMs or compute units; where nobody counted them, as many of GB200's as the peak is worth
    feed_ps, epilogue_ps, scale_ps    at this device's clock, where it and the profile's are known
    busy_rate       of the SMs in a step that goes on, against what their number and clock say; a fused kernel's
                    products and rows go by it (rows in fused_link_efficiency), within the peak and the link
    """

    name: str
    tflops: float
    operand_bytes: float
    sms: float
    memory_gb: float
    memory_bytes_s: float
    scaleup_gb_s: float
    scaleup_domain: int
    host_bridge: bool
    nic_gb_s: float | None
    feed_ps: float
    epilogue_ps: float
    scale_ps: float
    busy_rate: float
    sustained_rate: float
    pair_sms: int
    tile_rows: int
    block_rows: int
    small_rows: float
    last_rows: int
    swap_rows: float
    memory_efficiency: float
    link_efficiency: float
    fused_link_efficiency: float
    link_congestion: float
    link_incast: float
    nic_efficiency: float
    exchange_us: float
    memory_overlap: float
    overlap: float
    fixed_us: float
    expert_us: float
    barrier_us: float
    graph_us: float
    staging_us: float
    staging_bytes: float
    wave_us: float
    slot_us: float
    host_us: float
    ll_us: float
    ll_dispatch_efficiency: float
    ll_combine_efficiency: float

    @classmethod
    def of(cls, hardware: Hardware, profile: Profile, compute_format: str = "fp8") -> Device:
        """ValueError where the hardware has no peak for the format."""
        nic = hardware.nic_gb_s
        tflops = hardware.tflops(compute_format)
        busy_rate = hardware.busy_rate.value if hardware.busy_rate else 1.0
        slower = profile.sm_ghz.value / hardware.sm_ghz.value if profile.sm_ghz and hardware.sm_ghz else 1.0
        return cls(
            name=hardware.name,
            tflops=tflops,
            operand_bytes=_OPERAND_BYTES[compute_format],
            sms=hardware.sms.value if hardware.sms else tflops / _SM_TFLOPS[compute_format],
            memory_gb=hardware.memory_gb.value,
            memory_bytes_s=hardware.memory_tb_s.value * 1e12,
            scaleup_gb_s=hardware.scaleup_gb_s.one_way,
            scaleup_domain=int(hardware.scaleup_domain.value),
            host_bridge=hardware.joined_by == "pcie",
            nic_gb_s=nic.one_way if nic else None,
            feed_ps=profile.feed_ps.value * slower,
            epilogue_ps=profile.epilogue_ps.value * slower,
            scale_ps=profile.scale_ps.value * slower,
            busy_rate=busy_rate,
            sustained_rate=profile.sustained_rate.value,
            pair_sms=max(1, round(profile.pair_sms.value)),
            tile_rows=max(1, round(profile.tile_rows.value)),
            block_rows=max(1, round(profile.block_rows.value)),
            small_rows=profile.small_rows.value if profile.small_rows else max(1, round(profile.tile_rows.value)) / 2,
            last_rows=max(1, round(profile.last_rows.value)),
            swap_rows=profile.swap_rows.value,
            memory_efficiency=profile.memory_efficiency.value,
            link_efficiency=profile.link_efficiency.value,
            fused_link_efficiency=min(1.0, profile.fused_link_efficiency.value * busy_rate),
            link_congestion=profile.link_congestion.value,
            link_incast=profile.link_incast.value,
            nic_efficiency=profile.nic_efficiency.value,
            exchange_us=profile.exchange_us.value,
            memory_overlap=profile.memory_overlap.value,
            overlap=profile.overlap.value,
            fixed_us=profile.fixed_us.value,
            expert_us=profile.expert_us.value,
            barrier_us=profile.barrier_us.value,
            graph_us=profile.graph_us.value,
            staging_us=profile.staging_us.value,
            staging_bytes=profile.staging_bytes.value,
            wave_us=profile.wave_us.value,
            slot_us=profile.slot_us.value,
            ll_us=hardware.ll_us.value if hardware.ll_us else 0.0,
            host_us=(hardware.host_us or profile.host_us).value,
            ll_dispatch_efficiency=profile.ll_dispatch_efficiency.value,
            ll_combine_efficiency=profile.ll_combine_efficiency.value,
        )

    @property
    def blocks(self) -> list[int]:
        """Rows that a tile of an expert's rows may have.    16 up to 192 -> 16, 32, 64, 96, 128, 192"""
        sizes = [self.tile_rows * number for number in _BLOCKS]
        return [size for size in sizes if size <= self.block_rows] or [self.tile_rows]

    def tiers(self, ep: int, *, sent: float = 1.0, once: float | None = None) -> list[Tier]:
        """The tiers of links that so many ranks cross; see rule.tiers. ValueError where nothing is known of one."""
        known = self.scaleup_gb_s, self.scaleup_domain, self.nic_gb_s
        return tiers(ep, *known, host_bridge=self.host_bridge, sent=sent, once=once)

    def link_bytes_s(self, ep: int, *, fused: bool = False) -> float:
        """What an all-to-all of so many ranks gets out of the scale-up link: less the more ranks there are above 8.

        fused: where a fused kernel carries the rows.
        """
        reached = self.fused_link_efficiency if fused else self.link_efficiency
        return self.scaleup_gb_s * 1e9 * reached * self.congestion(ep)

    def congestion(self, ep: int) -> float:
        """What an exchange of so many ranks gets out of the scale-up link, of what 8 get."""
        return min(1.0, float((8 / ep) ** self.link_congestion))

    def under_load(self) -> Device:
        """Grouped products of a step that goes on: slower than launches timed one by one, where power limits."""
        rate = min(1.0, self.sustained_rate * self.busy_rate)
        return replace(
            self,
            tflops=self.tflops * rate,
            feed_ps=self.feed_ps / rate,
            epilogue_ps=self.epilogue_ps / rate,
            scale_ps=self.scale_ps / rate,
        )

    def busy_us(self, products: float, flops: float) -> float:
        """What products of so many FLOPs take at busy_rate, no less than the peak allows."""
        return max(products / self.busy_rate, flops / self.tflops * 1e-6)

    def incast(self, rows: float, own: float) -> float:
        """How much longer the scale-up link of a rank takes for a row, to which others send more than it sends itself.

        16 rows, 4 pairs of its own, link_incast 0.5 -> 2
        """
        return float((rows / own) ** self.link_incast) if rows > own > 0 else 1.0

    @property
    def nic_bytes_s(self) -> float:
        """What an all-to-all gets out of the NIC; 0 without one."""
        return (self.nic_gb_s or 0.0) * 1e9 * self.nic_efficiency

    def memory_us(self, num_bytes: float) -> float:
        return num_bytes / (self.memory_bytes_s * self.memory_efficiency) * 1e6

    def with_memory(self, products: float, memory: float) -> float:
        """What products and their memory take, which overlap as well as this device can: 3 and 4 at 2 -> 5"""
        return norm(products, memory, self.memory_overlap)

    def with_links(self, alone: float, links: float) -> float:
        """The same of both and the links: 3 and 4 at overlap 2 -> 5"""
        return norm(alone, links, self.overlap)


def norm(a: float, b: float, power: float) -> float:
    """The p-norm of two times: the longer for an infinite p, their sum for 1.    3, 4, 2 -> 5"""
    less, more = sorted((a, b))
    return float(more * (1 + (less / more) ** power) ** (1 / power)) if more else 0.0


def compute_format(hardware: Hardware, weight_format: str, dispatch_format: str) -> str:
    """The format whose peak the expert products run at: 8 bits where both sides have at most 8 and the device does.

    A device with int8 and no fp8 is taken at its int8 rate, as if weights and tokens were converted for it.

    mxfp4 weights and mxfp8 tokens on gb200 -> fp8 (its 8-bit rate)    on ascend-910c -> int8
    nvfp4 weights and nvfp4 tokens on gb200 -> fp4
    """
    widest = max(value_bytes(weight_format), value_bytes(dispatch_format))
    wanted = ["fp4"] if widest < 1 else []
    wanted += ["fp8", "int8"] if widest < 2 else []
    has = [fmt for fmt in [*wanted, "bf16", "fp8", "int8"] if fmt in hardware.formats]
    return has[0]
