"""What the products of a rank's experts take: tiles, spread over the SMs of a device.

A tile has rows of one expert and columns of its weights, 128 where nothing else is said. One step of K costs an SM

    tensor    2 * rows * 128 FLOPs / (peak of an SM)
    feed      feed_ps * (rows * bytes of a token's value + 128 * bytes of a weight)    bringing both to the tensor core
and once a tile

    epilogue  epilogue_ps * rows * 128                      activation, quantisation, the way home

The slower of tensor core and feed counts: a chip whose tensor peak is small against the rest of its SMs reaches nearly
all of it, and one whose peak is large does not. The epilogue belongs to other warps, which work on one tile while the
next is multiplied: the 3-norm of both. A narrow expert has fewer steps of K in the second product, which hide less of
it; one of SiTU is longer. The fused kernel keeps the tiles of all experts and of both products in one queue, and has
one size of tiles for a call; grouped products are two launches, of which each ends in a wave that is not full.

Grouped products of Hopper give every 64 rows of a tile to a warp group, which multiplies a block of K and then scales
its sums by itself: scale_ps for each byte. In a tile of 128 rows one group multiplies while the other scales; in a tile
of 64 rows the tensor cores wait. That shows where tensor cores are slow and weights are not: on H20. Those of Blackwell
multiply with pair_sms SMs at a time, of which each brings its part of the weights, 128 columns of them or 256; a weight
of 4 bits comes as a byte. Where tiles of 128 columns are fewer than the SMs, narrower ones share the work out.
"""

# n rows of an expert   K, N of a product   T_n tiles

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from megamoe.planner.layer.device import Device, norm
from megamoe.planner.layer.expert import Expert

COLUMNS = 128  # of a tile: DeepGEMM's
GROUPED_BLOCKS = (64, 128)  # rows of a tile of grouped products
NARROW_COLUMNS = (64, 32)  # of a tile where wider ones are fewer than the SMs
PAIRED_COLUMNS = 256  # of a tile of two SMs, as well as COLUMNS: M 256, N 256 (tcgen05, cta_group::2)
SWAPPED_STEP = 8  # WGMMA: 64 rows, columns in steps of 8
_SWAPPED_AT_MOST = 1.5  # times swap_rows: DeepGEMM's 16 rows of an expert, 24 in some shapes
_EPILOGUE_NORM = 3.0
# The first product's epilogue with SiTU, of one with SwiGLU. SGLang's patch of DeepGEMM's kernel (docker/kimi_k3) has
# two tanhf, each of both its forms, and a division more for a pair of values: some 50 instructions, of which an SM
# issues 128 a cycle at most. That is 95 ps a value at 2.06 GHz, beside 255 (epilogue_ps).
SITU_EPILOGUE = 1.37


def tile_us(
    device: Device,
    rows: int,
    k: float,
    weight_bytes: float | None = None,
    *,
    columns: int = COLUMNS,
    scale_ps: float = 0.0,
    epilogue: float = 1.0,
) -> float:
    """One tile of rows x columns over K. weight_bytes: of a weight's value, None for that of the device's format.

    scale_ps: for each byte of the operands, what the tensor core waits for. epilogue: times the device's own.
    """
    size = rows * columns
    weights = columns * (device.operand_bytes if weight_bytes is None else weight_bytes)
    moved = 1e-6 * (rows * device.operand_bytes + weights) * k
    tensor = 2e-6 * size * k / (device.tflops / device.sms) + scale_ps * moved
    return norm(max(tensor, device.feed_ps * moved), 1e-6 * device.epilogue_ps * epilogue * size, _EPILOGUE_NORM)


def expert_tile_us(expert: Expert, device: Device, rows: int, product: int) -> float:
    """One tile of the fused kernel, of an expert's first product (0) or its second (1)."""
    longer = SITU_EPILOGUE if expert.situ and product == 0 else 1.0
    return tile_us(device, rows, expert.products[product][0], expert.weight_element_bytes, epilogue=longer)


def _row_of_tiles_us(expert: Expert, device: Device, rows: int) -> float:
    """So many rows through both products, their tiles spread over all SMs."""
    across = (-(-n // COLUMNS) for _, n in expert.products)
    return sum(many * expert_tile_us(expert, device, rows, which) for which, many in enumerate(across)) / device.sms


def products_us(
    expert: Expert, device: Device, rows: Sequence[float], number: Sequence[int], tiling: Tiling
) -> list[float]:
    """Of one expert of each kind, all tiles in one queue. rows of an expert, and how many experts are like that.

    An expert's rows are cut into blocks; the last tile has the rows that are left, in whole steps.
    However few tiles there are, a rank waits for one of each product.
    """
    block, step = tiling.block, tiling.step
    sizes = (min(size, block) for size in range(step, block + step, step))
    costs = [0.0, *(_row_of_tiles_us(expert, device, size) for size in sizes)]
    found = [each // block * costs[-1] + costs[math.ceil(each % block / step)] for each in rows]
    least = sum(expert_tile_us(expert, device, step, which) for which in range(len(expert.products)))
    total = sum(map(mul, found, number))
    return found if total >= least else [each * least / total for each in found]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows of a tile, and the steps in which an expert's last tile computes the rows that are left."""

    block: int
    step: int


def tiling_of(device: Device, rows: float) -> Tiling:
    """Tiles where experts have so many rows on average: of one size for all of a call, chosen before they are counted.

    Not the smallest that holds them, but the next, so that chance makes no second tile: 8 -> 16, 16 -> 32, 97 -> 192.
    Of the smallest tiles a kernel may have another bound, small_rows.
    """
    sizes = device.blocks
    most_rows = [device.small_rows, *sizes]
    block = next((block for block, most in zip(sizes, most_rows, strict=False) if rows <= most), sizes[-1])
    return Tiling(block, min(_step(device, rows), block))


def _step(device: Device, rows: float) -> int:
    """Steps of a tile's rows, last_rows, or less where a kernel swaps its operands for few rows.

    Rows then lie where a product of the tensor cores takes its columns, in steps of 8. Which shapes are swapped up to
    swap_rows and which up to 1.5 times as many is the kernel's choice; in between, steps grow from one to the other.
        swap_rows 16, last_rows 64: 16 -> 8, 20 -> 24, 24 -> 64
    """
    if rows >= device.swap_rows * _SWAPPED_AT_MOST or device.last_rows <= SWAPPED_STEP:
        return device.last_rows
    beyond = max(0.0, (rows / device.swap_rows - 1) / (_SWAPPED_AT_MOST - 1))
    return SWAPPED_STEP * math.ceil(math.pow(device.last_rows / SWAPPED_STEP, beyond))


def matrix_us(device: Device, rows: float, columns: int, k: float) -> float:
    """One product of rows x columns over K, its tiles spread over all SMs, in the blocks that take least."""
    across = -(-columns // COLUMNS)
    return min(math.ceil(rows / block) * across * tile_us(device, block, k) / device.sms for block in device.blocks)


def grouped_us(expert: Expert, device: Device, rows: Sequence[float], number: Sequence[int]) -> list[float]:
    """As products_us, the two products launched one after the other."""
    total = [0.0] * len(rows)
    wide = (PAIRED_COLUMNS, COLUMNS) if device.pair_sms > 1 else (COLUMNS,)
    for k, n in expert.products:
        weight_bytes = expert.weight_element_bytes
        if device.pair_sms > 1:
            weight_bytes = max(weight_bytes, device.operand_bytes) / device.pair_sms
        best: tuple[float, int, float] | None = None
        for block, columns in itertools.product(GROUPED_BLOCKS, (*wide, *NARROW_COLUMNS)):
            scale_ps, across = device.scale_ps if block <= device.tile_rows else 0.0, -(-n // columns)
            blocks = sum(math.ceil(each / block) * count for each, count in zip(rows, number, strict=True))
            if best and columns < COLUMNS and blocks * -(-n // (2 * columns)) >= device.sms:
                continue
            one = (
                across
                * tile_us(device, block, k, weight_bytes, columns=columns, scale_ps=scale_ps)
                / device.sms
                * _whole_waves(blocks * across, device.sms)
            )
            if best is None or blocks * one < best[0]:
                best = blocks * one, block, one
        assert best is not None
        total = [sum_us + math.ceil(each / best[1]) * best[2] for sum_us, each in zip(total, rows, strict=True)]
    return total


def _whole_waves(tiles: float, sms: float) -> float:
    """How much longer tiles take in whole waves than their sum, spread evenly.    150 tiles on 100 SMs -> 1.33"""
    return math.ceil(tiles / sms - 1e-9) * sms / tiles if tiles else 1.0


def reached_tflops(expert: Expert, device: Device) -> float:
    """Of an expert that has many rows: what its products reach, without memory and links."""
    block = max(device.blocks)
    flops = expert.flops * block
    return flops / device.busy_us(_row_of_tiles_us(expert, device, block), flops) * 1e-6
