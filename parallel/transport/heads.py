"""What a page begins with when ranks gather: what it is for and its size, so that ranks which do different things know.

gloo ends the process of a rank that gets more bytes than it has room for, and a collective of different sizes may
never end. So the first message of every exchange by pairs has the same tag and room for MESSAGE_BYTES on all ranks, the
first collective of one by collectives has one size, and nothing longer is sent before all have seen all heads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from megamoe.parallel.errors import CallRefusedError, listed, named
from megamoe.parallel.transport.pairs import WHOLE_BYTES, Label

MESSAGE_BYTES = WHOLE_BYTES  # of the first message of an exchange
FIRST_EXCHANGE = "shared_memory="  # what the phase of a group's first exchange begins with, before True or False
# "IGMM", the next version's has the next letter; a layer's page, which has a magic of its own, has no head
_MAGIC = 0x4D4D4749
_HEAD = struct.Struct("<I4xq24s64s")
HEAD_BYTES = _HEAD.size
FIRST_BYTES = MESSAGE_BYTES - HEAD_BYTES  # of a page behind its head


def write_head(to: memoryview, label: Label, num_bytes: int) -> None:
    """num_bytes of the whole page, of which the first FIRST_BYTES follow."""
    layer = label.layer.encode()[:64].decode(errors="ignore").encode()
    _HEAD.pack_into(to, 0, _MAGIC, num_bytes, label.phase.encode(), layer)


def check_heads(views: Sequence[memoryview], own: int, global_ranks: Sequence[int]) -> None:
    """CallRefusedError where ranks gather something else than the rank `own`, or pages of other sizes."""
    if all(_terms(view) == _terms(views[own]) for view in views):
        return
    whom = dict[str, list[int]]()
    for rank, view in enumerate(views):
        whom.setdefault(described(view) or "a layer", []).append(rank)

    def name(rank: int) -> str:
        return named(rank, global_ranks[rank] if global_ranks else None)

    found = "; ".join(f"{listed(ranks, name)}: {each}" for each, ranks in whom.items())
    raise CallRefusedError(
        f"ranks called something else than one another, so nothing was exchanged: {found}; every rank must call the "
        "same in the same order, from whatever threads"
    )


def described(view: memoryview) -> str:
    """What a rank gathers that sent this, in words; empty for what has no head."""
    magic, num_bytes, phase, layer = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        return ""
    if _text(phase).startswith(FIRST_EXCHANGE):
        return f"{_text(layer)} (the first exchange of an EPGroup with {_text(phase)})"
    return f"{_text(layer)} (phase {_text(phase)}, {num_bytes} bytes)"


def _terms(view: memoryview) -> tuple[int, int, bytes]:
    """What ranks must have in common. Names may differ: a rank loads what another regroups."""
    magic, num_bytes, phase, _ = _HEAD.unpack_from(view)
    return magic, num_bytes, phase


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
