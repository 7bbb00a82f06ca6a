"""What a backend does for a call: packs tokens, reads those that arrived, and computes the rows of a step."""

# T tokens of this rank   H hidden   I intermediate   B bytes of a row of the wire   n rows of a step

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from megamoe.execution.experts import Experts
from megamoe.formats import MXFP8
from megamoe.parallel.workspace import Workspace
from megamoe.routing.wire import Wire


@dataclass(frozen=True, slots=True)
class RowsByExpert:
    """Rows sorted by expert without being moved: n in all.

    experts             their global ids
    tokens_per_expert   [experts] rows of each: int64 on the host, or where the backend counts on the device int32 there
    sources             [n] int32, of any stride: in which row of the tokens each row is
    weights             [n] float32
    destinations        [n] int64: which row of the results each row becomes
    """

    experts: range
    tokens_per_expert: Tensor
    sources: Tensor
    weights: Tensor
    destinations: Tensor


@dataclass(frozen=True, slots=True)
class CallBuffers:
    """A call's rows of the wire [., B] uint8; own: those that hold this rank's tokens, where the inbox begins."""

    rows: Tensor
    own: slice

    @property
    def inbox(self) -> Tensor:
        return self.rows[self.own.start :]


class Backend(ABC):
    """Packs and computes for one call. What grouped_linear1() and activate() return is what comes next takes.

    packs_each_wave    whether pack_message() fills a wave's messages when they are sent, while others travel, or pack()
                       fills all of them at once
    counts_on_device   where RowsByExpert.tokens_per_expert is
    """

    packs_each_wave: ClassVar[bool]
    counts_on_device: ClassVar[bool]

    def __init__(self, experts: Experts, wire: Wire, workspace: Workspace, buffers: CallBuffers) -> None:
        self._experts, self._wire, self._workspace, self._buffers = experts, wire, workspace, buffers

    @abstractmethod
    def pack(self, hidden: Tensor, tokens: Tensor, rows: Tensor | None) -> None:
        """Encodes hidden [T, H] bfloat16 into this rank's part of the inbox, and tokens [u] into these rows [u] int64.

        rows is None where the backend packs each wave.
        """

    def pack_message(self, tokens: Tensor, rows: slice) -> None:
        """Copies encoded tokens into consecutive rows of a message."""
        raise AssertionError(f"pack() has filled rows {rows} already: {len(tokens)} tokens")

    @abstractmethod
    def read(self, rows: slice) -> None:
        """Decodes rows of the buffer that are in the inbox, pair records among them, for grouped_linear1()."""

    @abstractmethod
    def grouped_linear1(self, rows: RowsByExpert) -> Any:
        """Linear-1 of rows of the inbox that were read, with the activation where one kernel does both."""

    def activate(self, linear1: Any, rows: RowsByExpert) -> Any:
        """The activation, where grouped_linear1() does not end in it."""
        del rows
        return linear1

    @abstractmethod
    def grouped_linear2(self, activated: Any, rows: RowsByExpert, results: Tensor | MXFP8) -> None:
        """Linear-2 into results [., H], bfloat16 or rounded from that to MXFP8, each row to its destination."""
