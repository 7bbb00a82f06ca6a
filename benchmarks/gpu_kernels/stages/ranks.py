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

from benchmarks.gpu_kernels.findings import Check
from benchmarks.gpu_kernels.measure.layer import CHECKED, DISPATCH_FORMATS, Inputs, inputs, layer
from megamoe import EPGroup
from megamoe.parallel.transport.pairs import Label, Transfer, Transport

DEADLINE_S = 20.0  # of any one wait
TOKENS = [20, 13]  # of each rank
WAVES = (1, 3)
# where a piece lies, and what has whoever reads it wait for it
Letter = tuple[Tensor, Callable[[], object]]


class Room:
    """What the ranks share: a place to meet, and a box for every two of them and every kind of message."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: list[object] = []  # what may still be copied from when its box has been emptied
        self.pages: dict[int, Tensor] = {}
        self._meeting = threading.Barrier(size, timeout=DEADLINE_S)
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


class Boxes:
    """A Transport whose pieces lie where whoever they are for takes them from."""

    early = False

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> Transfer:
        return BoxTransfer(self, receive, list(counts), label)

    def put(self, peer: int, label: Label, piece: Tensor) -> None:
        raise NotImplementedError

    def take(self, peer: int, label: Label, place: Tensor) -> None:
        """Copies what a peer put there, once it has."""
        raise NotImplementedError


class BoxTransfer:
    """One exchange: pieces are put when they are sent, and copied when they are waited for."""

    def __init__(self, boxes: Boxes, receive: Tensor, counts: list[int], label: Label) -> None:
        self._boxes, self._receive, self._counts, self._label = boxes, receive, counts, label

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        del starts
        for peer, piece in enumerate(torch.split(rows, list(counts))):
            if len(piece):
                self._boxes.put(peer, self._label, piece)

    def wait(self) -> None:
        for peer, place in enumerate(torch.split(self._receive, self._counts)):
            if len(place):
                self._boxes.take(peer, self._label, place)

    def finish(self) -> None:
        """Whoever runs the ranks waits for the device before anything is used again."""


class ThreadTransport(Boxes):
    """Moves rows between the ranks of a room."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank = room, rank

    def put(self, peer: int, label: Label, piece: Tensor) -> None:
        wait: Callable[[], object] = _nothing
        if piece.is_cuda:
            queued = torch.cuda.Event()  # type: ignore[no-untyped-call]
            queued.record()
            wait = queued.wait
        self.room.box(label, self.rank, peer).put((piece, wait))

    def take(self, peer: int, label: Label, place: Tensor) -> None:
        piece, wait = self.room.box(label, peer, self.rank).get(timeout=DEADLINE_S)
        wait()
        place.copy_(piece)

    def gather(self, page: Tensor, label: Label) -> Tensor:
        del label
        self.room.pages[self.rank] = page.clone()
        self.room.meet()
        pages = torch.stack([self.room.pages[rank] for rank in range(self.room.size)])
        self.room.meet()
        return pages

    def abort(self) -> None:
        self.room.leave()


def _nothing() -> None:
    """What a piece on the host has whoever reads it wait for."""


# a room and a rank -> what moves its rows
MakeTransport = Callable[[Room, int], Transport]


def outputs_of(
    weight_format: str,
    waves: int,
    parts: Sequence[Inputs],
    device: torch.device,
    make_transport: MakeTransport = ThreadTransport,
) -> list[Tensor]:
    """What each rank's layer gives for its tokens, all ranks at once."""
    room = Room(len(parts))

    def work(rank: int) -> Tensor:
        try:
            group = EPGroup(rank, room.size, make_transport(room, rank), DEADLINE_S)
            made = layer(CHECKED, weight_format, device, group, waves=waves)
            if device.type == "cuda":  # the weights were loaded in this stream, and are used in another
                torch.cuda.current_stream(device).synchronize()
            with stream_of_its_own(device):
                out: Tensor = made(*parts[rank])
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
        except BaseException:
            room.leave()
            raise
        return out

    with ThreadPoolExecutor(room.size) as threads:
        return [each.result(2 * DEADLINE_S) for each in [threads.submit(work, rank) for rank in range(room.size)]]


def stream_of_its_own(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)


def rank_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Check]]]:
    for weight_format in DISPATCH_FORMATS:
        yield f"{weight_format} layer, check_ranks", partial(check_ranks, weight_format, device)


def check_ranks(
    weight_format: str,
    device: torch.device,
    make_transport: MakeTransport = ThreadTransport,
    how: str = "two ranks of one device",
) -> Check:
    """Two ranks in one and in three waves give the bits that one rank gives."""
    given, parts = split_inputs(device)
    wanted = layer(CHECKED, weight_format, device)(*given)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wrong = [
        waves
        for waves in WAVES
        if not torch.equal(torch.cat(outputs_of(weight_format, waves, parts, device, make_transport)), wanted)
    ]
    name = f"{weight_format} layer on {how}, bits of one rank"
    return Check(name, not wrong, f"others in {', '.join(map(str, wrong))} waves" if wrong else "")


def split_inputs(device: torch.device) -> tuple[Inputs, list[Inputs]]:
    """Tokens of all ranks together, and those of each."""
    given = inputs(CHECKED, sum(TOKENS), device)
    hidden, ids, weights = (torch.split(each, TOKENS) for each in given)
    return given, list(zip(hidden, ids, weights, strict=True))
