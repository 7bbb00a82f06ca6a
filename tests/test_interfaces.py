"""Network interfaces: the one that is named, the one towards an address, or the obvious one; otherwise refused."""

from __future__ import annotations

import ipaddress
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megamoe.parallel.interfaces import Interface, candidates, choose, interface_of, interface_towards, list_interfaces

LOOPBACK = "127.0.0.1"


def pretend(monkeypatch: pytest.MonkeyPatch, interfaces: dict[str, tuple[bool, list[str]]]) -> None:
    """Has psutil report these: name -> up, addresses."""

    def entry(address: str) -> Any:
        version = ipaddress.ip_address(address.partition("%")[0]).version
        return SimpleNamespace(family=socket.AF_INET if version == 4 else socket.AF_INET6, address=address)

    listed = {name: [entry(address) for address in addresses] for name, (_, addresses) in interfaces.items()}
    states = {name: SimpleNamespace(isup=up, speed=10_000) for name, (up, _) in interfaces.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: listed)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)


LO = (True, ["127.0.0.1", "::1"])


# ---- this machine ----


def test_loopback_is_listed_last_and_known_by_its_address() -> None:
    last = list_interfaces()[-1]
    assert last.loopback
    assert last.up
    assert interface_of(LOOPBACK) == last.name
    assert socket.if_nametoindex(last.name)


def test_the_way_to_loopback_is_loopback() -> None:
    towards = interface_towards(LOOPBACK)
    assert towards.loopback
    assert towards.address == LOOPBACK
    assert choose(address=LOOPBACK) == towards


def test_every_interface_is_found_by_its_address_and_chosen_by_its_name() -> None:
    for interface in list_interfaces():
        assert interface_of(interface.address) == interface.name
        if interface.up:
            assert choose(name=interface.name) == interface


def test_what_is_chosen_can_be_listened_on() -> None:
    chosen = choose()
    family = socket.AF_INET if ipaddress.ip_address(chosen.address).version == 4 else socket.AF_INET6
    with socket.socket(family) as listening:
        listening.bind((chosen.address, 0))


@pytest.mark.parametrize("address", ["", "localhost", "10.0.0", "10.0.0.1:80"])
def test_what_is_no_ip_address_is_refused(address: str) -> None:
    for look in (interface_of, interface_towards, choose):
        with pytest.raises(ValueError, match="is not an IP address such as"):
            look(address)


def test_an_address_of_another_machine_is_refused_with_what_is_there() -> None:
    with pytest.raises(ValueError, match=r"has the address 203\.0\.113\.9; there are .*127\.0\.0\.1"):
        interface_of("203.0.113.9")


def test_an_address_that_no_route_leads_to_is_refused() -> None:
    with pytest.raises(ValueError, match="no route leads from this machine to 255"):
        interface_towards("255.255.255.255")


# ---- machines that are pretended ----


def test_a_name_that_is_not_there_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"lo": LO, "eth0": (True, ["192.0.2.7"]), "ib0": (False, ["192.0.2.130"])})
    with pytest.raises(ValueError, match="'eth1'") as refusal:
        choose(name="eth1")
    assert str(refusal.value).endswith(
        "there are eth0 (192.0.2.7, 10000 Mbit/s), ib0 (192.0.2.130, 10000 Mbit/s, down), lo (127.0.0.1, 10000 Mbit/s)"
    )
    with pytest.raises(ValueError, match="interface ib0 is down; there are eth0"):
        choose(name="ib0")


def test_the_only_one_besides_loopback_is_obvious(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"lo": LO, "eth0": (True, ["192.0.2.7"]), "ib0": (False, ["192.0.2.130"])})
    assert choose() == Interface("eth0", "192.0.2.7", loopback=False, up=True, speed_mbit=10_000)


def test_loopback_serves_where_there_is_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"lo": LO, "eth0": (False, ["192.0.2.7"])})
    assert choose().name == "lo"


def test_a_machine_without_any_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"lo": (False, ["127.0.0.1"])})
    with pytest.raises(ValueError, match=r"no network interface of this machine is up; there are lo \(.*down\)"):
        choose()


@pytest.mark.parametrize(("default", "expected"), [("net1", "net1"), ("net2", "net2"), (None, "net1")])
def test_of_several_the_one_of_the_default_route_is_taken(
    monkeypatch: pytest.MonkeyPatch, default: str | None, expected: str
) -> None:
    pretend(monkeypatch, {"lo": LO, "net2": (True, ["192.0.2.8"]), "net1": (True, ["192.0.2.7"])})
    monkeypatch.setattr("megamoe.parallel.interfaces._default_route", lambda: default)
    assert [interface.name for interface in candidates(list_interfaces())] == ["net1", "net2"]
    assert choose().name == expected


def test_ipv4_goes_first_and_addresses_of_the_link_only_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {
        "lo": LO,
        "six": (True, ["fe80::1%six", "2001:db8::5"]),
        "both": (True, ["2001:db8::6", "192.0.2.7"]),
        "link": (True, ["fe80::2%link", "fe80::2"]),
    }
    pretend(monkeypatch, interfaces)
    assert {each.name: each.address for each in list_interfaces()} == {
        "both": "192.0.2.7",
        "six": "2001:db8::5",
        "lo": "127.0.0.1",
    }
    assert interface_of("2001:DB8::6") == "both"
