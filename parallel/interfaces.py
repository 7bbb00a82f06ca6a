"""Network interfaces of this machine: which there are, and which of them leads where.

Every backend has to be told one interface by name, and takes a wrong one without a word where there are several.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

# addresses that documentation may use (RFC 5737, RFC 3849): nobody's, so the way there is the default route
_ELSEWHERE = ("198.51.100.1", "2001:db8::1")
_DISCARD_PORT = 9
# what tells each device type's process-group backend which interface to use
INTERFACE_VARIABLES = {"cpu": "GLOO_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME", "npu": "HCCL_SOCKET_IFNAME"}


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface that has an IP address.

    address      its first IPv4 address, or the first IPv6 address that is valid beyond the link
    loopback     reaches this machine only
    up           whether it carries anything
    speed_mbit   megabits per second as its driver says, 0 where it does not say (virtual interfaces)
    """

    name: str
    address: str
    loopback: bool
    up: bool
    speed_mbit: int

    def __str__(self) -> str:
        speed = f", {self.speed_mbit} Mbit/s" if self.speed_mbit else ""
        return f"{self.name} ({self.address}{speed}{'' if self.up else ', down'})"


def list_interfaces() -> list[Interface]:
    """Interfaces with an IP address, loopback last, otherwise by name. ImportError where psutil is not installed."""
    import psutil  # here, for layers to run on a machine without it: a rank alone has no interface to choose

    states = psutil.net_if_stats()
    found = []
    for name, addresses in _addresses().items():
        state = states.get(name)
        loopback = any(ip_address(address).is_loopback for address in addresses)
        speed = int(state.speed) if state else 0
        found.append(Interface(name, addresses[0], loopback, bool(state and state.isup), speed))
    return sorted(found, key=lambda interface: (interface.loopback, interface.name))


def interface_of(address: str) -> str:
    """Name of the interface that has an address.    "127.0.0.1" -> "lo"

    ValueError where the text is no IP address, or none of this machine's.
    """
    wanted = _parsed(address)
    for name, addresses in _addresses().items():
        if wanted in map(ip_address, addresses):
            return name
    raise ValueError(f"no interface of this machine has the address {address}; there are {_listed(list_interfaces())}")


def address_towards(host: str) -> str:
    """IP address that the kernel would send from to reach host. No packet is sent. OSError where there is no way."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, _DISCARD_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as channel:
        channel.connect(where)  # of a datagram socket: looks up the route, and that is all
        return str(channel.getsockname()[0])


def interface_towards(address: str) -> Interface:
    """The interface whose address the kernel would send from to reach an address. Nothing is sent.

    The result carries that address, which need not be the interface's first. ValueError where no route leads there.
    """
    _parsed(address)
    try:
        own = address_towards(address)
    except OSError as refusal:
        raise ValueError(f"no route leads from this machine to {address}: {refusal.strerror}") from refusal
    name = interface_of(own)
    known = next(interface for interface in list_interfaces() if interface.name == name)
    return Interface(name, own, known.loopback, known.up, known.speed_mbit)


def choose(address: str | None = None, name: str | None = None) -> Interface:
    """The interface to use: the one that is named, else the one towards an address, else the obvious one.

    Obvious is the only one besides loopback; of several the one that the default route takes, or the first by name
    where there is no such route; loopback where there is nothing else. ValueError, with what is there, for a name that
    is not there or is down, and for an address that no route leads to.
    """
    there = list_interfaces()
    if name is not None:
        return _named(name, there)
    if address is not None:
        return interface_towards(address)
    usable = candidates(there)
    if len(usable) > 1:
        default = _default_route()
        return next((interface for interface in usable if interface.name == default), usable[0])
    usable = usable or [interface for interface in there if interface.up]
    if not usable:
        raise ValueError(f"no network interface of this machine is up; there are {_listed(there)}")
    return usable[0]


def told(device_type: str) -> Interface | None:
    """The interface that a device type's backend is told to use by its variable; None where it is told none, or one
    that has no address here.

    Spellings are the backends': gloo takes names, NCCL and HCCL prefixes of names, names after "=", and after "^" what
    not to use. Of several the first goes first.
    """
    setting = os.environ.get(INTERFACE_VARIABLES[device_type], "").strip()
    exact = device_type == "cpu" or setting.startswith("=")
    names = [name for name in setting.lstrip("=^").split(",") if name]
    there = [interface for interface in list_interfaces() if interface.up]
    if setting.startswith("^"):
        return next((each for each in candidates(there) if not each.name.startswith(tuple(names))), None)
    for name in names:
        for interface in there:
            if interface.name == name or (interface.name.startswith(name) and not exact):
                return interface
    return None


def candidates(interfaces: list[Interface]) -> list[Interface]:
    """Those that lead to other machines: up and not loopback."""
    return [interface for interface in interfaces if interface.up and not interface.loopback]


def _named(name: str, there: list[Interface]) -> Interface:
    found = next((interface for interface in there if interface.name == name), None)
    if found is None:
        raise ValueError(f"no interface called {name!r} has an IP address; there are {_listed(there)}")
    if not found.up:
        raise ValueError(f"interface {name} is down; there are {_listed(there)}")
    return found


def _default_route() -> str | None:
    """Name of the interface that the default route takes, None where there is no such route."""
    for address in _ELSEWHERE:
        try:
            return interface_towards(address).name
        except ValueError:
            continue
    return None


def _addresses() -> dict[str, list[str]]:
    """IP addresses by interface, the one to use first; interfaces without one are left out.

    IPv4 goes first. An IPv6 address of the link only means nothing without its interface, so it does not count.
    """
    import psutil

    found = {}
    for name, entries in psutil.net_if_addrs().items():
        four = [entry.address for entry in entries if entry.family == socket.AF_INET]
        six = [entry.address for entry in entries if entry.family == socket.AF_INET6]
        six = [address for address in six if "%" not in address and not ip_address(address).is_link_local]
        if four or six:
            found[str(name)] = [*four, *six]
    return found


def _parsed(address: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(address)
    except ValueError as wrong:
        raise ValueError(f"{address!r} is not an IP address such as 10.0.0.1") from wrong


def _listed(interfaces: list[Interface]) -> str:
    return ", ".join(map(str, interfaces)) or "none"
