"""Where a rank's sequences meet: a thread each, one at a time, up to the experts, which are called once for all.

Any model can be run so: what it does with a sequence has the shapes that it would have alone.
"""

# T tokens of all sequences   S of one   H hidden   K experts per token

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megamoe.model.generation.sequences import one_thread

T = TypeVar("T")


class Routed(Protocol):
    """What is asked of a model's routed experts: model.experts.RoutedExperts, or what behaves as it does."""

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor: ...

    def idle(self) -> None: ...


class _Abandoned(BaseException):
    """Ends a sequence's thread, after another one has raised."""


class _Traveller:
    """One sequence's thread, which runs only while it has the turn."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.rows: tuple[Tensor, ...] = ()
        self.place = -1  # of the experts where it waits
        self.answer: Tensor | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.abandoned = False
        self._work = work
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="sequence", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._back.acquire()

    def go_on(self, answer: Tensor | None) -> None:
        """Gives it the turn, until it meets the others again or ends."""
        self.answer = answer
        self._turn.release()
        self._back.acquire()

    def meet(self, place: int, rows: tuple[Tensor, ...]) -> Tensor:
        """Called by its own thread: gives the turn back, and waits for what the experts made of its rows."""
        self.place, self.rows = place, rows
        self._back.release()
        self._turn.acquire()
        if self.abandoned:
            raise _Abandoned
        assert self.answer is not None
        return self.answer

    def end(self) -> None:
        if not self.done:
            self.abandoned = True
            self.go_on(None)
        self._thread.join()

    def _run(self) -> None:
        _HERE.traveller = self
        try:
            self.result = self._work()
        except BaseException as error:  # noqa: BLE001  raised where the sequences were started
            self.error = error
        self.done = True
        self._back.release()


_HERE = threading.local()  # of a sequence's thread: who it is


class Meeting:
    """A model's routed experts, in the order in which a token meets them."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        self.experts = experts

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the block, experts that a sequence's thread calls wait for all sequences."""
        before = [each.forward for each in self.experts]
        for place, each in enumerate(self.experts):
            each.forward = _meeting(place, each.forward)
        try:
            yield
        finally:
            for each, forward in zip(self.experts, before, strict=True):
                each.forward = forward

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each comes to. Each runs in a thread of its own, with one thread of torch; the experts have all threads.

        RuntimeError for a model that does not call every one of its experts once and in order.
        """
        travellers = [_Traveller(work) for work in works]
        try:
            with one_thread():
                for each in travellers:
                    each.start()
            for place, experts in enumerate(self.experts):
                self._call(place, experts, travellers)
            _raise_first(travellers)
            if not all(each.done for each in travellers):
                raise RuntimeError("the model calls its experts more than once in a forward")
            return [each.result for each in travellers]
        finally:
            for each in travellers:
                each.end()

    def _call(self, place: int, experts: nn.Module, travellers: Sequence[_Traveller]) -> None:
        _raise_first(travellers)
        if any(each.done or each.place != place for each in travellers):
            raise RuntimeError("the model does not call its experts once each, in order")
        rows = [torch.cat(parts) for parts in zip(*(each.rows for each in travellers), strict=True)]
        out = experts.forward(*rows)  # from this thread, where nothing meets
        with one_thread():
            for each, answer in zip(travellers, out.split([len(t.rows[0]) for t in travellers]), strict=True):
                each.go_on(answer.contiguous())


def _raise_first(travellers: Sequence[_Traveller]) -> None:
    for each in travellers:
        if each.error is not None:
            raise each.error


def _meeting(place: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def meet(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        traveller: _Traveller | None = getattr(_HERE, "traveller", None)
        if traveller is None:
            return forward(hidden_states, top_k_index, top_k_weights)
        return traveller.meet(place, (hidden_states, top_k_index, top_k_weights))

    return meet
