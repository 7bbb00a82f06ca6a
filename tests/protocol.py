"""A model of the exchange over shared memory: ranks as programs of steps, and every order in which these can run.

A rank's call is: put a page into each peer's place, set its word; wait for all pages; put rows into each peer's inbox,
set the word; wait for all rows; read them. Every third call moves no rows, as when no token is routed. What a place
holds is the number of the call that wrote it, so a page or a row of another call is found by its number. Faults can be
seeded, to see that the search finds them.
"""

from __future__ import annotations

from dataclasses import dataclass

FAULTS = ("one page place", "word before rows", "no pages", "word not set", "word of any call")

# a step: (kind, place, owner of the memory, value)
Step = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search of all orders found: states visited, and what went wrong in one of them, empty if nothing."""

    states: int
    wrong: str


def program(rank: int, size: int, calls: int, fault: str = "") -> list[Step]:
    """The steps of a rank, in its own order."""
    steps: list[Step] = []
    peers = [(rank + distance) % size for distance in range(1, size)]
    for call in range(1, calls + 1):
        place = "page" if fault == "one page place" else f"page{call % 2}"
        if fault != "no pages":
            for peer in peers:
                steps += [("write", f"{place}<{rank}", peer, call), ("write", f"{place} word<{rank}", peer, call)]
            for peer in peers:
                steps += [("wait", f"{place} word<{peer}", rank, call), ("read", f"{place}<{peer}", rank, call)]
        if call % 3 == 2:
            continue
        for peer in peers:
            put = [("write", f"rows<{rank}", peer, call), ("write", f"rows word<{rank}", peer, call)]
            if fault == "word before rows":
                put.reverse()
            if fault == "word not set" and call == calls and rank == 0:
                put.pop()
            steps += put
        kind = "any" if fault == "word of any call" else "wait"
        for peer in peers:
            steps += [(kind, f"rows word<{peer}", rank, call), ("read", f"rows<{peer}", rank, call)]
    return steps


def search(size: int, calls: int, fault: str = "") -> Found:
    """Runs all orders of the ranks' steps, each step at once and for all to see."""
    programs = [program(rank, size, calls, fault) for rank in range(size)]
    places = sorted({(place, owner) for steps in programs for _, place, owner, _ in steps})
    index = {place: number for number, place in enumerate(places)}
    begin = ((0,) * size, (0,) * len(places))
    seen, ahead = {begin}, [begin]
    while ahead:
        at, memory = ahead.pop()
        moved = False
        for rank, steps in enumerate(programs):
            if at[rank] == len(steps):
                continue
            kind, place, owner, value = steps[at[rank]]
            where = index[place, owner]
            if (kind == "wait" and memory[where] != value) or (kind == "any" and not memory[where]):
                continue
            if kind == "read" and memory[where] != value:
                return Found(len(seen), f"rank {rank} read call {memory[where]} in place of {value} from {place}")
            after = (*memory[:where], value, *memory[where + 1 :]) if kind == "write" else memory
            state = ((*at[:rank], at[rank] + 1, *at[rank + 1 :]), after)
            moved = True
            if state not in seen:
                seen.add(state)
                ahead.append(state)
        if not moved and any(at[rank] < len(steps) for rank, steps in enumerate(programs)):
            stuck = [f"rank {rank}: {steps[at[rank]]}" for rank, steps in enumerate(programs) if at[rank] < len(steps)]
            return Found(len(seen), f"nobody can go on: {'; '.join(stuck)}")
    return Found(len(seen), "")
