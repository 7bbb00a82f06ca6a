"""What the link between ranks carries, found out by sending something over it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from megamoe.parallel.transport.pairs import Label, Transport
from megamoe.parallel.workspace import Workspace

_FIRST_BYTES, _MOST_BYTES = 32 * 1024, 16 * 1024 * 1024
_LONG_ENOUGH_S = 0.05


def measure_link(
    transport: Transport, rank: int, size: int, layer: str, device: torch.device, workspace: Workspace
) -> float:
    """Bytes per second that every rank can send while it receives as many, the same figure on all ranks.

    All ranks must call. Messages double until one round takes 50 ms or 16 MiB, and the last two sizes are tried
    twice more: what they differ by gives the rate, so that what passes at once (a token bucket, socket buffers) and
    what a message costs cancel out. PeerError where a rank does not answer.
    """
    num_bytes = _FIRST_BYTES
    took: dict[int, float] = {}
    while not took or (took[num_bytes] < _LONG_ENOUGH_S and num_bytes < _MOST_BYTES):
        num_bytes *= 2
        took[num_bytes] = _round(transport, rank, size, num_bytes, layer, device, workspace)
    half = num_bytes // 2
    for again in (half, num_bytes) * 2:
        seconds = _round(transport, rank, size, again, layer, device, workspace)
        took[again] = min(seconds, took.get(again, seconds))
    whole, further = num_bytes / took[num_bytes], half / max(took[num_bytes] - took[half], 1e-9)
    # where a round was slow by accident the difference can be absurd
    return further if whole / 2 < further < whole * 2 else whole


def _round(
    transport: Transport,
    rank: int,
    size: int,
    num_bytes: int,
    layer: str,
    device: torch.device,
    workspace: Workspace,
) -> float:
    """Seconds in which the slowest rank sent num_bytes to its peers together and received as many."""
    label = Label(layer, "link")
    each = num_bytes // (size - 1)
    counts = [0 if peer == rank else each for peer in range(size)]
    rows = torch.zeros(sum(counts), dtype=torch.uint8, device=device)
    transport.gather(torch.zeros(8, dtype=torch.uint8), label)  # all begin together
    arrived = workspace.take("rows", (sum(counts),), rows)
    starts = [each * (rank - (rank > peer)) for peer in range(size)]
    begun = time.perf_counter()
    transfer = transport.expect(arrived, counts, label)
    transfer.send(rows, counts, starts)
    transfer.wait()
    transfer.finish()
    if device.type != "cpu":
        _synchronize(arrived)
    mine = torch.tensor([time.perf_counter() - begun], dtype=torch.float64).view(torch.uint8)
    return float(transport.gather(mine, label).view(torch.float64).max())


def _synchronize(tensor: Tensor) -> None:
    """Waits for a device's work on the tensor: a copy of one value to the host does."""
    tensor[:1].cpu()
