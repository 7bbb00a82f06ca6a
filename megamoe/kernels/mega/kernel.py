"""The kernel: a persistent grid whose programs take the tasks of a call in one order, so that no waits form a ring.

Tasks come in stretches, and the programs take those of a stretch in turns: encode, push, lay out; then for each wave
pull the next one, Linear-1, Linear-2; then reduce. A task waits for tasks of earlier stretches alone, of its own rank
or of peers, so the earliest task that is not done can always run where all programs of a grid are on the chip at once,
or where there is one. In Triton's interpreter, which runs programs one after the other, there must be one.
"""

# P ranks   T tokens of this rank   K experts per token   H hidden   e experts of this rank

from __future__ import annotations

import triton
import triton.language as tl

from megamoe.kernels.chips.tiles import lay_out
from megamoe.kernels.device.linear import linear1_tile, linear2_tile
from megamoe.kernels.device.rounding import round_to_bf16
from megamoe.kernels.mega.combine import push_results, reduce_part
from megamoe.kernels.mega.dispatch import encode_part, find_wrong, lay_out_lists, pull_part, push_slots
from megamoe.kernels.mega.layout import CALLS, ENCODED, LAID_OUT, LEFT, PUSHED, WORD
from megamoe.kernels.mega.signals import add, at, now_ns, wait_for, wait_for_all

_CALLS, _LEFT = tl.constexpr(CALLS * WORD), tl.constexpr(LEFT * WORD)
_ENCODED, _PUSHED = tl.constexpr(ENCODED * WORD), tl.constexpr(PUSHED * WORD)
_LAID_OUT, _WORD = tl.constexpr(LAID_OUT * WORD), tl.constexpr(WORD)

# arguments that change from call to call, and those that differ between ranks: nothing is compiled again for a 1
VARYING = ["rank", "num_tokens", "num_local", "num_programs", "hidden_stride", "deadline_ms"]


@triton.jit
def _first(dealt, num_programs):
    """The first task of a stretch for this program, `dealt` tasks having been taken in turns before."""
    return (tl.program_id(0) + num_programs - dealt % num_programs) % num_programs


@triton.jit
def _block(number, counts, block_ends, L: tl.constexpr):
    """A block's expert, how many of the expert's rows come before it, its rows, its place in the ring, its round of it.

    rows of experts [5, 0, 2], 4 a block, a ring of 2: block 1 is expert 0's last row, block 2 rows 0 and 1 of expert 2
        1 -> 0, 4, 1, 1, 0        2 -> 2, 0, 2, 0, 1
    """
    expert = tl.sum((block_ends <= number).to(tl.int32), 0)
    here = tl.arange(0, L.width) == expert
    count, end = tl.sum(tl.where(here, counts, 0), 0), tl.sum(tl.where(here, block_ends, 0), 0)
    skipped = (number - (end - (count + L.rows - 1) // L.rows)) * L.rows
    return expert, skipped, tl.minimum(count - skipped, L.rows), number % L.ring, tl.cast(number // L.ring, tl.int64)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["hidden", "topk_ids", "topk_weights", "out"])
def mega_kernel(
    hidden,
    topk_ids,
    topk_weights,
    out,
    owners,
    places,
    bases,
    state,
    scratch,
    record,
    row_weights,
    x,
    x_scales,
    activated,
    activated_scales,
    w1,
    w1_scales,
    bias1,
    w2,
    w2_scales,
    bias2,
    rank,
    num_tokens,
    num_local,
    num_programs,
    hidden_stride,
    deadline_ms,
    L: tl.constexpr,
    CLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    CLAMP: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One call of one rank: `Layout` says where everything lies.

    hidden [T, H] bfloat16, hidden_stride apart; topk_ids [T, K] int64; topk_weights [T, K] float32; out as hidden;
    owners and places [E] int32: each expert's rank, and which of that rank's it is; bases [P] int64: addresses of all
    ranks' buffers; record [2 P + 2] int64: set to the number of the call for ranks whose counts, and whose results, did
    not come, then to 1 where a program of this rank was not done in time, and where a value was wrong
    """
    ROWS: tl.constexpr = L.rows  # Triton 3.6 takes no attribute for an argument
    COLUMNS: tl.constexpr = L.columns
    WIDTH: tl.constexpr = L.width
    PEERS: tl.constexpr = L.peers
    HIDDEN: tl.constexpr = L.hidden
    INTERMEDIATE: tl.constexpr = L.intermediate
    LINEAR1_ROWS: tl.constexpr = L.linear1_rows
    PUSHES: tl.constexpr = L.num_experts + L.ranks
    # Nothing is hoisted out of the loops of tasks, or the addresses of all stretches are in registers around products.
    # Not for scaled products: for tcgen05 the assembler of Triton 3.6 then aims at too few registers, and spills.
    UNSCALED: tl.constexpr = x_scales is None
    own, end_ns = tl.load(bases + rank), now_ns(CLOCK) + deadline_ms.to(tl.int64) * 1000000
    call, num_slots = tl.load(state + _CALLS) + 1, num_tokens * L.topk
    stuck, wrong = record + 2 * L.ranks, record + 2 * L.ranks + 1

    dealt = num_tokens * L.encodes
    for task in tl.range(tl.program_id(0), dealt, num_programs, disable_licm=UNSCALED):
        encode_part(task, hidden, hidden_stride, own, L)
        add(state + _ENCODED, 1, "gpu")
    if _first(dealt, num_programs) == 0:
        find_wrong(topk_ids, topk_weights, num_slots, wrong, L)

    wait_for(state + _ENCODED, dealt, end_ns, stuck, CLOCK)
    for task in tl.range(_first(dealt, num_programs), PUSHES, num_programs, disable_licm=UNSCALED):
        owner, place, count = push_slots(task, topk_ids, topk_weights, owners, places, bases, rank, num_slots, L)
        tl.atomic_add(state + L.expected_word + owner, tl.cast(count * L.tiles2, tl.int64), sem="relaxed", scope="gpu")
        row = (call % 2) * L.ranks + rank
        word = at(tl.load(bases + owner), L.counts_at, tl.int64) + row * (L.most_experts + 1) + place
        tl.debug_barrier()
        tl.atomic_xchg(word, (call << 32) + count, sem="release", scope="sys")
        add(state + _PUSHED, 1, "gpu")
    dealt += PUSHES

    if _first(dealt, num_programs) == 0:
        lay_out_lists(own, scratch, record, rank, call, num_local, end_ns, L, CLOCK)
        add(state + _LAID_OUT, 1, "gpu")
    dealt += 1
    wait_for(state + _LAID_OUT, 1, end_ns, stuck, CLOCK)

    counts, _row_ends, block_ends = lay_out(scratch + L.totals_place, num_local, 1, ROWS, WIDTH)
    num_blocks = tl.max(block_ends, 0)
    for first in tl.range(0, num_blocks + L.wave, L.wave, disable_licm=UNSCALED):
        pulled = tl.maximum(tl.minimum(num_blocks - first, L.wave), 0)
        for task in tl.range(_first(dealt, num_programs), pulled * L.pulls, num_programs, disable_licm=UNSCALED):
            expert, skipped, num_rows, slot, turn = _block(first + task % pulled, counts, block_ends, L)
            done2 = state + L.linear2_word + slot * _WORD
            wait_for(done2, turn * L.tiles2, end_ns, stuck, CLOCK)
            pull_part(
                task // pulled, slot, expert, skipped, num_rows, bases, scratch, row_weights, x, x_scales, rank, L
            )
            add(state + L.pulled_word + slot * _WORD, 1, "gpu")
        dealt += pulled * L.pulls

        before = first - L.wave  # the wave before is computed: none in the first turn
        ready = tl.where(first == 0, 0, tl.minimum(num_blocks - before, L.wave))
        for task in tl.range(_first(dealt, num_programs), ready * L.tiles1, num_programs, disable_licm=UNSCALED):
            expert, skipped, num_rows, slot, turn = _block(before + task % ready, counts, block_ends, L)
            pulled1 = state + L.pulled_word + slot * _WORD
            wait_for(pulled1, (turn + 1) * L.pulls, end_ns, stuck, CLOCK)
            linear1_tile(
                x,
                x_scales,
                w1,
                w1_scales,
                bias1,
                None,
                row_weights,
                activated,
                activated_scales,
                expert,
                slot * ROWS,
                num_rows,
                task // ready,
                HIDDEN,
                HIDDEN // 32,
                HIDDEN,
                LINEAR1_ROWS,
                OPERAND,
                SMALL_SCALES,
                FUNCTION,
                GATED,
                ALPHA,
                UP_SHIFT,
                LIMIT,
                UP_LIMIT,
                CLAMP,
                ROWS,
                COLUMNS,
                DEPTH,
            )
            add(state + L.linear1_word + slot * _WORD, 1, "gpu")
        dealt += ready * L.tiles1
        for task in tl.range(_first(dealt, num_programs), ready * L.tiles2, num_programs, disable_licm=UNSCALED):
            expert, skipped, num_rows, slot, turn = _block(before + task % ready, counts, block_ends, L)
            done1 = state + L.linear1_word + slot * _WORD
            wait_for(done1, (turn + 1) * L.tiles1, end_ns, stuck, CLOCK)
            total = linear2_tile(
                activated,
                activated_scales,
                w2,
                w2_scales,
                bias2,
                None,
                row_weights,
                expert,
                slot * ROWS,
                num_rows,
                task // ready,
                INTERMEDIATE,
                INTERMEDIATE // 32,
                INTERMEDIATE,
                HIDDEN,
                OPERAND,
                SMALL_SCALES,
                ROWS,
                COLUMNS,
                DEPTH,
            )
            push_results(round_to_bf16(tl.trans(total)), slot, num_rows, task // ready, bases, scratch, rank, L)
            add(state + L.linear2_word + slot * _WORD, 1, "gpu")
        dealt += ready * L.tiles2

    # read once more, as pull_part() does: in registers they would be there around the products
    own, call = tl.load(bases + rank), tl.load(state + _CALLS) + 1
    num_reduces = num_tokens * L.reduces
    begin = _first(dealt, num_programs)
    if begin < num_reduces:
        wait_for(state + _PUSHED, PUSHES, end_ns, stuck, CLOCK)
        ranks = tl.arange(0, PEERS)
        expected = tl.load(state + L.expected_word + ranks, mask=ranks < L.ranks, other=0)
        arrived = at(own, L.arrived_at, tl.int64) + ranks
        _seen, late = wait_for_all(arrived, expected, ranks < L.ranks, end_ns, CLOCK)
        tl.store(record + L.ranks + ranks, tl.zeros((PEERS,), tl.int64) + call, mask=late)
    for task in tl.range(begin, num_reduces, num_programs, disable_licm=UNSCALED):
        reduce_part(task, topk_ids, out, own, L)

    _leave(state, own, call, num_programs, L)


@triton.jit
def _leave(state, own, call, num_programs, L: tl.constexpr):
    """The last program to leave counts the call and clears every counter: nobody touches them before the next call.

    Peers add to `arrived` for rows of this rank alone, all of which have come, or those of its next call.
    """
    PEERS: tl.constexpr = L.peers
    tl.debug_barrier()
    left = tl.atomic_add(state + _LEFT, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    if left == num_programs - 1:
        for start in range(_LEFT, L.state_words, 1024):
            words = start + tl.arange(0, 1024)
            tl.store(state + words, tl.zeros((1024,), tl.int64), mask=words < L.state_words)
        ranks = tl.arange(0, L.peers)
        arrived = at(own, L.arrived_at, tl.int64) + ranks
        tl.store(arrived, tl.zeros((PEERS,), tl.int64), mask=ranks < L.ranks)
        tl.store(state + _CALLS, call)
