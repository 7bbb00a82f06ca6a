"""A model of the exchange over shared memory: ranks as programs of steps, and every order in which these can run.

A rank's call is: write what it brings into a place of its own segment, set its word in each peer's; wait for all words
and read all places. Then, in a call by waves, put rows into each peer's segment, set the word; wait for all rows; read
them. In a small call leave results in its own segment, set the word in each peer's; wait for their words, and read the
results where they lie. A call may also end after the pages, as when no token is routed. What memory holds is the number
of the call that wrote it, so what is of another call is found by its number. Faults can be seeded, to see that they
are found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WAVES, SMALL, ONE, EMPTY = "w", "s", "o", "e"  # kinds of calls; ONE: a small call in which only rank 0 has tokens
FAULTS = (
    *("one place", "word before place", "no pages", "word not set", "word of any call"),
    *("word before rows", "results before pages", "results unawaited"),
)

# a step: (kind, place, owner of the memory, value)
Step = tuple[str, str, int, int]
State = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search of all orders found: states visited, and what went wrong in one of them, empty if nothing."""

    states: int
    wrong: str


def program(rank: int, size: int, kinds: str, fault: str = "") -> list[Step]:
    """The steps of a rank, in its own order: a call of each kind in turn."""
    steps: list[Step] = []
    peers = [(rank + distance) % size for distance in range(1, size)]
    for call, kind in enumerate(kinds, 1):
        homes = peers if kind == SMALL else [0] if kind == ONE and rank else []
        small = [("write", f"results<{home}", rank, call) for home in homes]
        if fault == "results before pages":
            steps += small
        if fault != "no pages":
            steps += _pages(rank, peers, call, fault)
        last = fault == "word not set" and call == len(kinds) and rank == 0
        awaited = (
            []
            if kind == EMPTY or (kind == ONE and rank)
            else [("wait", f"results word<{peer}", rank, call) for peer in peers]
        )
        if fault == "word of any call":
            awaited = [("any", *step[1:]) for step in awaited]
        if kind == WAVES:
            for peer in peers:
                put = [("write", f"results<{rank}", peer, call), ("write", f"results word<{rank}", peer, call)]
                put = put[::-1] if fault == "word before rows" else put
                steps += put[:1] if last else put
            steps += [*awaited, *(("read", f"results<{peer}", rank, call) for peer in peers)]
        else:
            words = [("write", f"results word<{rank}", home, call) for home in homes[last:]]
            left = [] if fault == "results before pages" else small
            steps += [*words, *left] if fault == "word before rows" else [*left, *words]
            steps += [] if fault == "results unawaited" else awaited
            steps += [("read", f"results<{rank}", peer, call) for peer in peers if awaited]
    return steps


def _pages(rank: int, peers: list[int], call: int, fault: str) -> list[Step]:
    """The exchange that opens a call."""
    place = "place" if fault == "one place" else f"place{call % 2}"
    bring = [("write", place, rank, call), *(("write", f"{place} word<{rank}", peer, call) for peer in peers)]
    if fault == "word before place":
        bring = [*bring[1:], bring[0]]
    waits = [("wait", f"{place} word<{peer}", rank, call) for peer in peers]
    return [*bring, *waits, *(("read", place, peer, call) for peer in peers)]


class _Model:
    """The programs of all ranks over one memory. A state: where each rank is, and what memory holds."""

    def __init__(self, size: int, kinds: str, fault: str) -> None:
        self.programs = [program(rank, size, kinds, fault) for rank in range(size)]
        places = sorted({(place, owner) for steps in self.programs for _, place, owner, _ in steps})
        self._index = {place: number for number, place in enumerate(places)}
        self.begin: State = ((0,) * size, (0,) * len(places))

    def step(self, state: State, rank: int) -> State | str | None:
        """A rank's next step, at once and for all to see; None where it must wait, words where it read wrongly."""
        at, memory = state
        if at[rank] == len(self.programs[rank]):
            return None
        kind, place, owner, value = self.programs[rank][at[rank]]
        where = self._index[place, owner]
        if (kind == "wait" and memory[where] != value) or (kind == "any" and not memory[where]):
            return None
        if kind == "read" and memory[where] != value:
            return f"rank {rank} read call {memory[where]} in place of {value} from {place} of rank {owner}"
        after = (*memory[:where], value, *memory[where + 1 :]) if kind == "write" else memory
        return (*at[:rank], at[rank] + 1, *at[rank + 1 :]), after

    def stuck(self, state: State) -> str:
        """Whose next step is not to be had, empty where all have ended."""
        left = zip(self.programs, state[0], strict=True)
        return "; ".join(f"rank {rank}: {steps[at]}" for rank, (steps, at) in enumerate(left) if at < len(steps))


def search(size: int, kinds: str, fault: str = "") -> Found:
    """Runs all orders of the ranks' steps."""
    model = _Model(size, kinds, fault)
    seen, ahead = {model.begin}, [model.begin]
    while ahead:
        state = ahead.pop()
        after = [each for rank in range(size) if (each := model.step(state, rank)) is not None]
        for each in after:
            if isinstance(each, str):
                return Found(len(seen), each)
            if each not in seen:
                seen.add(each)
                ahead.append(each)
        if not after and model.stuck(state):
            return Found(len(seen), f"nobody can go on: {model.stuck(state)}")
    return Found(len(seen), "")


def wander(size: int, kinds: str, fault: str = "", *, walks: int, seed: int = 0) -> Found:
    """Runs some orders, drawn at random, of more ranks and calls than can be searched; often one rank far ahead."""
    model, rng, states = _Model(size, kinds, fault), random.Random(seed), 0
    for _ in range(walks):
        state, eager = model.begin, [rng.random() ** 4 for _ in range(size)]
        while True:
            order = sorted(range(size), key=lambda rank: rng.random() * eager[rank])
            after = next((each for rank in order if (each := model.step(state, rank)) is not None), None)
            if isinstance(after, str):
                return Found(states, after)
            if after is None:
                break
            state, states = after, states + 1
        if model.stuck(state):
            return Found(states, f"nobody can go on: {model.stuck(state)}")
    return Found(states, "")
