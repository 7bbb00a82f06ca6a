"""Counts the parameters of a model from its sizes: what memory holds, and what one token uses.

Norms, biases, sinks and convolution taps are left out; together they are below 0.1 % of any model of the catalog.
"""

from __future__ import annotations

from dataclasses import dataclass

from megamoe.catalog.schema import Attention, Model


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers of parameters (not bytes) of the whole model, all layers together; MTP layers stand apart."""

    routed: int  # routed experts, all of them
    shared: int  # shared experts
    mlp: int  # plain MLPs of the layers without experts
    attention: int
    router: int  # gates, and the two projections of a latent MoE
    embedding: int
    head: int  # 0 where the embedding serves as head
    routed_active: int  # of `routed`, what one token uses
    mtp: int  # the MTP layers, without the embedding and head that they share

    @property
    def total(self) -> int:
        """All parameters of the main model, without MTP."""
        return self.routed + self.other

    @property
    def other(self) -> int:
        """Everything but the routed experts and MTP: what is not spread by expert parallelism."""
        return self.shared + self.mlp + self.attention + self.router + self.embedding + self.head

    @property
    def active(self) -> int:
        """What one token multiplies with: its experts and the rest, the head but not the embedding, a look-up."""
        head = self.head or self.embedding
        return self.routed_active + self.shared + self.mlp + self.attention + self.router + head


def expert_parameters(model: Model) -> int:
    """Parameters of one routed expert: gate (if gated), up and down."""
    return (3 if model.gated else 2) * model.expert_hidden * model.intermediate


def parameters(model: Model) -> Parameters:
    """Count a model's parameters from its sizes."""
    matrices = 3 if model.gated else 2
    shared = matrices * model.hidden * model.shared_width
    router = model.hidden * model.num_experts
    if model.routed_hidden is not None:
        router += 2 * model.hidden * model.routed_hidden
    attention = [(a.layers, attention_parameters(a, model.hidden)) for a in model.attention]
    embedding = model.vocab * model.hidden
    expert = expert_parameters(model)
    last_attention = attention[-1][1] if attention else 0
    # an MTP layer is one more layer behind a projection of [hidden state, embedding]
    mtp_layer = expert * model.num_experts + shared + router + last_attention + 2 * model.hidden * model.hidden
    return Parameters(
        routed=model.moe_layers * model.num_experts * expert,
        shared=model.moe_layers * shared,
        mlp=model.mlp_layers * matrices * model.hidden * (model.dense_intermediate or 0),
        attention=sum(layers * count for layers, count in attention),
        router=model.moe_layers * router,
        embedding=embedding,
        head=0 if model.tied_embeddings else embedding,
        routed_active=model.moe_layers * model.topk * expert,
        mtp=model.mtp_layers * mtp_layer,
    )


def attention_parameters(attention: Attention, hidden: int) -> int:
    """Parameters of one layer's attention."""
    if attention.kind in ("mla", "dsa"):
        return _mla(attention, hidden)
    if attention.kind in ("csa", "hca") or attention.o_lora is not None:
        return _v4(attention, hidden)
    if attention.kind == "linear":
        return _linear(attention, hidden)
    return _gqa(attention, hidden)


def _gqa(a: Attention, hidden: int) -> int:
    assert a.kv_heads is not None
    assert a.head_dim is not None
    v_dim = a.v_head_dim or a.head_dim
    qk = (a.heads + a.kv_heads) * a.head_dim
    vo = (a.kv_heads + a.heads * (2 if a.output_gate else 1)) * v_dim
    index = 0 if a.index_heads is None or a.index_dim is None else (a.index_heads + 1) * a.index_dim
    return hidden * (qk + vo + index)


def _mla(a: Attention, hidden: int) -> int:
    """DeepSeek-V2 and V3 (2.1.1 of the V3 report), and V3.2's indexer on top for dsa."""
    assert a.kv_lora is not None
    assert a.rope_dim is not None
    assert a.qk_nope_dim is not None
    assert a.v_head_dim is not None
    q_out = a.heads * (a.qk_nope_dim + a.rope_dim)
    q = hidden * q_out if a.q_lora is None else a.q_lora * (hidden + q_out)
    kv = hidden * (a.kv_lora + a.rope_dim) + a.kv_lora * a.heads * (a.qk_nope_dim + a.v_head_dim)
    count = q + kv + hidden * a.heads * a.v_head_dim * (2 if a.output_gate else 1)
    if a.kind == "dsa" and not a.index_shared:
        assert a.q_lora is not None
        count += _index(a, a.q_lora, hidden) + hidden * (a.index_dim or 0)
    return count


def _v4(a: Attention, hidden: int) -> int:
    """DeepSeek-V4 (its inference code): low-rank q, one shared key-value head, grouped low-rank o, compressors.

    A compressor has two projections (values, gate); csa's are twice as wide, because its windows overlap.
    """
    assert a.head_dim is not None
    assert a.q_lora is not None
    assert a.o_lora is not None
    assert a.o_groups is not None
    width = a.heads * a.head_dim
    count = a.q_lora * (hidden + width) + hidden * a.head_dim + a.o_lora * (width + a.o_groups * hidden)
    if a.kind == "hca":
        count += 2 * hidden * a.head_dim
    if a.kind == "csa":
        count += 4 * hidden * (a.head_dim + (a.index_dim or 0)) + _index(a, a.q_lora, hidden)
    return count


def _index(a: Attention, q_lora: int, hidden: int) -> int:
    """The index's queries, made of the low-rank q, and the weights of its heads."""
    assert a.index_heads is not None
    assert a.index_dim is not None
    return q_lora * a.index_heads * a.index_dim + hidden * a.index_heads


def _linear(a: Attention, hidden: int) -> int:
    """Gated delta rule, KDA, Mamba2: q and k of the key heads; v, gate and o of the value heads; two gates a head."""
    assert a.kv_heads is not None
    assert a.head_dim is not None
    assert a.v_head_dim is not None
    return hidden * (2 * a.kv_heads * a.head_dim + 3 * a.heads * a.v_head_dim + 2 * a.heads)
