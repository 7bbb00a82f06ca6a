"""Tokens of other hosts that landed on another rank of this one, fetched into the inbox wave by wave."""

# P ranks   W waves   B bytes of a row of the wire

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megamoe.parallel.transport.landings import Landings
from megamoe.routing.messages import Messages
from megamoe.routing.row_plan import RowPlan


class Fetching:
    """Of one call: which messages lend tokens to others, and what this rank fetches.

    rows      [., B] uint8: this rank's buffer
    nodes     of each rank the lowest rank of its host
    """

    def __init__(
        self, landings: Landings, nodes: tuple[int, ...], ep_rank: int, messages: Messages, plan: RowPlan, rows: Tensor
    ) -> None:
        self._landings, self._rank, self._messages, self._plan, self._rows = landings, ep_rank, messages, plan, rows
        self._records = rows.view(torch.int32).view(-1, 2)
        home, of_rank = nodes[ep_rank], np.array(nodes)
        self._far = of_rank != home
        lends = np.array([nodes.count(node) > 1 for node in nodes])
        self._lending, self._borrowing = self._far & lends, self._far & lends[ep_rank]
        self._landed: set[tuple[int, int, int]] = set()

    def expect(self, wave: int) -> None:
        """After the wave's messages are expected."""
        self._landings.expect(wave, np.flatnonzero(self._borrowing & (self._sizes(wave)[:, self._rank] > 0)).tolist())

    def send(self, wave: int) -> None:
        """After the wave's messages are sent."""
        self._landings.send(wave, np.flatnonzero(self._lending & (self._sizes(wave)[self._rank] > 0)).tolist())

    def _sizes(self, wave: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """[P, P] tokens in the message of each sender for each receiver."""
        return self._messages.unique[:, wave]

    def fetch(self, wave: int) -> None:
        """Copies what this rank needs of the wave's tokens, once they have landed: after its own messages are there."""
        counts = self._messages.fetched[:, wave, self._rank].tolist()
        if not any(counts):
            return
        found = []
        for sender, (begin, count) in enumerate(zip(self._plan.to_fetch[wave].tolist(), counts, strict=True)):
            if count:
                records = self._records[begin : begin + count]
                for lander in set(records[:, 0].tolist()):
                    self._wait(wave, sender, lander)
                found.append(records)
        landers, places = torch.cat(found).T
        into = self._rows[self._plan.fetching[wave]]
        for lander in set(landers.tolist()):
            here = (landers == lander).nonzero().squeeze(1)
            there = places[here].to(torch.int64) + int(self._plan.inbox_starts[lander])
            lent = self._landings.rows(lander, into.shape[1])
            if len(here) == len(into):
                torch.index_select(lent, 0, there, out=into)
            else:
                into.index_copy_(0, here, lent.index_select(0, there))

    def _wait(self, wave: int, sender: int, lander: int) -> None:
        """Waits for all tokens that a sender has sent to a rank of this host by that wave."""
        for earlier in range(wave + 1):
            which = (earlier, sender, lander)
            if which not in self._landed and self._messages.unique[sender, earlier, lander]:
                self._landings.wait(*which)
                self._landed.add(which)

    def finish(self) -> None:
        """Returns when nothing of it is on its way any more."""
        self._landings.finish()
