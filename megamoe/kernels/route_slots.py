"""The routing of a rank alone: its slots sorted by expert, in one launch for as many slots as decoding has."""

# T tokens   K experts per token   E experts   R = T * K slots, masked ones included; t * K + k is a slot's number

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megamoe.kernels.chips.targets import OPTIONS, Build, Target


@dataclass(frozen=True, slots=True)
class SlotsByExpert:
    """A row for each slot, sorted by expert and then by slot; slots whose expert is none of [0, E) come last.

    order               [R] int64, the slot of each row
    tokens_per_expert   [E] int32, rows of each expert
    source              [R] int32, the token of each row
    weights             [R] float32, the weight of each row
    positions           [T, K] int64: the slot's own number, R + 1 for a masked one, R for an id that there is not
    wrong               [1] int64: 1 where an id is neither -1 nor an expert, or a weight that counts is not finite
        of topk_ids [[1, 0], [-1, 1], [0, 9]], E 2  ->  order [1, 4, 0, 3, 2, 5], tokens_per_expert [2, 2],
        source [0, 2, 0, 1, 1, 2], positions [[0, 1], [7, 3], [4, 6]], wrong [1]
    """

    order: Tensor
    tokens_per_expert: Tensor
    source: Tensor
    weights: Tensor
    positions: Tensor
    wrong: Tensor


# of both, slots and experts, one program has PART; it counts CHUNK slots at a time
PART, CHUNK, NUM_WARPS = 32, 256, 4
# each slot is compared with all: beyond these, sorting is less work
MOST_SLOTS = 4096
_MOST_EXPERTS = 1 << 18  # a place, see the kernel, has 32 bits


@triton.jit
def _keys(ids, num_experts):
    """The expert of each id, E where there is none, int32: only now, for 2^32 + 3 must not become expert 3."""
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_experts"], do_not_specialize_on_alignment=["topk_ids", "topk_weights"])
def _route_slots_kernel(
    topk_ids,
    topk_weights,
    order,
    tokens_per_expert,
    source,
    weights,
    positions,
    wrong,
    num_slots,
    num_experts,
    TOPK: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: the rows of PART slots, the counts of PART experts; program 0 also what is wrong.

    A slot's place is key * R + slot, its key the expert, E for none. A slot's row is how many places are below its own.
        topk_ids [[1, 0], [-1, 1]], E 2, R 4:  keys [1, 0, 2, 1]  ->  places [4, 1, 10, 7]  ->  rows [1, 0, 3, 2]
        order [1, 0, 3, 2], source [0, 0, 1, 1], tokens_per_expert [1, 2], positions [[0, 1], [5, 3]], wrong [0]
    """
    mine = tl.program_id(0) * PART + tl.arange(0, PART)
    exists = mine < num_slots
    ids = tl.load(topk_ids + mine, mask=exists, other=-1)
    my_keys = _keys(ids, num_experts)
    places = my_keys * num_slots + mine
    num_read = tl.where(tl.program_id(0) == 0, num_slots, 0)
    rows, counts, bad = tl.zeros((PART,), tl.int32), tl.zeros((PART,), tl.int32), tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_slots, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        # what lies beyond the slots is as masked ones: nobody's, and its places are above all others
        each = tl.load(topk_ids + slots, mask=slots < num_slots, other=-1)
        keys = _keys(each, num_experts)
        rows += tl.sum(((keys * num_slots + slots)[None, :] < places[:, None]).to(tl.int32), 1)
        counts += tl.sum((keys[None, :] == mine[:, None]).to(tl.int32), 1)
        # only program 0 reads these; to the others all weights are finite
        bits = tl.load(topk_weights + slots, mask=slots < num_read, other=0.0).to(tl.int32, bitcast=True)
        infinite = ((bits & 0x7FFFFFFF) >= 0x7F800000) & (each >= 0)  # or NaN
        bad |= (infinite | (each < -1) | (each >= num_experts)).to(tl.int32)
    tl.store(order + rows, mine.to(tl.int64), mask=exists)
    tl.store(source + rows, mine // TOPK, mask=exists)
    tl.store(weights + rows, tl.load(topk_weights + mine, mask=exists, other=0.0), mask=exists)
    absent = tl.where(ids == -1, num_slots + 1, num_slots)
    tl.store(positions + mine, tl.where(my_keys < num_experts, mine, absent).to(tl.int64), mask=exists)
    tl.store(tokens_per_expert + mine, counts, mask=mine < num_experts)
    if tl.program_id(0) == 0:
        tl.store(wrong, tl.max(bad, 0).to(tl.int64))


def route_slots(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> SlotsByExpert:
    """Sorts the slots by expert: one launch for up to MOST_SLOTS of them, the torch operations of the twin beyond.

    topk_ids [T, K] int64, -1 masks, any other value is noted in `wrong` where it is no expert; topk_weights [T, K]
    float32. Waits for no device.
    """
    num_slots = topk_ids.numel()
    if not 0 < num_slots <= MOST_SLOTS:
        return route_slots_torch(topk_ids, topk_weights, num_experts)
    assert num_experts <= _MOST_EXPERTS, f"{num_experts} experts are more than {_MOST_EXPERTS}"
    out = _empty(topk_ids, topk_weights, num_experts)
    _route_slots_kernel[(triton.cdiv(max(num_slots, num_experts), PART),)](
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        out.order,
        out.tokens_per_expert,
        out.source,
        out.weights,
        out.positions,
        out.wrong,
        num_slots,
        num_experts,
        TOPK=topk_ids.shape[1],
        PART=PART,
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
        **OPTIONS,
    )
    return out


def _empty(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> SlotsByExpert:
    num_slots = topk_ids.numel()
    return SlotsByExpert(
        order=topk_ids.new_empty(num_slots),
        tokens_per_expert=topk_ids.new_empty(num_experts, dtype=torch.int32),
        source=topk_ids.new_empty(num_slots, dtype=torch.int32),
        weights=topk_weights.new_empty(num_slots),
        positions=topk_ids.new_empty(topk_ids.shape),
        wrong=topk_ids.new_empty(1),
    )


def route_slots_torch(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> SlotsByExpert:
    """What route_slots() means, by operations for which no host waits."""
    topk_ids = topk_ids.contiguous()  # as positions are then as well
    known, masked = (topk_ids >= 0) & (topk_ids < num_experts), topk_ids == -1
    by_expert, order = torch.where(known, topk_ids, num_experts).flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=topk_ids.device))
    num_slots = topk_ids.numel()
    slots = torch.arange(num_slots, device=topk_ids.device).view(topk_ids.shape)
    not_finite = known & ~topk_weights.isfinite()
    return SlotsByExpert(
        order=order,
        tokens_per_expert=ends.diff().to(torch.int32),
        source=(order // topk_ids.shape[1]).to(torch.int32),
        weights=topk_weights.flatten()[order],
        positions=torch.where(known, slots, torch.where(masked, num_slots + 1, num_slots)),
        wrong=(~(known | masked) | not_finite).any().to(torch.int64).view(1),
    )


def builds(_: Target) -> list[Build]:
    """For six slots a token as DeepSeek-V4 has and for eight."""
    pointers = {
        "topk_ids": "*i64",
        "topk_weights": "*fp32",
        "order": "*i64",
        "tokens_per_expert": "*i32",
        "source": "*i32",
        "weights": "*fp32",
        "positions": "*i64",
        "wrong": "*i64",
    }
    constants = {"PART": PART, "CHUNK": CHUNK}
    sizes = {"num_slots": "i32", "num_experts": "i32", **dict.fromkeys(("TOPK", *constants), "constexpr")}
    return [
        Build(
            label=f"{topk} slots",
            kernel=_route_slots_kernel,
            signature={**pointers, **sizes},
            constants={"TOPK": topk, **constants},
            aligned=frozenset(pointers) - {"topk_ids", "topk_weights"},
            num_warps=NUM_WARPS,
        )
        for topk in (6, 8)
    ]
