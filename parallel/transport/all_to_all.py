"""All-to-all: the transport of NCCL and HCCL, whose works are queued on a device and waited for by it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.parallel.private import abort_backend
from megamoe.parallel.transport.heads import HEAD_BYTES, check_heads, write_head
from megamoe.parallel.transport.pairs import Clock, Label, MissingPageError

_MESSAGE_BYTES = 4096 - 8  # of the first collective of an exchange, but for the mark: a layer's page fits behind a head
FIRST_BYTES = _MESSAGE_BYTES - HEAD_BYTES  # of a page that go with its head

# torch 2.13 gave the collective this name and warns of the other
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class AllToAllTransfer:
    """One all_to_all_single, issued when this rank sends."""

    def __init__(self, transport: AllToAllTransport, label: Label, receive: Tensor, counts: Sequence[int]) -> None:
        self._transport, self._label = transport, label
        self._receive, self._receive_counts = receive, list(counts)
        self._work: dist.Work | None = None

    def send(self, rows: Tensor, counts: Sequence[int], starts: Sequence[int] = ()) -> None:
        del starts
        transport = self._transport
        with transport.naming(self._label):
            transport.refuse_aborted()
            self._work = dist.all_to_all_single(
                self._receive, rows, self._receive_counts, list(counts), group=transport.group, async_op=True
            )
            transport.follow(self._work)

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            with self._transport.naming(self._label):
                self._transport.wait(work)

    def finish(self) -> None:
        """wait() has waited for both directions: says whether they were broken off since."""
        if self._transport.aborted:
            with self._transport.naming(self._label):
                self._transport.refuse_aborted()


class AllToAllTransport:
    """One all_to_all_single a transfer: the fast path of NCCL and HCCL.

    A collective that fails does not tell which peer failed it: the error then names the next rank and says so.

    On an accelerator messages are queued and not waited for, a work's wait() returns whether or not its rows came, and
    a queue that was aborted goes on with what its buffers happen to hold. So nothing is taken for granted: the exchange
    of pages is followed by the host, within the deadline, and every page carries a mark of its rank; transfers are
    looked after by tend(); and from abort() on every step raises.
    """

    early = False
    _MARK = 0x6D6567616D6F65  # of a page that has arrived; the rank is added to it
    _SPINS, _NAP_S = 200, 5e-5

    def __init__(self, group: dist.ProcessGroup, clock: Clock, device: torch.device) -> None:
        self.group, self.clock, self._device = group, clock, device
        self.device_type = device.type
        self.aborted = ""  # why, once it has happened
        self._followed: deque[tuple[float, dist.Work]] = deque()

    def naming(self, label: Label) -> AbstractContextManager[None]:
        """Turns a failure in the block into a PeerError."""
        return self.clock.naming(self.group, label)

    def refuse_aborted(self) -> None:
        """RuntimeError once the group's collectives have been broken off."""
        if self.aborted:
            raise RuntimeError(self.aborted)

    def abort(self, why: str = "a peer was lost, and all collectives with it were broken off") -> None:
        """Has every wait of this rank end in an error, where the backend can: NCCL and HCCL do, gloo does not."""
        self.aborted = self.aborted or why  # first, for a wait that this ends to see it
        with suppress(RuntimeError):  # of a backend that cannot: its waits end at their deadline
            abort_backend(self.group, self._device)

    def follow(self, work: dist.Work) -> None:
        """Has tend() look after a work that nobody waits for on the host."""
        if self._device.type != "cpu" and self.clock.monitors:
            self._followed.append((time.monotonic() + self.clock.deadline_s, work))

    def tend(self) -> None:
        """Breaks off what is queued and has not ended within the deadline. Called by the heartbeat, beside the call."""
        try:
            while self._followed and self._followed[0][1].is_completed():
                self._followed.popleft()
        except RuntimeError as failure:  # of the device itself
            self._followed.clear()
            self.abort(f"a collective failed: {failure}")
        if self._followed and not self.aborted and time.monotonic() > self._followed[0][0]:
            self.abort(f"rows that were queued did not arrive within {self.clock.deadline_s:g} s")

    def wait(self, work: dist.Work) -> None:
        """Has what reads the rows wait for them: the host, or the device's queue."""
        if self._device.type == "cpu":
            if self.clock.monitors:  # who may break the wait off, which the backend cannot
                self._watch(work)
            work.wait(timedelta(seconds=self.clock.deadline_s))
        else:
            work.wait()
        self.refuse_aborted()

    def expect(self, receive: Tensor, counts: Sequence[int], label: Label) -> AllToAllTransfer:
        return AllToAllTransfer(self, label, receive, counts)

    def gather(self, page: Tensor, label: Label) -> Tensor:
        """As Transport says. CallRefusedError, on all ranks, where one gathers something else or calls a layer.

        One collective for a page of up to FIRST_BYTES, which that of a layer's call is; for a longer one a second.
        """
        first, message = page[:FIRST_BYTES], torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8, device="cpu")
        write_head(message.numpy().data, label, len(page))
        message[HEAD_BYTES : HEAD_BYTES + len(first)] = first
        messages = self._gather(message, label)
        check_heads([each.numpy().data for each in messages], self.group.rank(), self.clock.global_ranks)
        pages = messages[:, HEAD_BYTES : HEAD_BYTES + len(first)]
        if len(page) > len(first):
            pages = torch.cat((pages, self._gather(page[len(first) :], label)), 1)
        return pages.contiguous()

    def _gather(self, page: Tensor, label: Label) -> Tensor:
        """One collective of pages that are equally long on all ranks."""
        size, mark = self.group.size(), torch.tensor([self._MARK + self.group.rank()])
        mine = torch.cat((page, mark.view(torch.uint8))).to(self._device)
        pages = mine.new_zeros(size * mine.numel())
        with self.naming(label):
            self.refuse_aborted()
            work = _gather(pages, mine, group=self.group, async_op=True)
            if self._device.type != "cpu":
                self._watch(work)
            self.wait(work)
            arrived = pages.cpu().view(size, -1)
            self.refuse_aborted()
            marks = arrived[:, len(page) :].contiguous().view(torch.int64).flatten().tolist()
            for rank, found in enumerate(marks):
                if found != self._MARK + rank:
                    raise MissingPageError(rank)
        return arrived[:, : len(page)].contiguous()

    def _watch(self, work: dist.Work) -> None:
        """Returns when a work is done. RuntimeError where it has not within the deadline."""
        until, asked = time.monotonic() + self.clock.deadline_s, 0
        while not work.is_completed():
            self.refuse_aborted()
            if time.monotonic() > until:
                raise RuntimeError(f"no answer within {self.clock.deadline_s:g} s")
            asked += 1
            time.sleep(0 if asked < self._SPINS else self._NAP_S)
