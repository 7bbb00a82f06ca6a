"""The counts exchange that opens every call: one page from every rank to every rank, before any row moves.

A page says what the rank was called with and how many rows it has for each expert. All ranks see the same pages, so
all of them find out together when one was called wrongly or differently, and all of them raise.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megamoe.parallel.errors import CallRefusedError, difference, listed
from megamoe.parallel.group import EPGroup
from megamoe.parallel.symmetric import Place
from megamoe.parallel.transport.heads import described
from megamoe.parallel.transport.host import HostTransport
from megamoe.parallel.transport.pairs import Label

PAGE_COUNTS = 384  # counts that a page holds, two or three for each expert; more follow in a second message
_PAGE = np.dtype(
    [
        ("magic", "<u4"),
        ("wrong", "<u4"),
        ("small", "<i8"),
        ("tokens", "<i8"),
        ("row_s", "<f8"),
        ("hidden", "<i8"),
        ("intermediate", "<i8"),
        ("num_experts", "<i8"),
        ("topk", "<i8"),
        ("bias", "?"),
        ("node_limited", "?"),
        ("shared_memory", "?"),
        ("training", "S37"),
        ("call", "<i8"),
        ("activation", "S64"),
        ("weight_format", "S16"),
        ("dispatch_format", "S16"),
        ("combine_format", "S16"),
        ("arithmetic", "S16"),
        ("waves", "S64"),
        ("transport", "S32"),
        ("layer", "S64"),
        ("host", "S64"),
        ("complaint", "S200"),
        ("counts", "<i4", (PAGE_COUNTS,)),
    ]
)


def _offset(name: str) -> int:
    fields = _PAGE.fields
    assert fields is not None
    return int(fields[name][1])


_MAGIC = 0x4D4D0009  # "MM", and the version of this layout and the wire's
_COMPARED = (
    "layer",
    "call",
    "hidden",
    "intermediate",
    "num_experts",
    "topk",
    "activation",
    "bias",
    "node_limited",
    "shared_memory",
    "training",
    "weight_format",
    "dispatch_format",
    "combine_format",
    "arithmetic",
    "waves",
    "transport",
)
# where a page holds what is compared: these fields stand next to each other
_TERMS = slice(_offset("hidden"), _offset("host"))
_HEAD = struct.Struct("<IIqqd")  # the fields before them
_CALL = struct.Struct("<q")
PAGE_BYTES = _PAGE.itemsize
# all but what a rank brings to the call: tokens, and whether anything is wrong
PAGE_TERMS = slice(_HEAD.size, PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Terms:
    """What all ranks must be called with alike.

    activation: the experts', in words; bias: whether they add biases
    node_limited: whether a token may go to a host once for all of its ranks
    shared_memory: whether ranks of a host share memory
    training: "no", or what the messages of a call's backward hold
    arithmetic: how experts are summed where they are, as Experts.arithmetic has it
    transport: what carries rows: "auto", or "fused, 64 tokens", the most of a rank
    layer, number: the layer's name, and which it is of the layers of that name that share the group, from 1
    """

    layer: str
    number: int
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    activation: str
    bias: bool
    node_limited: bool
    shared_memory: bool
    training: str
    weight_format: str
    dispatch_format: str
    combine_format: str
    arithmetic: str
    waves: str
    transport: str

    @property
    def who(self) -> str:
        """The layer as the ranks compare it: layers of one name have numbers."""
        return self.layer if self.number == 1 else f"{self.layer} (number {self.number} of that name)"


@dataclass(frozen=True, slots=True)
class Agreement:
    """tokens[r]: T of each rank; counts [P, E] int64 on the CPU: rows that each rank has for each expert.

    firsts [P, E] int64: tokens whose first expert on its rank that is
    row_s: seconds that the slowest rank takes to compute a row, 0 where not all know yet
    landed [P, E] int64: tokens that land on its rank for its sake, where dispatch may be node-limited
    """

    tokens: list[int]
    counts: Tensor
    firsts: Tensor
    row_s: float
    landed: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SmallAgreement:
    """tokens as in Agreement; places: of each rank's page, behind which its slots and tokens lie."""

    tokens: list[int]
    places: list[Place]


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank brings: num_tokens T; counts [2, E] int32, those of Agreement and firsts, a third row being landed.

    row_s: as in Agreement
    small: whether this rank's slots and tokens lie behind its page already
    message: bytes of the page and what lies behind it
    """

    num_tokens: int
    counts: npt.NDArray[np.int32]
    row_s: float
    small: bool = False
    message: int = PAGE_BYTES


class Page:
    """What a rank says of the calls of a layer. What stays between calls is kept as the bytes that it is."""

    def __init__(self, terms: Terms, host: str) -> None:
        self.terms = terms
        page = np.zeros(1, _PAGE)
        for name in _COMPARED:
            if name != "call":
                value = terms.who if name == "layer" else getattr(terms, name)
                page[name] = fit_text(value, _PAGE[name].itemsize) if isinstance(value, str) else value
        page["host"] = _clipped(host, 64)
        self._lasting = page.tobytes()[: _offset("counts")]
        self.label = Label(terms.layer, "counts")

    def write(self, to: memoryview, call: int, part: Part, complaint: ValueError | None) -> None:
        """All of it into `to` [PAGE_BYTES], a view of bytes."""
        to[: len(self._lasting)] = self._lasting
        _HEAD.pack_into(to, 0, _MAGIC, complaint is not None, part.small, part.num_tokens, part.row_s)
        _CALL.pack_into(to, _offset("call"), call)
        if complaint is not None:
            text = _clipped(str(complaint), 200)
            to[_offset("complaint") : _offset("complaint") + len(text)] = text
        counts = part.counts.reshape(-1)[:PAGE_COUNTS].view(np.uint8).data
        to[_offset("counts") : _offset("counts") + len(counts)] = counts


def agree(
    group: EPGroup, page: Page, call: int, part: Part, complaint: ValueError | None
) -> Agreement | SmallAgreement:
    """Exchanges pages with all ranks of the group.

    SmallAgreement where every rank's slots and tokens lie behind its page. Raises the complaint, if this rank has one,
    after all others have heard of it. CallRefusedError, on every rank alike, where any rank complained or the terms
    differ; PeerError for a rank that does not answer within the deadline.
    """
    if isinstance(group.transport, HostTransport):
        place = group.transport.place(page.label)
        page.write(place.view, call, part, complaint)
        places = group.transport.share(page.label, part.message)
        if complaint is None and len(group.hosts) == group.size and part.small:
            tokens = _all_small(places, place)
            if tokens is not None:
                return SmallAgreement(tokens, places)
        raw = np.stack([np.frombuffer(each.view[:PAGE_BYTES], np.uint8) for each in places])
    elif group.transport is None:
        if complaint is not None:
            raise complaint
        if part.small:
            return SmallAgreement([part.num_tokens], [])
        rows, firsts = torch.from_numpy(part.counts.astype(np.int64)).unsqueeze(1)
        return Agreement([part.num_tokens], rows, firsts, part.row_s)
    else:
        own = torch.zeros(PAGE_BYTES, dtype=torch.uint8, device="cpu")
        page.write(own.numpy().data, call, part, complaint)
        raw = group.transport.gather(own, page.label).numpy()
    pages: npt.NDArray[np.void] = raw.view(_PAGE).reshape(-1)
    group.hosts.update({rank: _text(page["host"]) for rank, page in enumerate(pages) if page["magic"] == _MAGIC})
    if complaint is not None:
        raise CallRefusedError(str(complaint)) from complaint
    _refuse_differences(group, pages)
    if bool(pages["small"].all()):
        return SmallAgreement(pages["tokens"].tolist(), places)
    return _by_waves(group, page, part, pages)


def _all_small(places: list[Place], own: Place) -> list[int] | None:
    """Tokens of each rank, where all agree on a small call; None where anything is otherwise."""
    tokens, terms = [], bytes(own.view[_TERMS])
    for place in places:
        magic, wrong, small, num_tokens, _ = _HEAD.unpack_from(place.view)
        if magic != _MAGIC or wrong or not small or bytes(place.view[_TERMS]) != terms:
            return None
        tokens.append(num_tokens)
    return tokens


def _by_waves(group: EPGroup, page: Page, part: Part, pages: npt.NDArray[np.void]) -> Agreement:
    """What pages that agree say of a call by waves; counts that they have no room for are exchanged."""
    counts = part.counts.reshape(-1)
    row_s = float(pages["row_s"].max()) if bool((pages["row_s"] > 0).all()) else 0.0
    both = torch.from_numpy(pages["counts"][:, : len(counts)].astype(np.int64))
    if len(counts) > PAGE_COUNTS:
        assert group.transport is not None
        rest = torch.from_numpy(counts[PAGE_COUNTS:].copy()).view(torch.uint8)
        more = group.transport.gather(rest, Label(page.terms.layer, "more counts"))
        both = torch.cat((both, more.view(torch.int32).to(torch.int64)), 1)
    rows, firsts, *landed = both.tensor_split(len(part.counts), 1)
    return Agreement(pages["tokens"].tolist(), rows, firsts, row_s, landed[0] if landed else None)


def _refuse_differences(group: EPGroup, pages: npt.NDArray[np.void]) -> None:
    raw = pages.view(np.uint8).reshape(len(pages), -1)
    alike = bool((raw[:, _TERMS] == raw[0, _TERMS]).all())
    if alike and bool((pages["magic"] == _MAGIC).all()) and not bool(pages["wrong"].any()):
        return
    strangers = [rank for rank in range(group.size) if pages[rank]["magic"] != _MAGIC]
    if strangers:
        known = dict.fromkeys(filter(None, (described(raw[rank].data) for rank in strangers)))
        else_ = f": {', '.join(known)}" if known else ", or has another version of megamoe"
        raise CallRefusedError(
            f"{listed(strangers, group.named)} called something else{else_}; every rank must call the same in the same "
            "order, from whatever threads"
        )
    for rank in range(group.size):
        if pages[rank]["wrong"]:
            host, text = group.hosts[rank], _text(pages[rank]["complaint"])
            raise CallRefusedError(f"{group.named(rank)} on {host} was called wrongly, so no rank computed: {text}")
    values = {name: {rank: _plain(page[name]) for rank, page in enumerate(pages)} for name in _COMPARED}
    found = list(filter(None, (difference(name, each, group.named) for name, each in values.items())))
    if found:
        order = any(each.startswith(("layer is", "call is")) for each in found)
        hint = "; every rank must call the same layers in the same order, from whatever threads" if order else ""
        layers = {str(each) for each in values["layer"].values()}
        if len(set(map(_without_number, layers))) < len(layers):
            hint += (
                "; a rank may still hold a layer of that name that is gone on others: gc.collect(), or give each layer "
                "a name of its own"
            )
        if not any(each.startswith("weight_format is") for each in found):  # what there are kernels for follows from it
            hint += _hint_of_arithmetic(values["arithmetic"], group)
        raise CallRefusedError(f"ranks disagree, so no rank computed: {'; '.join(found)}{hint}")


def _without_number(layer: str) -> str:
    """moe (number 2 of that name) -> moe"""
    return layer.split(" (number ")[0]


def _hint_of_arithmetic(arithmetic: Mapping[int, object], group: EPGroup) -> str:
    """What to do where ranks sum in different ways: kernels of CPUs have one in common, and "fma" is its name."""
    kinds, without = set(arithmetic.values()), [rank for rank, each in arithmetic.items() if each == "torch"]
    if len(kinds) == 1:
        return ""
    if "triton" in kinds:
        return "; ranks of one group must have devices of one type"
    if without:
        return (
            f"; kernels are missing on {listed(without, group.named)}, where torch multiplies: `megamoe doctor` says "
            "there why, most often for want of a C++ compiler"
        )
    return '; arithmetic="fma" is what CPUs with and without BF16 instructions have in common'


def fit_text(text: str, size: int) -> bytes:
    """UTF-8 of at most `size` bytes that is another for another text: what does not fit becomes its ends and a digest.

    "layers.0.experts", 16 bytes -> as it is; 100 letters a, 64 bytes -> 22 of them, "...", 22, " #" and 15 hex digits
    """
    raw = text.encode()
    if len(raw) <= size and not raw.endswith(b"\0"):  # numpy drops zeros at the end
        return raw
    digest = f" #{hashlib.sha256(raw).hexdigest()[: min(15, size - 2)]}"
    ends = max(0, size - len(digest) - len("...")) // 2
    head, tail = raw[:ends].decode(errors="ignore"), raw[len(raw) - ends :].decode(errors="ignore")
    return f"{head}...{tail}{digest}".encode() if ends else digest.encode()


def exact(value: float) -> str:
    """A number in as few digits as tell it from all others.    100.0 -> '100'    100.0000001 -> '100.0000001'"""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _clipped(text: str, size: int) -> bytes:
    """UTF-8 of at most `size` bytes, cut between characters."""
    return text.encode()[:size].decode(errors="ignore").encode()


def _text(raw: bytes) -> str:
    return bytes(raw).decode(errors="replace")


def _plain(value: np.generic) -> str | int | float:
    return _text(value) if isinstance(value, bytes) else value.item()
