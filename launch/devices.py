"""What differs between device types: backend, names that Ray and the drivers use, and how many devices there are.

Sources: Ray's accelerator table (docs.ray.io, "Accelerator Support"); NCCL user guide, NCCL_SOCKET_IFNAME; CANN
environment variables ASCEND_RT_VISIBLE_DEVICES and HCCL_SOCKET_IFNAME (hiascend.com); torch.distributed, "Choosing the
network interface to use".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megamoe.parallel.group import BACKENDS
from megamoe.parallel.interfaces import INTERFACE_VARIABLES


@dataclass(frozen=True, slots=True)
class DeviceType:
    """A device type as torch names it.

    name                 "cpu", "cuda", "npu"
    backend              process-group backend
    ray_resource         what a Ray task asks for one of
    visible_devices      environment variable that says which devices a process sees, None where all see all
    interface_variable   environment variable that tells the backend which network interface to use
    exact_prefix         what makes the backend take an interface's name for the whole of it: without, NCCL and HCCL
                         take every interface that begins with it, eth1 as well as eth10
    """

    name: str
    backend: str
    ray_resource: str
    visible_devices: str | None
    interface_variable: str
    exact_prefix: str = ""

    def interface_setting(self, interface: str) -> dict[str, str]:
        """Environment that makes the backend use an interface.    nccl, "eth1" -> {"NCCL_SOCKET_IFNAME": "=eth1"}"""
        return {self.interface_variable: self.exact_prefix + interface}


DEVICE_TYPES = {
    "cpu": DeviceType("cpu", BACKENDS["cpu"], "CPU", None, INTERFACE_VARIABLES["cpu"]),
    "cuda": DeviceType("cuda", BACKENDS["cuda"], "GPU", "CUDA_VISIBLE_DEVICES", INTERFACE_VARIABLES["cuda"], "="),
    "npu": DeviceType("npu", BACKENDS["npu"], "NPU", "ASCEND_RT_VISIBLE_DEVICES", INTERFACE_VARIABLES["npu"], "="),
}
# torch built for ROCm calls its devices cuda and RCCL nccl, and RCCL reads NCCL's variables; Ray shares AMD's devices
# out by HIP_VISIBLE_DEVICES and refuses ROCR_VISIBLE_DEVICES
ROCM = replace(DEVICE_TYPES["cuda"], visible_devices="HIP_VISIBLE_DEVICES")


def device_type(name: str) -> DeviceType:
    """What is known of a device type, with this torch. ValueError, with those there are, for any other."""
    if name not in DEVICE_TYPES:
        raise ValueError(f"device type {name!r} is not one of {', '.join(DEVICE_TYPES)}")
    return ROCM if name == "cuda" and torch.version.hip else DEVICE_TYPES[name]


def device_of(name: str, local_rank: int) -> str:
    """Device of a machine's local_rank-th rank, to torch.    "cuda", 3 -> "cuda:3"    "cpu", 3 -> "cpu" """
    device_type(name)
    return name if name == "cpu" else f"{name}:{local_rank}"


def num_devices(name: str) -> int:
    """How many devices of a type this process sees. The CPU is one."""
    device_type(name)
    if name == "cpu":
        return 1
    module = getattr(torch, name, None)  # torch.npu is there once torch_npu is, which torch imports by itself
    return int(module.device_count()) if module is not None and module.is_available() else 0


def present_device() -> str:
    """The device type to use where none is named: an accelerator where there is one, else the CPU."""
    return next((name for name in ("cuda", "npu") if num_devices(name)), "cpu")
