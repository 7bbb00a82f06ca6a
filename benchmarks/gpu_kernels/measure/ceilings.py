"""What a device can do at most: a large BF16 matmul, a large copy."""

from __future__ import annotations

import torch

from benchmarks.gpu_kernels.findings import Ceilings
from benchmarks.gpu_kernels.measure.clock import MIB, Clock


def measure_ceilings(clock: Clock, when: str) -> Ceilings:
    """A matmul of 8192^3 and a copy of 1 GiB of random values: zeros toggle fewer bits and let the chip clock higher.

    RuntimeError where one does not run.
    """
    device = clock.device
    size, num_bytes = (8192, 1024 * MIB) if device.type != "cpu" else (64, MIB)
    left, right, product = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(3))
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = clock.compare(
        {"matmul": lambda _: torch.mm(left, right, out=product), "copy": lambda _: target.copy_(source)}
    )
    matmul, copy = times["matmul"], times["copy"]
    if isinstance(matmul, str) or isinstance(copy, str):
        raise RuntimeError(f"no ceilings: {matmul if isinstance(matmul, str) else copy}")
    return Ceilings(when, 2 * size**3 / matmul.us * 1e-6, 2 * num_bytes / copy.us * 1e-3)
