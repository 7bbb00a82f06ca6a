"""Where ranks lie, and what a token sends in a layer: across devices, and across the slower boundary of domains."""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.planner.layer.plan import PlanRequest
from megamoe.planner.layer.rule import found_among, inside, landed


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one token in one layer, there and back, scales included; domains of so many devices each.

    k * h * (b_dispatch + b_combine) * f, where f is 1 - 1/EP across devices and 1 - G/EP across domains of G (of
    domains that are not full, of the emptiest)
        top-4, 6144 values, BF16 both ways, EP8 -> 86016 bytes across devices, 84 KiB
    node_limited_bytes: across domains where dispatch is node-limited: a token goes once to each other domain that has
    one of its experts (found_in_domain: how likely one does), and results come home one by one, since a sum on the way
    would have other bits
    """

    ep: int
    domain: int
    across_devices_bytes: float
    across_domains_bytes: float
    node_limited_bytes: float
    found_in_domain: float
    node_limited: bool = False

    @property
    def leaves_domain_bytes(self) -> float:
        """Across domains, as the plan dispatches."""
        return self.node_limited_bytes if self.node_limited else self.across_domains_bytes

    @property
    def domains(self) -> int:
        return -(-self.ep // self.domain)

    @property
    def fewest(self) -> int:
        """Devices of the domain that has fewest."""
        return inside(self.ep, self.domain)[0]

    @property
    def where(self) -> str:
        """ "1 device", "within 1 of 72", "2 domains of 8" """
        if self.ep == 1:
            return "1 device"
        return f"within 1 of {self.domain}" if self.domains == 1 else f"{self.domains} domains of {self.domain}"


def traffic(request: PlanRequest) -> Traffic:
    """Of evenly spread tokens; every expert that a token goes to counts, also where two are on one device."""
    expert, ep = request.expert, request.ep
    domain = int(request.hardware.scaleup_domain.value)
    whole = expert.topk * (expert.dispatch_bytes + expert.combine_bytes)
    fewest, _ = inside(ep, domain)
    leaving, found = 1 - fewest / ep, found_among(request.model.num_experts, expert.topk, fewest / ep)
    copies = landed(request.model.num_experts, expert.topk, ep, domain) or 0.0
    once = expert.topk * (copies * expert.dispatch_bytes + leaving * expert.combine_bytes)
    return Traffic(ep, domain, whole * (1 - 1 / ep), whole * leaving, once, found, request.node_limited)
