"""The rule: communication hides where C / B <= 6d / (b_dispatch + b_combine) / f_remote.

DeepSeek-V4 report, section 3.1: a token-expert pair takes 6hd FLOPs and moves h bytes there (FP8) and 2h back (BF16),
so that it hides where C / B <= 2d; h cancels. The general form counts scales, other formats, MLPs without a gate and
the share of pairs that leave a tier of links, which is 1 in the paper's.
"""

# h hidden   d intermediate   C compute, FLOP/s   B bandwidth of one direction, bytes/s

from __future__ import annotations

from dataclasses import dataclass

from megamoe.schedule.formats import value_bytes

GATED_FLOPS, PLAIN_FLOPS = 6, 4  # per pair and h*d: three products of an MLP with a gate, two of one without


@dataclass(frozen=True, slots=True)
class Tier:
    """One kind of link and the share of token-expert pairs that cross it: scale-up (inside a domain) or nic (between).

    Two ranks of 16 on NVLink domains of 8: 8/16 of the pairs leave the domain, 7/16 only the device.
    f_dispatch: tokens that cross it for a pair, f_remote where each pair's token travels by itself
    """

    name: str
    gb_s: float
    f_remote: float
    f_dispatch: float


@dataclass(frozen=True, slots=True)
class Rule:
    """One tier held against one compute rate. FLOPs per byte, TFLOP/s, gigabytes per second one way.

    threshold       what the experts allow          ratio      what the machine has, C / B
    required_gb_s   bandwidth at which ratio is threshold, beyond which more brings nothing
    f_dispatch      tokens that cross for a pair where that is not f_remote
    """

    tier: str
    tflops: float
    gb_s: float
    f_remote: float
    threshold: float
    f_dispatch: float | None = None

    @property
    def ratio(self) -> float:
        return self.tflops * 1e3 / self.gb_s

    @property
    def margin(self) -> float:
        """threshold / ratio: 1 and more hides."""
        return self.threshold / self.ratio

    @property
    def hidden(self) -> bool:
        return self.ratio <= self.threshold

    @property
    def required_gb_s(self) -> float:
        return self.tflops * 1e3 / self.threshold


def threshold(
    intermediate: int,
    dispatch: str = "fp8",
    combine: str = "bf16",
    f_remote: float = 1.0,
    gated: bool = True,
    f_dispatch: float | None = None,
) -> float:
    """FLOPs per byte up to which communication hides, infinite where nothing leaves.

    d 3072, fp8 there, bf16 back -> 6144      d 2048 -> 4096      d 3072 with nvfp4 both ways -> 16384
    f_dispatch: tokens that leave for a pair, where not as many as results come back (f_remote)
    """
    there, back = value_bytes(dispatch), value_bytes(combine)
    if f_dispatch is not None and f_remote > 0:
        there *= f_dispatch / f_remote
    return allowed(GATED_FLOPS if gated else PLAIN_FLOPS, intermediate, there + back, f_remote)


def allowed(flops: float, intermediate: int, per_value: float, f_remote: float) -> float:
    """threshold() of a pass with other FLOPs of a pair and h*d, and other bytes of a value there and back."""
    return flops * intermediate / per_value / f_remote if f_remote > 0 else float("inf")


def found_among(num_experts: int, topk: int, share: float) -> float:
    """How likely one of a token's experts, all different, is among a share of all experts.    16, 4, 1/2 -> 0.962"""
    held, missed = share * num_experts, 1.0
    for taken in range(topk):
        missed *= max(0.0, num_experts - held - taken) / (num_experts - taken)
    return 1 - missed


def landed(num_experts: int, topk: int, ep: int, domain: int) -> float | None:
    """Tokens that go to another domain for a pair where each goes once to every domain; None where there is one.

    256 experts, top-8, 16 ranks in domains of 8 -> 0.1246, where each pair by itself makes 0.5
    """
    fewest, most = inside(ep, domain)
    if most == ep:
        return None
    return (ep / fewest - 1) * found_among(num_experts, topk, fewest / ep) / topk


def hides_tflops(intermediate: int, gated: bool = True) -> float:
    """TFLOP/s that 1 GB/s of link hides by the paper's count.    d 3072 -> 6.144"""
    return threshold(intermediate, gated=gated) / 1e3


def transfer_us(values: float, dispatch: str, combine: str, gb_s: float, f_remote: float = 1.0) -> float:
    """Microseconds for so many values to go and come back over one link, at its peak.

    ISCA 2025, "Insights into DeepSeek-V3", 2.3.2: 32 tokens x 9 experts x 7000 values, fp8 and bf16, 50 GB/s -> 120.96
    """
    return values * (value_bytes(dispatch) + value_bytes(combine)) * f_remote / gb_s / 1e3


def tiers(
    ep: int,
    scaleup_gb_s: float,
    domain: int,
    nic_gb_s: float | None,
    *,
    host_bridge: bool = False,
    sent: float = 1.0,
    once: float | None = None,
) -> list[Tier]:
    """The tiers that EP ranks cross, of which G share a scale-up domain; the share that the worst rank sends.

    ep 16, G 72 -> scale-up 15/16      ep 16, G 8 -> scale-up 7/16, nic 8/16      ep 1 -> none
    ep 12, G 8: two domains of 6 -> scale-up 5/12, nic 6/12
    host_bridge: cards that meet over PCIe, which is also their way to the NIC; ep 16, G 8 -> scale-up 15/16, nic 8/16
    sent: tokens that travel for a row; once: those that go to another domain, landed(), where dispatch is node-limited:
    there they are handed on over the scale-up link, which so carries all that the NIC does not
    ValueError where ranks lie in several domains and nothing is known of what joins them.
    """
    fewest, most = inside(ep, domain)
    crossing = ((ep if host_bridge else most) - 1) / ep
    anywhere = sent * (ep - 1) / ep
    handed_on = sent * crossing if once is None or host_bridge else anywhere - once
    found = [Tier("scale-up", scaleup_gb_s, crossing, handed_on)] if most > 1 else []
    if ep > domain:
        if not nic_gb_s:
            raise ValueError(
                f"EP{ep} spans {-(-ep // domain)} scale-up domains of {domain}, and no bandwidth between them is "
                f"known; give hardware.nic_gb_s, or an EP size of at most {domain}"
            )
        found.append(Tier("nic", nic_gb_s, 1 - fewest / ep, sent * (1 - fewest / ep) if once is None else once))
    return found


def inside(ep: int, domain: int) -> tuple[int, int]:
    """The fewest and the most ranks of a domain, where as few domains as hold EP ranks share them evenly.

    ep 16, G 8 -> 8, 8      ep 13, G 8 -> 6, 7      ep 4, G 72 -> 4, 4
    """
    domains = -(-ep // domain)
    return ep // domains, -(-ep // domains)
