"""Ranks that load together: what one finds wrong all raise, before anything is used, and none waits in vain."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megamoe.model.loading.report import Progress
from megamoe.parallel.group import EPGroup
from megamoe.parallel.health.waiter import Waiter
from megamoe.parallel.transport.pairs import Label

_PAGE = np.dtype([("state", "<i8"), ("read", "<i8"), ("total", "<i8"), ("terms", "S64"), ("complaint", "S1024")])
_WORKING, _DONE, _FAILED = 0, 1, 2
_TURN_S = 0.1


@dataclass(slots=True)
class Task:
    """Reading on a thread, looked at from outside."""

    total: int
    read: Callable[[], int]
    stop: threading.Event


@dataclass(frozen=True, slots=True)
class Checked:
    """What a rank found before it loads: terms that must be the same on all, or why it cannot."""

    terms: str = ""
    complaint: Exception | None = None

    @classmethod
    def of(cls, check: Callable[[], str]) -> Checked:
        try:
            return cls(check())
        except Exception as wrong:  # noqa: BLE001 raised by agree_on(), once the others know
            return cls(complaint=wrong)


def agree_on(group: EPGroup, what: str, checked: Checked) -> None:
    """Every rank tells the others what it found. Whoever calls has the group's turn, and keeps it until all is loaded.

    What one rank raised ends in a ValueError on the others, which names that rank; its own it raises as it is.
    """
    terms, complaint = checked.terms, checked.complaint
    pages = _exchange(group, what, _FAILED if complaint else _DONE, 0, 0, terms, complaint)
    _refuse(group, pages, complaint)
    texts = [bytes(page["terms"]) for page in pages]
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"ranks load differently: {group.named(rank)} has {text.decode()!r}, {group.named(0)} "
                f"{texts[0].decode()!r}"
            )


def run_together(
    group: EPGroup,
    what: str,
    work: Callable[[threading.Event], None],
    progress: Callable[[], tuple[int, int]],
    show: Callable[[Progress], None],
) -> None:
    """work(stop) on every rank, each for as long as it takes; returns when all are done. It is called in a turn.

    Ranks tell each other every tenth of a second how far they are, so that no wait has more than that to do with how
    long another takes. ValueError of any rank is raised on all; then and on an interruption stop is set, which work
    must look at. PeerError where a rank is lost.
    """
    stop = threading.Event()
    reading = Waiter("megamoe loading").begin(lambda: work(stop))
    try:
        while True:
            ended = reading.within(_TURN_S)
            state = _WORKING if not ended else _FAILED if reading.error else _DONE
            complaint = reading.error if ended else None
            pages = _exchange(group, what, state, *progress(), "", complaint)
            show(Progress(tuple(pages["read"].tolist()), tuple(pages["total"].tolist())))
            _refuse(group, pages, complaint)
            if all(page["state"] == _DONE for page in pages):
                return
    finally:
        stop.set()
        reading.within()


def _exchange(
    group: EPGroup, what: str, state: int, read: int, total: int, terms: str, complaint: BaseException | None
) -> np.ndarray:
    page = np.zeros(1, _PAGE)
    said = "" if complaint is None else f"{complaint}" if isinstance(complaint, ValueError) else repr(complaint)
    page[0] = (state, read, total, terms.encode(), said.encode()[:1024])
    if group.transport is None:
        return page
    with group.unbroken(what, 0):
        raw = group.transport.gather(torch.from_numpy(page.view(np.uint8)), Label(what, "load"))
    return raw.numpy().view(_PAGE).reshape(-1)


def _refuse(group: EPGroup, pages: np.ndarray, own: BaseException | None) -> None:
    if own is not None:
        raise own
    for rank, page in enumerate(pages):
        if page["state"] == _FAILED:
            raise ValueError(f"{group.named(rank)}: {bytes(page['complaint']).decode(errors='replace')}")
