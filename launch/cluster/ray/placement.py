"""Where Ray puts workers: a bundle for each, node after node, and what there is where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import ray

from megamoe.launch.cluster.ray.private import free_by_node


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is alive: its address, and how many of the resource it has and has free.

    free is None where it is not known.
    """

    node_id: str
    address: str
    total: float
    free: float | None

    def __str__(self) -> str:
        free = "" if self.free is None else f", {self.free:g} of them free"
        return f"node {self.address} has {self.total:g}{free}"


class Placement:
    """A placement group with one bundle for each worker.

    num_workers, resource   each worker has 1 of it: CPU, GPU or NPU
    group                 Ray's own record of the group
    """

    def __init__(self, num_workers: int, resource: str) -> None:
        self.num_workers, self.resource = num_workers, resource
        self._bundles: list[int] = []
        self.group: Any = None

    def reserve(self, deadline_s: float, *, grows: bool = True) -> None:
        """Returns when the cluster has set the bundles apart. RuntimeError, with what there is, where it cannot.

        grows   whether nodes may join the cluster while it waits; without, what it lacks is said at once
        """
        wanted = f"for {self.num_workers} bundles of 1 {self.resource}"
        if not grows and sum(node.total for node in self.nodes()) < self.num_workers:
            raise RuntimeError(f"there is no room {wanted}: {self.describe()}")
        self.group = ray.util.placement_group([{self.resource: 1}] * self.num_workers, strategy="PACK")
        if not self.group.wait(deadline_s):
            there = self.describe()
            self.release()
            raise RuntimeError(f"Ray found no room within {deadline_s:g} s {wanted}: {there}")
        addresses = {node.node_id: node.address for node in self.nodes()}
        driver = str(ray.get_runtime_context().get_node_id())
        self._bundles = order_bundles(self.node_ids(), addresses, driver)

    def release(self) -> None:
        """Gives the bundles back. What is still in them ends."""
        if self.group is not None:
            ray.util.remove_placement_group(self.group)
            self.group = None

    def bundle(self, number: int) -> int:
        """Index of the bundle of a worker."""
        return self._bundles[number]

    def num_workers_beside(self, number: int) -> int:
        """Workers on the node of a worker, itself included."""
        node_ids = self.node_ids()
        mine = node_ids.get(self.bundle(number))
        return max(1, sum(node_id == mine for node_id in node_ids.values()))

    def why_late(self, number: int) -> str:
        """Why a worker has not opened: its node is gone and Ray has found no other, or nothing answers there."""
        node_id = self.node_ids().get(self.bundle(number))
        there = next((node.address for node in self.nodes() if node.node_id == node_id), None)
        if there is not None:
            return f"its place is on node {there}, where no process answers"
        return f"its node is gone, and no other has 1 {self.resource} free; {self.describe()}"

    def node_ids(self) -> dict[int, str]:
        """Node of each bundle, by the bundle's index. One that waits for a node is left out, or has a dead one."""
        table = ray.util.placement_group_table(self.group)
        return {int(index): str(node_id) for index, node_id in table["bundles_to_node_id"].items()}

    def nodes(self) -> list[Node]:
        """Nodes that are alive, in order of address."""
        free = free_by_node()
        found = [
            Node(
                each["NodeID"],
                each["NodeManagerAddress"],
                each["Resources"].get(self.resource, 0),
                free[each["NodeID"]].get(self.resource, 0) if each["NodeID"] in free else None,
            )
            for each in ray.nodes()
            if each["Alive"]
        ]
        return sorted(found, key=lambda node: ip_address(node.address))

    def describe(self) -> str:
        """What the cluster has of the resource, and where."""
        nodes = self.nodes()
        parts = [f"the cluster has {sum(node.total for node in nodes):g} {self.resource}", *map(str, nodes)]
        return "; ".join(parts)


def order_bundles(node_ids: Mapping[int, str], addresses: Mapping[str, str], first: str) -> list[int]:
    """Bundles in an order in which those of a node follow each other; the driver's node goes first, then by address.

    {0: "b", 1: "a", 2: "b", 3: "a"}, {"a": "10.0.0.9", "b": "10.0.0.10"}, "x"  ->  [1, 3, 0, 2]
    """

    def place(bundle: int) -> tuple[bool, Any, int]:
        node_id = node_ids[bundle]
        return node_id != first, ip_address(addresses.get(node_id, "0.0.0.0")), bundle

    return sorted(node_ids, key=place)
