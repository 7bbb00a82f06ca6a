"""What has passed a lab's links, as the kernel counts it on the hosts' interfaces."""

from __future__ import annotations

import json

from megamoe.launch.lab.namespaces import Host, run_tool


def sent_bytes(host: Host) -> int:
    """Bytes that have left a host over its link, with headers, since it was built."""
    shown = json.loads(run_tool(f"ip -j -s -n {host.namespace} link show dev {host.interface}"))
    return int(shown[0]["stats64"]["tx"]["bytes"])
