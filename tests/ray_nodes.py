"""Two Ray nodes on this machine, each in a network of its own, and what a driver beside the first sees of them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist

from megamoe.launch.cluster.ray.pool import RayPool
from megamoe.launch.cluster.worker import Rendezvous
from megamoe.launch.lab.namespaces import Host, lab
from megamoe.parallel.group import EPGroup

if TYPE_CHECKING:
    from megamoe.launch.cluster.ray.handle import RayHandle

GCS_PORT = 6379
START_S = 60.0
# a node that is gone is missed after a second or two, not after half a minute
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
FAIR = {"worker_niceness": 0}  # else any two processes that compute keep workers from starting for minutes


@dataclass(frozen=True, slots=True)
class Nodes:
    """A Ray cluster in a lab: its head is hosts[0], at address; environment has what its token needs."""

    hosts: list[Host]
    address: str
    environment: dict[str, str]
    num_cpus: tuple[int, int]

    def join(self) -> None:
        """Has hosts[1] become a node, for the first time or again."""
        _start(self, self.hosts[1], self.num_cpus[1], f"--address={self.address}")

    def command(self, host: Host, *arguments: str) -> list[str]:
        """A command line that runs in a host's network."""
        return ["ip", "netns", "exec", host.namespace or "", *arguments]

    def python(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Runs Python beside the head, with the cluster's token."""
        line = self.command(self.hosts[0], sys.executable, *arguments)
        return subprocess.run(
            line, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )


@contextmanager
def two_nodes(num_cpus: tuple[int, int] = (2, 2)) -> Iterator[Nodes]:
    """Two nodes, the head first, of num_cpus behind links of 1 Gbit/s; nothing of them is left when the block ends.

    The directory goes last: the lab ends what runs in its networks, and that writes there.
    """
    with tempfile.TemporaryDirectory(prefix="megamoe-nodes-", dir="/tmp") as place, lab(2, "1gbit") as hosts:
        nodes = Nodes(hosts, f"{hosts[0].address}:{GCS_PORT}", _environment(Path(place)), num_cpus)
        head = ["--head", f"--port={GCS_PORT}", "--include-dashboard=false", f"--temp-dir={place}/ray"]
        _start(nodes, hosts[0], num_cpus[0], *head, f"--system-config={json.dumps({**HEALTH, **FAIR})}")
        nodes.join()
        yield nodes


def _environment(place: Path) -> dict[str, str]:
    """A token made for this cluster alone: every node and every driver has to show the same."""
    token = place / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _start(nodes: Nodes, host: Host, num_cpus: int, *arguments: str) -> None:
    """ray start, which returns once the node's processes run by themselves."""
    ray = str(Path(sys.executable).with_name("ray"))
    common = [f"--node-ip-address={host.address}", f"--num-cpus={num_cpus}", "--object-store-memory=100000000"]
    line = nodes.command(host, ray, "start", "--disable-usage-stats", *common, *arguments)
    done = subprocess.run(line, env=nodes.environment, capture_output=True, text=True, timeout=START_S, check=False)
    if done.returncode:
        raise RuntimeError(f"ray start on {host.address}: {done.stdout}{done.stderr}")


def meet(handles: list[RayHandle], generation: int) -> None:
    """Has all workers join a group, in order."""
    address, port = handles[0].call("open_store").result(timeout=START_S)
    size = len(handles)
    joining = [
        handle.call("join", Rendezvous(address, port, generation, rank, size)) for rank, handle in enumerate(handles)
    ]
    for each in joining:
        each.result(timeout=START_S)


def add_up(group: EPGroup, value: int) -> float:
    """Sum over the ranks of value + rank."""
    total = torch.tensor([float(value + group.rank)])
    dist.all_reduce(total)
    return float(total)


def drive(address: str) -> dict[str, Any]:
    """What a driver beside the head sees of four workers on two nodes, step by step; each step is a claim of a test."""
    seen: dict[str, Any] = {}
    with RayPool(4, address=address, deadline_s=30.0) as places:
        with ThreadPoolExecutor(max_workers=4) as pool:
            handles = list(pool.map(lambda number: places.open(number, START_S), range(4)))
        nodes = {log.number: log.node for log in places.log_paths()}
        seen["nodes"] = [nodes[number] for number in range(4)]
        seen["logs_exist"] = [Path(log.path).exists() for log in places.log_paths()]
        meet(handles, 1)
        summing = [handle.call("run", add_up, 10) for handle in handles]
        seen["sums"] = [each.result(timeout=START_S) for each in summing]
        seen["too_small"] = _refusal(lambda: RayPool(1, address=address, deadline_s=1.0).place())
        os.kill(handles[2].pid, signal.SIGSTOP)
        waiting = handles[2].call("info")
        begin = time.monotonic()
        handles[2].kill()
        seen["stopped_s"] = time.monotonic() - begin
        seen["stopped_is_gone"] = is_gone(handles[2].pid)
        seen["stopped_call"] = type(waiting.exception(timeout=START_S)).__name__
        handles[2] = places.open(2, START_S)
        napping = handles[3].call("run", nap)
        for raylet in _raylets(nodes[3]):
            raylet.kill()
        seen["node_lost"] = f"{type(napping.exception(timeout=START_S)).__name__}: {napping.exception()}"
        seen["homeless"] = _refusal(lambda: places.open(3, 5.0))
    return seen


def nap(group: EPGroup) -> None:
    """Waits for a message that nobody sends."""
    dist.recv(torch.zeros(1), src=(group.rank + 1) % group.size)


def is_gone(pid: int) -> bool:
    """Whether no process has the id, or only what is left of one until its parent has looked."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except RuntimeError as refusal:
        return str(refusal)
    return "none"


def _raylets(address: str) -> list[psutil.Process]:
    """The process of a node that stands for it."""
    wanted = f"--node_ip_address={address}"
    return [each for each in psutil.process_iter() if each.name() == "raylet" and wanted in each.cmdline()]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(drive(sys.argv[1])))
