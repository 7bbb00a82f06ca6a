"""Ranks that are threads of one process and share its device: the layer's exchange where only one GPU is at hand.

What travels is copied on the device, so this says nothing of a link and nothing of how fast. It shows that rows, places
and messages are right where counts, segments and streams are a GPU's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_kernels.layer import CHECKED, DISPATCH_FORMATS, Inputs, inputs, layer
from benchmarks.gpu_kernels.results import Check
from megamoe import EPGroup
from megamoe.parallel.transport.pairs import Label

_DEADLINE_S = 60.0
_TOKENS = [20, 13]  # of each rank
_WAVES = (1, 3)
# where each piece lies, and what is queued by then
Letter = tuple[Tensor, "torch.cuda.Event | None"]


class Room:
    """What the ranks share: a place to meet, and a box for every two of them and every kind of message."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pages: dict[int, Tensor] = {}
        self._meeting = threading.Barrier(size, timeout=_DEADLINE_S)
        self._boxes: dict[tuple[Label, int, int], queue.Queue[Letter]] = {}
        self._lock = threading.Lock()

    def meet(self) -> None:
        """Returns when all have come. threading.BrokenBarrierError where one does not."""
        self._meeting.wait()

    def leave(self) -> None:
        """Has all that wait for this rank fail."""
        self._meeting.abort()

    def box(self, label: Label, sender: int, receiver: int) -> queue.Queue[Letter]:
        with self._lock:
            return self._boxes.setdefault((label, sender, receiver), queue.Queue())


class ThreadTransport:
    """Moves rows between the ranks of a room: a Transport."""

    early = False

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank = room, rank

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> ThreadTransfer:
        return ThreadTransfer(self, receive, list(counts), label)

    def gather(self, page: Tensor, label: Label) -> Tensor:
        del label
        self.room.pages[self.rank] = page.clone()
        self.room.meet()
        pages = torch.stack([self.room.pages[rank] for rank in range(self.room.size)])
        self.room.meet()
        return pages

    def abort(self) -> None:
        self.room.leave()


class ThreadTransfer:
    """One exchange: pieces are left in boxes when they are sent, and copied when they are waited for."""

    def __init__(self, transport: ThreadTransport, receive: Tensor, counts: list[int], label: Label) -> None:
        self._transport, self._receive, self._counts, self._label = transport, receive, counts, label

    def send(self, rows: Tensor, counts: Sequence[int]) -> None:
        queued: torch.cuda.Event | None = None
        if rows.is_cuda:
            queued = torch.cuda.Event()  # type: ignore[no-untyped-call]
            queued.record()
        mine, room = self._transport.rank, self._transport.room
        for peer, piece in enumerate(torch.split(rows, list(counts))):
            if len(piece):
                room.box(self._label, mine, peer).put((piece, queued))

    def wait(self) -> None:
        mine, room = self._transport.rank, self._transport.room
        for peer, place in enumerate(torch.split(self._receive, self._counts)):
            if len(place):
                piece, queued = room.box(self._label, peer, mine).get(timeout=_DEADLINE_S)
                if queued is not None:
                    queued.wait()
                place.copy_(piece)

    def finish(self) -> None:
        """Whoever runs the ranks waits for the device before anything is used again."""


def outputs_of(weight_format: str, waves: int, parts: Sequence[Inputs], device: torch.device) -> list[Tensor]:
    """What each rank's layer gives for its tokens, all ranks at once."""
    room = Room(len(parts))

    def work(rank: int) -> Tensor:
        try:
            group = EPGroup(rank, room.size, ThreadTransport(room, rank), _DEADLINE_S)
            made = layer(CHECKED, weight_format, device, group, waves=waves)
            with _stream_of_its_own(device):
                out: Tensor = made(*parts[rank])
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
        except BaseException:
            room.leave()
            raise
        return out

    with ThreadPoolExecutor(room.size) as threads:
        return [each.result(2 * _DEADLINE_S) for each in [threads.submit(work, rank) for rank in range(room.size)]]


def _stream_of_its_own(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)


def rank_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    for weight_format in DISPATCH_FORMATS:
        yield f"{weight_format} layer, check_ranks", partial(check_ranks, weight_format, device)


def check_ranks(weight_format: str, device: torch.device) -> Check:
    """Two ranks in one and in three waves give the bits that one rank gives."""
    given = inputs(CHECKED, sum(_TOKENS), device)
    wanted = layer(CHECKED, weight_format, device)(*given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    parts = list(zip(*(torch.split(each, _TOKENS) for each in given), strict=True))
    wrong = [
        waves for waves in _WAVES if not torch.equal(torch.cat(outputs_of(weight_format, waves, parts, device)), wanted)
    ]
    name = f"{weight_format} layer on two ranks of one device, bits of one rank"
    return Check(name, not wrong, f"others in {', '.join(map(str, wrong))} waves" if wrong else "")
