"""Where ranks meet: a part of the store that no group has used before, and the address at which others reach a rank."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from megamoe.parallel.errors import difference
from megamoe.parallel.interfaces import address_towards, told

_MOMENT_S = 2.0


def store_of_one() -> Store:
    """A store for a rank that is alone: in its memory; on Windows, where torch has none, a file that goes with it."""
    if sys.platform == "win32":
        return dist.FileStore(str(Path(tempfile.gettempdir()) / f"megamoe-{uuid4().hex}"), 1)
    return dist.HashStore()


def fresh_store(store: Store, rank: int, within_s: float) -> Store:
    """A part of the store for the next group: under torchrun one store serves a program for as long as it runs.

    What a group leaves behind, torch's own keys too, the next one would take for its own. Rank 0 numbers the groups;
    the others take the newest that they have not been in, so that a start which fails on one rank can be tried again.
    RuntimeError where rank 0 does not come in time.
    """
    if rank == 0:
        number = store.add("megamoe groups", 1)
        store.set(f"megamoe group {number}", "")
    else:
        known = f"megamoe groups that rank {rank} knows"
        latest = store.add(known, 0)
        wait_for(store, {f"megamoe group {latest + 1}": "rank 0"}, within_s)
        number = store.add("megamoe groups", 0)
        store.add(known, number - latest)
    return PrefixStore(f"megamoe group {number}", store)


def compare_starts(store: Store, rank: int, size: int, terms: dict[str, object], within_s: float) -> None:
    """Compares, before ranks connect, what they start a group with: its size and terms, which are texts or booleans.

    ValueError, on all ranks, where some start it with something else than others. RuntimeError where a rank does not
    come in time.
    """
    terms = {"size": size, **terms}
    store.set(f"terms of rank {rank}", json.dumps(terms))
    found = {rank: terms}
    for other in range(size):
        wait_for(store, {f"terms of rank {other}": f"rank {other}"}, within_s)
        found[other] = json.loads(store.get(f"terms of rank {other}"))
        if found[other]["size"] != size:  # ranks that come after it may be no ranks of its group
            break
    store.set(f"terms read by rank {rank}", "")
    apart = (difference(name, {each: found[each].get(name) for each in sorted(found)}) for name in terms)
    if said := "; ".join(filter(None, apart)):
        # A rank that is gone needs none; the store of those here may be rank 0's. Whoever comes after the others
        # gave this start up takes the next for it: ranks that only some count with are waited for too, for a moment.
        largest = max(int(str(each["size"])) for each in found.values())
        for some, patience_s in ((found, within_s), (range(largest), min(_MOMENT_S, within_s))):
            with suppress(RuntimeError):
                wait_for(store, {f"terms read by rank {each}": f"rank {each}" for each in some}, patience_s)
        raise ValueError(f"ranks start a group with different arguments, so none starts it: {said}")


def wait_for(store: Store, keys: dict[str, str], within_s: float) -> None:
    """Waits for keys, each left by someone. RuntimeError that says who has not come."""
    try:
        store.wait(list(keys), timedelta(seconds=within_s))
    except RuntimeError as late:
        missing = [who for key, who in keys.items() if not store.check([key])]
        if not missing:
            raise
        said = f"{', '.join(missing)} did not come to where the ranks meet within {within_s:g} s"
        raise RuntimeError(said) from late


def heartbeat_address(store: Store, kind: str, rank: int, size: int, given: str | None, within_s: float) -> str:
    """IP address at which the other ranks reach this one: that of the interface which the group's backend uses.

    In this order: the one given; that of the interface which the backend is told to use (GLOO_SOCKET_IFNAME, ...); the
    one from which this rank reaches the store's host, or a rank elsewhere where that is loopback: Debian's hosts file
    gives a machine's own name 127.0.1.1. All ranks must ask.
    """
    interface = told(kind)
    own = given or (interface.address if interface else local_address(store))
    store.set(f"address of rank {rank}", own)
    keys = {f"address of rank {each}": f"rank {each}" for each in range(size)}
    wait_for(store, keys, within_s)
    if given or interface or not _is_loopback(own):
        return own
    others = [store.get(key).decode() for key in keys]
    elsewhere = next((other for other in others if not _is_loopback(other)), None)
    return own if elsewhere is None else address_towards(elsewhere)


def local_address(store: Store) -> str:
    """IP address of the interface towards the store's host; loopback where the store has no host."""
    host = _host(store)
    return "127.0.0.1" if host is None else address_towards(host)


def _is_loopback(address: str) -> bool:
    """Of a name that was given in place of an address nothing is known."""
    with suppress(ValueError):
        return ip_address(address).is_loopback
    return False


def _host(store: Any) -> str | None:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = getattr(store, "host", None)
    return str(host) if host else None
