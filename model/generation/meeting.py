"""Where a rank's sequences meet: a thread each, one at a time, up to modules that are called once for all.

Any model can be run so: what it does with a sequence between those has the shapes that it would have alone.
"""

# T tokens of all sequences   S of one   H hidden   K experts per token

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megamoe.model.generation.forward import replaced_forwards
from megamoe.model.generation.sequences import one_thread

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A module that sequences meet at.

    axis   of tokens, in what it takes and gives: 0 where rows are flat, [S, .], and 1 where they are [1, S, .]
    all    whether every sequence must come, once in a forward: it has routed experts, which other ranks call too
    """

    module: nn.Module
    axis: int
    all: bool


class _Abandoned(BaseException):
    """Ends a sequence's thread, after another one has raised."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a sequence calls a module with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> Tensor | None:
        """The first tensor of it."""
        return next((each for each in (*self.args, *self.kwargs.values()) if isinstance(each, Tensor)), None)

    def length(self, axis: int) -> int:
        assert self.tokens is not None
        return int(self.tokens.shape[axis])


class _Traveller:
    """One sequence's thread, which runs only while it has the turn."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.place = -1  # where it waits
        self.call: Call | None = None
        self.answer: Any = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = self.abandoned = self.leads = False
        self._work, self._task = work, _nothing
        # locks, held: each is released by the side that gives the turn away
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, name="sequence", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._back.acquire()

    def go_on(self, answer: Any) -> None:
        """Gives it the turn, until it meets the others again or ends."""
        self.answer, self.call = answer, None
        self._turn.release()
        self._back.acquire()

    def lead(self, task: Callable[[], Any]) -> Any:
        """Has its thread, where the model's modes of torch are on, do something for all; it meets nobody meanwhile."""
        self.leads, self._task = True, task
        self._turn.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error
        return self.answer

    def meet(self, place: int, call: Call) -> Any:
        """Called by its own thread: gives the turn back, and waits for what became of its call."""
        self.place, self.call = place, call
        self._back.release()
        self._turn.acquire()
        while self.leads:
            self.answer = self._task()
            self.leads, self._task = False, _nothing
            self._back.release()
            self._turn.acquire()
        if self.abandoned:
            raise _Abandoned
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
        self.done, self.leads = True, False
        self._back.release()


def _nothing() -> None:
    return None


_HERE = threading.local()  # of a sequence's thread: who it is


class Meeting:
    """Modules of a model that sequences meet at, in the order in which a token passes them."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the block, places that a sequence's thread calls wait for the other sequences."""
        modules = [each.module for each in self.places]
        with replaced_forwards((each, _meeting(number, each.forward)) for number, each in enumerate(modules)):
            yield

    def run(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """What each comes to. Each runs in a thread of its own, with one thread of torch; experts have all threads.

        RuntimeError for a model that does not call every one of its experts once and in order.
        """
        travellers, threads = [_Traveller(work) for work in works], torch.get_num_threads()
        met = -1  # the last place that all have passed
        try:
            with one_thread():
                for each in travellers:
                    each.start()
                while True:
                    _raise_first(travellers)
                    waiting = [each for each in travellers if not each.done]
                    if not waiting:
                        break
                    # those who are furthest behind, so that as many as possible come together
                    number = min(each.place for each in waiting)
                    group = [each for each in waiting if each.place == number]
                    if self.places[number].all:
                        if number <= met:
                            raise RuntimeError("the model calls its experts more than once in a forward")
                        if len(group) < len(travellers):
                            raise RuntimeError("the model does not call its experts once each, in order")
                        met = number
                    self._call(number, group, threads)
            if met < max((n for n, place in enumerate(self.places) if place.all), default=-1):
                raise RuntimeError("the model does not call its experts once each, in order")
            return [each.result for each in travellers]
        finally:
            for each in travellers:
                each.end()

    def _call(self, number: int, group: Sequence[_Traveller], threads: int) -> None:
        """The module called once for all of the group, in the first one's thread; then each goes on with its part."""
        place, calls = self.places[number], [each.call for each in group]
        answers = group[0].lead(lambda: _together(place, calls, threads))  # type: ignore[arg-type]
        for each, answer in zip(group, answers, strict=True):
            each.go_on(answer)


def _together(place: Place, calls: Sequence[Call], threads: int) -> list[Any]:
    """What the module gives each call."""
    forward = getattr(place.module.forward, "alone", place.module.forward)
    if place.all:
        torch.set_num_threads(threads)  # of this thread, for others keep their own
    try:
        if len(calls) == 1:
            return [forward(*calls[0].args, **calls[0].kwargs)]
        lengths = [each.length(place.axis) for each in calls]
        whole = join(calls, place.axis)
        if whole is None:
            if place.all:
                raise RuntimeError("the model calls its experts with other arguments for each sequence")
            return [forward(*each.args, **each.kwargs) for each in calls]
        return split(forward(*whole.args, **whole.kwargs), lengths, place.axis)
    finally:
        if place.all:
            torch.set_num_threads(1)


def join(calls: Sequence[Call], axis: int) -> Call | None:
    """One call with the tokens of all; None where they differ in anything but their tokens."""
    lengths = [each.length(axis) for each in calls]

    def joined(values: Sequence[Any]) -> Any:
        if all(isinstance(each, Tensor) for each in values):
            if all(each.dim() > axis and each.shape[axis] == n for each, n in zip(values, lengths, strict=True)):
                return torch.cat(tuple(values), axis)
            return _DIFFERENT
        return values[0] if all(each is values[0] for each in values) else _DIFFERENT

    first = calls[0]
    if any(len(each.args) != len(first.args) or each.kwargs.keys() != first.kwargs.keys() for each in calls):
        return None
    args = tuple(joined([each.args[number] for each in calls]) for number in range(len(first.args)))
    kwargs = {name: joined([each.kwargs[name] for each in calls]) for name in first.kwargs}
    if any(each is _DIFFERENT for each in (*args, *kwargs.values())):
        return None
    return Call(args, kwargs)


def split(out: Any, lengths: Sequence[int], axis: int) -> list[Any]:
    """What a module gave for all, a part for each: tensors of tokens, tuples of such, or None."""
    if isinstance(out, Tensor):
        return [part.contiguous() for part in torch.split(out, list(lengths), axis)]
    if isinstance(out, tuple):
        return list(zip(*(split(each, lengths, axis) for each in out), strict=True))
    assert out is None, type(out)
    return [None] * len(lengths)


_DIFFERENT = object()


def _raise_first(travellers: Sequence[_Traveller]) -> None:
    for each in travellers:
        if each.error is not None:
            raise each.error


def _meeting(place: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def meet(*args: Any, **kwargs: Any) -> Any:
        traveller: _Traveller | None = getattr(_HERE, "traveller", None)
        if traveller is None or traveller.leads:
            return forward(*args, **kwargs)
        return traveller.meet(place, Call(args, kwargs))

    meet.alone = forward  # type: ignore[attr-defined]
    return meet
