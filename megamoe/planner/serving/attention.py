"""What one layer of attention costs, kind by kind: weights, FLOPs at a context, cached bytes, bytes read.

    query t of a sequence --> entries(t)  = min(t // ratio, cap) + min(t, window)     what the core attends
                          --> indexed(t)  = t // ratio, where an index chooses         what the index scores

Every kind is that one rule with its own numbers: gqa and mla attend all (ratio 1, no cap), dsa the chosen 2048,
sliding its window, csa the chosen entries of four tokens each and a window, hca all entries of 128 tokens and a
window, linear none: it keeps a state. Sources: DeepSeek-V3 report 2.1.1 (mla), V3.2 report (dsa), V4 report 2.3 and
the inference code beside its checkpoints (csa, hca, sliding), Qwen3-Next's gated delta rule (linear).
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.catalog import Attention
from megamoe.catalog.parameters import attention_parameters

KV_FORMATS = ("bf16", "fp8", "int8")
INDEX_FORMATS = ("bf16", "fp8", "fp4")
# kinds whose decode kernels were timed: a call takes attention_us, products are 8-bit where a device's kernel has them
DENSE_KINDS = ("mla",)

# Dependent launches of one layer's attention in a fused serving stack (vLLM, SGLang, cann-recipes-infer): each waits
# for the one before. mla: norm, down projections, norms, q up, absorb, rope and cache, core, v up, quantise, o.
# An index adds its q, k, logits, top-k. V4's: two of mHC, norm, q and kv down, norm, q up, rope and cache, core,
# rope back, o_a, o_b; hca adds compressor and pool; csa those and an index.
KERNELS = {"gqa": 5, "sliding": 5, "mla": 10, "csa": 17, "hca": 13, "linear": 6}
V4_SLIDING_KERNELS, INDEX_KERNELS = 11, 4


@dataclass(frozen=True, slots=True)
class Product:
    """One projection of a layer: its parameters, and the values of a token that go in and come out."""

    name: str
    weights: int
    values: int


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """One layer of one kind. FLOPs count a multiply-add as two; a pair is one query with one attended entry."""

    kind: str
    layers: int
    weights: int  # projection parameters, all formats
    wide_weights: int  # of `weights`, those kept in BF16: V4's compressors and the index's head weights
    ratio: int
    cap: int | None  # entries that the index lets through; None: all of them
    window: int
    pair_flops: int  # decode; latent kinds absorbed
    prefill_pair_flops: int
    index_pair_flops: int  # 0: no index
    nope: int  # dims of an entry that may be 8-bit
    rope: int  # dims of an entry that stay BF16
    index_dim: int
    token_flops: int  # what does not depend on the context: the state update of linear attention
    state_bytes: int  # per sequence, whatever the context
    query_bytes: int  # q in and o out of one token, BF16; written and read once each where no `products` count that
    splits: int  # ways that tensor parallelism can divide the cache: KV heads; 1 for a shared latent
    kernels: int
    products: tuple[Product, ...] = ()  # in decode, one after the other; empty: all weights as one, hidden in and out
    prefill_products: tuple[Product, ...] = ()
    pass_bytes: int = 0  # of one token, read and written by what runs between the products: norms, rope, quantisation
    prefill_pass_bytes: int = 0
    unfolded: int = 0  # dims of keys and values of all heads, where a dense prefill unfolds them

    def entries(self, context: int) -> int:
        """Entries that the query at position `context` (counted from 1) attends."""
        return self._chosen(context) + min(context, self.window)

    def indexed(self, context: int) -> int:
        """Keys that the index scores for the query at position `context`."""
        return context // self.ratio if self.index_pair_flops else 0

    def stored(self, context: int) -> int:
        """Entries in the cache of a sequence of `context` tokens."""
        return (0 if self.cap == 0 else context // self.ratio) + min(context, self.window)

    def core_flops(self, context: int) -> int:
        """FLOPs of the attention core for one decoded token."""
        return self.pair_flops * self.entries(context) + self.token_flops

    def index_flops(self, context: int) -> int:
        """FLOPs of the index for one token."""
        return self.index_pair_flops * self.indexed(context)

    def prefill_core_flops(self, start: int, stop: int) -> int:
        """FLOPs of the core for tokens start+1 .. stop of one sequence, the first `start` being cached."""
        return self.prefill_pair_flops * self._entries_between(start, stop) + self.token_flops * (stop - start)

    def prefill_index_flops(self, start: int, stop: int) -> int:
        """FLOPs of the index for tokens start+1 .. stop."""
        if not self.index_pair_flops:
            return 0
        return self.index_pair_flops * (_floor_sum(stop, self.ratio, None) - _floor_sum(start, self.ratio, None))

    def prefill_read_bytes(self, start: int, stop: int, kv_format: str) -> float:
        """Cache read by the core: every query its own entries where they are chosen, else once for 128 queries.

        Not of a latent that is unfolded first, of which prefill_value_bytes says what the core moves.
        """
        together = 1 if self.cap else 128
        return self._entries_between(start, stop) * self.entry_bytes(kv_format) / together

    def prefill_value_bytes(self, start: int, stop: int) -> int:
        """Moved by the core of a latent that is unfolded: queries and results of start+1 .. stop, all keys and values.

        BF16, all heads, each once: tiles that are read again come out of the caches.    V3: 163840 for a token of each
        """
        return 2 * self.unfolded * (stop - start + stop)

    def cache_bytes(self, context: int, kv_format: str, index_format: str) -> int:
        """Cache of one sequence of `context` tokens in one layer, scales included."""
        index = self.indexed(context) * self.index_entry_bytes(index_format)
        return self.stored(context) * self.entry_bytes(kv_format) + index + self.state_bytes

    def read_bytes(self, context: int, kv_format: str, queries: int) -> int:
        """Cache that the core reads for `queries` speculated tokens of one sequence; each may choose other entries."""
        shared = (
            self._chosen(context) if self.cap is None else min(queries * self._chosen(context), self.stored(context))
        )
        return (shared + min(context, self.window)) * self.entry_bytes(kv_format) + 2 * self.state_bytes

    def entry_bytes(self, kv_format: str) -> int:
        """Bytes of one cached entry.

        8-bit latents keep their rope dims in BF16 (V4 report 2.3.4). Scales as FlashMLA stores them: mla and dsa one
        FP32 per 128 (512 + 16 + 128 = 656 B), V4 one UE8M0 per 64, padded to 8 (448 + 8 + 128 = 584 B).
        """
        if kv_format not in KV_FORMATS:
            raise ValueError(f"kv_format {kv_format!r} is none of {', '.join(KV_FORMATS)}")
        if kv_format == "bf16":
            return 2 * (self.nope + self.rope)
        if not self.rope:
            return self.nope
        scales = -(-self.nope // 128) * 4 if self.kind in ("mla", "dsa") else -(-self.nope // 512) * 8
        return self.nope + scales + 2 * self.rope

    def index_entry_bytes(self, index_format: str) -> int:
        """Bytes of one index key: bf16; fp8 with one FP32 scale; fp4 with one UE8M0 scale per 32."""
        if index_format not in INDEX_FORMATS:
            raise ValueError(f"index_format {index_format!r} is none of {', '.join(INDEX_FORMATS)}")
        dim = self.index_dim
        return {"bf16": 2 * dim, "fp8": dim + 4, "fp4": dim // 2 + -(-dim // 32)}[index_format] if dim else 0

    def _chosen(self, context: int) -> int:
        all_of_them = context // self.ratio
        return all_of_them if self.cap is None else min(all_of_them, self.cap)

    def _entries_between(self, start: int, stop: int) -> int:
        return self._entries_until(stop) - self._entries_until(start)

    def _entries_until(self, context: int) -> int:
        return _floor_sum(context, self.ratio, self.cap) + _floor_sum(context, 1, self.window)


def attention_cost(attention: Attention, hidden: int) -> AttentionCost:
    """The cost record of one kind of a model whose hidden size is `hidden`."""
    if attention.kind in ("mla", "dsa"):
        return _latent(attention, hidden)
    if attention.kind in ("csa", "hca") or attention.o_lora is not None:
        return _compressed(attention, hidden)
    if attention.kind == "linear":
        return _linear(attention, hidden)
    return _grouped(attention, hidden)


def draft_attention(attention: Attention) -> Attention:
    """The attention of an MTP layer: the model's kind, but V4's looks at its window alone (its inference code)."""
    if attention.kind in ("csa", "hca"):
        changes = {"kind": "sliding", "ratio": None, "index_heads": None, "index_dim": None, "index_topk": None}
        return attention.model_copy(update={**changes, "layers": 1})
    return attention.model_copy(update={"layers": 1})


def _grouped(a: Attention, hidden: int) -> AttentionCost:
    kv_heads, head_dim = _size(a.kv_heads), _size(a.head_dim)
    width = head_dim + (a.v_head_dim or head_dim)
    pair = 2 * a.heads * width
    index = _index_flops(a)
    return AttentionCost(
        kind=a.kind, layers=a.layers, weights=attention_parameters(a, hidden), wide_weights=0,
        ratio=1, cap=0 if a.window else a.index_topk, window=a.window or 0,
        pair_flops=pair, prefill_pair_flops=pair, index_pair_flops=index,
        nope=kv_heads * width, rope=0, index_dim=a.index_dim or 0 if index else 0, token_flops=0, state_bytes=0,
        query_bytes=4 * a.heads * width, splits=kv_heads, kernels=KERNELS[a.kind] + (INDEX_KERNELS if index else 0),
    )  # fmt: skip


def _latent(a: Attention, hidden: int) -> AttentionCost:
    """Decode attends the latent itself (absorbed); dense prefill unfolds it per head, which is cheaper per pair."""
    latent, rope = _size(a.kv_lora), _size(a.rope_dim)
    absorbed = 2 * a.heads * (2 * latent + rope)
    unfolded = 2 * a.heads * (_size(a.qk_nope_dim) + rope + _size(a.v_head_dim))
    index = _index_flops(a)
    weights = attention_parameters(a, hidden)
    decode, prefill = _latent_products(a, hidden, weights)
    passes = _latent_passes(a, hidden)
    sparse = a.kind == "dsa"
    return AttentionCost(
        kind=a.kind, layers=a.layers, weights=weights,
        wide_weights=hidden * (a.index_heads or 0) if index else 0,
        ratio=1, cap=a.index_topk, window=0,
        pair_flops=absorbed, prefill_pair_flops=absorbed if sparse else unfolded, index_pair_flops=index,
        nope=latent, rope=rope, index_dim=a.index_dim or 0 if index else 0, token_flops=0, state_bytes=0,
        query_bytes=2 * a.heads * (2 * latent + rope), splits=1,
        kernels=KERNELS["mla"] + (INDEX_KERNELS if index else 0),
        products=decode, prefill_products=decode if sparse else prefill,
        pass_bytes=passes, prefill_pass_bytes=passes + (0 if sparse else _unfolding_bytes(a)),
        unfolded=0 if sparse else unfolded // 2,
    )  # fmt: skip


def _latent_products(a: Attention, hidden: int, weights: int) -> tuple[tuple[Product, ...], tuple[Product, ...]]:
    """Decode: down, q up, keys' half absorbed into q, values' half, out. Prefill: latents unfolded in place of halves.

    What is left of `weights` (an index's, an output gate's) goes down with the first.
    """
    latent, nope, v_dim = _size(a.kv_lora), _size(a.qk_nope_dim), _size(a.v_head_dim)
    queries, low = a.heads * (nope + _size(a.rope_dim)), a.q_lora or 0
    first = low + latent + _size(a.rope_dim)
    up = [Product("q up", low * queries, low + queries)] if low else []
    halves = [
        Product("absorb", a.heads * nope * latent, a.heads * (nope + latent)),
        Product("values up", a.heads * latent * v_dim, a.heads * (latent + v_dim)),
    ]
    out = Product("out", a.heads * v_dim * hidden, a.heads * v_dim + hidden)
    rest = weights - sum(product.weights for product in (*up, *halves, out))
    down = Product("down", rest, hidden + first + (0 if low else queries))
    both = Product("unfold", halves[0].weights + halves[1].weights, latent + a.heads * (nope + v_dim))
    return (down, *up, *halves, out), (down, *up, both, out)


def _latent_passes(a: Attention, hidden: int) -> int:
    """Bytes of a token: hidden, low-rank q and the core's output quantised (2 in, 1 out), norms and rope (2 and 2)."""
    quantised = hidden + (a.q_lora or 0) + a.heads * _size(a.v_head_dim)
    normed = (a.q_lora or 0) + _size(a.kv_lora) + _size(a.rope_dim)
    return 3 * quantised + 4 * (normed + a.heads * _size(a.rope_dim))


def _unfolding_bytes(a: Attention) -> int:
    """Of a token whose keys are put together from unfolded and rotated dims, for every head, in BF16."""
    nope = _size(a.qk_nope_dim)
    return 2 * a.heads * (nope + nope + _size(a.rope_dim))


def _index_flops(a: Attention) -> int:
    """Of one query with one key; 0 without an index, or where an earlier layer's choice is used again."""
    return 0 if a.index_shared else 2 * (a.index_heads or 0) * (a.index_dim or 0)


def _compressed(a: Attention, hidden: int) -> AttentionCost:
    """DeepSeek-V4: one shared entry per `ratio` tokens is key and value; csa's compressor sees two blocks (overlap)."""
    head_dim, rope = _size(a.head_dim), _size(a.rope_dim)
    pair = 4 * a.heads * head_dim
    index = _index_flops(a)
    overlap = 2 if a.kind == "csa" else 1
    width = head_dim + (a.index_dim or 0)
    compressors = 0 if a.kind == "sliding" else 2 * overlap * hidden * width
    # the tokens of a block that is not full yet: values and scores in FP32
    state = 0 if a.kind == "sliding" else 2 * 4 * overlap * (a.ratio or 1) * overlap * width
    return AttentionCost(
        kind=a.kind, layers=a.layers, weights=attention_parameters(a, hidden),
        wide_weights=compressors + hidden * (a.index_heads or 0),
        ratio=a.ratio or 1, cap=0 if a.kind == "sliding" else a.index_topk, window=a.window or 0,
        pair_flops=pair, prefill_pair_flops=pair, index_pair_flops=index,
        nope=head_dim - rope, rope=rope, index_dim=a.index_dim or 0, token_flops=0, state_bytes=state,
        query_bytes=8 * a.heads * head_dim, splits=1,
        kernels=V4_SLIDING_KERNELS if a.kind == "sliding" else KERNELS[a.kind],
    )  # fmt: skip


def _linear(a: Attention, hidden: int) -> AttentionCost:
    """Gated delta rule: decay, read, correct and query a state of heads x head_dim x v_head_dim, kept in FP32."""
    state = a.heads * _size(a.head_dim) * _size(a.v_head_dim)
    rows = 2 * _size(a.kv_heads) * _size(a.head_dim) + a.heads * _size(a.v_head_dim)
    return AttentionCost(
        kind=a.kind, layers=a.layers, weights=attention_parameters(a, hidden), wide_weights=2 * hidden * a.heads,
        ratio=1, cap=0, window=0, pair_flops=0, prefill_pair_flops=0, index_pair_flops=0,
        nope=0, rope=0, index_dim=0, token_flops=7 * state, state_bytes=4 * state,
        query_bytes=4 * (rows + a.heads * _size(a.v_head_dim)), splits=_size(a.kv_heads), kernels=KERNELS[a.kind],
    )  # fmt: skip


def _floor_sum(stop: int, ratio: int, cap: int | None) -> int:
    """Sum of min(t // ratio, cap) for t = 1 .. stop.    (10, 4, None) -> 0+0+0+1+1+1+1+2+2+2 = 10;  (10, 4, 1) -> 7"""
    if cap is not None and stop >= (cap + 1) * ratio:
        full = (cap + 1) * ratio - 1
        return _floor_sum(full, ratio, None) + cap * (stop - full)
    blocks, rest = divmod(stop, ratio)
    return ratio * blocks * (blocks - 1) // 2 + blocks * (rest + 1)


def _size(value: int | None) -> int:
    assert value is not None  # the catalog refuses a kind without its sizes
    return value
