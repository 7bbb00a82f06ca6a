"""Where everything of the mega-kernel lies: the symmetric buffer that peers touch, and what is this rank's alone.

`Layout` is one constant of the kernel. Sizes follow from the shape of the layer, the number of ranks and the most
tokens that a rank may bring, so nothing of it changes from call to call and a captured graph stays valid.
"""

# P ranks   E experts   T most tokens of a rank   K experts per token   H hidden   I intermediate

from __future__ import annotations

from dataclasses import dataclass

from megamoe.formats import BLOCK

ALIGNED = 256  # bytes: where each part of the symmetric buffer begins
WORD = 16  # int64 between two counters of a rank: a line of the cache each
# counters of `state`, in WORDs, before the ring's: the number of calls done, programs that have left, parts of tokens
# encoded, experts pushed, counts laid out
CALLS, LEFT, ENCODED, PUSHED, LAID_OUT, RING = range(6)
_PULLED_VALUES, _ENCODED_BLOCKS, _REDUCED_COLUMNS, _SLOTS_AT_ONCE = 4096, 8, 512, 256


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes, and byte offsets of the parts of the symmetric buffer, which are the same on every rank.

    Peers write or read these, each part at `offset`:

    counts      int64 [2][P][e + 1]   word [call % 2][source rank][place]: call << 32 | rows, set by the source rank
                                      for each of this rank's e experts; place e has no rows and says that it is there
    arrived     int64 [P]             rows times column tiles that each owner has put into `results` in this call
    slots       int32 [P][T K]        from each source rank the slots (token * K + k) of its rows here, by expert
    weights     float32 [P][T K]      and their weights
    tokens      uint8 [T][H] or bfloat16 [T][H]     this rank's tokens as they travel, which owners pull
    scales      uint8 [T][H / 32]     of tokens of MXFP8
    results     bfloat16 [T K][H]     row token * K + k: what expert topk_ids[token, k] made of the token

    In memory of this rank's own: `state` int64, counters WORD apart: calls, programs that left, parts of tokens
    encoded, experts pushed, counts laid out, then [3][ring] of the ring's blocks pulled, done by Linear-1, done by
    Linear-2, then [P] rows times column tiles that are expected of each owner; `scratch` int32: counts [P][width] and
    starts [P][width] of the lists, from this rank on round the ranks, rows of each expert [width], then rank and slot
    of each row of the ring; the ring's weights, rows and activated rows.

    rows     of a block, the tile's    columns   of a tile    wave   blocks of a wave; the ring has two waves
    kind     of the products, as in `tiles`         wire     "mxfp8" or "bf16"
    width    a power of two above e
    """

    ranks: int
    num_experts: int
    most_experts: int
    topk: int
    tokens: int
    hidden: int
    intermediate: int
    linear1_rows: int
    kind: str
    wire: str
    rows: int
    columns: int
    wave: int
    width: int
    peers: int
    counts_at: int
    arrived_at: int
    slots_at: int
    weights_at: int
    tokens_at: int
    scales_at: int
    results_at: int
    num_bytes: int
    pulled_values: int
    encoded_values: int
    reduced_columns: int
    slots_at_once: int

    @classmethod
    def of(
        cls,
        *,
        ranks: int,
        num_experts: int,
        most_experts: int,
        topk: int,
        tokens: int,
        hidden: int,
        intermediate: int,
        linear1_rows: int,
        kind: str,
        wire: str,
        rows: int,
        columns: int,
        wave: int,
    ) -> Layout:
        """Lays the symmetric buffer out.

        2 ranks, 4 experts, 2 of them on each, top-2, 8 tokens, H 64 of MXFP8:
            counts 0 (96 bytes), arrived 256 (16), slots 512 (128), weights 768 (128), tokens 1024 (512),
            scales 1536 (16), results 1792 (2048)  ->  3840 bytes on each rank
        """
        assert hidden % BLOCK == 0, hidden
        width = _power_of_two(most_experts + 1)
        sizes = (
            16 * ranks * (most_experts + 1),
            8 * ranks,
            4 * ranks * tokens * topk,
            4 * ranks * tokens * topk,
            tokens * hidden * (1 if wire == "mxfp8" else 2),
            tokens * hidden // BLOCK if wire == "mxfp8" else 0,
            2 * tokens * topk * hidden,
        )
        offsets = [0]
        for size in sizes:
            offsets.append(-(-(offsets[-1] + size) // ALIGNED) * ALIGNED)
        counts, arrived, slots, weights, tokens_at, scales, results, end = offsets
        return cls(
            ranks=ranks,
            num_experts=num_experts,
            most_experts=most_experts,
            topk=topk,
            tokens=tokens,
            hidden=hidden,
            intermediate=intermediate,
            linear1_rows=linear1_rows,
            kind=kind,
            wire=wire,
            rows=rows,
            columns=columns,
            wave=wave,
            width=width,
            peers=_power_of_two(ranks),
            counts_at=counts,
            arrived_at=arrived,
            slots_at=slots,
            weights_at=weights,
            tokens_at=tokens_at,
            scales_at=scales,
            results_at=results,
            num_bytes=end,
            pulled_values=min(max(64, _PULLED_VALUES // rows), _power_of_two(hidden)),
            encoded_values=min(_ENCODED_BLOCKS * BLOCK, _power_of_two(hidden)),
            reduced_columns=min(_REDUCED_COLUMNS, _power_of_two(hidden)),
            slots_at_once=min(_SLOTS_AT_ONCE, _power_of_two(tokens * topk)),
        )

    # ---- pieces of work ----

    @property
    def ring(self) -> int:
        """Blocks of the ring: a wave is pulled while another is computed."""
        return 2 * self.wave

    @property
    def pulls(self) -> int:
        """Tasks in which a block is pulled."""
        return -(-self.hidden // self.pulled_values)

    @property
    def tiles1(self) -> int:
        """Column tiles of Linear-1, which a block's count of done tasks comes to."""
        return -(-self.linear1_rows // self.columns)

    @property
    def tiles2(self) -> int:
        return -(-self.hidden // self.columns)

    @property
    def encodes(self) -> int:
        """Tasks in which a token is encoded."""
        return -(-self.hidden // self.encoded_values)

    @property
    def reduces(self) -> int:
        """Tasks in which a token's slots are summed."""
        return -(-self.hidden // self.reduced_columns)

    # ---- memory of this rank's own ----

    @property
    def pulled_word(self) -> int:
        return RING * WORD

    @property
    def linear1_word(self) -> int:
        return self.pulled_word + self.ring * WORD

    @property
    def linear2_word(self) -> int:
        return self.linear1_word + self.ring * WORD

    @property
    def expected_word(self) -> int:
        return self.linear2_word + self.ring * WORD

    @property
    def state_words(self) -> int:
        return self.expected_word + self.ranks

    @property
    def starts_place(self) -> int:
        return self.ranks * self.width

    @property
    def totals_place(self) -> int:
        return 2 * self.ranks * self.width

    @property
    def row_ranks_place(self) -> int:
        return self.totals_place + self.width

    @property
    def row_slots_place(self) -> int:
        return self.row_ranks_place + self.ring * self.rows

    @property
    def scratch_size(self) -> int:
        return self.row_slots_place + self.ring * self.rows


def _power_of_two(size: int) -> int:
    """At least 2.    5 -> 8"""
    return 1 << max(1, (size - 1).bit_length())
