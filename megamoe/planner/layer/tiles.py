"""What the products of a rank's experts take: tiles, spread over the SMs of a device.

A tile has `block` rows of one expert and 128 columns of its weights. One step of K costs an SM

    tensor    2 * block * 128 FLOPs / (peak of an SM)
    feed      feed_ps * bytes of a value * (block + 128)    bringing both operands to the tensor core
and once a tile

    epilogue  epilogue_ps * block * 128                     activation, quantisation, the way home

Tensor core on one side, the rest of the SM on the other, overlap as the 2-norm: a chip whose tensor peak is small
against the rest of its SMs reaches nearly all of it, and one whose peak is large does not. A narrow expert has fewer
steps of K in the second product, over which the epilogue is spread. The fused kernel keeps the tiles of all experts
and of both products in one queue; grouped products are two launches, of which each ends in a wave that is not full.
"""

# n rows of an expert   K, N of a product   T_n tiles

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from megamoe.planner.layer.device import Device
from megamoe.planner.layer.expert import Expert

COLUMNS = 128  # of a tile: DeepGEMM's
GROUPED_BLOCKS = (64, 128)  # rows of a tile of grouped products
_TILE_NORM = 2.0


def tile_us(device: Device, block: int, k: float) -> float:
    """One tile of block x 128 over K."""
    size = block * COLUMNS
    tensor = 2e-6 * size * k / (device.tflops / device.sms)
    feed = device.feed_ps * device.operand_bytes * (block + COLUMNS) * k
    rest = 1e-6 * (feed + device.epilogue_ps * size)
    return float((tensor**_TILE_NORM + rest**_TILE_NORM) ** (1 / _TILE_NORM))


def products_us(expert: Expert, device: Device, rows: Sequence[float], number: Sequence[int]) -> list[float]:
    """Of one expert of each kind, all tiles in one queue. rows of an expert, and how many experts are like that.

    An expert's rows are cut into the tiles that take least: the kernel computes no more of its last one than is there.
    However few tiles there are, a rank waits for one of each product.
    """
    tiles = [(block, [tile_us(device, block, k) for k, _ in expert.products]) for block in device.blocks]
    across = [-(-n // COLUMNS) for _, n in expert.products]
    costs = [(block, sum(map(mul, across, each)) / device.sms) for block, each in tiles]
    found = [min(math.ceil(each / block) * cost for block, cost in costs) for each in rows]
    least = min(sum(each) for _, each in tiles)
    total = sum(map(mul, found, number))
    return found if total >= least else [each * least / total for each in found]


def matrix_us(device: Device, rows: float, columns: int, k: float) -> float:
    """One product of rows x columns over K, its tiles spread over all SMs, in the blocks that take least."""
    across = -(-columns // COLUMNS)
    return min(math.ceil(rows / block) * across * tile_us(device, block, k) / device.sms for block in device.blocks)


def grouped_us(expert: Expert, device: Device, rows: Sequence[float], number: Sequence[int]) -> list[float]:
    """As products_us, the two products launched one after the other."""
    total = [0.0] * len(rows)
    for k, n in expert.products:
        across = -(-n // COLUMNS)
        best: tuple[float, int, float] | None = None
        for block in GROUPED_BLOCKS:
            blocks = sum(math.ceil(each / block) * count for each, count in zip(rows, number, strict=True))
            one = across * tile_us(device, block, k) / device.sms * _whole_waves(blocks * across, device.sms)
            if best is None or blocks * one < best[0]:
                best = blocks * one, block, one
        assert best is not None
        total = [sum_us + math.ceil(each / best[1]) * best[2] for sum_us, each in zip(total, rows, strict=True)]
    return total


def _whole_waves(tiles: float, sms: float) -> float:
    """How much longer tiles take in whole waves than their sum, spread evenly.    150 tiles on 100 SMs -> 1.33"""
    return math.ceil(tiles / sms - 1e-9) * sms / tiles if tiles else 1.0


def block_of(expert: Expert, device: Device, rows: float) -> int:
    """Rows of the tiles that an expert of so many rows is cut into."""
    across = [(-(-n // COLUMNS), k) for k, n in expert.products]
    return min(
        device.blocks,
        key=lambda block: math.ceil(rows / block) * sum(many * tile_us(device, block, k) for many, k in across),
    )


def reached_tflops(expert: Expert, device: Device) -> float:
    """Of an expert that has many rows: what its products reach, without memory and links."""
    block = max(device.blocks)
    tiles = sum(-(-n // COLUMNS) * tile_us(device, block, k) for k, n in expert.products)
    return expert.flops * block / tiles * device.sms / 1e6
