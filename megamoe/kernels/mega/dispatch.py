"""The way to the experts: tokens encoded at home, counts and slots pushed to the owners, rows pulled by them."""

# P ranks   T tokens of this rank   K experts per token   H hidden   e experts of this rank

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.kernels.device.rounding import dequantize_block, round_to_mxfp8, widen_block
from megamoe.kernels.mega.signals import at, wait_for_all


@triton.jit
def encode_part(task, hidden, hidden_stride, own, L: tl.constexpr):
    """A part of a token to where owners pull it from: rounded to MXFP8, or as it is on a bf16 wire."""
    BLOCKS: tl.constexpr = L.encoded_values // 32
    token, part = tl.cast(task // L.encodes, tl.int64), task % L.encodes
    blocks = part * BLOCKS + tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 32 + tl.arange(0, 32)[None, :]
    wanted = columns < L.hidden
    piece = tl.load(hidden + token * hidden_stride + columns, mask=wanted, other=0.0)
    if L.wire == "mxfp8":
        codes, exponents = round_to_mxfp8(piece.to(tl.float32))
        tl.store(at(own, L.tokens_at, tl.uint8) + token * L.hidden + columns, codes, mask=wanted)
        scales = at(own, L.scales_at, tl.uint8) + token * (L.hidden // 32) + blocks
        tl.store(scales, exponents, mask=blocks * 32 < L.hidden)
    else:
        tl.store(at(own, L.tokens_at, tl.bfloat16) + token * L.hidden + columns, piece, mask=wanted)


@triton.jit
def push_slots(task, topk_ids, topk_weights, owners, places, bases, rank, num_slots, L: tl.constexpr):
    """The slots of expert `task` to its owner's list of this rank, behind those of the owner's experts before it.

    Tasks beyond the experts are one for each rank, with no rows: they say that this rank is there. -> owner, the
    expert's place there, its number of rows
        topk_ids [[1, 0], [1, 2]], experts 1 and 2 on rank 3: task 2 puts slot 3 behind slots 0 and 2  ->  3, 1, 1
    """
    AT_ONCE: tl.constexpr = L.slots_at_once
    expert = tl.minimum(task, L.num_experts - 1)
    owner = tl.where(task < L.num_experts, tl.load(owners + expert), task - L.num_experts)
    place = tl.where(task < L.num_experts, tl.load(places + expert), L.most_experts)
    num_read = tl.where(task < L.num_experts, num_slots, 0)
    base = tl.load(bases + owner) + rank * (4 * L.tokens * L.topk)
    before = tl.zeros((AT_ONCE,), tl.int32)
    for start in range(0, num_read, AT_ONCE):
        slots = start + tl.arange(0, AT_ONCE)
        ids = tl.load(topk_ids + slots, mask=slots < num_read, other=-1)
        known = (ids >= 0) & (ids < L.num_experts)
        theirs = known & (tl.load(owners + ids, mask=known, other=-1) == owner)
        before += (theirs & (tl.load(places + ids, mask=theirs, other=L.most_experts) < place)).to(tl.int32)
    first, count = tl.sum(before, 0), 0
    for start in range(0, num_read, AT_ONCE):
        slots = start + tl.arange(0, AT_ONCE)
        mine = tl.load(topk_ids + slots, mask=slots < num_read, other=-1) == task
        found = tl.cumsum(mine.to(tl.int32), 0)
        where = first + count + found - 1
        tl.store(at(base, L.slots_at, tl.int32) + where, slots, mask=mine)
        weights = tl.load(topk_weights + slots, mask=mine, other=0.0)
        tl.store(at(base, L.weights_at, tl.float32) + where, weights, mask=mine)
        count += tl.sum(mine.to(tl.int32), 0)
    return owner, place, count


@triton.jit
def find_wrong(topk_ids, topk_weights, num_slots, wrong, L: tl.constexpr):
    """Sets `wrong` where an id is neither -1 nor an expert, or the weight of an expert is not finite."""
    AT_ONCE: tl.constexpr = L.slots_at_once
    bad = tl.zeros((AT_ONCE,), tl.int32)
    for start in range(0, num_slots, AT_ONCE):
        slots = start + tl.arange(0, AT_ONCE)
        ids = tl.load(topk_ids + slots, mask=slots < num_slots, other=-1)
        bits = tl.load(topk_weights + slots, mask=slots < num_slots, other=0.0).to(tl.int32, bitcast=True)
        infinite = ((bits & 0x7FFFFFFF) >= 0x7F800000) & (ids >= 0)  # or NaN
        bad |= (infinite | (ids < -1) | (ids >= L.num_experts)).to(tl.int32)
    if tl.max(bad, 0) > 0:
        tl.store(wrong, 1)


@triton.jit
def lay_out_lists(own, scratch, record, rank, call, num_local, end_ns, L: tl.constexpr, CLOCK: tl.constexpr):
    """Waits for the counts of all ranks, then notes where each rank's rows of each expert lie, and the experts' totals.

    Ranks follow each other from this one on, so that not all owners begin to pull from the same rank. A rank whose
    counts do not come is noted in record[rank], and has no rows.
        counts [[2, 1], [0, 3]] of ranks 0 and 1, on rank 1:
        counts [[0, 3], [2, 1]], starts [[0, 0], [0, 2]], totals [2, 4]
    """
    WIDTH: tl.constexpr = L.width
    experts = tl.arange(0, WIDTH)
    has_rows = experts < num_local
    wanted = has_rows | (experts == L.most_experts)
    least = tl.zeros((WIDTH,), tl.int64) + (call << 32)
    totals = tl.zeros((WIDTH,), tl.int32)
    for turn in range(L.ranks):
        source = (rank + turn) % L.ranks
        row = (call % 2) * L.ranks + source
        words = at(own, L.counts_at, tl.int64) + row * (L.most_experts + 1) + experts
        seen, late = wait_for_all(words, least, wanted, end_ns, CLOCK)
        counts = tl.where(has_rows & (seen >= least), seen & 0x7FFFFFFF, 0).to(tl.int32)
        if tl.max(late.to(tl.int32), 0) > 0:
            tl.store(record + source, call)
        tl.store(scratch + turn * L.width + experts, counts)
        tl.store(scratch + L.starts_place + turn * L.width + experts, tl.cumsum(counts, 0) - counts)
        totals += counts
    tl.store(scratch + L.totals_place + experts, totals)


@triton.jit
def pull_part(
    part,
    slot_of_ring,
    expert,
    skipped,
    num_rows,
    bases,
    scratch,
    row_weights,
    x,
    x_scales,
    rank,
    L: tl.constexpr,
):
    """A part of the columns of a block's rows into the ring; part 0 also whose rows they are, and their weights.

    Rows `skipped` to skipped + num_rows of the expert, which has those of this rank first, then the next rank's
        counts of the expert [2, 3], skipped 0, 4 rows: rows 0, 1 of this rank's list, 0, 1 of the next one's
    """
    ROWS: tl.constexpr = L.rows
    VALUES: tl.constexpr = L.pulled_values
    rows = tl.arange(0, ROWS)
    has_row = rows < num_rows
    numbers = skipped + tl.minimum(rows, num_rows - 1)
    turns = tl.arange(0, L.peers)
    counts = tl.load(scratch + turns * L.width + expert, mask=turns < L.ranks, other=0)
    ends = tl.cumsum(counts, 0)
    turn = tl.sum((ends[None, :] <= numbers[:, None]).to(tl.int32), 1)
    here = turns[None, :] == turn[:, None]
    begin = tl.sum(tl.where(here, (ends - counts)[None, :], 0), 1)
    start = tl.load(scratch + L.starts_place + turn * L.width + expert)
    source, own = (rank + turn) % L.ranks, tl.load(bases + rank)
    entry = source * (L.tokens * L.topk) + start + numbers - begin
    slots = tl.load(at(own, L.slots_at, tl.int32) + entry)
    places = slot_of_ring * L.rows + rows
    if part == 0:
        tl.store(scratch + L.row_ranks_place + places, source, mask=has_row)
        tl.store(scratch + L.row_slots_place + places, slots, mask=has_row)
        tl.store(row_weights + places, tl.load(at(own, L.weights_at, tl.float32) + entry), mask=has_row)
    homes, tokens = tl.load(bases + source), (slots // L.topk).to(tl.int64)
    columns = part * L.pulled_values + tl.arange(0, L.pulled_values)
    wanted = has_row[:, None] & (columns < L.hidden)[None, :]
    out = places.to(tl.int64)[:, None] * L.hidden + columns[None, :]
    if L.wire == "mxfp8":
        BLOCKS: tl.constexpr = L.pulled_values // 32
        pointers = at(homes, L.tokens_at + tokens * L.hidden, tl.uint8, 32)
        codes = tl.load(pointers[:, None] + columns[None, :], mask=wanted, other=0)
        blocks = part * BLOCKS + tl.arange(0, BLOCKS)
        has_block = has_row[:, None] & (blocks * 32 < L.hidden)[None, :]
        scales = at(homes, L.scales_at + tokens * (L.hidden // 32), tl.uint8)
        exponents = tl.load(scales[:, None] + blocks[None, :], mask=has_block, other=0)
        if L.kind == "mxfp4":
            tl.store(x + out, codes, mask=wanted)
            places_of_scales = places.to(tl.int64)[:, None] * (L.hidden // 32) + blocks[None, :]
            tl.store(x_scales + places_of_scales, exponents, mask=has_block)
        else:
            codes = tl.reshape(codes, (ROWS * BLOCKS, 32))
            exponents = tl.reshape(exponents, (ROWS * BLOCKS,))
            if L.kind == "wide":  # noqa: SIM108
                values = widen_block(codes, exponents)
            else:
                values = dequantize_block(codes, exponents)
            tl.store(x + out, tl.reshape(values, (ROWS, VALUES)), mask=wanted)
    else:
        pointers = at(homes, L.tokens_at + tokens * (2 * L.hidden), tl.bfloat16, 32)
        tl.store(x + out, tl.load(pointers[:, None] + columns[None, :], mask=wanted, other=0.0), mask=wanted)
