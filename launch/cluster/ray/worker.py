"""A worker in a process of Ray's: set up as ordered, on the node's own address and interface."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import ray

from megamoe.launch.cluster.ray.actor import Occupant, WorkerOrder
from megamoe.launch.cluster.worker import Worker, WorkerOptions
from megamoe.launch.devices import device_of, device_type
from megamoe.parallel.interfaces import interface_of
from megamoe.schedule.limits import cores


def start(order: WorkerOrder) -> tuple[Worker, Occupant]:
    """Makes the worker of this process, and says whose process it is."""
    address = str(ray.util.get_node_ip_address())
    interface = interface_of(address)
    for name in {"cpu", order.device}:  # whatever the device, what it has to say to the host goes by gloo
        os.environ.update(device_type(name).interface_setting(interface))
    worker = Worker(
        WorkerOptions(
            device=device_of(order.device, 0),
            address=address,
            interface=interface,
            threads=order.threads or max(1, cores() // order.num_workers),
            deadline_s=order.deadline_s,
            run=order.run,
        )
    )
    node_id = str(ray.get_runtime_context().get_node_id())
    return worker, Occupant(worker.info(), address, node_id, psutil.Process().create_time(), _log())


def _log() -> str:
    """The file that stderr goes to; where the system does not say which, a pattern under Ray's own directory."""
    link = Path("/proc/self/fd", str(sys.stderr.fileno()))
    return str(link.readlink()) if link.exists() else f"/tmp/ray/session_latest/logs/worker-*-{os.getpid()}.err"
