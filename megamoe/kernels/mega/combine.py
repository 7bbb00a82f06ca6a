"""The way home: results pushed to slot [token][k] of their rank, told of by rank, and summed there in order of k."""

# P ranks   T tokens of this rank   K experts per token   H hidden

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.kernels.device.rounding import round_to_bf16
from megamoe.kernels.mega.signals import at


@triton.jit
def push_results(results, slot_of_ring, num_rows, column_tile, bases, scratch, rank, L: tl.constexpr):
    """A tile of results [rows, columns] bfloat16, each row to its slot at home, then adds to what each home has got."""
    rows, columns = tl.arange(0, L.rows), column_tile * L.columns + tl.arange(0, L.columns)
    places, has_row = slot_of_ring * L.rows + rows, rows < num_rows
    homes = tl.load(scratch + L.row_ranks_place + places, mask=has_row, other=0)
    slots = tl.load(scratch + L.row_slots_place + places, mask=has_row, other=0).to(tl.int64)
    pointers = at(tl.load(bases + homes), L.results_at + slots * (2 * L.hidden), tl.bfloat16, 32)
    wanted = has_row[:, None] & (columns < L.hidden)[None, :]
    tl.store(pointers[:, None] + columns[None, :], results, mask=wanted)
    ranks = tl.arange(0, L.peers)
    theirs = has_row[:, None] & (homes[:, None] == ranks[None, :])
    pushed = tl.sum(theirs.to(tl.int32), 0)
    arrived = at(tl.load(bases + ranks, mask=ranks < L.ranks, other=0), L.arrived_at, tl.int64) + rank
    tl.debug_barrier()
    tl.atomic_add(arrived, pushed.to(tl.int64), mask=pushed > 0, sem="release", scope="sys")


@triton.jit
def reduce_part(task, topk_ids, out, own, L: tl.constexpr):
    """A part of a token's columns: its slots in ascending order in FP32 from zero, rounded once, as in reduce_slots().

    A masked slot adds nothing; an id that is no expert makes the token NaN.
    """
    COLUMNS: tl.constexpr = L.reduced_columns
    token, part = tl.cast(task // L.reduces, tl.int64), task % L.reduces
    columns = part * L.reduced_columns + tl.arange(0, L.reduced_columns)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(L.topk):
        slot = token * L.topk + k
        expert = tl.load(topk_ids + slot)
        known = (expert >= 0) & (expert < L.num_experts)
        row = at(own, L.results_at, tl.bfloat16) + slot * L.hidden + columns
        piece = tl.load(row, mask=columns < tl.where(known, L.hidden, 0), other=0.0).to(tl.float32)
        total += tl.where(known | (expert == -1), piece, float("nan"))
    tl.store(out + token * L.hidden + columns, round_to_bf16(total), mask=columns < L.hidden)
