"""Faults in a lab that is in use: a rank cut off, a link slowed down, and both healed; read back from the kernel.

A fault of a rank is its host's, and befalls all ranks of that host. Nothing is remembered here: what is in force is
what the lab's interfaces say, whoever made it so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megamoe.catalog.wording import nearest
from megamoe.launch.lab.namespaces import (
    BRIDGE,
    INTERFACE,
    NAMESPACES,
    PREFIX,
    UNITS,
    Host,
    hosts_of,
    parse_rate,
    run_tool,
    runs,
    shape,
    switch,
)


@dataclass(frozen=True, slots=True)
class Link:
    """A rank's link as the kernel has it, its host's: bits per second each way, None where nothing bounds them.

    built_bits_per_s   what the lab was built with and heal() restores, None while it is being built
    cut                the host's port is off the switch
    """

    rank: int
    host: Host
    sends_bits_per_s: float | None
    receives_bits_per_s: float | None
    built_bits_per_s: int | None
    cut: bool

    @property
    def bits_per_s(self) -> float | None:
        """The slower direction."""
        return min((rate for rate in (self.sends_bits_per_s, self.receives_bits_per_s) if rate), default=None)

    @property
    def slow(self) -> bool:
        """Whether it is slower than it was built; the kernel keeps whole bytes per second."""
        rate = self.bits_per_s
        return rate is not None and self.built_bits_per_s is not None and self.built_bits_per_s - rate >= 8


def format_rate(bits_per_s: float) -> str:
    """The rate as parse_rate reads it.    1e9 -> "1gbit"    2.5e8 -> "250mbit" """
    unit, size = next(((unit, size) for unit, size in reversed(UNITS.items()) if bits_per_s >= size), ("kbit", 1e3))
    return f"{bits_per_s / size:.6g}{unit}"


def find(name: str | None = None) -> str:
    """The standing lab of that name, with or without "megamoe-"; None is the only one there is.

    ValueError where there is no such lab, with the nearest names, and where None could be several.
    """
    standing = {run.removeprefix(PREFIX): run for run in runs()}
    if not standing:
        raise ValueError("no lab stands on this machine: megamoe lab up makes one")
    if name is None and len(standing) > 1:
        raise ValueError(f"{len(standing)} labs stand on this machine, name one: {', '.join(standing)}")
    wanted = next(iter(standing)) if name is None else name.removeprefix(PREFIX)
    if wanted not in standing:
        raise ValueError(f"no lab is called {wanted!r}; {nearest(wanted, standing)}")
    return standing[wanted]


def links(lab: str) -> list[Link]:
    """Every rank's link in a standing lab. RuntimeError where it is taken down meanwhile."""
    hosts, ports = hosts_of(lab), _ports(lab)
    built = ports.get(BRIDGE, {}).get("ifalias")
    if built is None:  # the lab is being built, or what builds it was killed: its links need not be there yet
        return [Link(rank, host, None, None, None, cut=False) for rank, host in enumerate(hosts)]
    receives = _rates(switch(lab))
    return [
        Link(
            rank,
            host,
            _rates(host.namespace or "").get(host.interface),
            receives.get(host.port),
            int(built),
            cut="master" not in ports[host.port],
        )
        for rank, host in enumerate(hosts)
    ]


def cut(lab: str, rank: int) -> Link:
    """Drops all that goes to and from a rank, in silence, until heal(). ValueError for a rank that is not there.

    The rank's port leaves the switch, both ends of the link stay up. Had an end gone down, the rank's routes would have
    gone with it and its sends failed at once; as it is TCP hears nothing and sends again, as when a cable or a machine
    is lost somewhere on the way. (Filters that drop would do the same, but not every kernel has them.)
    """
    lab = find(lab)
    run_tool(f"ip -n {switch(lab)} link set {_link(lab, rank).host.port} nomaster")
    return _link(lab, rank)


def slow(lab: str, rank: int, rate: str) -> Link:
    """Bounds both directions of a rank's link to rate, such as 10mbit; what waits in its queues stays there.

    ValueError for a rank that is not there, and for a rate that is none or not below the one the lab was built with.
    """
    lab, bits_per_s = find(lab), parse_rate(rate, "rate")
    link = _link(lab, rank)
    assert link.built_bits_per_s is not None
    if bits_per_s >= link.built_bits_per_s:
        built = format_rate(link.built_bits_per_s)
        raise ValueError(f"rate {rate} does not slow rank {rank} down: the lab's links have {built}")
    _bound(link, lab, bits_per_s)
    return _link(lab, rank)


def heal(lab: str, rank: int) -> Link:
    """Ends what cut() and slow() did to a rank. ValueError for a rank that is not there."""
    lab = find(lab)
    link = _link(lab, rank)
    assert link.built_bits_per_s is not None
    _bound(link, lab, link.built_bits_per_s)
    run_tool(f"ip -n {switch(lab)} link set {link.host.port} master {BRIDGE}")
    return _link(lab, rank)


def _bound(link: Link, lab: str, bits_per_s: float) -> None:
    shape(link.host.namespace or "", INTERFACE, bits_per_s, "change")
    shape(switch(lab), link.host.port, bits_per_s, "change")


def _link(lab: str, rank: int) -> Link:
    found = {link.rank: link for link in links(lab)}
    name = lab.removeprefix(PREFIX)
    if rank not in found:
        raise ValueError(f"lab {name} has ranks 0 to {len(found) - 1}, there is no rank {rank}")
    if found[rank].built_bits_per_s is None:
        raise ValueError(f"lab {name} is not whole: it is being built, or megamoe lab down {name} removes what is left")
    return found[rank]


def _ports(lab: str) -> dict[str, dict[str, Any]]:
    """What the kernel says of the switch's interfaces, by name."""
    if not (NAMESPACES / switch(lab)).exists():
        return {}
    listed = json.loads(run_tool(f"ip -j -n {switch(lab)} link show") or "[]")
    return {each["ifname"]: each for each in listed}


def _rates(namespace: str) -> dict[str, float]:
    """Bits per second that token buckets let out of a namespace's interfaces."""
    listed = json.loads(run_tool(f"tc -j -n {namespace} qdisc show") or "[]")
    return {each["dev"]: each["options"]["rate"] * 8.0 for each in listed if each["kind"] == "tbf"}
