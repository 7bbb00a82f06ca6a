"""The address at which this rank is reached by the others: the one from which it reaches where they meet."""

from __future__ import annotations

import socket
from typing import Any

from torch.distributed import Store


def local_address(store: Store) -> str:
    """IP address of the interface towards the store's host; loopback where the store has no host."""
    host = _host(store)
    return "127.0.0.1" if host is None else address_towards(host)


def address_towards(host: str) -> str:
    """IP address that the kernel would send from to reach host. No packet is sent. OSError where there is no way."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as channel:
        channel.connect(where)
        return str(channel.getsockname()[0])


def _host(store: Any) -> str | None:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = getattr(store, "host", None)
    return str(host) if host else None
